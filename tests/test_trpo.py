"""TRPO's own equations; what it shares with other algorithms is in test_correctness.py."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from algos import trpo
from tests.spies import VECTOR, distribution, flat, make_agent, policy_of, scalars, shake, train, watch

THREE_ACTIONS, BOX = spaces.Discrete(3), spaces.Box(-1, 1, (2,))
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


def kl_of(old_agent, agent, obs) -> float:
    with torch.no_grad():
        old_policy, policy = (distribution(x, x.features(obs)) for x in (old_agent, agent))
        return torch.distributions.kl_divergence(old_policy, policy).mean().item()


def improvement_of(old_agent, agent, record) -> float:
    """L(θ) - L(θ_old), with L the mean of ρ Â."""
    with torch.no_grad():
        policies = (distribution(x, x.features(record.obs)) for x in (agent, old_agent))
        log_probs, old_log_probs = (policy.log_prob(record.actions) for policy in policies)
        return ((log_probs - old_log_probs).exp() * record.advantages - record.advantages).mean().item()


def vector(parameters) -> torch.Tensor:
    return flat(parameters).detach().clone()


def fisher(agent, obs) -> torch.Tensor:
    """The matrix E[∇ log π ∇ log πᵀ], over all actions of each state; of a Gaussian its known integral."""
    parameters = policy_of(agent)
    matrices = []
    for state in obs:
        rows, weights = [], []  # the matrix is the sum of weight * row rowᵀ
        policy = distribution(agent, state[None])
        if agent.is_discrete:
            for action in range(agent.num_actions):
                log_prob = policy.log_prob(torch.tensor([action]))[0]
                rows.append(flat(torch.autograd.grad(log_prob, parameters, retain_graph=True)))
                weights.append(log_prob.exp().item())
        else:
            for k in range(agent.num_actions):
                for y, weight in ((policy.mean[0, k], 1 / policy.variance[0, k].item()), (agent.log_std[k], 2.0)):
                    options = dict(retain_graph=True, materialize_grads=True, allow_unused=True)
                    rows.append(flat(torch.autograd.grad(y, parameters, **options)))
                    weights.append(weight)
        rows = torch.stack(rows)
        matrices.append(rows.T @ (torch.tensor(weights, dtype=rows.dtype)[:, None] * rows))
    return torch.stack(matrices).mean(0)


def policy_gradient_of(agent, obs, actions, advantages) -> torch.Tensor:
    objective = (distribution(agent, obs).log_prob(actions) * advantages).mean()
    return flat(torch.autograd.grad(objective, policy_of(agent)))


def small_problem(action_space, B=12, seed=0):
    """An agent in float64 with few parameters, and a batch for it."""
    agent = make_agent(VECTOR, action_space, module=trpo, hidden_sizes=(4,)).double()
    torch.manual_seed(seed)
    obs = torch.randn(B, 3, dtype=torch.float64)
    actions, advantages = distribution(agent, obs).sample(), torch.randn(B, dtype=torch.float64)
    return agent, obs, actions, advantages


def step(agent, obs, actions, advantages, monkeypatch, **args):
    """One trust region step: θ before and after, what conjugate_gradient was given and gave, and what is logged."""
    result, original = SimpleNamespace(before=vector(policy_of(agent))), trpo.conjugate_gradient

    def spy(product, b, iters):
        result.product, result.b, result.x = product, b, original(product, b, iters)
        return result.x

    with monkeypatch.context() as patch:
        patch.setattr(trpo, "conjugate_gradient", spy)
        result.scalars = trpo.trust_region_step(agent, policy_of(agent), obs, actions, advantages, trpo.Args(**args))
    result.after = vector(policy_of(agent))
    return result


# ---- the parts of the step


@pytest.mark.parametrize("action_space", [THREE_ACTIONS, BOX])
def test_mean_kl_is_that_of_torch_distributions_from_the_old_policy_to_the_new(action_space):
    old_agent, obs = make_agent(VECTOR, action_space, module=trpo), torch.randn(20, 3)
    agent = copy.deepcopy(old_agent)
    shake(policy_of(agent), 0.5)
    old_log_std = None if agent.is_discrete else old_agent.log_std
    ours = trpo.mean_kl(agent, agent.actor(obs), old_agent.actor(obs), old_log_std).item()
    assert ours == pytest.approx(kl_of(old_agent, agent, obs), rel=1e-4)
    assert abs(ours / kl_of(agent, old_agent, obs) - 1) > 0.05  # the other way round it is another number


@pytest.mark.parametrize("action_space", [THREE_ACTIONS, BOX])
def test_mean_kl_and_its_gradient_are_zero_at_the_old_policy(action_space):
    agent, obs = make_agent(VECTOR, action_space, module=trpo), torch.randn(20, 3)
    old_output = agent.actor(obs).detach()
    old_log_std = None if agent.is_discrete else agent.log_std.detach().clone()
    kl = trpo.mean_kl(agent, agent.actor(obs), old_output, old_log_std)
    assert kl.item() == pytest.approx(0, abs=1e-6)
    gradient = flat(torch.autograd.grad(kl, policy_of(agent)))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def random_system(n: int, seed: int = 0):
    """A symmetric positive definite matrix, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    factor, b = torch.randn(n, n, generator=generator).double(), torch.randn(n, generator=generator).double()
    return factor @ factor.T + torch.eye(n), b


