"""The four policy gradients: their equations against slow computations, and what train() learns from.

`watch` shows the batches of a run. An observation of Trace-v0 says which step of which environment it is, so that a
test can tell what a batch should be about, and compute from the environment's own log what it should contain.
"""

import copy
import inspect
from collections import Counter, defaultdict
from functools import partial
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import only, read_events
from gymnasium import spaces
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.optimizer import register_optimizer_step_pre_hook

from algos import a2c, dqn, ppo, reinforce, trpo
from tests.tiny_envs import Trace

INF = np.inf
VECTOR, IMAGE = spaces.Box(-INF, INF, (3,)), spaces.Box(0, 255, (40, 36, 3), np.uint8)
LEARN = {a2c: "a2c_loss", ppo: "ppo_loss", reinforce: "reinforce_loss", trpo: "trust_region_step"}
ROLLOUTS = dict(num_envs=4, num_steps=16, total_timesteps=5 * 64, num_minibatches=3)


def each(*modules):
    """Parametrise a test over these algorithms."""
    return pytest.mark.parametrize("module", modules, ids=lambda module: module.__name__.split(".")[-1])


def make_agent(obs_space=VECTOR, action_space=None, module=ppo, **args):
    """An agent whose outputs differ from observation to observation (a fresh one has nearly constant ones)."""
    torch.manual_seed(0)
    agent = module.Agent(obs_space, action_space or spaces.Discrete(3), module.Args(**args))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return agent


def policy_of(agent):
    """The parameters of the policy."""
    return [x for name, x in agent.named_parameters() if not name.startswith("critic")]


def gradient(y, parameters, **options):
    return parameters_to_vector(torch.autograd.grad(y, parameters, **options))


def look(agent, x):
    """π(·|s) and V(s) of preprocessed observations."""
    features = agent.encoder(torch.as_tensor(x, dtype=torch.float32))
    return agent.policy(features), agent.critic(features)


def train(module, log_dir, env="Trace", **args):
    """Train on that tiny environment: 4 of them, 16 steps a rollout and 5 rollouts, unless told otherwise."""
    return conftest.train(module, env, log_dir, **ROLLOUTS | args)


def logged(log_dir):
    """The points (step, value) of each tag of the only run in that folder."""
    return read_events(only(log_dir))


