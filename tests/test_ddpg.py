"""DDPG's own equations, noise and replay buffer."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from gymnasium import spaces

from algos import ddpg
from tests.replay_spies import (
    check_adam,
    check_returns,
    check_transitions,
    copies,
    events,
    forward,
    resume,
    same,
    steps,
    train,
    watch,
)
from tests.spies import VECTOR, mean_return, shake
from tests.tiny_control import BoxTrace

TRACE, LONG = "tests.tiny_control:BoxTrace-v0", "tests.tiny_control:LongBoxTrace-v0"


def make_agent(obs_space=VECTOR, hidden_sizes=(16,)):
    agent = ddpg.Agent(obs_space, spaces.Box(-1, 1, (2,)), ddpg.Args(hidden_sizes=hidden_sizes))
    shake(agent.parameters(), 0.2)
    return agent


def units(actions) -> np.ndarray:
    """Actions that BoxTrace got, in the units in which the bounds are -1 and 1."""
    return (np.array(actions) - BoxTrace.centre) / BoxTrace.half_range


def sent() -> np.ndarray:
    """What BoxTrace got in the last run, in order, shape (steps, 2)."""
    return units([step.action for step in BoxTrace.log])


def act_constantly(monkeypatch, value: float) -> None:
    monkeypatch.setattr(ddpg.Agent, "policy", lambda agent: lambda obs: np.full((len(obs), 2), value, np.float32))


# ---- the target


class Known:
    """A target network whose policy and values are known."""

    def mu(self, obs):
        return -obs[:, :1]

    def q(self, obs, actions):
        return 100 * obs[:, 0] + actions[:, 0]


def test_the_target_bootstraps_from_the_next_state_unless_the_episode_terminated():
    rewards, next_obs = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([[1.0], [2.0], [3.0]])
    for ended in ([0, 0, 0], [0, 1, 0], [1, 1, 1]):
        terminated, args = torch.tensor(ended, dtype=torch.bool), ddpg.Args(gamma=0.5)
        y = ddpg.bellman_target(Known(), rewards, next_obs, terminated, args)
        expected = [10 + 0.5 * 99 * (1 - ended[0]), 20 + 0.5 * 198 * (1 - ended[1]), 30 + 0.5 * 297 * (1 - ended[2])]
        assert y.tolist() == expected


def test_the_target_is_a_constant():
    rewards, next_obs, terminated = torch.zeros(5), torch.randn(5, 3), torch.zeros(5, dtype=torch.bool)
    y = ddpg.bellman_target(make_agent(), rewards, next_obs, terminated, ddpg.Args())
    assert y.shape == (5,)
    assert not y.requires_grad


# ---- the networks


@pytest.mark.parametrize("obs_space", [VECTOR, spaces.Box(-9, 9, ()), spaces.Box(-9, 9, (2, 4))])
@pytest.mark.parametrize("hidden_sizes", [(), (8,), (16, 8, 8)])
def test_the_policy_acts_with_the_network_as_it_is(obs_space, hidden_sizes):
    agent = make_agent(obs_space, hidden_sizes=hidden_sizes)
    obs = np.stack([obs_space.sample() for _ in range(20)]).astype(np.float32)
    flat = torch.as_tensor(obs).reshape(20, -1)
    for _ in range(2):
        with torch.no_grad():
            agent.actor[-1].weight.neg_()
            mu = forward(list(agent.actor.parameters()), flat).tanh()
        torch.testing.assert_close(agent.mu(torch.as_tensor(obs)).detach(), mu)
        np.testing.assert_allclose(agent.policy()(obs), mu, rtol=1e-4, atol=1e-5)
        assert mu.abs().max() <= 1


def test_q_is_a_network_of_observation_and_action():
    agent, obs, actions = make_agent(spaces.Box(-9, 9, (2, 2))), torch.randn(20, 2, 2), torch.randn(20, 2)
    expected = forward(list(agent.critic.parameters()), torch.cat([obs.flatten(1), actions], 1))[:, 0]
    torch.testing.assert_close(agent.q(obs, actions), expected)


def test_other_action_spaces_are_refused():
    for space in (spaces.Discrete(3), spaces.Box(0, 3, (2,), np.int64), spaces.MultiDiscrete([2, 2])):
        with pytest.raises(ddpg.UsageError, match="Box"):
            ddpg.Agent(VECTOR, space, ddpg.Args())


# ---- the noise


@pytest.mark.parametrize("noise", ["gaussian", "ou"])
def test_the_noise_of_each_environment_is_in_units_of_half_the_range_and_follows_its_process(
    noise, monkeypatch, tmp_path
):
    act_constantly(monkeypatch, 0.25)
    args = dict(noise=noise, exploration_noise=0.15, num_envs=3, learning_starts=0, batch_size=1)
    train(ddpg, LONG, tmp_path, total_timesteps=1500, hidden_sizes=(), **args)
    noise_of = {(s.env, s.episode, s.step): units(s.action) - 0.25 for s in BoxTrace.log}
    x = np.array([x for (_, _, t), x in noise_of.items() if t > 6])  # the other noise is smaller before
    assert x.mean(0) == pytest.approx([0, 0], abs=0.02 if noise == "gaussian" else 0.06)
    assert x.std(0) == pytest.approx([0.15, 0.15], rel=0.1 if noise == "gaussian" else 0.2)
    assert np.corrcoef(x.T)[0, 1] == pytest.approx(0, abs=0.12 if noise == "gaussian" else 0.3)

    pairs = [(x, noise_of[e, k, t + 1]) for (e, k, t), x in noise_of.items() if (e, k, t + 1) in noise_of]
    within = np.mean([x * y for x, y in pairs]) / np.mean([x * x for x, _ in pairs])
    assert within == pytest.approx(0 if noise == "gaussian" else 0.85, abs=0.08)
    last = {(e, k): t for e, k, t in sorted(noise_of)}
    pairs = [(noise_of[e, k, t], noise_of[e, k + 1, 0]) for (e, k), t in last.items() if (e, k + 1, 0) in noise_of]
    between = np.mean([x * y for x, y in pairs]) / np.mean([x * x for x, _ in pairs])
    assert len(pairs) > 50
    assert between == pytest.approx(0, abs=0.25)  # without a new start it would be 0.85 ** 2
    first = np.array([x for (_, _, t), x in noise_of.items() if t == 0])  # one step from zero
    assert first.std() == pytest.approx(0.15 * (1 if noise == "gaussian" else math.sqrt(1 - 0.85**2)), rel=0.2)


def test_actions_with_noise_are_cut_to_the_bounds(monkeypatch, tmp_path):
    seen = watch(ddpg, monkeypatch)
    act_constantly(monkeypatch, 0.25)
    train(ddpg, TRACE, tmp_path, exploration_noise=3.0, learning_starts=0, total_timesteps=150)
    assert np.abs(sent()).max() == pytest.approx(1)
    assert (np.abs(sent()) > 0.999).mean() > 0.5
    learned_from = torch.cat([batch.actions for batch in events(seen, "sample")])
    assert learned_from.abs().max() == 1  # what was done


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_first_actions_are_uniform_and_the_others_follow_the_policy(num_envs, monkeypatch, tmp_path):
    act_constantly(monkeypatch, 0.25)
    args = dict(exploration_noise=0, num_envs=num_envs, batch_size=1, hidden_sizes=())
    train(ddpg, LONG, tmp_path, learning_starts=900, total_timesteps=960, **args)
    actions = sent()
    is_policy = np.isclose(actions, 0.25, atol=1e-5).all(1)
    first = is_policy.argmax()
    assert is_policy[first:].all()
    resets = [step.env for step in BoxTrace.log[:first] if step.terminated or step.truncated]
    assert 900 - num_envs <= first + len(resets) <= 900
    uniform = actions[:first]
    assert np.abs(uniform).max() <= 1
    for axis in uniform.T:  # the largest distance of the distribution functions (Kolmogorov and Smirnov)
        distance = np.abs((np.sort(axis) + 1) / 2 - (np.arange(first) + 0.5) / first).max()
        assert distance < 1.95 / np.sqrt(first)  # exceeded by chance once in a thousand
    assert np.corrcoef(uniform.T)[0, 1] == pytest.approx(0, abs=0.11)
    assert np.corrcoef(uniform[1:, 0], uniform[:-1, 0])[0, 1] == pytest.approx(0, abs=0.11)


def test_without_noise_each_action_is_that_of_the_network_of_now(monkeypatch, tmp_path):
    seen, expected, original = watch(ddpg, monkeypatch), {}, ddpg.Agent.policy

    def spy(agent):
        act = original(agent)

        def act_and_tell(obs):
            with torch.no_grad():
                mu = seen.agent.mu(torch.as_tensor(obs)).numpy()
            expected.update({tuple(map(int, row)): x for row, x in zip(obs, mu, strict=True)})
            return act(obs)

        return act_and_tell

    monkeypatch.setattr(ddpg.Agent, "policy", spy)
    args = dict(exploration_noise=0, num_envs=2, learning_starts=20, learning_rate=0.01)
    train(ddpg, TRACE, tmp_path, total_timesteps=120, eval_episodes=4, noise="ou", **args)
    late = [step for step in BoxTrace.log if (step.env, step.episode, step.step) in expected]
    assert len(late) > 50
    for step in late:
        expect = expected[step.env, step.episode, step.step]
        np.testing.assert_allclose(units(step.action), expect, rtol=1e-3, atol=1e-4)


def test_the_evaluation_is_without_noise(tmp_path):
    args = dict(exploration_noise=5.0, total_timesteps=60, eval_episodes=9)
    agent = train(ddpg, TRACE, tmp_path, **args)
    evaluated = [step for step in BoxTrace.log if step.env >= 10**7]
    assert len(evaluated) > 10
    for step in evaluated:
        with torch.no_grad():
            mu = agent.mu(torch.tensor([[step.env, step.episode, step.step]], dtype=torch.float32))[0]
        np.testing.assert_allclose(units(step.action), mu, rtol=1e-3, atol=1e-4)


# ---- the replay buffer


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("added", [1, 19, 20, 53])
def test_the_buffer_keeps_the_last_transitions_and_draws_them_equally_often(added, at_once):
    rng, size = np.random.default_rng(0), 20
    buffer = ddpg.ReplayBuffer(size, (2,), 3)
    widths = dict(obs=2, actions=3, rewards=0, next_obs=2, terminated=0)
    history = [rng.normal(size=(added * at_once, width) if width else added * at_once) for width in widths.values()]
    history = [x.astype(np.float32) for x in history[:4]] + [history[4] > 0]
    for k in range(0, added * at_once, at_once):
        buffer.add(*(x[k : k + at_once] for x in history))
    batch = buffer.sample(4000, rng, torch.device("cpu"))
    assert [x.dtype for x in batch] == [torch.float32] * 4 + [torch.bool]
    where = {float(reward): k for k, reward in enumerate(history[2])}
    drawn = [where[float(reward)] for reward in batch[2]]
    for ours, theirs in zip(history, batch, strict=True):
        np.testing.assert_array_equal(theirs, ours[drawn])
    kept = range(max(added * at_once - size, 0), added * at_once)
    expected = 4000 / len(kept)
    chi_square = sum((drawn.count(k) - expected) ** 2 / expected for k in kept)
    assert set(drawn) == set(kept)
    assert chi_square < len(kept) + 5 * (2 * len(kept)) ** 0.5
    before = [x.clone() for x in batch]
    for _ in range(size):  # the ring goes on; a batch stays what it was
        buffer.add(*(x[:at_once] + True for x in history))
    assert same(batch, before)


def test_a_buffer_larger_than_the_free_memory_is_refused_before_it_is_made(monkeypatch):
    needed = sum(x.nbytes for x in vars(ddpg.ReplayBuffer(3000, (5, 2), 3)).values() if isinstance(x, np.ndarray))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))
    ddpg.ReplayBuffer(3000, (5, 2), 3)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    monkeypatch.setattr(np, "zeros", None)
    with pytest.raises(ddpg.UsageError, match="--buffer-size 3000 "):
        ddpg.ReplayBuffer(3000, (5, 2), 3)


# ---- a run


@pytest.mark.parametrize(("num_envs", "args"), [(1, {}), (3, {"noise": "ou", "tau": 0.5}), (1, {"hidden_sizes": ()})])
def test_the_weights_follow_the_gradients_of_both_objectives(num_envs, args, monkeypatch, tmp_path):
    """Each update by hand, from the batch drawn for it; the actor's gradient by the chain rule."""
    seen = watch(ddpg, monkeypatch)
    args = dict(tau=0.1, gamma=0.9, learning_rate=3e-3) | args
    train(ddpg, TRACE, tmp_path, num_envs=num_envs, total_timesteps=60, **args)
    half, target = len(copies(seen.initial.actor)), copies(seen.initial)  # the actor's parameters are the first half
    adam = events(seen, "adam")
    updates = [*zip(events(seen, "sample"), adam[::2], adam[1::2], events(seen, "target"), strict=True)]
    assert len(updates) >= 40
    for batch, critic_step, actor_step, target_update in updates:
        next_actions = forward(target[:half], batch.next_obs).tanh()
        next_values = forward(target[half:], torch.cat([batch.next_obs, next_actions], 1))[:, 0]
        rows = zip(batch.rewards.tolist(), next_values.tolist(), batch.terminated, strict=True)
        y = [reward if terminated else reward + 0.9 * value for reward, value, terminated in rows]
        critic = [x.clone().requires_grad_() for x in critic_step.before]
        q = forward(critic, torch.cat([batch.obs, batch.actions], 1))[:, 0]
        gradients = torch.autograd.grad(((q - torch.tensor(y)) ** 2).mean(), critic)
        torch.testing.assert_close(critic_step.gradients, list(gradients), rtol=1e-3, atol=1e-3)

        actor = [x.clone().requires_grad_() for x in actor_step.before]
        critic = [x for name, (x, _) in actor_step.everything.items() if name.startswith("critic")]  # as it is now
        mu = forward(actor, batch.obs).tanh()
        actions = mu.detach().requires_grad_()
        slope = torch.autograd.grad(forward(critic, torch.cat([batch.obs, actions], 1)).sum(), actions)[0]
        ascent = torch.autograd.grad(mu, actor, grad_outputs=slope / len(mu))  # of the mean of Q(s, μ(s))
        torch.testing.assert_close(actor_step.gradients, [-x for x in ascent], rtol=1e-3, atol=1e-4)

        assert same(target_update.before, target)
        tau, online = args["tau"], target_update.online
        target = [tau * x + (1 - tau) * old for x, old in zip(online, target, strict=True)]
        torch.testing.assert_close(target_update.after, target, rtol=1e-4, atol=1e-5)
        target = target_update.after
    check_adam(seen, adam[::2], 3e-3, copies(seen.agent.critic))
    check_adam(seen, adam[1::2], 3e-3, copies(seen.agent.actor))
    moved = [(new - old).abs().max() for new, old in zip(copies(seen.agent), copies(seen.initial), strict=True)]
    assert min(max(moved[:half]), max(moved[half:])) > 0.01


