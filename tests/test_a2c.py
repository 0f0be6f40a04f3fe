"""A2C's own equations; what it shares with other algorithms is in test_correctness.py."""

import numpy as np
import pytest
import torch

from algos import a2c
from tests.spies import check_clipping, check_losses, distribution, flat, scalars, spy_on_optimizers, train, watch


def test_loss_is_the_equation_sample_by_sample():
    rng, B = np.random.default_rng(0), 50
    log_probs, entropy, values, advantages, returns = data = rng.normal(size=(5, B))
    objective, value_loss, total_entropy = 0.0, 0.0, 0.0
    for i in range(B):
        objective += log_probs[i] * advantages[i] / B
        value_loss += (values[i] - returns[i]) ** 2 / B
        total_entropy += entropy[i] / B
    given = [torch.tensor(x, requires_grad=k < 3) for k, x in enumerate(data)]
    loss, *parts = a2c.a2c_loss(*given, a2c.Args(vf_coef=0.7, ent_coef=0.3))
    np.testing.assert_allclose([x.item() for x in parts], [-objective, value_loss, total_entropy])
    np.testing.assert_allclose(loss.item(), -objective + 0.7 * value_loss - 0.3 * total_entropy)

    loss.backward()
    torch.testing.assert_close(given[0].grad, -given[3] / B)
    torch.testing.assert_close(given[1].grad, torch.full((B,), -0.3 / B, dtype=torch.float64))
    torch.testing.assert_close(given[2].grad, 0.7 * 2 * torch.tensor(values - returns) / B)


@pytest.mark.parametrize(("max_grad_norm", "clipped"), [(1e-3, True), (1e6, False)])
def test_each_step_takes_the_gradient_of_its_rollout_clipped_to_the_norm(max_grad_norm, clipped, monkeypatch, tmp_path):
    updates, steps = watch(a2c, monkeypatch), spy_on_optimizers(monkeypatch)
    train(a2c, "Trace-v0", tmp_path, total_timesteps=5 * 64, max_grad_norm=max_grad_norm, ent_coef=0.1)
    assert len(updates) == len(steps) == 5
    check_clipping(steps, updates, max_grad_norm, clipped)


def test_the_gradient_is_that_of_the_policy_the_value_and_the_entropy_of_the_transitions(monkeypatch, tmp_path):
    updates = watch(a2c, monkeypatch)
    train(a2c, "Trace-v0", tmp_path, total_timesteps=3 * 64, vf_coef=0.4, ent_coef=0.2)
    for update in updates:
        agent = update.agent
        policy, values = distribution(agent, update.obs), agent.critic(update.obs)[:, 0]
        loss = -(policy.log_prob(update.actions) * update.advantages).mean()
        loss = loss + 0.4 * (values - update.returns).square().mean() - 0.2 * policy.entropy().mean()
        gradient = flat(torch.autograd.grad(loss, list(agent.parameters())))
        torch.testing.assert_close(update.gradient, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_each_rollout_gives_one_step_of_rmsprop(monkeypatch, tmp_path):
    updates, rollouts, rate = watch(a2c, monkeypatch), 5, 0.003
    args = dict(learning_rate=rate, anneal_lr=False, max_grad_norm=1e9)
    agent = train(a2c, "Trace-v0", tmp_path, total_timesteps=rollouts * 64, **args)
    assert len(updates) == rollouts
    agents, mean_square = [*(update.agent for update in updates), agent], 0.0
    for i, update in enumerate(updates):
        before, after = (flat(x.parameters()).detach() for x in agents[i : i + 2])
        mean_square = 0.99 * mean_square + 0.01 * update.gradient.square()
        expected = before - rate * update.gradient / (mean_square.sqrt() + 1e-5)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


def test_logged_losses_are_those_of_the_transitions(monkeypatch, tmp_path):
    updates = watch(a2c, monkeypatch)
    train(a2c, "Trace-v0", tmp_path, total_timesteps=3 * 64, learning_rate=0.01)
    logged = scalars(tmp_path)
    for i, update in enumerate(updates):
        policy = distribution(update.agent, update.obs)
        errors = update.agent.critic(update.obs)[:, 0] - update.returns
        expected = {
            "policy_loss": -(policy.log_prob(update.actions) * update.advantages).mean().item(),
            "value_loss": errors.square().mean().item(),
            "entropy": policy.entropy().mean().item(),
        }
        check_losses(logged, i, (i + 1) * 64, expected)
