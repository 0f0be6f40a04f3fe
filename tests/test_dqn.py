"""DQN's own equations and schedules; the replay buffer is in test_replay.py."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces

from algos import dqn
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
from tests.spies import VECTOR, mean_return, played, shake
from tests.tiny_envs import Trace


def make_agent(obs_space=VECTOR, hidden_sizes=(16,)):
    agent = dqn.Agent(obs_space, spaces.Discrete(3), dqn.Args(hidden_sizes=hidden_sizes))
    shake(agent.parameters(), 0.1)
    return agent


def greedy(agent, obs) -> int:
    with torch.no_grad():
        return agent(torch.tensor(obs, dtype=torch.float32)[None]).argmax().item()


# ---- the target

ONLINE = torch.tensor([[1.0, 9.0, 2.0], [5.0, 4.0, 3.0], [0.0, 0.0, 7.0], [-5.0, -1.0, -3.0]])
TARGET = torch.tensor([[4.0, 1.0, 3.0], [2.0, 8.0, 6.0], [9.0, 1.0, 5.0], [-2.0, -6.0, -4.0]])


@pytest.mark.parametrize(
    ("double_q", "values"),
    [
        (False, [4.0, 8.0, 9.0, -2.0]),  # the target network's largest
        (True, [1.0, 2.0, 5.0, -6.0]),  # its value of the action that the online network finds best
    ],
)
def test_the_target_bootstraps_from_the_next_state_unless_the_episode_terminated(double_q, values):
    args = dqn.Args(gamma=0.5, double_q=double_q)
    rewards, next_obs = torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.arange(4)
    for ended in ([0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]):
        terminated = torch.tensor(ended, dtype=torch.bool)
        y = dqn.bellman_target(lambda s: ONLINE[s], lambda s: TARGET[s], rewards, next_obs, terminated, args)
        assert y.tolist() == [r + 0.5 * v * (1 - e) for r, v, e in zip(rewards.tolist(), values, ended, strict=True)]


@pytest.mark.parametrize("double_q", [False, True])
def test_the_target_is_a_constant(double_q):
    agent, target = make_agent(), make_agent()
    args = dqn.Args(double_q=double_q)
    y = dqn.bellman_target(agent, target, torch.zeros(5), torch.randn(5, 3), torch.zeros(5, dtype=torch.bool), args)
    assert y.shape == (5,)
    assert not y.requires_grad


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_target_network_moves_by_tau_towards_the_online_network(tau):
    online, target = make_agent(), make_agent()
    before, online_before = copies(target), copies(online)
    dqn.update_target(target, online, tau)
    assert same(copies(online), online_before)
    for old, new, goal in zip(before, copies(target), online_before, strict=True):
        torch.testing.assert_close(new, tau * goal + (1 - tau) * old)
        assert not torch.allclose(old, goal)


# ---- exploration


@pytest.mark.parametrize(("step", "epsilon"), [(0, 0.9), (100, 0.7), (200, 0.5), (300, 0.3), (400, 0.1), (2000, 0.1)])
def test_epsilon_falls_linearly_and_then_stays(step, epsilon):
    args = dqn.Args(total_timesteps=2000, exploration_fraction=0.2, start_e=0.9, end_e=0.1)
    assert dqn.linear_epsilon(args, step) == pytest.approx(epsilon)
    np.testing.assert_allclose(dqn.linear_epsilon(args, np.array([step, step])), [epsilon, epsilon])


def test_epsilon_may_fall_at_once_or_never():
    args = dqn.Args(total_timesteps=1000, exploration_fraction=0, start_e=0.9, end_e=0.1)
    assert dqn.linear_epsilon(args, 1) == pytest.approx(0.1)
    args = dqn.Args(total_timesteps=1000, exploration_fraction=1, start_e=0.3, end_e=0.3)
    assert dqn.linear_epsilon(args, np.array([0, 1, 500, 1000])) == pytest.approx(0.3)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_as_many_actions_are_random_as_epsilon_says(num_envs, monkeypatch, tmp_path):
    monkeypatch.setattr(dqn.Agent, "policy", lambda agent: lambda obs: np.zeros(len(obs), np.int64))
    args = dict(total_timesteps=6000, learning_starts=5990, start_e=0.9, end_e=0.3, exploration_fraction=2 / 3)
    train(dqn, "Trace-v0", tmp_path, num_envs=num_envs, train_frequency=3 * num_envs, **args)
    actions = [[], [], []]  # by thirds of the run
    for timeline in played(1):
        for step in timeline:
            actions[3 * step.t * num_envs // 6000].append((step.t, step.action))
    actions = [[action for _, action in sorted(third)] for third in actions]
    for third, epsilon in zip(actions, [0.75, 0.45, 0.3], strict=True):  # the means
        shares = np.bincount(third, minlength=3) / len(third)
        assert shares == pytest.approx([1 - 2 / 3 * epsilon, epsilon / 3, epsilon / 3], abs=0.04)
    at = {(step.t, step.env): step.action for timeline in played(1) for step in timeline}
    pairs = [(action, at[t, env + 1]) for (t, env), action in at.items() if (t, env + 1) in at]
    if pairs:  # environments explore independently
        assert np.corrcoef(np.array(pairs).T)[0, 1] == pytest.approx(0, abs=0.1)
    first, last = (np.mean(np.array(x, bool)) for x in (actions[0][:500], actions[1][-500:]))
    assert [first, last] == pytest.approx([2 / 3 * 0.85, 2 / 3 * 0.35], abs=0.1)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_other_actions_are_the_best_by_the_network_of_now(num_envs, monkeypatch, tmp_path):
    seen, best, original = watch(dqn, monkeypatch), {}, dqn.Agent.policy

    def spy(agent):
        with torch.no_grad():
            seen.agent.q[-1].bias.normal_(0, 5)  # another network each time
        act = original(agent)

        def act_and_tell(obs):
            best.update({tuple(map(int, row)): greedy(seen.agent, row) for row in obs})
            return act(obs)

        return act_and_tell

    monkeypatch.setattr(dqn.Agent, "policy", spy)
    args = dict(start_e=0, end_e=0, train_frequency=3 * num_envs, total_timesteps=210)
    train(dqn, "Trace-v0", tmp_path, num_envs=num_envs, **args)
    assert len({step.action for step in Trace.log}) == 3
    for step in Trace.log:
        assert step.action == best[step.env, step.episode, step.step]


def test_the_evaluation_is_greedy(tmp_path):
    agent = train(dqn, "Trace-v0", tmp_path, total_timesteps=30, start_e=1, end_e=1, eval_episodes=9)
    evaluated = [step for step in Trace.log if step.env >= 10**7]
    assert len(evaluated) > 10
    for step in evaluated:
        assert step.action == greedy(agent, [step.env, step.episode, step.step])


# ---- the network

IMAGES = (40, 36, 3), (4, 36, 40), (8, 8, 3)  # the last is too small for the convolutions


@pytest.mark.parametrize(
    "obs_space",
    [
        VECTOR,
        spaces.Box(-9, 9, ()),
        spaces.Box(-9, 9, (2, 4)),
        *(spaces.Box(0, 255, shape, np.uint8) for shape in IMAGES),
    ],
)
@pytest.mark.parametrize("hidden_sizes", [(), (8,), (16, 8, 8)])
def test_the_policy_takes_the_best_action_of_the_network_as_it_is(obs_space, hidden_sizes):
    torch.manual_seed(0)
    agent = make_agent(obs_space, hidden_sizes=hidden_sizes)
    obs_space.seed(0)
    obs = np.stack([obs_space.sample() for _ in range(20)]).astype(agent.obs_dtype)
    for _ in range(2):
        with torch.no_grad():
            agent.q[-1].weight.neg_()  # what was best is worst
            agent.q[-1].bias.neg_()
            best = agent(torch.as_tensor(obs)).argmax(1).numpy()
        np.testing.assert_array_equal(agent.policy()(obs), best)


def test_q_is_a_network_with_relu_or_linear():
    for hidden_sizes in ((), (8,), (16, 8)):
        agent, obs = make_agent(hidden_sizes=hidden_sizes), torch.randn(20, 3)
        weights = list(agent.q.parameters())
        assert [w.shape[0] for w in weights[::2]] == [*hidden_sizes, 3]
        torch.testing.assert_close(agent(obs), forward(weights, obs))


def test_channels_may_be_first_or_last():
    first, last = (make_agent(spaces.Box(0, 255, shape, np.uint8)) for shape in ((3, 44, 40), (44, 40, 3)))
    last.load_state_dict(first.state_dict())
    images = torch.randint(0, 256, (5, 3, 44, 40), dtype=torch.uint8)
    q = first(images)
    torch.testing.assert_close(q, last(images.permute(0, 2, 3, 1)))
    assert len(set(q[:, 0].tolist())) == 5


def test_other_action_spaces_are_refused():
    for space in (spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 2])):
        with pytest.raises(dqn.UsageError, match="Discrete"):
            dqn.Agent(VECTOR, space, dqn.Args())


# ---- a run


@pytest.mark.parametrize(
    ("num_envs", "args"),
    [
        (1, {}),
        (1, {"double_q": True, "tau": 0.3, "gradient_steps": 3, "target_network_frequency": 10}),
        (3, {"double_q": True, "target_network_frequency": 42}),
        (3, {"tau": 0.5, "target_network_frequency": 6, "hidden_sizes": ()}),
    ],
)
def test_the_weights_follow_the_gradient_of_the_squared_error(num_envs, args, monkeypatch, tmp_path):
    """Each update by hand, from the batch drawn for it."""
    seen = watch(dqn, monkeypatch)
    args = dict(target_network_frequency=30, tau=1.0, gradient_steps=1, double_q=False, train_frequency=6) | args
    train(dqn, "Trace-v0", tmp_path, num_envs=num_envs, total_timesteps=150, learning_rate=0.01, gamma=0.9, **args)
    target, batch = copies(seen.initial), None
    for event in seen.events:
        if event.kind == "sample":
            batch = event
        elif event.kind == "adam":
            online = [x.clone().requires_grad_() for x in event.before]
            y = []
            for reward, row, terminated in zip(batch.rewards.tolist(), batch.next_obs, batch.terminated, strict=True):
                values = forward(target, row)
                best = (forward(online, row) if args["double_q"] else values).argmax()
                y.append(reward if terminated else reward + 0.9 * values[best].item())
            q = torch.stack([forward(online, obs)[a] for obs, a in zip(batch.obs, batch.actions, strict=True)])
            gradients = torch.autograd.grad(((q - torch.tensor(y)) ** 2).mean(), online)
            torch.testing.assert_close(event.gradients, list(gradients), rtol=1e-3, atol=1e-3)
        else:
            target = [args["tau"] * x + (1 - args["tau"]) * old for x, old in zip(event.online, target, strict=True)]
            torch.testing.assert_close(event.after, target, rtol=1e-4, atol=1e-5)
    check_adam(seen, events(seen, "adam"), 0.01, copies(seen.agent))
    assert len(events(seen, "adam")) == len(events(seen, "sample")) > 20
    assert not torch.allclose(copies(seen.agent)[0], copies(seen.initial)[0], atol=0.05)


@pytest.mark.parametrize("env", ["Trace-v0", "PaidResets-v0"])
@pytest.mark.parametrize(("num_envs", "train_frequency"), [(1, 1), (1, 7), (3, 6)])
def test_the_transitions_learned_from_are_those_played_and_no_reset_step(
    env, num_envs, train_frequency, monkeypatch, tmp_path
):
    seen = watch(dqn, monkeypatch)
    args = dict(num_envs=num_envs, train_frequency=train_frequency, total_timesteps=250, batch_size=24)
    train(dqn, env, tmp_path, **args, gradient_steps=train_frequency, learning_starts=100)
    found = check_transitions(seen, Trace.log)
    ends = {(step.terminated, step.truncated) for step in Trace.log if (step.env, step.episode, step.step) in found}
    assert ends == {(False, False), (True, False), (False, True), (True, True)}
    check_returns(Trace.log, tmp_path)
    assert len(found) > 0.9 * len([step for timeline in played(1) for step in timeline if step.t * num_envs < 220])


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(
    ("learning_starts", "frequency", "gradient_steps", "target_frequency"),
    [(0, 6, 1, 30), (60, 6, 2, 12), (61, 3, 1, 3), (50, 12, 3, 6), (0, 6, 1, 20), (198, 6, 1, 6)],
)
def test_gradient_steps_and_target_updates_are_as_often_as_the_flags_say(
    num_envs, learning_starts, frequency, gradient_steps, target_frequency, monkeypatch, tmp_path
):
    seen, total = watch(dqn, monkeypatch), 200
    args = dict(learning_starts=learning_starts, train_frequency=frequency, gradient_steps=gradient_steps)
    args |= dict(target_network_frequency=target_frequency, total_timesteps=total, num_envs=num_envs, tau=0.5)
    train(dqn, "Trace-v0", tmp_path, **args)
    updates = [step for step in range(frequency, total + 1, frequency) if step >= learning_starts]
    assert seen.steps == total - total % frequency
    assert steps(seen, "adam") == steps(seen, "sample") == np.repeat(updates, gradient_steps).tolist()
    targets = steps(seen, "target")
    assert all(event.tau == 0.5 for event in events(seen, "target"))
    span = max(target_frequency, frequency)
    assert set(targets) <= set(updates)
    assert np.abs(np.diff(targets) - span).max(initial=0) < (frequency if span % frequency else 1)
    assert targets[0] < updates[0] + span  # none is left out, the last ones neither
    assert targets[-1] > updates[-1] - span


def test_the_target_network_changes_only_in_its_updates(monkeypatch, tmp_path):
    seen = watch(dqn, monkeypatch)
    train(dqn, "Trace-v0", tmp_path, total_timesteps=200, train_frequency=2, target_network_frequency=20)
    updates = events(seen, "target")
    last = copies(seen.initial)
    for update in updates:
        assert same(update.before, last)
        assert not same(update.before, update.after)
        last = update.after
    assert len(updates) > 5
    assert same(copies(updates[-1].target), last)


def test_the_transitions_learned_from_may_have_images(monkeypatch, tmp_path):
    """Transitions of one step each, whose next observation is that of the end."""
    seen = watch(dqn, monkeypatch)
    train(dqn, "PictureBandit-v0", tmp_path, total_timesteps=60, train_frequency=10, num_envs=2, learning_starts=30)
    for batch in events(seen, "sample"):
        assert batch.obs.dtype == torch.uint8
        assert torch.equal(batch.obs, batch.next_obs)
        which = batch.obs[:, 0, 0].argmax(1)
        assert batch.rewards.tolist() == (batch.actions == which).float().tolist()
        assert batch.terminated.all()


def test_a_resumed_run_refills_its_buffer_before_it_learns(monkeypatch, tmp_path):
    args = dict(train_frequency=4, learning_starts=40)
    trained = copy.deepcopy(train(dqn, "Trace-v0", tmp_path, total_timesteps=100, **args))
    seen = watch(dqn, monkeypatch)
    resume(dqn, "Trace-v0", tmp_path, total_timesteps=200, learning_rate=0.007, **args)
    assert same(copies(seen.initial), copies(trained))
    assert steps(seen, "adam") == list(range(40, 101, 4))
    assert {event.lr for event in events(seen, "adam")} == {0.007}  # a flag given beside --resume wins
    found = check_transitions(seen, Trace.log)  # only of this run: the log of the other was cleared
    assert min(env for env, _, _ in found) == 101


def test_epsilon_of_a_resumed_run_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(dqn.Agent, "policy", lambda agent: lambda obs: np.zeros(len(obs), np.int64))
    args = dict(start_e=1, end_e=0, exploration_fraction=0.5, learning_starts=50)
    train(dqn, "Trace-v0", tmp_path, total_timesteps=52, **args)
    resume(dqn, "Trace-v0", tmp_path, total_timesteps=100, **args)
    assert {step.action for step in Trace.log} == {0}


# ---- learning on environments whose best policy and values are known

FAST = dict(learning_rate=1e-2, buffer_size=2000, learning_starts=50, target_network_frequency=50, batch_size=32)
FAST |= dict(train_frequency=4, eval_episodes=20, start_e=1, end_e=0.1, exploration_fraction=0.5, tau=1)


@pytest.mark.parametrize("env", ["Bandit-v0", "StartBandit-v0", "DictBandit-v0"])
def test_learns_which_action_pays(env, tmp_path, capsys):
    train(dqn, env, tmp_path, total_timesteps=1000, **FAST)
    assert mean_return(capsys) == 1.0


def test_learns_which_action_pays_from_pictures(tmp_path, capsys):
    args = FAST | dict(learning_rate=1e-3)
    train(dqn, "PictureBandit-v0", tmp_path, total_timesteps=300, **args)
    assert mean_return(capsys) == 1.0


@pytest.mark.parametrize("num_envs", [1, 4])
def test_learns_that_a_later_reward_is_worth_more_than_one_at_once(num_envs, tmp_path, capsys):
    agent = train(dqn, "Delay-v0", tmp_path, total_timesteps=2400, gamma=0.9, num_envs=num_envs, **FAST)
    assert mean_return(capsys) == 1.0
    states = torch.cat([torch.eye(4), torch.tensor([[0.0], [1], [1], [1]])], 1)
    values = agent(states)
    assert values[0].tolist() == pytest.approx([0.2, 0.729], abs=0.06)
    torch.testing.assert_close(values[1:], torch.tensor([[0.81], [0.9], [1.0]]).expand(3, 2), atol=0.06, rtol=0)


@pytest.mark.parametrize("double_q", [False, True])
def test_a_time_limit_takes_nothing_from_the_value_of_staying_alive(double_q, tmp_path, capsys):
    args = FAST | dict(learning_rate=0.05, target_network_frequency=20, double_q=double_q, hidden_sizes=())
    agent = train(dqn, "Alive-v0", tmp_path, total_timesteps=2000, gamma=0.9, **args)
    assert mean_return(capsys) == 10  # the time limit
    torch.testing.assert_close(agent(torch.eye(2)), torch.tensor([[10.0, 1.0], [1.0, 10.0]]), atol=0.3, rtol=0)


@pytest.mark.parametrize("double_q", [False, True])
def test_a_table_learns_the_shortest_way_over_the_lake_from_random_steps(double_q, tmp_path, capsys):
    args = dict(hidden_sizes=(), learning_rate=0.01, gamma=0.8, start_e=1, end_e=1, num_envs=8, buffer_size=5000)
    args |= dict(train_frequency=8, gradient_steps=8, batch_size=64, learning_starts=1000, target_network_frequency=48)
    args |= dict(total_timesteps=3000, tau=1, eval_episodes=1, double_q=double_q)
    agent = train(dqn, "tests.tiny_control:DryLake-v0", tmp_path, **args)
    assert mean_return(capsys) == 1.0
    assert len(list(agent.parameters())) == 2
    table, state = agent(torch.eye(16)), 0
    for steps_left in (6, 5, 4, 3, 2, 1):
        action = table[state].argmax().item()
        assert table[state, action].item() == pytest.approx(0.8 ** (steps_left - 1), abs=0.05)
        state += {0: -1, 1: 4, 2: 1, 3: -4}[action]
    assert state == 15