@pytest.mark.parametrize("n", [1, 2, 10])
def test_conjugate_gradients_solve_a_linear_system_of_n_equations_in_n_iterations(n):
    H, b = random_system(n)
    products = []
    x = trpo.conjugate_gradient(lambda v: products.append(v) or H @ v, b, n)
    torch.testing.assert_close(x, torch.linalg.solve(H, b), rtol=1e-4, atol=1e-4)
    assert len(products) <= n
    torch.testing.assert_close(trpo.conjugate_gradient(lambda v: H @ v, b, 10 * n), torch.linalg.solve(H, b))


def test_conjugate_gradients_come_closer_with_each_iteration_and_stop_when_they_are_there():
    H, b = random_system(10)
    exact = torch.linalg.solve(H, b)
    errors = []
    for iters in range(11):
        error = trpo.conjugate_gradient(lambda v: H @ v, b, iters) - exact
        errors.append((error @ H @ error).item())
    assert errors[0] == pytest.approx((exact @ H @ exact).item())  # from x = 0
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))
    products = []
    trpo.conjugate_gradient(lambda v: products.append(v) or H @ v, b, 1000)
    assert len(products) <= 12
    assert not trpo.conjugate_gradient(lambda v: H @ v, torch.zeros(10).double(), 5).any()


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("action_space", [THREE_ACTIONS, BOX])
def test_the_product_is_that_with_the_fisher_matrix_and_the_right_side_the_policy_gradient(
    action_space, damping, monkeypatch
):
    agent, *batch = small_problem(action_space)
    H, g = fisher(agent, batch[0]), policy_gradient_of(agent, *batch)
    result = step(agent, *batch, monkeypatch, cg_damping=damping, line_search_steps=1, target_kl=1e-9)
    torch.testing.assert_close(result.b, g)
    agent_before = small_problem(action_space)[0]
    assert torch.equal(vector(policy_of(agent_before)), result.before)
    for _ in range(3):
        v = torch.randn_like(g)
        torch.testing.assert_close(result.product(v), H @ v + damping * v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("action_space", [THREE_ACTIONS, BOX])
def test_without_a_line_search_the_step_is_the_natural_gradient_as_long_as_the_quadratic_kl_allows(
    action_space, monkeypatch
):
    agent, *batch = small_problem(action_space)
    damping, target_kl = 0.1, 0.02
    H, g = fisher(agent, batch[0]), policy_gradient_of(agent, *batch)
    H += damping * torch.eye(len(H))
    x = torch.linalg.solve(H, g)
    expected = (2 * target_kl / (x @ H @ x)).sqrt() * x
    args = dict(cg_iters=100, cg_damping=damping, target_kl=target_kl, line_search_steps=0)
    result = step(agent, *batch, monkeypatch, **args)
    torch.testing.assert_close(result.after - result.before, expected, rtol=1e-3, atol=1e-5)
    assert result.scalars["losses/line_search_steps"] == 0


@pytest.mark.parametrize("target_kl", [1e-4, 1.0])
def test_without_a_line_search_nothing_is_checked(target_kl, monkeypatch):
    agent, *batch = small_problem(THREE_ACTIONS)
    old_agent = copy.deepcopy(agent)
    monkeypatch.setattr(trpo, "mean_kl", shifted(trpo.mean_kl, 100.0))
    result = step(agent, *batch, monkeypatch, target_kl=target_kl, line_search_steps=0, cg_damping=1e-3)
    assert kl_of(old_agent, agent, batch[0]) > target_kl / 10
    assert result.scalars["losses/kl"] == pytest.approx(100 + kl_of(old_agent, agent, batch[0]), rel=1e-4)


def shifted(mean_kl, shift: float, thetas: list | None = None):
    """mean_kl plus a number, but for its gradient; `thetas` gets the parameters at which the line search calls it."""

    def fake(agent, *args):
        if thetas is not None and not torch.is_grad_enabled():
            thetas.append(vector(policy_of(agent)))
        return mean_kl(agent, *args) + shift

    return fake


# ---- the line search


@pytest.mark.parametrize("action_space", [THREE_ACTIONS, BOX])
def test_a_line_search_without_success_tries_ever_shorter_steps_and_restores_the_parameters(action_space, monkeypatch):
    agent, *batch = small_problem(action_space)
    full = step(copy.deepcopy(agent), *batch, monkeypatch, line_search_steps=0, target_kl=0.02)
    thetas = []
    monkeypatch.setattr(trpo, "mean_kl", shifted(trpo.mean_kl, 1.0, thetas))
    args = dict(line_search_steps=5, line_search_decay=0.7, target_kl=0.02)
    result = step(agent, *batch, monkeypatch, **args)
    assert len(thetas) == 5
    for j, theta in enumerate(thetas):
        torch.testing.assert_close(theta - result.before, 0.7**j * (full.after - full.before), rtol=1e-5, atol=1e-8)
    assert torch.equal(result.after, result.before)
    assert result.scalars["losses/line_search_steps"] == 5
    assert result.scalars["losses/kl"] == result.scalars["losses/surrogate_improvement"] == 0


def test_a_step_that_does_not_improve_the_surrogate_is_refused(monkeypatch):
    agent, *batch = small_problem(THREE_ACTIONS)
    old_agent, original = copy.deepcopy(agent), trpo.conjugate_gradient
    monkeypatch.setattr(trpo, "conjugate_gradient", lambda *args: -original(*args))  # downhill
    result = step(agent, *batch, monkeypatch, line_search_steps=6)
    assert torch.equal(result.after, result.before)
    assert result.scalars["losses/line_search_steps"] == 6
    step(agent, *batch, monkeypatch, line_search_steps=0)
    assert kl_of(old_agent, agent, batch[0]) < 0.01  # the limit alone would have let it pass


@pytest.mark.parametrize("line_search_steps", [0, 4])
def test_nothing_moves_if_all_advantages_are_zero(line_search_steps, monkeypatch):
    agent, obs, actions, advantages = small_problem(BOX)
    result = step(agent, obs, actions, 0 * advantages, monkeypatch, line_search_steps=line_search_steps)
    assert torch.equal(result.after, result.before)
    assert all(math.isfinite(x) for x in result.scalars.values())


@pytest.mark.parametrize("action_space", [THREE_ACTIONS, BOX])
def test_the_first_step_that_keeps_to_the_limit_is_taken(action_space, monkeypatch):
    counts, decay = set(), 0.6
    for seed in range(8):
        agent, *batch = small_problem(action_space, seed=seed)
        old_agent, args = copy.deepcopy(agent), dict(target_kl=0.1 * (seed + 1), cg_damping=1e-3)
        full = step(copy.deepcopy(agent), *batch, monkeypatch, line_search_steps=0, **args)
        record = SimpleNamespace(obs=batch[0], actions=batch[1], advantages=batch[2])
        accepted = []
        for j in range(10):
            nn.utils.vector_to_parameters(full.before + decay**j * (full.after - full.before), policy_of(agent))
            kept = kl_of(old_agent, agent, batch[0]) <= args["target_kl"]
            accepted.append(kept and improvement_of(old_agent, agent, record) > 0)
        agent = copy.deepcopy(old_agent)
        result = step(agent, *batch, monkeypatch, line_search_steps=10, line_search_decay=decay, **args)
        j = accepted.index(True)
        counts.add(j)
        assert result.scalars["losses/line_search_steps"] == j
        moved = decay**j * (full.after - full.before)
        torch.testing.assert_close(result.after - result.before, moved, rtol=1e-5, atol=1e-8)
    assert len(counts) > 1  # else the test would prove less


@pytest.mark.parametrize("action_space", [THREE_ACTIONS, BOX])
@pytest.mark.parametrize("cg_iters", [1, 3, 100])
def test_what_is_logged_of_a_step_is_true(action_space, cg_iters, monkeypatch):
    agent, *batch = small_problem(action_space)
    old_agent = copy.deepcopy(agent)
    H, g = fisher(agent, batch[0]), policy_gradient_of(agent, *batch)
    result = step(agent, *batch, monkeypatch, cg_iters=cg_iters, cg_damping=0.05, target_kl=0.03)
    record = SimpleNamespace(obs=batch[0], actions=batch[1], advantages=batch[2])
    residual = ((H @ result.x + 0.05 * result.x - g).norm() / g.norm()).item()
    assert result.scalars["losses/kl"] == pytest.approx(kl_of(old_agent, agent, batch[0]), rel=1e-4)
    improvement = improvement_of(old_agent, agent, record)
    assert result.scalars["losses/surrogate_improvement"] == pytest.approx(improvement, rel=1e-4)
    assert result.scalars["losses/cg_residual"] == pytest.approx(residual, rel=1e-4, abs=1e-6)
    assert (residual > 0.01) == (cg_iters < 100)


# ---- real runs


@pytest.mark.parametrize(
    ("env", "args"),
    [
        ("gymnasium:CartPole-v1", {}),
        ("gymnasium:CartPole-v1", {"target_kl": 0.1, "cg_iters": 2, "cg_damping": 1e-4}),
        ("gymnasium:Pendulum-v1", {"norm_obs": True, "norm_reward": True}),
        ("gymnasium:Pendulum-v1", {"target_kl": 0.1, "cg_iters": 3, "cg_damping": 1e-4}),
        ("Target-v0", {"target_kl": 0.3, "cg_damping": 1e-5}),
        ("Trace-v0", {"target_kl": 0.05, "cg_iters": 1, "cg_damping": 0.0, "norm_obs": True}),
        ("PictureBandit-v0", {"target_kl": 0.05}),
    ],
)
def test_no_update_exceeds_the_kl_limit_and_each_improves_the_surrogate_or_changes_nothing(
    env, args, monkeypatch, tmp_path
):
    updates = watch(trpo, monkeypatch)
    train(trpo, env, tmp_path, num_steps=32, total_timesteps=6 * 128, **dict(target_kl=0.01) | args)
    logged, kls = scalars(tmp_path), []
    assert len(updates) == 6
    for i, update in enumerate(updates):
        before, after = update.agent, update.agent_after_step
        kls.append(kl_of(before, after, update.obs))
        assert kls[-1] <= args.get("target_kl", 0.01) * (1 + 1e-3)
        unchanged = torch.equal(vector(policy_of(before)), vector(policy_of(after)))
        improvement = improvement_of(before, after, update)
        assert unchanged or improvement > 0
        expected = {**update.scalars, "losses/kl": kls[-1], "losses/surrogate_improvement": improvement}
        for name, y in expected.items():
            assert logged[name][i] == ((i + 1) * 128, pytest.approx(y, rel=1e-2, abs=1e-5)), name
        assert torch.equal(vector(before.critic.parameters()), vector(after.critic.parameters()))
        fitted = update.agent_after_fit
        assert torch.equal(vector(policy_of(after)), vector(policy_of(fitted)))
        for old, new in zip(after.critic.parameters(), fitted.critic.parameters(), strict=True):
            assert not torch.equal(old, new)
    if env != "PictureBandit-v0":
        assert max(kls) > args.get("target_kl", 0.01) / 4  # the steps are no shorter than they need to be


def test_a_run_with_too_long_steps_cuts_them_back(monkeypatch, tmp_path):
    args = {"target_kl": 0.3, "cg_iters": 1, "cg_damping": 1e-4, "num_steps": 32, "total_timesteps": 8 * 128}
    train(trpo, "gymnasium:Pendulum-v1", tmp_path, **args)
    counts = [y for _, y in scalars(tmp_path)["losses/line_search_steps"]]
    assert max(counts) > 0  # or the test above would prove less


def test_logged_losses_are_those_of_the_critics_regression_and_of_the_policy_before_the_step(monkeypatch, tmp_path):
    updates = watch(trpo, monkeypatch)
    train(trpo, "Trace-v0", tmp_path, total_timesteps=3 * 64)
    logged = scalars(tmp_path)
    for i, update in enumerate(updates):
        entropy = distribution(update.agent, update.obs).entropy().mean().item()
        assert logged["losses/value_loss"][i] == ((i + 1) * 64, pytest.approx(update.value_loss))
        assert logged["losses/entropy"][i] == ((i + 1) * 64, pytest.approx(entropy, rel=1e-3))


# ---- the critic's regression, the same in reinforce.py


def fit(agent, obs, returns, monkeypatch, seed=0, learning_rate=1e-2, **args):
    """Call fit_critic; returns its result, and the returns that each minibatch was about."""
    minibatches, mse_loss = [], torch.nn.functional.mse_loss

    def spy(values, targets):
        assert values.shape == targets.shape
        minibatches.append(targets.tolist())
        return mse_loss(values, targets)

    optimizer = torch.optim.Adam(agent.critic.parameters(), lr=learning_rate)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "mse_loss", spy)
        rng = np.random.default_rng(seed)
        return trpo.fit_critic(agent, optimizer, obs, returns, rng, trpo.Args(**args)), minibatches


