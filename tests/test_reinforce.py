"""REINFORCE's own equations; what it shares with other algorithms is in test_correctness.py."""

import copy
from itertools import groupby

import numpy as np
import pytest
import torch
from gymnasium import spaces

from algos import reinforce
from tests.spies import (
    VECTOR,
    check_losses,
    distribution,
    flat,
    keys,
    make_agent,
    played,
    policy_of,
    scalars,
    spy_on_optimizers,
    train,
    value_of,
    watch,
)
from tests.tiny_envs import Trace

WEIGHTS = ("total-return", "reward-to-go", "baseline")


def whole_episodes(update) -> list[list]:
    """What Trace logged of the episodes that an update learned from; those must be whole."""
    logged = {env: list(steps) for env, steps in groupby(sorted(Trace.log), key=lambda step: step.env)}
    episodes = []
    for env in sorted({env for env, _, _ in keys(update)}):
        episodes.append([step for step in logged[env] if step.episode == 0])
        assert episodes[-1][-1].terminated or episodes[-1][-1].truncated
    return episodes


# ---- the parts of an update


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_rewards_to_go_are_the_sum_of_their_definition(gamma):
    rewards = np.random.default_rng(0).normal(size=(12, 3))
    returns = reinforce.rewards_to_go(rewards, gamma)
    for t in range(12):
        for n in range(3):
            expected = sum(gamma ** (k - t) * rewards[k, n] for k in range(t, 12))
            assert returns[t, n] == pytest.approx(expected, abs=1e-9)


def some_episodes(action_space, lengths):
    """An agent, and obs, actions and weights of episodes of these lengths, with NaN after their ends."""
    agent, T, N = make_agent(VECTOR, action_space, module=reinforce, hidden_sizes=(8,)), max(lengths), len(lengths)
    obs, weights = torch.randn(T, N, 3), torch.randn(T, N)
    noise = agent.noise(np.random.default_rng(0), T * N)
    actions = torch.as_tensor(agent.policy()(obs.reshape(T * N, 3).numpy(), noise)).reshape(
        T, N, *noise.shape[1:-1], -1
    )
    actions = actions[..., 0] if agent.is_discrete else actions
    for n, length in enumerate(lengths):
        obs[length:, n], weights[length:, n] = torch.nan, torch.nan
    return agent, obs, actions, weights


@pytest.mark.parametrize("lengths", [[7, 1, 4, 3], [5]])
@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))])
def test_the_gradient_is_the_mean_over_episodes_of_the_sum_over_steps(action_space, lengths):
    agent, obs, actions, weights = some_episodes(action_space, lengths)
    parameters, of_episodes = policy_of(agent), []
    for n, length in enumerate(lengths):
        total = 0.0
        for t in range(length):
            (log_prob,) = distribution(agent, obs[t, n][None]).log_prob(actions[t, n])
            total = total + weights[t, n] * flat(torch.autograd.grad(log_prob, parameters))
        of_episodes.append(total)
    of_episodes = torch.stack(of_episodes)
    variance = reinforce.policy_gradient(agent, parameters, obs, actions, weights, np.array(lengths))
    torch.testing.assert_close(flat([x.grad for x in parameters]), of_episodes.mean(0), rtol=1e-4, atol=1e-5)
    assert not any(x.grad is not None for x in agent.critic.parameters())
    if len(lengths) == 1:
        assert variance == 0
    else:
        assert variance == pytest.approx(of_episodes.var(0, correction=1).sum().item(), rel=1e-4)


# ---- what train() learns from


@pytest.mark.parametrize("num_envs", [1, 4])
def test_each_environment_gives_the_first_whole_episode_after_each_reset(num_envs, monkeypatch, tmp_path):
    updates, budget = watch(reinforce, monkeypatch), 210
    train(reinforce, "Trace-v0", tmp_path, num_envs=num_envs, total_timesteps=budget)
    assert len(updates) > 5
    start = 0
    for update in updates:
        assert {env for env, _, _ in keys(update)} == {1 + start + n for n in range(num_envs)}  # --seed 1
        episodes = whole_episodes(update)
        steps = [step for episode in episodes for step in episode]
        assert sorted(keys(update)) == [(step.env, 0, step.step) for step in steps]
        actions = dict(zip(keys(update), update.actions.tolist(), strict=True))
        assert [actions[step.env, 0, step.step] for step in steps] == [step.action for step in steps]
        assert update.lengths == [len(episode) for episode in episodes]
        start += num_envs * max(update.lengths)
    assert scalars(tmp_path)["losses/entropy"][-1][0] == start <= budget
    # What is left of the budget was played, too, but not all of its episodes are whole.
    last = [timeline for timeline in played(budget) if timeline[0].env > start]
    left = num_envs * max(timeline[-1].t + 1 for timeline in last)
    assert budget - num_envs < start + left <= budget
    assert not all(any(step.ended for step in timeline) for timeline in last)