def played(num_steps=16):
    """The training steps in Trace's log by (env, episode, step), and these keys of each rollout."""
    steps, rollouts, time = {}, defaultdict(list), Counter()
    for step in Trace.training():
        steps[step[:3]] = step
        rollouts[time[step.env] // num_steps].append(step[:3])
        time[step.env] += 2 if step.terminated or step.truncated else 1  # the step after an end only resets
    return steps, rollouts


def whole_episodes():
    """The keys in Trace's log of each update of REINFORCE: after a reset, the first episode of each environment.

    What the budget cuts off at last is no update.
    """
    updates, first, ended = [], {}, set()
    for step in Trace.training():
        if len(ended) == 4 and step.env == 1:  # in the log the environments take turns
            first, ended = {}, set()
        if not first:
            updates.append([])
        if step.episode == first.setdefault(step.env, step.episode):
            updates[-1].append(step[:3])
            if step.terminated or step.truncated:
                ended.add(step.env)
    return updates if len(ended) == 4 else updates[:-1]


def keys(x):
    return [tuple(map(int, row)) for row in x]


def watch(module, patch):
    """A record of each batch of the run: what the loss (or TRPO's step) is given, by name; of the agent, a copy."""
    batches, original, policy = [], getattr(module, LEARN[module]), module.Agent.policy
    given = {}

    def spy_on_policy(agent, features):
        given.update(agent=agent, x=features)  # vectors are their own features
        return policy(agent, features)

    def spy(*args, **kwargs):
        batch = SimpleNamespace(**inspect.signature(original).bind(*args, **kwargs).arguments)
        if module is a2c:  # its loss is given what comes out of the policy instead, without the steps that only reset
            real = {step[:3] for step in Trace.log}
            batch.agent, batch.x = given["agent"], given["x"][[key in real for key in keys(given["x"])]]
        for name in ("old_log_probs", "advantages", "returns", "weights"):
            assert not getattr(batch, name, torch.empty(0)).requires_grad, f"{name} are constants"
        batch.agent = copy.deepcopy(batch.agent)
        batch.results = original(*args, **kwargs)
        batches.append(batch)
        return batch.results

    patch.setattr(module.Agent, "policy", spy_on_policy)
    patch.setattr(module, LEARN[module], spy)
    return batches


@pytest.fixture
def optimizer_steps():
    """The learning rate and the gradient of every step of an optimizer."""
    steps = []

    def record(optimizer, *_):
        (group,) = optimizer.param_groups
        gradients = parameters_to_vector([x.grad for x in group["params"]])
        steps.append(SimpleNamespace(lr=group["lr"], gradient=gradients))

    hook = register_optimizer_step_pre_hook(record)
    yield steps
    hook.remove()


# ---- equations


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.7), (0.9, 0.0), (0.9, 1.0), (1.0, 0.5)])
def test_gae_is_the_sum_of_its_definition(gamma, gae_lambda):
    rng, T, N = np.random.default_rng(0), 40, 3
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    terminated, truncated = rng.random((2, T, N)) < 0.15
    terminated[10, 0] = truncated[10, 0] = terminated[-1, 1] = truncated[-1, 2] = True
    terminated[-1, 2] = truncated[-1, 1] = terminated[-1, 0] = truncated[-1, 0] = False
    advantages, returns = ppo.compute_gae(rewards, values, terminated, truncated, gamma, gae_lambda)
    for t, n in np.ndindex(T, N):
        expected = 0.0
        for k in range(t, T):
            next_value = 0.0 if terminated[k, n] else values[k + 1, n]
            expected += (gamma * gae_lambda) ** (k - t) * (rewards[k, n] + gamma * next_value - values[k, n])
            if terminated[k, n] or truncated[k, n]:
                break
        assert advantages[t, n] == pytest.approx(expected)
        assert returns[t, n] == pytest.approx(expected + values[t, n])


# ---- the agent, the same text in all four files


def test_discrete_actions_follow_the_softmax_and_without_rng_are_the_most_likely():
    agent, obs = make_agent(action_space=spaces.Discrete(4)), np.ones((40_000, 3), np.float32)
    probabilities = look(agent, torch.ones(1, 3))[0].probs[0].detach().numpy()
    frequencies = np.bincount(agent.numpy_policy(np.random.default_rng(0))(obs), minlength=4) / len(obs)
    chi_square = (len(obs) * (frequencies - probabilities) ** 2 / probabilities).sum()
    assert chi_square < 16.3  # three degrees of freedom: exceeded by chance once in a thousand
    assert (agent.numpy_policy()(obs) == probabilities.argmax()).all()


def test_only_actions_that_exist_have_a_probability():
    space = spaces.MultiDiscrete([2, 4, 3])
    every_action = torch.cartesian_prod(*map(torch.arange, space.nvec.tolist()))
    policy, _ = look(make_agent(action_space=space), torch.ones(24, 3))
    assert policy.log_prob(every_action).exp().sum().item() == pytest.approx(1)


def test_box_actions_follow_the_gaussian_and_without_rng_are_its_mean():
    agent, obs = make_agent(action_space=spaces.Box(-1, 1, (3,)), log_std_init=-1.5), np.ones((40_000, 3), np.float32)
    assert ppo.Agent(VECTOR, spaces.Box(-9, 9, (1,)), ppo.Args(log_std_init=-1.5)).log_std.tolist() == [-1.5]
    policy, _ = look(agent, torch.ones(1, 3))
    mean, std = policy.mean[0].detach(), policy.stddev[0].detach()
    torch.testing.assert_close(std, agent.log_std.exp())
    z = (torch.as_tensor(agent.numpy_policy(np.random.default_rng(0))(obs)) - mean) / std
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(z.T.cov(), torch.eye(3), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.as_tensor(agent.numpy_policy()(obs[:1]))[0], mean)


