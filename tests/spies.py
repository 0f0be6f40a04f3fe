"""What the tests of correctness share: short runs on tiny environments, and spies that see what such a run computes."""

import copy
import dataclasses
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_events
from gymnasium import spaces

from algos import a2c, ppo, reinforce, trpo
from tests.tiny_envs import Trace

VECTOR, TWO_ACTIONS = spaces.Box(-np.inf, np.inf, (3,)), spaces.Discrete(2)
FROZEN = 1e-9  # a learning rate so small that float32 weights keep their values
MODULES = (a2c, ppo, reinforce, trpo)
SMALL = dict(num_envs=4, num_steps=16, total_timesteps=4 * 16, eval_episodes=0, device="cpu")
SMALL |= dict(update_epochs=2, num_minibatches=3, critic_updates=2, cg_iters=5)


def name_of(module) -> str:
    return module.__name__.split(".")[-1]


def each(*modules):
    """Parametrise a test over these algorithms."""
    return pytest.mark.parametrize("module", modules, ids=name_of)


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.flatten() for x in tensors])


def policy_of(agent) -> list[torch.nn.Parameter]:
    return [x for name, x in agent.named_parameters() if not name.startswith("critic")]


def shake(parameters, scale: float) -> None:
    """Add to each parameter normal noise of that deviation."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn_like(parameter))


def distribution(agent, features) -> torch.distributions.Distribution:
    """π(·|s) as torch has it, from what the actor gets: `agent.features(obs)`, or plain vectors as they are."""
    output = agent.actor(features)
    if agent.is_discrete:
        return torch.distributions.Categorical(logits=output)
    return torch.distributions.Independent(torch.distributions.Normal(output, agent.log_std.exp()), 1)


def make_agent(obs_space=VECTOR, action_space=TWO_ACTIONS, scale=1.0, module=ppo, **args):
    """An agent whose outputs differ from observation to observation (a fresh one has nearly constant ones)."""
    torch.manual_seed(0)
    agent = module.Agent(obs_space, action_space, module.Args(**args))
    with torch.no_grad():
        agent.actor[-1].weight.normal_(0, scale)
        if not agent.is_discrete:
            agent.log_std.uniform_(-1, 1)
    return agent


def train(module, env: str, log_dir: Path, **args):
    """Train on the tiny environment of that name: 4 environments and 16 steps a rollout, unless told otherwise.

    Arguments that other algorithms have and this one lacks are left out.
    """
    known = {field.name for each_module in MODULES for field in dataclasses.fields(each_module.Args)}
    assert known >= set(args), "no algorithm has such an argument"
    Trace.log.clear()
    args = SMALL | {"env_id": env if ":" in env else f"tests.tiny_envs:{env}"} | args
    own = {field.name for field in dataclasses.fields(module.Args)}
    args = {name: value for name, value in args.items() if name in own}
    return module.train(module.Args(**args, log_dir=str(log_dir)))


def scalars(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (x, y) of each tag of the only run in that folder."""
    (folder,) = log_dir.iterdir()
    return read_events(folder)


def check_losses(logged: dict, i: int, step: int, expected: dict[str, float]) -> None:
    """Assert that point i of each of these losses is at that step and has that value."""
    for name, y in expected.items():
        assert logged[f"losses/{name}"][i] == (step, pytest.approx(float(y), rel=1e-3, abs=1e-6)), name


def mean_return(capsys) -> float:
    """That of the evaluation, from the last line."""
    return float(capsys.readouterr().out.splitlines()[-1].split("mean_return=")[1].split()[0])


def check_clipping(steps: list, records: list, max_grad_norm: float, clipped: bool) -> None:
    """Assert that each optimizer step took its record's gradient, clipped to the norm; whether all were or none."""
    for record, step in zip(records, steps, strict=True):
        norm = record.gradient.norm()
        assert (norm > max_grad_norm) == clipped
        expected = record.gradient * min(1.0, max_grad_norm / norm)
        torch.testing.assert_close(step.gradient, expected, rtol=1e-3, atol=1e-7)


# ---- what Trace logged


