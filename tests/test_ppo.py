"""PPO's own equations; what it shares with other algorithms is in test_correctness.py."""

import math
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from algos import ppo
from tests.spies import (
    FROZEN,
    check_clipping,
    check_losses,
    distribution,
    keys,
    make_agent,
    played,
    scalars,
    spy_on_optimizers,
    spy_on_ppo_loss,
    train,
)


@pytest.fixture
def losses(monkeypatch):
    return spy_on_ppo_loss(monkeypatch)


@pytest.fixture
def adam_steps(monkeypatch):
    return spy_on_optimizers(monkeypatch)


# ---- the loss


def loss_of(log_probs, old_log_probs, advantages, entropy=None, values=None, old_values=None, returns=None, **args):
    """ppo_loss of a policy and critic that are nothing but numbers."""
    zeros = torch.zeros_like(log_probs)
    given = (zeros if x is None else x for x in (entropy, values, old_values, returns))
    entropy, values, old_values, returns = given
    agent = SimpleNamespace(evaluate_actions=lambda obs, actions: (log_probs, entropy, values))
    return ppo.ppo_loss(agent, zeros, zeros, old_log_probs, old_values, advantages, returns, ppo.Args(**args))


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_loss_is_the_equation_sample_by_sample(clip_vloss):
    rng, B = np.random.default_rng(0), 200
    log_probs, old_log_probs, advantages, entropy, values, old_values, returns = data = rng.normal(0, 0.4, (7, B))
    args = dict(clip_coef=0.15, vf_coef=0.7, ent_coef=0.3, clip_vloss=clip_vloss)
    objective, value_loss, cases = [], [], set()
    for i in range(B):
        ratio = math.exp(log_probs[i] - old_log_probs[i])
        clipped = min(max(ratio, 0.85), 1.15)
        cases.add((ratio > 1.15, ratio < 0.85, advantages[i] > 0))
        objective.append(min(ratio * advantages[i], clipped * advantages[i]))
        errors = [(values[i] - returns[i]) ** 2]
        if clip_vloss:
            moved = min(max(values[i] - old_values[i], -0.15), 0.15)
            errors.append((old_values[i] + moved - returns[i]) ** 2)
        value_loss.append(max(errors))
    assert len(cases) == 6  # a ratio above, below and within the limits, each with both signs of the advantage

    names = ("log_probs", "old_log_probs", "advantages", "entropy", "values", "old_values", "returns")
    tensors = {name: torch.as_tensor(x) for name, x in zip(names, data, strict=True)}
    loss, *parts, log_ratio = loss_of(**tensors, **args)
    expected = [-np.mean(objective), np.mean(value_loss), np.mean(entropy)]
    np.testing.assert_allclose([x.item() for x in parts], expected)
    np.testing.assert_allclose(loss.item(), expected[0] + 0.7 * expected[1] - 0.3 * expected[2])
    np.testing.assert_allclose(log_ratio, log_probs - old_log_probs)


def test_clipping_stops_the_gradient_only_where_the_ratio_has_moved_far_in_the_direction_of_the_advantage():
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.1, 0.9, 1.0])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 3.0])
    log_probs = ratio.log().requires_grad_()
    loss_of(log_probs, torch.zeros(7), advantages, clip_coef=0.2)[0].backward()
    stopped = torch.tensor([True, False, False, True, False, False, False])
    torch.testing.assert_close(log_probs.grad, torch.where(stopped, 0.0, -ratio * advantages / 7))


def test_value_clipping_stops_the_gradient_of_values_that_have_moved_far_towards_their_return():
    values = torch.tensor([0.5, 0.5, 0.1], requires_grad=True)  # from 0: far the right way, far the wrong way, a little
    returns = torch.tensor([2.0, -2.0, 2.0])
    zeros = torch.zeros(3)
    args = dict(vf_coef=0.5, clip_coef=0.2, clip_vloss=True)
    loss_of(zeros, zeros, zeros, values=values, old_values=zeros, returns=returns, **args)[0].backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 2.5, -1.9]) / 3)