@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE])
@pytest.mark.parametrize("hidden_sizes", [(), (16, 8, 8)])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_numpy_and_torch_agree(obs_space, hidden_sizes, norm_obs):
    agent = make_agent(obs_space, spaces.Box(-1, 1, (2,)), hidden_sizes=hidden_sizes, norm_obs=norm_obs)
    if norm_obs:
        agent.obs_stats.update(np.random.default_rng(0).normal(50, 100, (20, *obs_space.shape)))
    obs = np.stack([obs_space.sample() for _ in range(6)])
    expected = look(agent, agent.preprocess(obs))[0].mean.detach().numpy()
    np.testing.assert_allclose(agent.numpy_policy()(obs), expected, rtol=1e-3, atol=1e-4)
    num_layers = sum(isinstance(layer, nn.Linear) for layer in agent.actor)
    assert num_layers == (1 if obs_space == IMAGE else len(hidden_sizes) + 1)


def test_statistics_of_small_numbers():
    """As with rewards of 1e-5: the variance, 1e-10, is far below the rounding of the 1 that it starts at."""
    stats, rows = make_agent(norm_obs=True).obs_stats, np.random.default_rng(0).normal(2e-5, 1e-5, (300, 3))
    for part in np.split(rows, [100, 150]):
        stats.update(part)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-4)


def test_observations_are_standardised_and_clipped():
    agent = make_agent(norm_obs=True)
    agent.obs_stats.mean[:], agent.obs_stats.var[:] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])
    obs = np.array([[2, 4, 6], [0, 0, -3], [1e6, -1e6, 32.9]])
    np.testing.assert_allclose(agent.preprocess(obs), [[1, 1, 1], [-1, -1, -2], [10, -10, 29.9 / 3]], rtol=1e-6)


@pytest.mark.parametrize("module", [ppo, dqn])
@pytest.mark.parametrize("name", ["ChannelsFirst", "ChannelsLast", "GreyImage", "SmallImage"])
def test_pixels_of_images_are_scaled_and_channels_come_first(module, name):
    """What is flattened is not scaled: its bytes may be symbols."""
    envs = ppo.make_envs(ppo.Args(env_id="tests.tiny_envs:Odd-v0", env_kwargs={"observe": name}), 2)
    obs, _ = envs.reset(seed=0)
    expected = obs.transpose(0, 3, 1, 2) if name == "ChannelsLast" else obs
    assert expected.shape[1:] in [(3, 36, 40), (1, 40, 36), (40 * 40,), (8 * 8 * 3,)]
    agent, inputs = module.Agent(envs.single_observation_space, spaces.Discrete(2), module.Args()), []
    first_layer = next(layer for layer in agent.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    first_layer.register_forward_pre_hook(lambda _, args: inputs.extend(args[0].numpy()))
    run_network = agent if module is dqn else partial(look, agent)
    run_network(torch.as_tensor(agent.preprocess(obs)))
    scale = 255 if "Channels" in name else 1
    np.testing.assert_allclose(inputs, expected / scale, rtol=1e-6)


@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE])
def test_weights_start_orthogonal_and_only_features_are_shared(obs_space):
    agent = ppo.Agent(obs_space, spaces.Discrete(4), ppo.Args(hidden_sizes=(32, 16)))
    gains = {agent.actor[-1]: 0.01, agent.critic[-2]: 1.0}
    for layer in (layer for layer in agent.modules() if isinstance(layer, nn.Linear | nn.Conv2d)):
        weight = layer.weight.flatten(1)
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        gram = gains.get(layer, 2**0.5) ** 2 * torch.eye(len(weight))
        torch.testing.assert_close(weight @ weight.T, gram, atol=1e-4, rtol=1e-4)
        assert not layer.bias.any()
    policy, values = look(agent, agent.preprocess(np.ones((2, *obs_space.shape), obs_space.dtype)))
    names, parameters = zip(*agent.named_parameters(), strict=True)
    for y, other in ((policy.logits[:, 0].sum(), "critic"), (values.sum(), "actor")):
        gradients = torch.autograd.grad(y, parameters, allow_unused=True, retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            assert (gradient is None) == name.startswith(other), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("low", "high", "actions", "expected"),
    [
        ([2, -300], [6, -100], [[-1, -1], [0, 0], [1, 1], [0.5, -0.5]], [[2, -300], [4, -200], [6, -100], [5, -250]]),
        ([2, -300], [6, -100], [[-9, 9], [1.01, -1.01]], [[2, -100], [6, -300]]),  # clipped
        ([-INF, 0, -INF], [INF, INF, 5], [[-70, -2, 70], [3, 4, -5]], [[-70, 0, 5], [3, 4, -5]]),  # own units
        ([2, -INF], [INF, -5], [[-1, -1], [0.5, -0.5]], [[2, -6], [2.5, -5.5]]),  # around the number nearest to 0
        (2, 4, [[-1], [0], [3]], [2, 3, 4]),  # no axes: one number
        ([[0, 0, 0], [-2, -2, -2]], [[2, 4, 6], [0, 0, 0]], [[-1, 0, 1, -1, 0, 1]], [[[0, 2, 6], [-2, -1, 0]]]),
    ],
)
def test_box_actions_are_scaled_to_the_bounds_of_each_axis(low, high, actions, expected, dtype):
    space = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    sent = make_agent(action_space=space).to_env(np.array(actions, np.float32))
    np.testing.assert_allclose(sent, np.array(expected, dtype))
    assert sent.dtype == dtype