def played(num_steps: int) -> list[list[SimpleNamespace]]:
    """What Trace logged: for each environment its steps in order, each with the time t at which it was played."""
    environments = []
    for _, steps in groupby(sorted(Trace.log), key=lambda step: step.env):
        t, timeline = 0, []
        for step in steps:
            ended = step.terminated or step.truncated
            key = (step.env, step.episode, step.step)
            timeline.append(SimpleNamespace(**step._asdict(), key=key, ended=ended, t=t, rollout=t // num_steps))
            t += 2 if ended else 1  # the step after an end only resets
        environments.append(timeline)
    return environments


def keys(record) -> list[tuple[int, int, int]]:
    """Which transitions a record is about: the observation says it."""
    return [tuple(map(int, row)) for row in record.obs]


def value_of(agent, observations) -> np.ndarray:
    with torch.no_grad():
        return agent.critic(torch.tensor(observations, dtype=torch.float32))[:, 0].numpy()


# ---- spies


def spy_on_ppo_loss(patch) -> list[SimpleNamespace]:
    """Every call of ppo_loss: its arguments by name, its results, and the gradient of the loss."""
    calls, original = [], ppo.ppo_loss

    def spy(agent, obs, actions, old_log_probs, old_values, advantages, returns, args):
        batch = (obs, actions, old_log_probs, old_values, advantages, returns)
        assert not any(x.requires_grad for x in batch), "the data of a rollout are constants"
        results = original(agent, *batch, args)
        names = ("obs", "actions", "old_log_probs", "old_values", "advantages", "returns")
        names += ("loss", "policy_loss", "value_loss", "entropy", "log_ratio")
        call = {name: x.detach().clone() for name, x in zip(names, (*batch, *results), strict=True)}
        gradients = torch.autograd.grad(results[0], list(agent.parameters()), retain_graph=True)
        with torch.no_grad():
            log_probs = agent.evaluate_actions(obs, actions)[0]
        calls.append(SimpleNamespace(**call, gradient=flat(gradients), log_probs=log_probs))
        return results

    patch.setattr(ppo, "ppo_loss", spy)
    return calls


def watch(module, patch) -> list[SimpleNamespace]:
    """A record of each pass of the run over its data: each update, or in PPO each epoch of it.

    agent: a copy from before the pass. obs, actions, advantages, returns: of the transitions that it learns from, in
    the same order. REINFORCE's advantages are its weights; its returns are there only with a baseline. What else is
    in the record depends on the algorithm.
    """
    return {a2c: watch_a2c, ppo: watch_ppo, reinforce: watch_reinforce, trpo: watch_trpo}[module](patch)


def watch_ppo(patch):
    passes, calls = [], spy_on_ppo_loss(patch)
    inner, agents = ppo.ppo_loss, []

    def spy(agent, *batch):
        M = batch[-1].num_minibatches
        if len(calls) % M == 0:
            agents.append(copy.deepcopy(agent))
        results = inner(agent, *batch)
        if len(calls) % M == 0:
            names = ("obs", "actions", "advantages", "returns", "old_values", "old_log_probs", "log_probs")
            merged = {name: torch.cat([getattr(call, name) for call in calls[-M:]]) for name in names}
            passes.append(SimpleNamespace(agent=agents[-1], **merged))
        return results

    patch.setattr(ppo, "ppo_loss", spy)
    return passes


def watch_a2c(patch):
    passes, evaluations = [], []
    loss, evaluate_actions = a2c.a2c_loss, a2c.Agent.evaluate_actions

    def spy_on_agent(agent, obs, actions):
        results = evaluate_actions(agent, obs, actions)
        evaluations.append((agent, obs, actions, results))
        return results

    def spy_on_loss(log_probs, entropy, values, advantages, returns, args):
        assert not advantages.requires_grad, "advantages are constants"
        assert not returns.requires_grad, "returns are constants"
        agent, obs, actions, (all_log_probs, all_entropy, all_values) = evaluations[-1]
        # Which rows of the batch the loss is about, and in which order: their derivatives tell.
        places = torch.arange(1.0, len(log_probs) + 1)
        counts, order = (
            torch.autograd.grad(log_probs @ x, all_log_probs, retain_graph=True)[0]
            for x in (torch.ones_like(places), places)
        )
        assert counts.max() == 1, "no transition counts twice"
        rows = torch.argsort(order)[-len(log_probs) :]
        assert counts[rows].min() == 1
        for ours, every in ((log_probs, all_log_probs), (entropy, all_entropy), (values, all_values)):
            assert torch.equal(ours, every[rows])
        results = loss(log_probs, entropy, values, advantages, returns, args)
        names = ("log_probs", "entropies", "values", "advantages", "returns", "loss", "policy_loss", "value_loss")
        given = (log_probs, entropy, values, advantages, returns, *results)
        record = {name: x.detach().clone() for name, x in zip((*names, "entropy"), given, strict=True)}
        gradients = torch.autograd.grad(results[0], list(agent.parameters()), retain_graph=True)
        record |= dict(agent=copy.deepcopy(agent), obs=obs[rows], actions=actions[rows], gradient=flat(gradients))
        passes.append(SimpleNamespace(**record))
        return results

    patch.setattr(a2c.Agent, "evaluate_actions", spy_on_agent)
    patch.setattr(a2c, "a2c_loss", spy_on_loss)
    return passes


def spy_on_fit_critic(module, passes: list[SimpleNamespace], patch) -> None:
    """Add to the last pass the returns, the loss, and the agent before and after the regression of its critic."""
    original = module.fit_critic

    def spy(agent, optimizer, obs, returns, rng, args):
        record = passes[-1]
        assert torch.equal(obs, record.obs)
        record.returns, record.agent_before_fit = returns.clone(), copy.deepcopy(agent)
        record.value_loss = original(agent, optimizer, obs, returns, rng, args)
        record.agent_after_fit = copy.deepcopy(agent)
        return record.value_loss

    patch.setattr(module, "fit_critic", spy)


def watch_reinforce(patch):
    passes, policy_gradient = [], reinforce.policy_gradient

    def spy_on_gradient(agent, parameters, obs, actions, weights, lengths):
        assert not weights.requires_grad, "weights are constants"
        record = SimpleNamespace(agent=copy.deepcopy(agent), lengths=lengths.tolist(), value_loss=None)
        record.variance = policy_gradient(agent, parameters, obs, actions, weights, lengths)
        record.gradient = flat([x.grad for x in parameters]).clone()
        valid = torch.arange(len(obs))[:, None] < torch.as_tensor(lengths)
        record.obs, record.actions, record.advantages = (x[valid].clone() for x in (obs, actions, weights))
        passes.append(record)
        return record.variance

    patch.setattr(reinforce, "policy_gradient", spy_on_gradient)
    spy_on_fit_critic(reinforce, passes, patch)
    return passes


def watch_trpo(patch):
    passes, step = [], trpo.trust_region_step

    def spy_on_step(agent, parameters, obs, actions, advantages, args):
        record = SimpleNamespace(agent=copy.deepcopy(agent))
        record.obs, record.actions, record.advantages = obs.clone(), actions.clone(), advantages.clone()
        record.scalars = step(agent, parameters, obs, actions, advantages, args)
        record.agent_after_step = copy.deepcopy(agent)
        passes.append(record)
        return dict(record.scalars)

    patch.setattr(trpo, "trust_region_step", spy_on_step)
    spy_on_fit_critic(trpo, passes, patch)
    return passes


def spy_on_optimizers(patch) -> list[SimpleNamespace]:
    """Every step of Adam and RMSprop: the learning rate, the gradient it was given, and whether it goes up or down."""
    steps = []

    def spied(kind):
        class Spy(kind):
            def step(self):
                (group,) = self.param_groups
                gradient = flat([parameter.grad for parameter in group["params"]])
                steps.append(SimpleNamespace(lr=float(group["lr"]), gradient=gradient, up=group["maximize"]))
                super().step()

        return Spy

    for name in ("Adam", "RMSprop"):
        patch.setattr(torch.optim, name, spied(getattr(torch.optim, name)))
    return steps
