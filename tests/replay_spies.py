"""What the tests of DQN and DDPG share: short runs on tiny environments, and a spy that sees what such a run does."""

import copy
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.spies import scalars
from tests.tiny_control import BoxTrace
from tests.tiny_envs import Trace

SMALL = dict(
    seed=1, eval_episodes=0, device="cpu", hidden_sizes=(16,), batch_size=16, buffer_size=500, learning_starts=20
)
NAMES = "obs", "actions", "rewards", "next_obs", "terminated"


def make_args(module, env: str, log_dir: Path, **args):
    """Arguments of a short run; an environment without a module is one of tiny_envs."""
    args = SMALL | {"env_id": env if ":" in env else f"tests.tiny_envs:{env}", "log_dir": str(log_dir)} | args
    return module.Args(**args)


def train(module, env: str, log_dir: Path, **args):
    Trace.log.clear()
    BoxTrace.log.clear()
    return module.train(make_args(module, env, log_dir, **args))


def resume(module, env: str, log_dir: Path, **args):
    """Go on with the only run in that folder."""
    (folder,) = log_dir.iterdir()
    return train(module, env, log_dir, resume=str(folder / "checkpoint.pt"), **args)


def forward(parameters, x: torch.Tensor) -> torch.Tensor:
    """A network of linear layers with ReLU between them, from its weights and biases in turn."""
    *hidden, weight, bias = parameters
    for w, b in zip(hidden[::2], hidden[1::2], strict=True):
        x = (x @ w.T + b).clamp(min=0)
    return x @ weight.T + bias


def copies(module: nn.Module) -> list[torch.Tensor]:
    return [x.detach().clone() for x in module.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_adam(seen, adam: list[SimpleNamespace], lr: float, final: list[torch.Tensor]) -> None:
    """Assert that these steps are those that Adam takes with the gradients it was given."""
    parameters = [x.clone().requires_grad_() for x in adam[0].before]
    optimizer = seen.Adam(parameters, lr=lr)
    for event, after in zip(adam, [event.before for event in adam[1:]] + [final], strict=True):
        for parameter, value, gradient in zip(parameters, event.before, event.gradients, strict=True):
            parameter.data, parameter.grad = value.clone(), gradient
        optimizer.step()
        torch.testing.assert_close([x.detach() for x in parameters], after, rtol=1e-4, atol=1e-5)


def watch(module, patch) -> SimpleNamespace:
    """What the run of `module.train` that follows does, in order.

    events: each with `kind` and `steps`, the environment steps until then.
        sample: a batch, by NAMES.
        adam: the learning rate `lr`, `parameters`, and copies of their values `before` and of the `gradients`;
            `everything`, all parameters of the agent by name, each with its gradient, before the step.
        target: `tau`, the network `target`, copies of its parameters `before` and `after`, and of those of `online`.
    agent, initial: the agent, and a copy from before the first step.
    """
    seen = SimpleNamespace(events=[], agent=None, initial=None, steps=0, Adam=torch.optim.Adam)
    init, make_envs, update_target = module.Agent.__init__, module.make_envs, module.update_target
    sample = module.ReplayBuffer.sample

    def note(kind, **values):
        seen.events.append(SimpleNamespace(kind=kind, steps=seen.steps, **values))

    def spy_on_init(agent, *args, **kwargs):
        seen.agent = agent
        init(agent, *args, **kwargs)

    def spy_on_envs(args, num_envs, evaluation=False, **kwargs):
        envs = make_envs(args, num_envs, evaluation, **kwargs)
        if not evaluation:
            reset, step = envs.reset, envs.step
            patch.setattr(envs, "reset", lambda **kwargs: spy_on_reset(reset(**kwargs)))
            patch.setattr(envs, "step", lambda actions: spy_on_step(step(actions)))
        return envs

    def spy_on_reset(result):
        seen.initial = copy.deepcopy(seen.agent)
        return result

    def spy_on_step(result):
        seen.steps += len(result[1])
        return result

    def spy_on_sample(self, *args):
        batch = sample(self, *args)
        note("sample", **{name: x.clone() for name, x in zip(NAMES, batch, strict=True)})
        return batch

    def spy_on_target(target, online, tau):
        assert online is seen.agent
        before = copies(target)
        update_target(target, online, tau)
        note("target", tau=tau, target=target, before=before, after=copies(target), online=copies(online))

    class Adam(torch.optim.Adam):
        def step(self):
            (group,) = self.param_groups
            before = [x.detach().clone() for x in group["params"]]
            everything = {name: (x.detach().clone(), None if x.grad is None else x.grad.clone()) for name, x in named()}
            super().step()
            gradients = [x.grad.clone() for x in group["params"]]
            note(
                "adam",
                lr=group["lr"],
                parameters=group["params"],
                before=before,
                everything=everything,
                gradients=gradients,
            )

    def named():
        return seen.agent.named_parameters()

    patch.setattr(module.Agent, "__init__", spy_on_init)
    patch.setattr(module, "make_envs", spy_on_envs)
    patch.setattr(module.ReplayBuffer, "sample", spy_on_sample)
    patch.setattr(module, "update_target", spy_on_target)
    patch.setattr(torch.optim, "Adam", Adam)
    return seen


def events(seen, kind: str) -> list[SimpleNamespace]:
    return [event for event in seen.events if event.kind == kind]


def steps(seen, kind: str) -> list[int]:
    """The environment steps before each event of that kind."""
    return [event.steps for event in events(seen, kind)]


def check_transitions(seen, log, decode=lambda action: action) -> set:
    """Assert that all that was sampled was played; return the (environment, episode, step) of what was sampled.

    log: of Trace or BoxTrace, whose observations tell which one they are. decode: a sampled action as it is logged.
    """
    played = {(step.env, step.episode, step.step): step for step in log}
    assert len(played) == len(log)
    found = set()
    for batch in events(seen, "sample"):
        for i, row in enumerate(batch.obs):
            env, episode, t = map(int, row)
            step = played[env, episode, t]
            assert batch.next_obs[i].tolist() == [env, episode, t + 1]  # and not the first of the next episode
            torch.testing.assert_close(decode(batch.actions[i]), torch.as_tensor(step.action), rtol=1e-5, atol=1e-4)
            assert abs(batch.rewards[i].item() - step.reward) < 1e-4
            assert batch.terminated[i].item() == step.terminated  # a truncation is none
            found.add((env, episode, t))
    return found


def check_returns(log, log_dir: Path) -> None:
    """Assert that the only run in that folder has logged the return and length of each episode of `log` that ended."""
    episodes = defaultdict(list)
    for step in log:
        episodes[step.env, step.episode].append(step)
    ended = [steps for steps in episodes.values() if steps[-1].terminated or steps[-1].truncated]
    logged = scalars(log_dir)
    assert sorted(y for _, y in logged["charts/episodic_length"]) == sorted(map(len, ended))
    returns = sorted(sum(step.reward for step in steps) for steps in ended)
    assert sorted(y for _, y in logged["charts/episodic_return"]) == pytest.approx(returns, rel=1e-4, abs=1e-4)