# ---- what train() learns from


def slow_advantages(agent, steps, rollout, gamma, gae_lambda, scale):
    """GAE, and the return, of each step of the rollout."""
    states = rollout + [(env, n, t + 1) for env, n, t in rollout]
    values = dict(zip(states, look(agent, states)[1].tolist(), strict=True))
    result = {}
    for env, n, first in rollout:
        total, t = 0.0, first
        while (env, n, t) in rollout:
            step = steps[env, n, t]
            reward = np.clip(step.reward / scale, -10, 10) if scale else step.reward  # the jackpot is clipped
            next_value = (not step.terminated) * values[env, n, t + 1]
            total += (gamma * gae_lambda) ** (t - first) * (reward + gamma * next_value - values[env, n, t])
            t += 1
        result[env, n, first] = total, total + values[env, n, first]
    return result


@each(a2c, ppo, trpo)
@pytest.mark.parametrize("args", [{"num_steps": 17}, {"norm_reward": True, "env_kwargs": {"jackpot": 1000.0}}])
def test_batches(module, args, optimizer_steps, monkeypatch, tmp_path):
    """A batch has each step of its rollout once, resets not at all, and with each step what belongs to it."""
    batches, T = watch(module, monkeypatch), args.get("num_steps", 16)
    settings = dict(gae_lambda=0.7, gamma=0.9, num_minibatches=1, update_epochs=1, total_timesteps=8 * 4 * T)
    train(module, tmp_path, "PaidResets", **settings | args)
    steps, rollouts = played(T)
    assert len(batches) == 8
    for k, batch in enumerate(batches):
        so_far, order = [key for i in range(k + 1) for key in rollouts[i]], keys(batch.x)
        sums = [sum(0.9**i * steps[env, n, t - i].reward for i in range(t + 1)) for env, n, t in so_far]
        scale = np.std(sums) if "norm_reward" in args else None  # of discounted sums up to each step
        expected = slow_advantages(batch.agent, steps, rollouts[k], 0.9, 0.7, scale)
        assert sorted(order) == sorted(expected)
        advantages, returns = np.array([expected[key] for key in order]).T
        if module is not a2c:
            assert batch.actions.tolist() == [steps[key].action for key in order]
            advantages = (advantages - advantages.mean()) / advantages.std()
        np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-3, atol=1e-3)
        if module is trpo:  # the first of two steps of the critic
            errors = look(batch.agent, batch.x)[1] - torch.as_tensor(returns, dtype=torch.float32)
            expected = gradient(errors.square().mean(), list(batch.agent.critic.parameters()))
            torch.testing.assert_close(optimizer_steps[2 * k].gradient, expected, rtol=1e-3, atol=1e-3)
        else:
            np.testing.assert_allclose(batch.returns, returns, rtol=1e-3, atol=1e-3)
        if module is ppo:
            explained = 1 - np.var(returns - look(batch.agent, batch.x)[1].detach().numpy()) / np.var(returns)
            point = logged(tmp_path)["losses/explained_variance"][k]
            assert point == ((k + 1) * 4 * T, pytest.approx(explained, rel=1e-2, abs=1e-3))