@pytest.mark.parametrize("norm_weight", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("env", "args"),
    [
        ("Trace-v0", {}),
        ("PaidResets-v0", {}),
        ("Trace-v0", {"norm_reward": True}),
        ("LateJackpot-v0", {}),
        ("LateJackpot-v0", {"norm_reward": True}),
    ],
)
def test_the_weights_are_those_of_the_steps_played(env, args, weight, norm_weight, monkeypatch, tmp_path):
    updates, gamma = watch(reinforce, monkeypatch), 0.9
    args = dict(num_envs=32, total_timesteps=600, learning_rate=0.01, gamma=gamma, weight=weight) | args
    train(reinforce, env, tmp_path, norm_weight=norm_weight, **args)
    assert len(updates) == 3
    sums = []
    for update in updates:
        rewards, expected, expected_returns = {}, {}, {}
        for episode in whole_episodes(update):
            rewards[episode[0].env] = [step.reward for step in episode]
            for t in range(len(episode)):
                sums.append(sum(gamma ** (t - k) * episode[k].reward for k in range(t + 1)))
        for env_, of_episode in rewards.items():
            if args.get("norm_reward"):
                of_episode = np.clip(np.array(of_episode) / np.std(sums), -10, 10)
            for t in range(len(of_episode)):
                to_go = sum(gamma ** (k - t) * of_episode[k] for k in range(t, len(of_episode)))
                whole = sum(gamma**k * of_episode[k] for k in range(len(of_episode)))
                value = value_of(update.agent, [(env_, 0, t)])[0]
                numbers = {"total-return": whole, "reward-to-go": to_go, "baseline": to_go - value}
                expected[env_, 0, t], expected_returns[env_, 0, t] = numbers[weight], to_go
        weights = np.array([expected[key] for key in keys(update)])
        if norm_weight:
            weights = (weights - weights.mean()) / weights.std()
        np.testing.assert_allclose(update.advantages, weights, rtol=1e-3, atol=1e-3)
        if weight == "baseline":
            returns = [expected_returns[key] for key in keys(update)]
            np.testing.assert_allclose(update.returns, returns, rtol=1e-3, atol=1e-3)
    if env == "LateJackpot-v0":
        assert max(step.reward for step in Trace.log if step.episode == 0) / np.std(sums) > 10  # it is clipped


def test_the_baseline_is_the_critic_from_before_the_regression_of_the_same_update(monkeypatch, tmp_path):
    updates = watch(reinforce, monkeypatch)
    train(reinforce, "Trace-v0", tmp_path, total_timesteps=3 * 64, learning_rate=0.03)
    for last, update in zip(updates, updates[1:], strict=False):
        states = update.obs.tolist()
        np.testing.assert_allclose(
            update.advantages, update.returns.numpy() - value_of(update.agent, states), atol=1e-3
        )
        critic, before = (flat(x.critic.parameters()) for x in (update.agent, last.agent))
        assert torch.equal(critic, flat(update.agent_before_fit.critic.parameters()))
        assert not torch.allclose(critic, before, atol=1e-3)  # it learns
        policy, stepped = (flat(policy_of(x)) for x in (update.agent, update.agent_before_fit))
        assert not torch.equal(policy, stepped)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_critic_learns_only_if_it_is_the_baseline(weight, monkeypatch, tmp_path):
    updates = watch(reinforce, monkeypatch)
    agent = train(reinforce, "Trace-v0", tmp_path, weight=weight, learning_rate=0.03)
    before, after = (flat(x.critic.parameters()) for x in (updates[0].agent, agent))
    assert torch.equal(before, after) == (weight != "baseline")
    assert ("losses/value_loss" in scalars(tmp_path)) == (weight == "baseline")


