"""DQN's own equations, schedules and replay buffer."""

import copy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, load, read_events
from gymnasium import spaces

from tests.tiny_control import check_transitions, resume, train, watch
from tests.tiny_envs import Trace

PATH = ROOT / "algos/dqn.py"
dqn = load(PATH)
VECTOR = spaces.Box(-9, 9, (3,))

# ---- the equations


@pytest.mark.parametrize(("double_q", "values"), [(False, [4, 8, 9, -2]), (True, [1, 2, 5, -6])])
def test_bellman_target(double_q, values):
    online = torch.tensor([[1.0, 9, 2], [5, 4, 3], [0, 0, 7], [-5, -1, -3]], requires_grad=True)
    target = torch.tensor([[4.0, 1, 3], [2, 8, 6], [9, 1, 5], [-2, -6, -4]], requires_grad=True)
    rewards, terminated = torch.tensor([10.0, 20, 30, 40]), torch.tensor([False, True, False, False])
    args = dqn.Args(gamma=0.5, double_q=double_q)
    y = dqn.bellman_target(lambda s: online[s], lambda s: target[s], rewards, torch.arange(4), terminated, args)
    assert y.tolist() == [10 + values[0] / 2, 20, 30 + values[2] / 2, 40 + values[3] / 2]
    assert not y.requires_grad


@pytest.mark.parametrize(("step", "epsilon"), [(0, 0.9), (100, 0.7), (200, 0.5), (400, 0.1), (2000, 0.1)])
def test_epsilon(step, epsilon):
    args = dqn.Args(total_timesteps=2000, exploration_fraction=0.2, start_e=0.9, end_e=0.1)
    assert dqn.linear_epsilon(args, step) == pytest.approx(epsilon)


@pytest.mark.parametrize("shape", [(3,), (40, 36, 3), (3, 36, 40)])
@pytest.mark.parametrize("hidden_sizes", [(), (16, 8)])
def test_policy_is_greedy(shape, hidden_sizes):
    space = VECTOR if len(shape) == 1 else spaces.Box(0, 255, shape, np.uint8)
    agent = dqn.Agent(space, spaces.Discrete(3), dqn.Args(hidden_sizes=hidden_sizes))
    obs = np.stack([space.sample() for _ in range(20)])
    for _ in range(2):
        with torch.no_grad():
            for parameter in agent.q.parameters():
                parameter.normal_()
            best = agent(torch.as_tensor(agent.preprocess(obs))).argmax(1)
        np.testing.assert_array_equal(agent.numpy_policy()(obs), best)