@each(a2c, ppo)
@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e9])
def test_gradients_are_those_of_the_loss_and_clipped(module, max_grad_norm, optimizer_steps, monkeypatch, tmp_path):
    batches = watch(module, monkeypatch)
    args = dict(learning_rate=0.01, clip_coef=0.02, vf_coef=0.3, ent_coef=0.7, num_minibatches=1)
    train(module, tmp_path, max_grad_norm=max_grad_norm, **args)
    (steps, _), epochs, outside = played(), 2 if module is ppo else 1, 0
    assert len(optimizer_steps) == len(batches) == 5 * epochs
    for k, (step, batch) in enumerate(zip(optimizer_steps, batches, strict=True)):
        actions, A = torch.tensor([steps[key].action for key in keys(batch.x)]), batch.advantages
        policy, values = look(batch.agent, batch.x)
        old_policy, _ = look(batches[k - k % epochs].agent, batch.x)
        objective = policy.log_prob(actions) * A
        if module is ppo:
            ratio = (policy.log_prob(actions) - old_policy.log_prob(actions).detach()).exp()
            objective = torch.min(ratio * A, ratio.clamp(0.98, 1.02) * A)
            outside += (objective < ratio * A).sum()
        losses = {"policy_loss": -objective.mean(), "value_loss": (values - batch.returns).square().mean()}
        entropy, losses["entropy"] = (-(x.probs * x.probs.log()).sum(1).mean() for x in (policy, old_policy))
        loss = losses["policy_loss"] + 0.3 * losses["value_loss"] - 0.7 * entropy
        expected = gradient(loss, list(batch.agent.parameters()))
        assert expected.norm() > 1e-3
        expected *= min(1, max_grad_norm / expected.norm())
        torch.testing.assert_close(step.gradient, expected, rtol=1e-3, atol=1e-4 * expected.norm().item())
        if k % epochs == epochs - 1:  # the last epoch is logged
            for name, value in losses.items():
                assert logged(tmp_path)[f"losses/{name}"][k // epochs][1] == pytest.approx(value.item(), abs=1e-4)
    assert (outside > 20) == (module is ppo)


def test_each_epoch_of_ppo_has_each_transition_once_in_a_new_order(monkeypatch, tmp_path):
    batches = watch(ppo, monkeypatch)
    train(ppo, tmp_path, update_epochs=2, num_minibatches=3)
    _, rollouts = played()
    epochs = [[keys(batch.x) for batch in batches[k : k + 3]] for k in range(0, len(batches), 3)]
    for k, epoch in enumerate(epochs):
        assert sorted(sum(epoch, [])) == sorted(rollouts[k // 2])
        assert max(map(len, epoch)) - min(map(len, epoch)) <= 1
    assert epochs[0] != epochs[1]


@each(*LEARN)
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_learning_rate(module, anneal_lr, optimizer_steps, tmp_path):
    """It falls linearly to zero, or stays (TRPO's is the critic's and always stays)."""
    train(module, tmp_path, learning_rate=0.01, anneal_lr=anneal_lr, seed=4)
    points = logged(tmp_path)["charts/learning_rate"]
    before = [0, *(x for x, _ in points[:-1])]  # environment steps before each update
    assert module is reinforce or before == [0, 64, 128, 192, 256]
    rates = [0.01 * (1 - x / 320 if anneal_lr and module is not trpo else 1) for x in before]
    per_update = {a2c: 1, ppo: 6, reinforce: 3, trpo: 6}[module]  # epochs times minibatches; reinforce: 1 + 2
    assert [step.lr for step in optimizer_steps] == pytest.approx(np.repeat(rates, per_update).tolist())
    assert [y for _, y in points] == pytest.approx(rates)
    if module is reinforce:  # first the policy: a V that knows these episodes would bias its gradient
        assert [len(step.gradient) for step in optimizer_steps[:3]] == [59, 41, 41]


@each(*LEARN)
def test_observation_statistics(module, monkeypatch, tmp_path):
    """In an update they are those of the transitions learned from before it."""
    batches = watch(module, monkeypatch)
    agent = train(module, tmp_path, norm_obs=True, update_epochs=1, num_minibatches=1)
    (_, rollouts), rows = played(), []
    updates = whole_episodes() if module is reinforce else list(rollouts.values())
    assert len(batches) == len(updates)
    assert not batches[0].agent.obs_stats.mean.any()
    for update, after in zip(updates, [*[batch.agent for batch in batches[1:]], agent], strict=True):
        rows += update
        np.testing.assert_allclose(after.obs_stats.mean, np.mean(rows, 0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(after.obs_stats.var, np.var(rows, 0), rtol=1e-4, atol=1e-4)
    if module is ppo:  # in the first epoch all ratios are 1, as π_old saw the same statistics
        assert max(batch.results[-1].abs().max() for batch in batches) < 1e-5


@each(*LEARN)
def test_the_actions_learned_from_are_those_before_they_are_clipped(module, monkeypatch, tmp_path):
    used, log_prob = [], torch.distributions.Independent.log_prob
    deviations, numpy_policy = set(), module.Agent.numpy_policy

    def spy(policy, actions):
        used.append(actions)
        return log_prob(policy, actions)

    def spy_on_acting(agent, *rng):
        deviations.add(tuple(agent.log_std.tolist()))
        return numpy_policy(agent, *rng)

    monkeypatch.setattr(torch.distributions.Independent, "log_prob", spy)
    monkeypatch.setattr(module.Agent, "numpy_policy", spy_on_acting)
    train(module, tmp_path, "Target")
    assert len(deviations) > 2  # σ is learned, and each rollout has that of its time
    used = torch.cat(used).numpy()
    assert (np.abs(used) > 1).any(0).all()
    assert used.std(0) == pytest.approx(np.ones(3), abs=0.5)


def test_the_target_kl_ends_an_update_of_ppo(monkeypatch, tmp_path):
    batches = watch(ppo, monkeypatch)
    args = dict(update_epochs=4, num_minibatches=1, learning_rate=0.01, total_timesteps=64, clip_coef=0.1)
    train(ppo, tmp_path / "all", **args)
    kls, fractions = [], []
    for batch in batches:
        log_ratio = (look(batch.agent, batch.x)[0].log_prob(batch.actions) - batch.old_log_probs).detach().double()
        kls.append((log_ratio.exp() - 1 - log_ratio).mean().item())
        fractions.append(((log_ratio.exp() - 1).abs() > 0.1).double().mean().item())
    assert len(batches) == 4
    assert logged(tmp_path / "all")["losses/approx_kl"][0][1] == pytest.approx(kls[-1], rel=1e-3)
    assert logged(tmp_path / "all")["losses/clipfrac"][0][1] == pytest.approx(fractions[-1])
    assert kls[1] < kls[2]
    for target_kl, epochs in ((0.99 * kls[1], 2), ((kls[1] + kls[2]) / 2, 3), (99.0, 4)):
        batches.clear()
        train(ppo, tmp_path / str(target_kl), target_kl=target_kl, **args)
        assert len(batches) == epochs


# ---- TRPO


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))])
def test_a_full_step_is_the_natural_gradient_of_the_explicit_fisher_matrix(action_space):
    args = dict(hidden_sizes=(4,), line_search_steps=0, cg_iters=200, cg_damping=0.1, target_kl=0.01)
    agent, args = make_agent(VECTOR, action_space, trpo, **args), trpo.Args(**args)
    parameters = policy_of(agent)
    x, advantages = torch.randn(60, 3), torch.randn(60)
    actions = look(agent, x)[0].sample()
    g = gradient((look(agent, x)[0].log_prob(actions) * advantages).mean(), parameters)
    kl = torch.distributions.kl_divergence(look(copy.deepcopy(agent), x)[0], look(agent, x)[0]).mean()
    slope = gradient(kl, parameters, create_graph=True)
    H = torch.stack([gradient(y, parameters, retain_graph=True) for y in slope]) + 0.1 * torch.eye(len(g))
    natural = torch.linalg.solve(H, g)
    theta = parameters_to_vector(parameters).detach()
    expected = theta + (2 * 0.01 / (natural @ H @ natural)).sqrt() * natural
    trpo.trust_region_step(agent, parameters, x, actions, advantages, args)
    torch.testing.assert_close(parameters_to_vector(parameters).detach(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))])