def test_each_step_changes_one_network_and_leaves_the_gradients_of_the_other(monkeypatch, tmp_path):
    seen = watch(ddpg, monkeypatch)
    train(ddpg, TRACE, tmp_path, total_timesteps=60)
    adam = events(seen, "adam")
    names = {id(x): name for name, x in seen.agent.named_parameters()}
    which = [{names[id(x)].split(".")[0] for x in event.parameters} for event in adam]
    assert which == [{"critic"}, {"actor"}] * (len(adam) // 2)
    for critic_step, actor_step in zip(adam[::2], adam[1::2], strict=True):
        gradients = [g for name, (_, g) in actor_step.everything.items() if name.startswith("critic")]
        assert same(gradients, critic_step.gradients)  # the actor's loss added nothing to them
    for one, other in zip(adam, adam[1:], strict=False):
        mine = {names[id(x)] for x in one.parameters}
        for name, (before, _) in one.everything.items():
            assert torch.equal(before, other.everything[name][0]) != (name in mine)


def test_the_actor_climbs_up_the_critic(monkeypatch, tmp_path):
    seen = watch(ddpg, monkeypatch)
    train(ddpg, TRACE, tmp_path, total_timesteps=100, learning_rate=1e-4)
    rises = 0
    actor_steps = events(seen, "adam")[1::2]
    for batch, event in zip(events(seen, "sample"), actor_steps, strict=True):
        critic = [x for name, (x, _) in event.everything.items() if name.startswith("critic")]
        ascent = 0.0
        actor = [x.clone().requires_grad_() for x in event.before]
        q = forward(critic, torch.cat([batch.obs, forward(actor, batch.obs).tanh()], 1)).mean()
        for gradient, applied in zip(torch.autograd.grad(q, actor), event.gradients, strict=True):
            torch.testing.assert_close(applied, -gradient, rtol=1e-3, atol=1e-5)
            ascent += (gradient * -applied).sum().item()
        rises += ascent > 0
    assert rises == len(actor_steps) > 50


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("learning_starts", [0, 30, 61])
def test_each_environment_step_has_one_update_of_both_networks(num_envs, learning_starts, monkeypatch, tmp_path):
    seen = watch(ddpg, monkeypatch)
    train(ddpg, TRACE, tmp_path, num_envs=num_envs, total_timesteps=100, learning_starts=learning_starts)
    total = 100 - 100 % num_envs
    expected = [x for x in range(num_envs, total + 1, num_envs) if x >= learning_starts]
    assert seen.steps == total
    assert steps(seen, "sample") == steps(seen, "target") == np.repeat(expected, num_envs).tolist()
    assert steps(seen, "adam") == np.repeat(expected, 2 * num_envs).tolist()


@pytest.mark.parametrize("env", ["BoxTrace-v0", "PaidBoxResets-v0"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_transitions_learned_from_are_those_played_and_no_reset_step(env, num_envs, monkeypatch, tmp_path):
    def to_bounds(action):
        assert action.abs().max() <= 1
        return action * torch.as_tensor(BoxTrace.half_range).float() + torch.as_tensor(BoxTrace.centre).float()

    seen = watch(ddpg, monkeypatch)
    args = dict(num_envs=num_envs, total_timesteps=200, learning_starts=100, exploration_noise=0.3, batch_size=32)
    train(ddpg, f"tests.tiny_control:{env}", tmp_path, **args)
    found = check_transitions(seen, BoxTrace.log, to_bounds)
    ends = {(step.terminated, step.truncated) for step in BoxTrace.log if (step.env, step.episode, step.step) in found}
    assert ends == {(False, False), (True, False), (False, True), (True, True)}
    check_returns(BoxTrace.log, tmp_path)
    assert len(found) > 0.9 * len(BoxTrace.log)


@pytest.mark.parametrize("noise", ["gaussian", "ou"])
def test_a_resumed_run_refills_its_buffer_with_the_policy_before_it_learns(noise, monkeypatch, tmp_path):
    args = dict(learning_starts=40, exploration_noise=0, noise=noise)
    trained = copy.deepcopy(train(ddpg, TRACE, tmp_path, total_timesteps=60, **args))
    act_constantly(monkeypatch, 0.25)
    seen = watch(ddpg, monkeypatch)
    resume(ddpg, TRACE, tmp_path, total_timesteps=120, learning_rate=0.007, **args)
    assert same(copies(seen.initial), copies(trained))
    np.testing.assert_allclose(sent(), 0.25, atol=1e-5)  # none at random
    assert steps(seen, "sample") == list(range(40, 61))
    assert {event.lr for event in events(seen, "adam")} == {0.007}  # a flag given beside --resume wins
    batches = torch.cat([batch.obs[:, 0] for batch in events(seen, "sample")])
    assert batches.min() == batches.max() == 61  # the seed of the resumed run


# ---- learning on environments whose best policy and values are known

FAST = dict(learning_rate=3e-3, tau=0.02, hidden_sizes=(32, 32), learning_starts=200, batch_size=32, eval_episodes=20)
FAST |= dict(exploration_noise=0.1, gamma=0.98)


@pytest.mark.parametrize(("noise", "num_envs"), [("gaussian", 1), ("ou", 4)])
def test_learns_targets_on_axes_with_any_bounds(noise, num_envs, tmp_path, capsys):
    args = FAST | dict(noise=noise, num_envs=num_envs, buffer_size=5000)
    train(ddpg, "tests.tiny_control:Reach-v0", tmp_path, total_timesteps=900, **args)
    assert mean_return(capsys) > -0.02  # doing nothing gets -0.89


def test_a_time_limit_takes_nothing_from_the_value_of_going_on(tmp_path, capsys):
    args = FAST | dict(tau=0.1, gamma=0.8, buffer_size=5000)
    agent = train(ddpg, "tests.tiny_control:Balance-v0", tmp_path, total_timesteps=1100, **args)
    assert mean_return(capsys) > 9.8  # of ten steps
    obs = torch.ones(1, 1)
    assert agent.mu(obs).item() == pytest.approx(0.5, abs=0.15)
    assert agent.q(obs, agent.mu(obs)).item() == pytest.approx(5, abs=0.25)  # 1 / (1 - gamma)