@pytest.mark.parametrize("action_space", [spaces.Discrete(4), spaces.Box(-1, 1, (2,))])
def test_the_first_gradient_is_the_policy_gradient_plus_those_of_value_and_entropy(action_space):
    agent = make_agent(action_space=action_space)
    rng = np.random.default_rng(0)
    obs, advantages, returns = torch.randn(50, 3), torch.randn(50), torch.randn(50)
    actions = torch.as_tensor(agent.policy()(obs.numpy(), agent.noise(rng, 50)))
    old_log_probs, _, old_values = (x.detach() for x in agent.evaluate_actions(obs, actions))
    args = ppo.Args(vf_coef=0.4, ent_coef=0.2)
    loss = ppo.ppo_loss(agent, obs, actions, old_log_probs, old_values, advantages, returns, args)[0]
    gradients = torch.autograd.grad(loss, list(agent.parameters()))

    log_probs, entropy, values = agent.evaluate_actions(obs, actions)
    plain = -(advantages * log_probs).mean() + 0.4 * (values - returns).pow(2).mean() - 0.2 * entropy.mean()
    for ours, expected in zip(gradients, torch.autograd.grad(plain, list(agent.parameters())), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        assert expected.abs().max() > 0  # the loss reaches every parameter


# ---- the updates


@pytest.mark.parametrize("num_steps", [2, 16, 17])
def test_each_epoch_sees_each_transition_once_and_no_reset_step(num_steps, losses, tmp_path):
    K, M, rollouts = 3, 3, 5
    args = dict(num_steps=num_steps, total_timesteps=4 * num_steps * rollouts, update_epochs=K, num_minibatches=M)
    train(ppo, "Trace-v0", tmp_path, **args)
    assert len(losses) == rollouts * K * M
    steps = {step.key: step for timeline in played(num_steps) for step in timeline}
    for epoch in range(rollouts * K):
        calls = losses[epoch * M : (epoch + 1) * M]
        seen = [key for call in calls for key in keys(call)]
        expected = [step.key for step in steps.values() if step.rollout == epoch // K]
        assert sorted(seen) == sorted(expected)
        actions = torch.cat([call.actions for call in calls]).tolist()
        assert actions == [steps[key].action for key in seen]
        assert np.ptp([len(call.obs) for call in calls]) <= 1
    assert num_steps == 2 or len({tuple(keys(call)) for call in losses}) == len(losses)  # shuffled anew in each epoch


@pytest.mark.parametrize("env", ["Bandit-v0", "Trace-v0", "Target-v0", "PictureBandit-v0"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_ratio_is_1_until_the_first_optimizer_step_of_each_rollout(env, norm, losses, tmp_path):
    norm_obs = norm and env != "PictureBandit-v0"
    train(ppo, env, tmp_path, total_timesteps=3 * 64, norm_obs=norm_obs, norm_reward=norm, learning_rate=3e-3)
    assert len(losses) == 3 * 6
    for i, call in enumerate(losses):
        if i % 6 == 0:
            assert call.log_ratio.abs().max() < 2e-5
        else:
            assert call.log_ratio.abs().max() > 2e-5  # else the first half of this test would prove nothing


def test_log_probs_are_of_the_actions_before_they_are_clipped(losses, tmp_path):
    agent = train(ppo, "Target-v0", tmp_path, learning_rate=FROZEN, update_epochs=1)
    actions = torch.cat([call.actions for call in losses])
    assert (actions[:, :2].abs() > 1).any(0).all()  # a standard deviation of 1 often leaves [-1, 1]
    policy = distribution(agent, torch.cat([call.obs for call in losses]))
    old_log_probs = torch.cat([call.old_log_probs for call in losses])
    torch.testing.assert_close(old_log_probs, policy.log_prob(actions).detach())


@pytest.mark.parametrize(("max_grad_norm", "clipped"), [(1e-3, True), (1e6, False)])
def test_each_step_takes_the_gradient_of_its_minibatch_clipped_to_the_norm(
    max_grad_norm, clipped, losses, adam_steps, tmp_path
):
    train(ppo, "Trace-v0", tmp_path, max_grad_norm=max_grad_norm, ent_coef=0.1)
    assert len(losses) == len(adam_steps) == 6
    check_clipping(adam_steps, losses, max_grad_norm, clipped)


@pytest.mark.parametrize("target_kl", [None, 1e-9, 0.01, 1e9])
def test_epochs_end_with_the_first_that_exceeds_the_target_kl(target_kl, losses, tmp_path):
    K, M, rollouts = 8, 2, 4
    args = dict(update_epochs=K, num_minibatches=M, total_timesteps=64 * rollouts, learning_rate=3e-3)
    train(ppo, "Trace-v0", tmp_path, target_kl=target_kl, **args)
    epochs = [losses[i : i + M] for i in range(0, len(losses), M)]
    by_rollout = [list(group) for _, group in groupby(epochs, key=lambda calls: rollout_of(calls[0]))]
    assert len(by_rollout) == rollouts
    counts = [len(group) for group in by_rollout]
    if target_kl in (None, 1e9):
        assert counts == [K] * rollouts
    elif target_kl == 1e-9:
        assert counts == [1] * rollouts
    else:
        assert max(counts) > 1
        assert min(counts) < K
        for group in by_rollout:
            *earlier, last = [mean_kl(epoch) for epoch in group]
            assert all(kl <= target_kl for kl in earlier)
            assert last > target_kl or len(group) == K


def rollout_of(call) -> int:
    when = {step.key: step.rollout for timeline in played(16) for step in timeline}
    return when[keys(call)[0]]


def mean_kl(epoch) -> float:
    """The estimate (ρ - 1) - log ρ of KL(π_old || π), over all samples of an epoch."""
    log_ratio = torch.cat([call.log_ratio for call in epoch])
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


def test_logged_losses_are_those_of_the_last_epoch_of_each_rollout(losses, tmp_path):
    K, M = 3, 2
    train(ppo, "Trace-v0", tmp_path, total_timesteps=3 * 64, update_epochs=K, num_minibatches=M, learning_rate=0.01)
    logged = scalars(tmp_path)
    for rollout in range(3):
        epoch = losses[((rollout + 1) * K - 1) * M : (rollout + 1) * K * M]
        ratio = torch.cat([call.log_ratio for call in epoch]).exp()
        returns = torch.cat([call.returns for call in epoch])
        errors = returns - torch.cat([call.old_values for call in epoch])
        expected = {
            "policy_loss": epoch[-1].policy_loss,
            "value_loss": epoch[-1].value_loss,
            "entropy": epoch[-1].entropy,
            "approx_kl": mean_kl(epoch),
            "clipfrac": ((ratio < 0.8) | (ratio > 1.2)).float().mean(),
            "explained_variance": 1 - errors.var() / returns.var(),
        }
        check_losses(logged, rollout, (rollout + 1) * 64, expected)