def test_the_kl_limit_holds_or_the_old_parameters_stay(action_space):
    agent, shortened = make_agent(VECTOR, action_space, trpo), []
    parameters = policy_of(agent)
    x, advantages = torch.randn(100, 3), torch.randn(100)
    for delta in (0.01, 1.0, 100.0):
        old, full = copy.deepcopy(agent), copy.deepcopy(agent)
        actions = look(old, x)[0].sample()
        log = trpo.trust_region_step(agent, parameters, x, actions, advantages, trpo.Args(target_kl=delta))
        unchecked = trpo.Args(target_kl=delta, line_search_steps=0)
        trpo.trust_region_step(full, policy_of(full), x, actions, advantages, unchecked)
        before, step, full_step = (parameters_to_vector(policy_of(a)).detach() for a in (old, agent, full))
        shortened.append(log["losses/line_search_steps"])
        share = 0.8 ** shortened[-1] if shortened[-1] < 10 else 0
        torch.testing.assert_close(step - before, share * (full_step - before), rtol=1e-3, atol=1e-5)
        kl = torch.distributions.kl_divergence(look(old, x)[0], look(agent, x)[0]).mean().item()
        assert kl <= delta
        assert log["losses/kl"] == pytest.approx(kl, abs=1e-5)
        assert log["losses/surrogate_improvement"] > 0 or kl == 0
        assert all(torch.equal(p, q) for p, q in zip(old.critic.parameters(), agent.critic.parameters(), strict=True))
    assert any(0 < j < 10 for j in shortened) or action_space == spaces.Discrete(3)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_step_that_makes_things_worse_is_refused(seed):
    """The KL of the full step, 26 or 5, is within the limit, but L falls."""
    agent = make_agent(VECTOR, spaces.Box(-1, 1, (2,)), trpo)
    torch.manual_seed(seed)
    x, advantages = torch.randn(100, 3), torch.randn(100)
    actions, before = look(agent, x)[0].sample(), parameters_to_vector(policy_of(agent)).detach()
    for line_search_steps in (1, 0):
        args = trpo.Args(target_kl=100, line_search_steps=line_search_steps)
        log = trpo.trust_region_step(agent, policy_of(agent), x, actions, advantages, args)
        refused = torch.equal(parameters_to_vector(policy_of(agent)), before)
        assert refused == bool(line_search_steps)  # 0: natural policy gradient, unchecked
        assert log["losses/line_search_steps"] == line_search_steps
        assert (log["losses/surrogate_improvement"] < 0) == (not refused)
        assert (5 < log["losses/kl"] < 100) == (not refused)