def test_each_update_is_one_step_of_adam_up_the_gradient(monkeypatch, tmp_path):
    updates, steps, rate = watch(reinforce, monkeypatch), spy_on_optimizers(monkeypatch), 0.003
    args = dict(weight="reward-to-go", learning_rate=rate, anneal_lr=False, total_timesteps=100)
    agent = train(reinforce, "Trace-v0", tmp_path, **args)
    assert len(updates) == len(steps) > 2
    agents = [*(update.agent for update in updates), agent]
    mean = mean_square = 0.0
    for i, update in enumerate(updates):
        assert torch.equal(update.gradient, steps[i].gradient)
        before, after = (flat(policy_of(x)).detach() for x in agents[i : i + 2])
        mean = 0.9 * mean + 0.1 * update.gradient
        mean_square = 0.999 * mean_square + 0.001 * update.gradient.square()
        slope = mean / (1 - 0.9 ** (i + 1)) / ((mean_square / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
        torch.testing.assert_close(after, before + rate * slope, rtol=1e-4, atol=1e-6)


def test_logged_losses_are_those_of_the_steps_played(monkeypatch, tmp_path):
    updates = watch(reinforce, monkeypatch)
    train(reinforce, "Trace-v0", tmp_path, total_timesteps=3 * 64, learning_rate=0.01)
    logged, start = scalars(tmp_path), 0
    for i, update in enumerate(updates):
        start += 4 * max(update.lengths)
        errors = update.returns - torch.as_tensor(value_of(update.agent, update.obs.tolist()))
        expected = {
            "gradient_variance": update.variance,
            "value_loss": update.value_loss,
            "entropy": distribution(update.agent, update.obs).entropy().mean().item(),
            "explained_variance": 1 - (errors.var() / update.returns.var()).item(),
        }
        check_losses(logged, i, start, expected)


def test_a_budget_without_one_whole_episode_in_each_environment_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(reinforce, "Endless-v0", tmp_path, total_timesteps=50)
    assert stop.value.code == 1
    assert "\nerror: no update: REINFORCE needs whole episodes" in capsys.readouterr().err


# ---- the estimate


@pytest.fixture(scope="module")
def estimates(tmp_path_factory):
    """For each weight: a policy that stays as it is, the gradients of 15 updates, and the variances over episodes."""
    results = {}
    for weight in WEIGHTS:
        with pytest.MonkeyPatch.context() as patch:
            updates = []
            original = reinforce.policy_gradient

            def spy(agent, parameters, *episodes, original=original, updates=updates):
                variance = original(agent, parameters, *episodes)
                updates.append((copy.deepcopy(agent), flat([x.grad for x in parameters]).clone(), variance))
                for x in parameters:
                    x.grad.zero_()
                return variance

            patch.setattr(reinforce, "policy_gradient", spy)
            args = dict(num_envs=64, total_timesteps=25 * 64 * 4, hidden_sizes=(8,), gamma=1.0, learning_rate=0.03)
            train(reinforce, "Wages-v0", tmp_path_factory.mktemp(weight), weight=weight, critic_updates=10, **args)
        agents, gradients, variances = zip(*updates[10:], strict=True)  # when the critic is fitted
        assert torch.equal(flat(policy_of(agents[0])), flat(policy_of(agents[-1])))
        results[weight] = (agents[0], torch.stack(gradients), np.array(variances))
    return results


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_estimate_is_unbiased_with_each_weight(weight, estimates):
    agent, gradients, variances = estimates[weight]
    probability = agent.actor(torch.eye(4)).softmax(-1)[:, 1]  # of the action that pays, at each step
    exact = flat(torch.autograd.grad(probability.sum(), policy_of(agent)))
    square_error = (gradients.mean(0) - exact).square().sum().item()
    expected = variances.mean() / (64 * len(gradients))
    assert square_error < 9 * expected
    if weight == "baseline":
        assert square_error < 0.1 * exact.square().sum()  # so that a bias of this size would be seen


def test_the_variance_falls_from_the_total_return_to_the_reward_to_go_to_the_baseline(estimates):
    total_return, to_go, baseline = (estimates[weight][2].mean() for weight in WEIGHTS)
    assert baseline < 0.2 * to_go
    assert to_go < 0.8 * total_return
