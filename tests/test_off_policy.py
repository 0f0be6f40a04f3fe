"""DQN's and DDPG's exploration and replay buffers, and whole runs against a replay by hand.

An observation of Trace-v0 says which step of which environment it is, so that a test can tell from the environment's
own log what a transition should be.
"""

import copy
import sys
import time
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import only, read_checkpoint, read_events, train
from gymnasium import spaces

from algos import ddpg, dqn
from tests.tiny_envs import Trace, ended_episodes

VECTOR = spaces.Box(-9, 9, (3,))
MODULES = pytest.mark.parametrize("module", [dqn, ddpg], ids=["dqn", "ddpg"])


def run(module, log_dir, env="Trace", longest=6, **args):
    """Train on a Trace with actions that the module takes."""
    settings = dict(num_envs=1, batch_size=16, buffer_size=500, learning_starts=20, train_frequency=4)
    settings |= dict(hidden_sizes=(16,), env_kwargs={"continuous": module is ddpg, "longest": longest})
    return train(module, env, log_dir, **settings | args)


def resume(module, log_dir, **args):
    """Go on with the only run in that folder."""
    return run(module, log_dir, resume=str(only(log_dir) / "checkpoint.pt"), **args)


def watch(module, patch):
    """A list to which each batch that is drawn will be added, after the number of environment steps until then."""
    batches, steps, step, sample = [], [], gym.vector.SyncVectorEnv.step, module.ReplayBuffer.sample

    def spy_on_step(envs, actions):
        steps.extend(actions)
        return step(envs, actions)

    def spy_on_sample(buffer, *args):
        batch = sample(buffer, *args)
        batches.append((len(steps), [torch.as_tensor(x).clone() for x in batch]))
        return batch

    patch.setattr(gym.vector.SyncVectorEnv, "step", spy_on_step)
    patch.setattr(module.ReplayBuffer, "sample", spy_on_sample)
    return batches


def in_units(actions):
    """Actions as the environment got them, in units in which its bounds are -1 and 1; or the numbers of actions."""
    actions = np.array(actions)
    return (actions - Trace.centre) / Trace.half_range if actions.dtype.kind == "f" else actions


def assert_saved(log_dir, **networks):
    """The networks of the only run in that folder have (nearly) these weights."""
    saved = read_checkpoint(only(log_dir))
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            torch.testing.assert_close(saved[name][key], value, rtol=1e-3, atol=1e-3)


# ---- replay buffers