# ---- REINFORCE


@pytest.mark.parametrize("norm", ["", "norm_reward", "norm_weight"])
@pytest.mark.parametrize("weight", ["total-return", "reward-to-go", "baseline"])
def test_reinforce_weighs_whole_episodes_one_of_each_environment(weight, norm, monkeypatch, tmp_path):
    batches = watch(reinforce, monkeypatch)
    norms = dict(norm_reward=norm == "norm_reward", norm_weight=norm == "norm_weight")
    train(reinforce, tmp_path, total_timesteps=100, gamma=0.9, weight=weight, **norms)
    assert min(length for _, length in logged(tmp_path)["charts/episodic_length"]) > 0
    steps, _ = played()
    returns, all_returns = {}, []
    for key in steps:
        future = [other.reward for other in steps.values() if other[:2] == key[:2] and other.step >= key[2]]
        returns[key] = sum(0.9**k * reward for k, reward in enumerate(future))
    for batch, update in zip(batches, whole_episodes(), strict=True):
        mine = keys(batch.x)
        assert sorted(mine) == sorted(update)
        assert batch.num_episodes == 4
        assert batch.actions.tolist() == [steps[key].action for key in mine]
        policy, values = look(batch.agent, batch.x)
        torch.testing.assert_close(batch.results[0], -(policy.log_prob(batch.actions) * batch.weights).sum() / 4)
        all_returns += [returns[key] for key in mine]
        scale = np.std(all_returns) if norms["norm_reward"] else 1
        expected = [returns[*key[:2], 0 if weight == "total-return" else key[2]] / scale for key in mine]
        expected -= values.detach().numpy() * (weight == "baseline")
        if norms["norm_weight"]:
            expected = (expected - expected.mean()) / expected.std()
        np.testing.assert_allclose(batch.weights, expected, rtol=1e-3, atol=1e-3)