# ---- the replay buffer


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize(("size", "num_envs"), [(2, 1), (43, 3), (1000, 3)])
def test_buffer(stack, size, num_envs):
    """Against a list of all transitions; the reward tells which one it is."""
    rng, N, history = np.random.default_rng(0), num_envs, []
    frame_shape = (3, 4) if stack > 1 else (3,)
    space = spaces.Box(0, 255, (stack, *frame_shape) if stack > 1 else frame_shape, np.uint8)
    buffer = dqn.ReplayBuffer(size, N, space, stack)

    def follow(obs, new):
        frames = rng.integers(1, 256, (N, *frame_shape), np.uint8)
        if stack == 1:
            return frames
        past = obs[:, 1:] * ~new.reshape(N, 1, 1, 1)  # black before the start of an episode
        return np.concatenate([past, frames[:, None]], 1)

    def check(batch):
        for obs, action, reward, next_obs, terminated in zip(*batch, strict=True):
            t, n = divmod(int(reward), N)
            expected = [x[n] for x in history[t]]
            assert expected[5], "a step that only reset"
            for ours, theirs in zip(expected, (obs, action, reward, next_obs, terminated), strict=False):
                np.testing.assert_array_equal(theirs, ours)
            yield t, n

    obs, valid = follow(np.zeros((N, *space.shape), np.uint8), np.ones(N, bool)), np.ones(N, bool)
    for t in range(300):
        next_obs, actions = follow(obs, ~valid), rng.integers(5, size=N)
        ended = valid & (rng.random(N) < 0.2)
        terminated = ended & (rng.random(N) < 0.5)
        history.append((obs, actions, np.arange(N) + N * t, next_obs, terminated, valid))
        buffer.add(*history[-1])
        assert len(list(check(buffer.sample(8, rng)))) == 8
        obs, valid = next_obs, ~ended
    drawn = Counter(check(buffer.sample(30 * min(size, 300 * N), rng)))
    kept = {(t, n) for t in range(max(0, 300 - size // N), 300) for n in range(N) if history[t][5][n]}
    assert drawn.keys() == kept
    mean = sum(drawn.values()) / len(kept)
    assert 0.25 * mean < min(drawn.values()) <= max(drawn.values()) < 2 * mean


def test_atari_frames_come_back():
    pytest.importorskip("ale_py")
    args, rng, history = dqn.Args(env_id="ALE/Breakout-v5"), np.random.default_rng(0), []
    envs = dqn.make_envs(args, 2)
    buffer = dqn.ReplayBuffer(200, 2, envs.single_observation_space, stack=4)
    obs, valid = envs.reset(seed=1)[0].copy(), np.ones(2, bool)
    for t in range(150):
        next_obs, _, terminated, truncated, _ = envs.step(rng.integers(4, size=2))
        history.append((obs, next_obs.copy()))
        buffer.add(obs, 0, np.array([2 * t, 2 * t + 1]), next_obs, terminated, valid)
        obs, valid = next_obs.copy(), ~(terminated | truncated)
    envs.close()
    b_obs, _, rewards, b_next_obs, _ = buffer.sample(500, rng)
    for i, (t, n) in enumerate(divmod(int(reward), 2) for reward in rewards):
        np.testing.assert_array_equal(b_obs[i], history[t][0][n])
        np.testing.assert_array_equal(b_next_obs[i], history[t][1][n])


@pytest.mark.parametrize(("flags", "needed"), [("", "0.0"), ("--env-id ALE/Pong-v5 --buffer-size 1000000", "7.1")])
def test_buffer_larger_than_memory(flags, needed, cli, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    result = cli(PATH, flags)
    assert result.status == 2
    assert f"takes {needed} GB" in result.err
    assert not (result.cwd / "runs").exists()


# ---- a run


@pytest.mark.parametrize(
    ("num_envs", "args"),
    [
        (1, {"tau": 0.3, "gradient_steps": 3, "double_q": True}),
        (3, {"target_network_frequency": 42, "learning_starts": 61}),
        (1, {"target_network_frequency": 7, "tau": 0.5, "train_frequency": 20, "learning_starts": 0}),
    ],
)
def test_run(num_envs, args, monkeypatch, tmp_path):
    """The weights at the end are those of the algorithm by hand, from the batches that were drawn."""
    args = dict(target_network_frequency=30, tau=1.0, gradient_steps=1, train_frequency=6, learning_starts=50) | args
    args |= dict(total_timesteps=200, num_envs=num_envs, learning_rate=0.01, gamma=0.9)
    batches = watch(dqn, monkeypatch)
    agent = train(dqn, "Trace-v0", tmp_path, **args)
    every, starts, frequency = args["train_frequency"], args["learning_starts"], args["target_network_frequency"]
    updates = [step for step in range(every, 201, every) if step >= starts]
    assert [step for step, _ in batches] == np.repeat(updates, args["gradient_steps"]).tolist()

    torch.manual_seed(1)
    q = dqn.Agent(VECTOR, agent.action_space, dqn.Args(hidden_sizes=(16,)))
    target, optimizer, losses = copy.deepcopy(q), torch.optim.Adam(q.parameters(), lr=0.01), {}
    for i, (step, (obs, actions, rewards, next_obs, terminated)) in enumerate(batches):
        with torch.no_grad():
            values = target(torch.tensor(next_obs))
            best = (q(torch.tensor(next_obs)) if args.get("double_q") else values).argmax(1)
        y = torch.tensor(rewards) + 0.9 * torch.tensor(~terminated) * values[range(16), best]
        loss = (q(torch.tensor(obs))[range(16), actions] - y).pow(2).mean()
        losses[step] = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (i + 1) % args["gradient_steps"] == 0 and step // frequency > (step - every) // frequency:
            for old, new in zip(target.parameters(), q.parameters(), strict=True):
                old.data = args["tau"] * new.data + (1 - args["tau"]) * old.data
    saved = torch.load(next(tmp_path.glob("*/checkpoint.pt")))
    for name, value in q.state_dict().items():
        torch.testing.assert_close(saved["agent"][name], value, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(saved["target"][name], target.state_dict()[name], rtol=1e-3, atol=1e-3)
    logged = dict(read_events(next(tmp_path.iterdir()))["losses/q_loss"])
    assert logged == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize("env", ["Trace-v0", "PaidResets-v0"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_transitions(env, num_envs, monkeypatch, tmp_path):
    batches = watch(dqn, monkeypatch)
    train(dqn, env, tmp_path, num_envs=num_envs, total_timesteps=252, train_frequency=6, gradient_steps=6)
    check_transitions(batches, Trace.log, tmp_path)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_share_of_random_actions(num_envs, monkeypatch, tmp_path):
    monkeypatch.setattr(dqn.Agent, "numpy_policy", lambda agent: lambda obs: np.zeros(len(obs), np.int64))
    args = dict(total_timesteps=6000, learning_starts=5990, start_e=0.9, end_e=0.3, exploration_fraction=2 / 3)
    train(dqn, "Trace-v0", tmp_path, num_envs=num_envs, train_frequency=3 * num_envs, **args)
    actions = [step.action for step in Trace.log if step.env < 10**6]
    for third, epsilon in zip(np.array_split(actions, 3), [0.75, 0.45, 0.3], strict=True):  # the means
        shares = np.bincount(third, minlength=3) / len(third)
        assert shares == pytest.approx([1 - 2 / 3 * epsilon, epsilon / 3, epsilon / 3], abs=0.04)


def test_resume(monkeypatch, tmp_path):
    """The buffer is refilled before learning, epsilon goes on, and flags win."""
    args = dict(learning_starts=40, start_e=1, end_e=0, exploration_fraction=1)
    train(dqn, "Trace-v0", tmp_path, total_timesteps=100, **args)
    batches = watch(dqn, monkeypatch)
    resume(dqn, "Trace-v0", tmp_path, total_timesteps=200, learning_rate=0.007, **args)
    assert [step for step, _ in batches] == list(range(140, 201, 4))
    events = read_events(next(tmp_path.iterdir()))
    assert dict(events["charts/epsilon"])[104] == pytest.approx(1 - 103 / 200)
    saved = torch.load(next(tmp_path.glob("*/checkpoint.pt")))
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0.007


# ---- learning where the best policy and its values are known

FAST = dict(learning_rate=1e-2, buffer_size=2000, learning_starts=50, target_network_frequency=50, batch_size=32)
FAST |= dict(train_frequency=4, eval_episodes=20, start_e=1, end_e=0.1, exploration_fraction=0.5, tau=1)


@pytest.mark.parametrize("env", ["StartBandit-v0", "DictBandit-v0", "PictureBandit-v0"])
def test_learns_which_action_pays(env, tmp_path, capsys):
    args = FAST | (dict(learning_rate=1e-3, total_timesteps=300) if "Picture" in env else dict(total_timesteps=1000))
    train(dqn, env, tmp_path, **args)
    assert "mean_return=1.00" in capsys.readouterr().out


@pytest.mark.parametrize("double_q", [False, True])
def test_time_limit_takes_nothing(double_q, tmp_path):
    args = FAST | dict(learning_rate=0.05, target_network_frequency=20, double_q=double_q, hidden_sizes=())
    agent = train(dqn, "Alive-v0", tmp_path, total_timesteps=2000, gamma=0.9, **args)
    torch.testing.assert_close(agent(torch.eye(2)), torch.tensor([[10.0, 1], [1, 10]]), atol=0.3, rtol=0)


def test_learns_to_wait(tmp_path):
    agent = train(dqn, "Delay-v0", tmp_path, total_timesteps=2400, gamma=0.9, num_envs=4, **FAST)
    values = agent(torch.cat([torch.eye(4), torch.tensor([[0.0], [1], [1], [1]])], 1))
    assert values[0].tolist() == pytest.approx([0.2, 0.729], abs=0.06)
    torch.testing.assert_close(values[1:], torch.tensor([[0.81], [0.9], [1.0]]).expand(3, 2), atol=0.06, rtol=0)
