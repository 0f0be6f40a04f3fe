"""DDPG's own equations, noise, replay buffer, and whole runs against a replay by hand."""

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT, load, read_events
from gymnasium import spaces

from tests.tiny_control import BoxTrace, check_transitions, resume, train, watch

ddpg = load(ROOT / "algos/ddpg.py")
VECTOR, PUSH = spaces.Box(-9, 9, (3,)), spaces.Box(-1, 1, (2,))
TRACE = "tests.tiny_control:BoxTrace-v0"


def to_units(actions):
    """Actions as the environment got them, in units in which its bounds are -1 and 1."""
    return (np.array(actions) - BoxTrace.centre) / BoxTrace.half_range


def test_bellman_target_and_polyak_averaging():
    torch.manual_seed(0)
    target, online = (ddpg.Agent(VECTOR, PUSH, ddpg.Args(hidden_sizes=(16,))) for _ in range(2))
    rewards, next_obs, terminated = torch.randn(30), torch.randn(30, 3), torch.rand(30) < 0.5
    y = ddpg.bellman_target(target, rewards, next_obs, terminated, ddpg.Args(gamma=0.9))
    next_q = target.critic(torch.cat([next_obs, target.actor(next_obs).tanh()], 1))[:, 0]
    torch.testing.assert_close(y, rewards + torch.where(terminated, 0, 0.9 * next_q))
    assert not y.requires_grad
    expected = [0.75 * p + 0.25 * q for p, q in zip(target.parameters(), online.parameters(), strict=True)]
    ddpg.update_target(target, online, 0.25)
    for p, q in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q)


def test_buffer_is_a_ring():
    buffer, rng = ddpg.ReplayBuffer(5, 1, 1), np.random.default_rng(0)
    for i in range(0, 8, 2):  # two transitions at a time
        x = np.float32([[i], [i + 1]])
        buffer.add(x, x / 10, x[:, 0], x + 1, np.array([True, False]))
        obs, actions, rewards, next_obs, terminated = buffer.sample(300, rng, "cpu")
        assert {*rewards.tolist()} == {*range(max(0, i - 3), i + 2)}
        torch.testing.assert_close(actions, obs / 10)
        torch.testing.assert_close(next_obs, obs + 1)
        assert torch.equal(obs[:, 0], rewards)
        assert torch.equal(terminated, rewards % 2 == 0)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("env", ["BoxTrace-v0", "PaidBoxResets-v0"])
def test_transitions(env, num_envs, monkeypatch, tmp_path):
    batches = watch(ddpg, monkeypatch)
    train(ddpg, f"tests.tiny_control:{env}", tmp_path, num_envs=num_envs, total_timesteps=252)
    check_transitions(
        batches, BoxTrace.log, tmp_path, lambda action: BoxTrace.centre + BoxTrace.half_range * action.clip(-1, 1)
    )


def test_first_actions_are_uniform_and_later_ones_those_of_the_policy_with_noise(monkeypatch, tmp_path):
    policy = np.float32([0.3, -0.2])
    monkeypatch.setattr(ddpg.Agent, "numpy_policy", lambda agent: lambda obs: np.tile(policy, (len(obs), 1)))
    args = dict(total_timesteps=2400, learning_starts=1600, exploration_noise=0.2, num_envs=4)
    train(ddpg, TRACE, tmp_path, **args)
    steps = sorted(step for step in BoxTrace.log if step.env < 10**6)
    first, last = [], []
    for env in {step.env for step in steps}:
        actions = to_units([step.action for step in steps if step.env == env])
        first.append(actions[:250])  # of 400 steps, some of which only reset
        last.append(actions[-140:])
    first, last = np.concatenate(first), np.concatenate(last)
    for axis in first.T:
        assert np.histogram(axis, 4, (-1, 1))[0] / len(axis) == pytest.approx([0.25] * 4, abs=0.06)
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.15
    assert last.mean(0) == pytest.approx(policy, abs=0.04)
    assert last.std(0) == pytest.approx([0.2, 0.2], abs=0.03)
    assert abs(np.corrcoef(last[1:, 0], last[:-1, 0])[0, 1]) < 0.15