def test_reinforce_says_which_episodes_it_did_not_learn_from(capsys, optimizer_steps, tmp_path):
    train(reinforce, tmp_path, num_envs=3, total_timesteps=6)
    assert "not learned from: the last 3 episodes" in capsys.readouterr().out
    assert not optimizer_steps


def test_the_entropy_bonus_of_reinforce(optimizer_steps, monkeypatch, tmp_path):
    batches = watch(reinforce, monkeypatch)
    train(reinforce, tmp_path, weight="reward-to-go", ent_coef=0.7)
    for step, batch in zip(optimizer_steps, batches, strict=True):
        policy, _ = look(batch.agent, batch.x)
        entropy = -(policy.probs * policy.probs.log()).sum(1)
        objective = (policy.log_prob(batch.actions) * batch.weights + 0.7 * entropy).sum() / 4
        expected = gradient(-objective, policy_of(batch.agent))
        torch.testing.assert_close(step.gradient, expected, rtol=1e-3, atol=1e-4 * expected.norm().item())


@pytest.mark.parametrize("restart", [False, True])
def test_rewards_to_go_may_end_with_the_next_reward(restart):
    rewards = np.random.default_rng(0).choice([-1, 0, 0, 0, 1], size=(40, 3)).astype(np.float32)
    returns = reinforce.rewards_to_go(rewards, 0.9, restart)
    for t, n in np.ndindex(rewards.shape):
        expected = 0.0
        for k in range(t, 40):
            expected += 0.9 ** (k - t) * rewards[k, n]
            if restart and rewards[k, n]:
                break
        assert returns[t, n] == pytest.approx(expected, abs=1e-5)


def test_a_flag_restarts_the_returns(monkeypatch, tmp_path):
    """All rewards here are other than 0. Total returns have no use for it."""
    batches = watch(reinforce, monkeypatch)
    train(reinforce, tmp_path, weight="reward-to-go", restart_returns=True)
    steps, _ = played()
    for batch in batches:
        assert batch.weights.tolist() == pytest.approx([steps[key].reward for key in keys(batch.x)], abs=1e-5)
    with pytest.raises(SystemExit):
        train(reinforce, tmp_path, weight="total-return", restart_returns=True)