@pytest.mark.parametrize("env_id", ["tests.tiny_envs:Trace-v0", "ALE/Breakout-v5"])
@pytest.mark.parametrize(("size", "num_envs"), [(2, 1), (43, 3), (1000, 3)])
def test_buffer_of_dqn(env_id, size, num_envs):
    """Against a list of all transitions. In the place of the reward is the number of the transition."""
    is_atari, rng, N, history = "ALE" in env_id, np.random.default_rng(0), num_envs, []
    if is_atari:
        pytest.importorskip("ale_py")
    kwargs = {"max_num_frames_per_episode": 60} if is_atari else {}
    envs = dqn.make_envs(dqn.Args(env_id=env_id, env_kwargs=kwargs), N)
    buffer = dqn.ReplayBuffer(size, N, envs.single_observation_space, stack=4 if is_atari else 1)

    def check(batch):
        for obs, action, reward, next_obs, terminated in zip(*batch, strict=True):
            t, n = divmod(int(reward), N)
            *expected, valid = (x[n] for x in history[t])
            assert valid, "a step that only reset"
            for ours, theirs in zip(expected, (obs, action, reward, next_obs, terminated), strict=True):
                assert np.array_equal(theirs, ours)
            yield t, n

    obs, valid = envs.reset(seed=1)[0].copy(), np.ones(N, bool)
    for t in range(100):
        actions = rng.integers(3, size=N)
        next_obs, _, terminated, truncated, _ = envs.step(actions)
        history.append((obs, actions, np.arange(N) + N * t, next_obs.copy(), terminated.copy(), valid))
        buffer.add(*history[-1])
        assert len(list(check(buffer.sample(8, rng)))) == 8
        obs, valid = history[-1][3], ~(terminated | truncated)
    envs.close()
    drawn = Counter(check(buffer.sample(30 * min(size, 100 * N), rng)))
    kept = {(t, n) for t in range(max(0, 100 - size // N), 100) for n in range(N) if history[t][5][n]}
    assert drawn.keys() == kept
    mean = sum(drawn.values()) / len(kept)
    assert 0.25 * mean < min(drawn.values()) <= max(drawn.values()) < 2 * mean


def test_only_frames_of_atari_are_stacked(monkeypatch, tmp_path):
    pytest.importorskip("ale_py")
    stacks = []
    monkeypatch.setattr(dqn, "ReplayBuffer", lambda size, num_envs, space, stack: stacks.append(stack) or sys.exit())
    for env_id in ("ALE/Pong-v5", "ale_py:ALE/Pong-v5", "tests.tiny_envs:Odd-v0"):
        kwargs = {"observe": "ChannelsFirst"} if "Odd" in env_id else {}
        with pytest.raises(SystemExit):
            run(dqn, tmp_path, env_id=env_id, env_kwargs=kwargs)
    assert stacks == [4, 4, 1]


def test_the_rewards_of_every_step_of_dqn_must_be_finite(monkeypatch, tmp_path):
    step, rewards_seen = gym.vector.SyncVectorEnv.step, []

    def fifth_is_not(envs, actions):
        obs, rewards, *others = step(envs, actions)
        rewards_seen.append(rewards)
        return obs, rewards if len(rewards_seen) != 5 else rewards + np.nan, *others

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", fifth_is_not)
    with pytest.raises(AssertionError, match="rewards not finite at step 8"):
        run(dqn, tmp_path, train_frequency=4)


@MODULES
def test_what_would_never_learn_is_refused(module, tmp_path):
    for args in ({"total_timesteps": 100, "learning_starts": 100}, {"buffer_size": 5, "total_timesteps": 120}):
        if module is dqn or "buffer_size" not in args:
            with pytest.raises(SystemExit):
                run(module, tmp_path, num_envs=3, **args)
    assert not [*tmp_path.iterdir()]


def test_buffer_of_ddpg_is_a_ring():
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


@MODULES
@pytest.mark.parametrize("num_envs", [1, 3])
def test_transitions(module, num_envs, monkeypatch, tmp_path):
    """What is drawn is what was played, nearly all of it, and the run's log has its episodes."""
    batches = watch(module, monkeypatch)
    run(module, tmp_path, "PaidResets", num_envs=num_envs, total_timesteps=252, train_frequency=6, gradient_steps=6)
    played, drawn = {step[:3]: step for step in Trace.training()}, set()
    for _, batch in batches:
        for obs, action, reward, next_obs, terminated in zip(*batch, strict=True):
            step = played[tuple(map(int, obs))]
            drawn.add(step[:3])
            assert next_obs.tolist() == [step.env, step.episode, step.step + 1]  # not the first of the next episode
            assert action.tolist() == pytest.approx(in_units(step.action).tolist(), rel=1e-4, abs=1e-4)
            assert reward.item() == pytest.approx(step.reward, rel=1e-4, abs=1e-4)
            assert terminated == step.terminated  # a truncation is none
    assert len(drawn) > 0.9 * len(played)
    logged = sorted(value for _, value in read_events(only(tmp_path))["charts/episodic_return"])
    assert logged == pytest.approx([value for value, _ in ended_episodes(played.values())], rel=1e-4, abs=1e-4)


@MODULES
def test_resumed_runs_refill_the_buffer_before_they_learn(module, monkeypatch, tmp_path):
    args = dict(learning_starts=40, start_e=1, end_e=0, exploration_fraction=1)
    run(module, tmp_path, total_timesteps=100, **args)
    batches = watch(module, monkeypatch)
    time.sleep(1)  # TensorBoard orders the logs of a folder by the second in which they begin
    resume(module, tmp_path, total_timesteps=200, **args)
    assert [step for step, _ in batches] == list(range(40, 101, 4 if module is dqn else 1))
    if module is dqn:
        epsilons = dict(read_events(only(tmp_path))["charts/epsilon"])
        assert epsilons[104] == pytest.approx(1 - 103 / 200)


# ---- exploration


@pytest.mark.parametrize("shape", [(3,), (40, 36, 3), (3, 36, 40)])
@pytest.mark.parametrize("hidden_sizes", [(), (16, 8)])
def test_dqns_policy_is_greedy(shape, hidden_sizes):
    space = VECTOR if len(shape) == 1 else spaces.Box(0, 255, shape, np.uint8)
    agent = dqn.Agent(space, spaces.Discrete(3), dqn.Args(hidden_sizes=hidden_sizes))
    with torch.no_grad():
        for parameter in agent.q.parameters():
            parameter.normal_()
    obs = np.stack([space.sample() for _ in range(20)])
    best = agent(torch.as_tensor(agent.preprocess(obs))).argmax(1)
    np.testing.assert_array_equal(agent.numpy_policy()(obs), best)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_share_of_random_actions(num_envs, monkeypatch, tmp_path):
    monkeypatch.setattr(dqn.Agent, "numpy_policy", lambda agent: lambda obs: np.zeros(len(obs), np.int64))
    args = dict(total_timesteps=6000, learning_starts=5990, start_e=0.9, end_e=0.3, exploration_fraction=2 / 3)
    run(dqn, tmp_path, num_envs=num_envs, train_frequency=3 * num_envs, longest=10**6, **args)
    actions = np.array([step.action for step in Trace.training()])
    if num_envs == 3:  # they choose at random independently of each other; in the log they take turns
        assert (actions[:1998].reshape(-1, 3)[:, :2] != 0).all(1).mean() == pytest.approx(0.25, abs=0.05)
    for third, epsilon in zip(np.array_split(actions, 3), [0.75, 0.45, 0.3], strict=True):  # the means
        shares = np.bincount(third, minlength=3) / len(third)
        assert shares == pytest.approx([1 - 2 / 3 * epsilon, epsilon / 3, epsilon / 3], abs=0.04)
    for step, epsilon in read_events(only(tmp_path))["charts/epsilon"]:
        assert epsilon == pytest.approx(max(0.9 - 0.6 * (step - num_envs) / 4000, 0.3))


@pytest.mark.parametrize(("noise", "theta"), [("gaussian", 1.0), ("ou", 0.15)])
def test_ddpgs_first_actions_are_uniform_and_later_ones_those_of_the_policy_with_noise(
    noise, theta, monkeypatch, tmp_path
):
    """Noise x starts at ε √(1 - (1 - θ)²), keeps 1 - θ of the last x, and has the deviation σ in the long run."""
    mean = np.float32([0.3, -0.2])
    monkeypatch.setattr(ddpg.Agent, "numpy_policy", lambda agent: lambda obs: np.tile(mean, (len(obs), 1)))
    args = dict(noise=noise, exploration_noise=0.2, learning_starts=6000, num_envs=20, longest=40)
    run(ddpg, tmp_path, total_timesteps=6000, **args)
    first = in_units([step.action for step in Trace.training()])
    for axis in first.T:
        assert np.histogram(axis, 4, (-1, 1))[0] / len(axis) == pytest.approx([0.25] * 4, abs=0.03)
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.05
    resume(ddpg, tmp_path, total_timesteps=12_000, **args)
    x = {step[:3]: in_units(step.action) - mean for step in Trace.training()}
    starts = np.array([x[key] for key in x if key[2] == 0])
    later = np.array([x[key] for key in x if key[2] > 20])
    pairs = np.array([(x[env, n, t - 1], x[env, n, t]) for env, n, t in x if t > 0])
    assert starts.std(0) == pytest.approx([0.2 * np.sqrt(1 - (1 - theta) ** 2)] * 2, rel=0.2)
    assert later.std(0) == pytest.approx([0.2, 0.2], rel=0.1)
    assert later.mean(0) == pytest.approx([0, 0], abs=0.03)
    assert abs(np.corrcoef(later.T)[0, 1]) < 0.3
    for before, after in pairs.transpose(2, 1, 0):
        assert np.polyfit(before, after, 1) == pytest.approx([1 - theta, 0], abs=0.03)


# ---- whole runs: the weights at the end are those of the algorithm by hand, from the batches that were drawn


@pytest.mark.parametrize(
    ("num_envs", "args"),
    [
        (1, {"tau": 0.3, "gradient_steps": 3}),
        (3, {"target_network_frequency": 42, "learning_starts": 61, "double_q": False}),
        (1, {"target_network_frequency": 7, "tau": 0.5, "train_frequency": 20, "learning_starts": 0}),
    ],
)
def test_run_of_dqn(num_envs, args, monkeypatch, tmp_path):
    args = dict(target_network_frequency=30, tau=1.0, gradient_steps=1, train_frequency=6, learning_starts=50) | args
    batches = watch(dqn, monkeypatch)
    run(dqn, tmp_path, total_timesteps=200, num_envs=num_envs, learning_rate=0.01, gamma=0.9, **args)
    every, frequency = args["train_frequency"], args["target_network_frequency"]
    updates = [step for step in range(every, 201, every) if step >= args["learning_starts"]]
    assert [step for step, _ in batches] == np.repeat(updates, args["gradient_steps"]).tolist()

    torch.manual_seed(1)
    q = dqn.Agent(VECTOR, spaces.Discrete(3), dqn.Args(hidden_sizes=(16,)))
    target, optimizer, losses = copy.deepcopy(q), torch.optim.Adam(q.parameters(), lr=0.01), {}
    for i, (step, (obs, actions, rewards, next_obs, terminated)) in enumerate(batches):
        with torch.no_grad():
            values = target(next_obs)
            best = (q(next_obs) if args.get("double_q", True) else values).argmax(1)
        y = rewards + 0.9 * ~terminated * values[range(16), best]
        loss = (q(obs)[range(16), actions] - y).pow(2).mean()
        losses[step] = loss.item()
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - (step - every) / 200)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (i + 1) % args["gradient_steps"] == 0 and step // frequency > (step - every) // frequency:
            for old, new in zip(target.parameters(), q.parameters(), strict=True):
                old.data = args["tau"] * new.data + (1 - args["tau"]) * old.data
    assert_saved(tmp_path, agent=q, target=target)
    assert dict(read_events(only(tmp_path))["losses/q_loss"]) == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_run_of_ddpg(num_envs, monkeypatch, tmp_path):
    batches = watch(ddpg, monkeypatch)
    run(ddpg, tmp_path, total_timesteps=99, num_envs=num_envs, learning_rate=0.01, gamma=0.9, tau=0.1)
    first = -(-20 // num_envs) * num_envs  # learning_starts
    assert [step for step, _ in batches] == np.repeat(np.arange(first, 100, num_envs), num_envs).tolist()

    torch.manual_seed(1)
    mine = ddpg.Agent(VECTOR, spaces.Box(-1, 1, (2,)), ddpg.Args(hidden_sizes=(16,)))
    target, losses = copy.deepcopy(mine), []
    actor, critic = (torch.optim.Adam(net.parameters(), lr=0.01) for net in (mine.actor, mine.critic))

    def q(agent, obs, actions):
        return agent.critic(torch.cat([obs, actions], 1))[:, 0]

    for _, (obs, actions, rewards, next_obs, terminated) in batches:
        y = rewards + 0.9 * ~terminated * q(target, next_obs, target.actor[:-1](next_obs).tanh())
        loss = (q(mine, obs, actions) - y.detach()).pow(2).mean()
        critic.zero_grad()
        loss.backward()
        critic.step()
        actor_loss = -q(mine, obs, mine.actor[:-1](obs).tanh()).mean()
        actor.zero_grad()
        actor_loss.backward()
        actor.step()
        losses.append((loss.item(), actor_loss.item()))
        for old, new in zip(target.parameters(), mine.parameters(), strict=True):
            old.data = 0.1 * new.data + 0.9 * old.data
    assert_saved(tmp_path, agent=mine, target=target)
    events = read_events(only(tmp_path))
    logged = [(x, y) for (_, x), (_, y) in zip(events["losses/critic_loss"], events["losses/actor_loss"], strict=True)]
    np.testing.assert_allclose(logged, losses[num_envs - 1 :: num_envs], rtol=1e-2, atol=1e-3)