def test_each_epoch_of_the_regression_sees_each_return_once_in_a_new_order(monkeypatch):
    agent, obs, returns = make_agent(module=trpo), torch.randn(20, 3), torch.randn(20)
    _, minibatches = fit(agent, obs, returns, monkeypatch, critic_updates=4, num_minibatches=3)
    assert [len(rows) for rows in minibatches] == [7, 7, 6] * 4
    epochs = [sum(minibatches[i : i + 3], []) for i in range(0, 12, 3)]
    assert all(sorted(epoch) == sorted(returns.tolist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    _, minibatches = fit(agent, obs[:2], returns[:2], monkeypatch, critic_updates=1, num_minibatches=16)
    assert [len(rows) for rows in minibatches] == [1, 1]


def test_the_regression_ends_at_least_squares(monkeypatch):
    agent = make_agent(module=trpo, hidden_sizes=())
    obs = torch.randn(50, 3)
    returns = obs @ torch.tensor([1.0, -2.0, 0.5]) + 3 + torch.randn(50)
    loss, _ = fit(agent, obs, returns, monkeypatch, learning_rate=0.05, critic_updates=400, num_minibatches=1)
    inputs = torch.cat([obs, torch.ones(50, 1)], 1)
    expected = inputs @ torch.linalg.lstsq(inputs, returns[:, None]).solution
    torch.testing.assert_close(agent.critic(obs), expected, atol=0.01, rtol=0)
    assert loss == pytest.approx((expected[:, 0] - returns).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE])
def test_the_regression_changes_the_critics_own_layers_only(obs_space, monkeypatch):
    agent = make_agent(obs_space, BOX, module=trpo)
    obs, before = torch.rand(6, *obs_space.shape), {name: x.clone() for name, x in agent.state_dict().items()}
    fit(agent, obs, torch.randn(6), monkeypatch, critic_updates=2, num_minibatches=2)
    for name, x in agent.named_parameters():
        assert torch.equal(x, before[name]) != name.startswith("critic"), name
        assert x.grad is None or name.startswith("critic"), name