def test_ornstein_uhlenbeck_noise(monkeypatch, tmp_path):
    """x starts at ε √(1 - (1 - θ)²), keeps 1 - θ of the last x, and has the standard deviation σ in the long run."""
    monkeypatch.setattr(ddpg.Agent, "numpy_policy", lambda agent: lambda obs: np.zeros((len(obs), 2), np.float32))
    args = dict(noise="ou", exploration_noise=0.2, learning_starts=6000, num_envs=20)
    train(ddpg, "tests.tiny_control:LongBoxTrace-v0", tmp_path, total_timesteps=6000, **args)  # at random
    resume(ddpg, "tests.tiny_control:LongBoxTrace-v0", tmp_path, total_timesteps=12_000, **args)
    steps = {step[:3]: to_units(step.action) for step in BoxTrace.log if step.env < 10**6}
    later = np.array([x for (_, _, t), x in steps.items() if t > 20])
    pairs = [(steps[env, episode, t - 1], x) for (env, episode, t), x in steps.items() if t > 0]
    before, after = np.array(pairs).transpose(1, 2, 0)
    innovation = 0.2 * np.sqrt(1 - 0.85**2)
    assert np.array([x for (_, _, t), x in steps.items() if t == 0]).std(0) == pytest.approx([innovation] * 2, rel=0.2)
    assert later.std(0) == pytest.approx([0.2, 0.2], rel=0.2)
    for a, b in zip(before, after, strict=True):
        assert np.polyfit(a, b, 1) == pytest.approx([0.85, 0], abs=0.03)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_run(num_envs, monkeypatch, tmp_path):
    """The weights at the end are those of the algorithm by hand, from the batches that were drawn."""
    batches = watch(ddpg, monkeypatch)
    args = dict(tau=0.1, gamma=0.9, learning_rate=0.01, num_envs=num_envs, total_timesteps=99)
    agent = train(ddpg, TRACE, tmp_path, **args)
    first = -(-20 // num_envs) * num_envs  # learning_starts
    assert [step for step, _ in batches] == np.repeat(np.arange(first, 100, num_envs), num_envs).tolist()
    torch.manual_seed(1)
    mine = ddpg.Agent(VECTOR, BoxTrace.action_space, ddpg.Args(hidden_sizes=(16,)))
    target, losses = copy.deepcopy(mine), []
    actor, critic = (torch.optim.Adam(net.parameters(), lr=0.01) for net in (mine.actor, mine.critic))

    def q(agent, obs, actions):
        return agent.critic(torch.cat([obs, actions], 1))[:, 0]

    for _, batch in batches:
        obs, actions, rewards, next_obs, terminated = map(torch.tensor, batch)
        y = rewards + 0.9 * ~terminated * q(target, next_obs, target.actor(next_obs).tanh())
        loss = (q(mine, obs, actions) - y.detach()).pow(2).mean()
        critic.zero_grad()
        loss.backward()
        critic.step()
        actor.zero_grad()
        actor_loss = -q(mine, obs, mine.actor(obs).tanh()).mean()
        actor_loss.backward()
        actor.step()
        losses.append((loss.item(), actor_loss.item()))
        for old, new in zip(target.parameters(), mine.parameters(), strict=True):
            old.data = 0.1 * new.data + 0.9 * old.data
    saved = torch.load(next(tmp_path.glob("*/checkpoint.pt")))
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], value, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(saved["target"][name], target.state_dict()[name], rtol=1e-3, atol=1e-3)
    events = read_events(next(tmp_path.iterdir()))
    logged = [(x, y) for (_, x), (_, y) in zip(events["losses/critic_loss"], events["losses/actor_loss"], strict=True)]
    np.testing.assert_allclose(logged, losses[num_envs - 1 :: num_envs], rtol=1e-2, atol=1e-3)


def test_resume(monkeypatch, tmp_path):
    """The buffer is refilled by the policy, not at random, before learning goes on; flags win."""
    args = dict(learning_starts=40, exploration_noise=0.0)
    train(ddpg, TRACE, tmp_path, total_timesteps=100, **args)
    batches = watch(ddpg, monkeypatch)
    resume(ddpg, TRACE, tmp_path, total_timesteps=200, learning_rate=0.007, **args)
    assert [step for step, _ in batches] == list(range(140, 201))
    saved = torch.load(next(tmp_path.glob("*/checkpoint.pt")))
    assert [saved[name]["param_groups"][0]["lr"] for name in ("actor_optimizer", "critic_optimizer")] == [0.007] * 2


FAST = dict(hidden_sizes=(32, 32), learning_rate=3e-3, batch_size=64, learning_starts=200, buffer_size=5000)


def test_learns_targets_on_axes_with_any_bounds(tmp_path, capsys):
    train(ddpg, "tests.tiny_control:Reach-v0", tmp_path, total_timesteps=1500, eval_episodes=32, **FAST)
    assert float(capsys.readouterr().out.split("mean_return=")[1].split()[0]) > -0.05  # doing nothing gets -0.9


def test_time_limit_takes_nothing(tmp_path):
    args = FAST | dict(tau=0.05, exploration_noise=0.3, gamma=0.8)
    agent = train(ddpg, "tests.tiny_control:Balance-v0", tmp_path, total_timesteps=2000, **args)
    action = agent.mu(torch.ones(1, 1))
    assert action.item() == pytest.approx(0.5, abs=0.15)
    assert agent.q(torch.ones(1, 1), action).item() == pytest.approx(5, abs=0.4)  # taken as an end: at most 4.5
