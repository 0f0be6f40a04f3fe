"""Each equation against a slow and obvious computation, or against a known answer.

What the files share is tested here once, in ppo.py: another test holds the copies to each other. What each file does
with it in `train` is tested in all of them. What only one algorithm has is in test_ppo.py, test_a2c.py and so on.
"""

import math
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from algos import a2c, ppo, reinforce, trpo
from tests.spies import (
    VECTOR,
    distribution,
    each,
    keys,
    make_agent,
    mean_return,
    played,
    scalars,
    shake,
    spy_on_optimizers,
    train,
    value_of,
    watch,
)
from tests.tiny_envs import Endless, Trace

# ---- advantages and returns


def random_rollout(seed: int, T: int = 40, N: int = 3):
    """Random data with episodes that end in both ways, and with the reset steps that NEXT_STEP autoreset makes."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    terminated, truncated = rng.random((2, T, N)) < 0.12
    terminated[10, 0] = truncated[10, 0] = True  # both at once
    terminated[T - 1, 1], truncated[T - 1, 2] = True, True  # ends on the rollout's last step
    valid = np.ones((T, N), bool)
    for t in range(1, T):
        valid[t] = ~(terminated | truncated)[t - 1]
        rewards[t] *= valid[t]
        terminated[t] &= valid[t]
        truncated[t] &= valid[t]
    return rewards, values, terminated, truncated, valid


def slow_advantage(t, n, rewards, values, terminated, truncated, gamma, gae_lambda):
    """The sum over l of (gamma lambda)^l delta_{t+l}, up to the end of the episode or of the rollout."""
    total = 0.0
    for k in range(t, len(rewards)):
        next_value = 0.0 if terminated[k, n] else values[k + 1, n]
        total += (gamma * gae_lambda) ** (k - t) * (rewards[k, n] + gamma * next_value - values[k, n])
        if terminated[k, n] or truncated[k, n]:
            break
    return total


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_gae_is_the_sum_of_its_definition(gamma, gae_lambda):
    for seed in range(3):
        *rollout, valid = random_rollout(seed)
        advantages, returns = ppo.compute_gae(*rollout, gamma, gae_lambda)
        for t, n in np.argwhere(valid):
            expected = slow_advantage(t, n, *rollout, gamma, gae_lambda)
            assert advantages[t, n] == pytest.approx(expected, abs=1e-9)
            assert returns[t, n] == pytest.approx(expected + rollout[1][t, n], abs=1e-9)


def test_gae_with_lambda_0_is_the_td_error_and_with_1_the_monte_carlo_return_minus_the_value():
    rewards, values, terminated, truncated, valid = rollout = random_rollout(7)
    ended, gamma = terminated | truncated, 0.9
    td_errors = rewards + gamma * np.where(terminated, 0, values[1:]) - values[:-1]
    np.testing.assert_allclose(ppo.compute_gae(*rollout[:4], gamma, 0.0)[0][valid], td_errors[valid])
    returns = ppo.compute_gae(*rollout[:4], gamma, 1.0)[1]
    for t, n in np.argwhere(valid):
        last = next((k for k in range(t, len(rewards)) if ended[k, n]), len(rewards) - 1)
        discounts = gamma ** np.arange(last + 2 - t)
        bootstrap = 0.0 if terminated[last, n] else values[last + 1, n]
        monte_carlo = discounts @ np.append(rewards[t : last + 1, n], bootstrap)
        assert returns[t, n] == pytest.approx(monte_carlo, abs=1e-9)


def test_running_mean_and_variance_are_those_of_all_rows():
    rng = np.random.default_rng(0)
    for shape in ((), (3,)):
        stats = ppo.RunningMeanStd(*shape)
        batches = [rng.normal(100, 1 + k, (size, *shape)).astype(np.float32) for k, size in enumerate((200, 1, 50, 7))]
        for batch in batches:
            stats.update(torch.as_tensor(batch))
        rows = np.concatenate(batches)
        np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-4)
        np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-4)
        assert set(stats.state_dict()) == {"mean", "var", "count"}


# ---- the policy


@pytest.mark.parametrize("action_space", [spaces.Discrete(5), spaces.Box(-3, 7, (2,)), spaces.Box(-1, 1, ())])
def test_log_probs_and_entropy_are_those_of_torch_distributions(action_space):
    agent = make_agent(action_space=action_space)
    obs = torch.randn(64, 3)
    policy = distribution(agent, obs)
    actions = policy.sample() if agent.is_discrete else 3 * policy.sample()  # far out of the bounds, too
    log_probs, entropy, values = agent.evaluate_actions(obs, actions)
    torch.testing.assert_close(log_probs, policy.log_prob(actions))
    torch.testing.assert_close(entropy, policy.entropy())
    torch.testing.assert_close(values, agent.critic(obs)[:, 0])


def test_discrete_actions_follow_the_softmax_and_without_noise_are_the_most_likely():
    agent, B = make_agent(action_space=spaces.Discrete(4)), 40_000
    obs = torch.randn(1, 3)
    noise = agent.noise(np.random.default_rng(0), B // 8, 8)
    assert noise.shape == (B // 8, 8, 4)
    act, probabilities = agent.policy(), agent.actor(obs).softmax(-1)[0].detach().numpy()
    for actions in (act(obs.expand(B, 3).numpy(), noise.reshape(B, 4)), act(obs.numpy(), noise[:, :1]).flatten()):
        frequencies = np.bincount(actions, minlength=4) / len(actions)
        chi_square = (len(actions) * (frequencies - probabilities) ** 2 / probabilities).sum()
        assert chi_square < 16.3  # three degrees of freedom: exceeded by chance once in a thousand
    assert act(obs.numpy()).item() == probabilities.argmax()


def test_box_actions_follow_the_gaussian_and_without_noise_are_its_mean():
    agent, B = make_agent(action_space=spaces.Box(-1, 1, (3,))), 40_000
    obs, act = torch.randn(1, 3), agent.policy()
    actions = torch.as_tensor(act(obs.expand(B, 3).numpy(), agent.noise(np.random.default_rng(0), B)))
    assert actions.dtype == torch.float32
    mean, std = agent.actor(obs)[0].detach(), agent.log_std.exp().detach()
    torch.testing.assert_close((actions.mean(0) - mean) / std, torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(actions.T.cov() / torch.outer(std, std), torch.eye(3), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.as_tensor(act(obs.numpy()))[0], mean)


def test_the_first_standard_deviation_is_the_one_asked_for():
    agent = ppo.Agent(VECTOR, spaces.Box(-9, 9, (2,)), ppo.Args(log_std_init=-1.5))
    assert agent.noise(np.random.default_rng(0), 20_000).std(0) == pytest.approx(math.exp(-1.5), rel=0.02)
    assert agent.log_std.requires_grad
    assert ppo.Args().log_std_init == 0


@pytest.mark.parametrize("obs_space", [VECTOR, spaces.Box(-9, 9, (2, 4)), spaces.Box(0, 255, (40, 40, 3), np.uint8)])
@pytest.mark.parametrize("hidden_sizes", [(), (8,), (16, 8, 8)])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_the_policy_acts_with_the_network_as_it_is(obs_space, hidden_sizes, norm_obs):
    """In numpy for vectors, in torch for images: the output is that of the actor, also after its weights changed."""
    if norm_obs and obs_space.dtype == np.uint8:
        return
    args = ppo.Args(hidden_sizes=hidden_sizes, norm_obs=norm_obs)
    agent = ppo.Agent(obs_space, spaces.Box(-1, 1, (2,)), args)
    for _ in range(2):
        shake(agent.parameters(), 0.3)
        if norm_obs:
            agent.obs_stats.update(100 * torch.randn(20, int(np.prod(obs_space.shape))) + 50)
        obs = np.stack([obs_space.sample() for _ in range(6)])
        obs = obs if obs_space.dtype == np.uint8 else 300 * obs.astype(np.float32)
        expected = agent.actor(agent.features(torch.as_tensor(obs))).detach().numpy()
        np.testing.assert_allclose(agent.policy()(obs), expected, rtol=1e-4, atol=1e-4)


def test_bounds_too_far_apart_to_scale_to_are_passed_through():
    largest = np.finfo(np.float32).max
    agent = make_agent(action_space=spaces.Box(-largest, largest, (2,)))
    np.testing.assert_array_equal(agent.to_env(np.array([[0.0, -2.5]], np.float32)), [[0.0, -2.5]])


INF = np.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("low", "high", "actions", "expected"),
    [
        ([2, -300], [6, -100], [[-1, -1], [0, 0], [1, 1], [0.5, -0.5]], [[2, -300], [4, -200], [6, -100], [5, -250]]),
        ([2, -300], [6, -100], [[-9, 9], [1.01, -1.01]], [[2, -100], [6, -300]]),  # clipped
        ([-INF, 0, -INF], [INF, INF, 5], [[-70, -2, 70], [3, 4, -5]], [[-70, 0, 5], [3, 4, -5]]),  # own units
        (2, 4, [[-1], [0], [3]], [2, 3, 4]),  # no axes: one number
        ([[0, 0, 0], [-2, -2, -2]], [[2, 4, 6], [0, 0, 0]], [[-1, 0, 1, -1, 0, 1]], [[[0, 2, 6], [-2, -1, 0]]]),
    ],
)
def test_box_actions_are_scaled_to_the_bounds_of_each_axis(low, high, actions, expected, dtype):
    space = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    sent = make_agent(action_space=space).to_env(np.array(actions, np.float32))
    np.testing.assert_allclose(sent, np.array(expected, dtype))
    assert all(space.contains(np.asarray(action, dtype)) for action in sent)


def test_discrete_actions_are_counted_from_the_start_of_the_space():
    sent = make_agent(action_space=spaces.Discrete(3, start=-4)).to_env(np.array([0, 1, 2]))
    assert sent.tolist() == [-4, -3, -2]


# ---- the networks


def test_picture_channels_may_be_first_or_last():
    height, width, channels = 44, 40, 3
    first = make_agent(spaces.Box(0, 255, (channels, height, width), np.uint8))
    last = make_agent(spaces.Box(0, 255, (height, width, channels), np.uint8))
    last.load_state_dict(first.state_dict())
    pictures = torch.randint(0, 256, (5, channels, height, width), dtype=torch.uint8)
    features = first.features(pictures)
    torch.testing.assert_close(features, nn.Sequential(*first.convolutions)(pictures / 255))
    torch.testing.assert_close(features, last.features(pictures.permute(0, 2, 3, 1)))
    assert not torch.allclose(features[0], features[1])


def test_vectors_are_flattened():
    small_picture = make_agent(spaces.Box(0, 255, (8, 8, 3), np.uint8))  # too small for the convolutions: numbers
    assert small_picture.obs_dtype == np.float32
    obs = torch.randint(0, 256, (5, 8, 8, 3)).float()
    torch.testing.assert_close(small_picture.features(obs), obs.reshape(5, -1))
    matrix = make_agent(spaces.Box(-9, 9, (2, 4)))
    obs = torch.randn(5, 2, 4)
    torch.testing.assert_close(matrix.features(obs), obs.reshape(5, -1))


def test_normalised_observations_are_standardised_and_clipped_at_10():
    agent = make_agent(norm_obs=True)
    agent.obs_stats.mean[:], agent.obs_stats.var[:] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])
    obs = torch.tensor([[2.0, 4.0, 6.0], [0.0, 0.0, -3.0], [1e6, -1e6, 32.9]])
    expected = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -2.0], [10.0, -10.0, 29.9 / 3]])
    torch.testing.assert_close(agent.features(obs), expected)


@pytest.mark.parametrize("obs_space", [VECTOR, spaces.Box(0, 255, (40, 40, 1), np.uint8)])
def test_weights_start_orthogonal_with_the_gain_of_their_layer_and_biases_at_zero(obs_space):
    agent = ppo.Agent(obs_space, spaces.Discrete(4), ppo.Args(hidden_sizes=(32, 16)))
    gains = {agent.actor[-1]: 0.01, agent.critic[-1]: 1.0}
    layers = [layer for layer in agent.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(layers) == 6 + 3 * agent.is_image
    for layer in layers:
        weight = layer.weight.flatten(1)
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        gram = gains.get(layer, math.sqrt(2)) ** 2 * torch.eye(len(weight))
        torch.testing.assert_close(weight @ weight.T, gram, atol=1e-4, rtol=1e-4)
        assert not layer.bias.any()


def test_actor_and_critic_share_nothing_but_the_convolutions():
    for obs_space in (VECTOR, spaces.Box(0, 255, (40, 40, 1), np.uint8)):
        agent = make_agent(obs_space, spaces.Box(-1, 1, (2,)))
        obs = torch.ones(2, *obs_space.shape)
        log_probs, _, values = agent.evaluate_actions(obs, torch.zeros(2, 2))
        names, parameters = zip(*agent.named_parameters(), strict=True)
        reach = []
        for output in (log_probs, values):
            gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True, retain_graph=True)
            reach.append({name for name, x in zip(names, gradients, strict=True) if x is not None})
        actor, critic = reach
        assert actor | critic == set(names)
        assert {name.split(".")[0] for name in actor & critic} == ({"convolutions"} if agent.is_image else set())


def test_no_hidden_sizes_make_a_linear_model():
    agent = make_agent(hidden_sizes=())
    a, b = torch.randn(2, 10, 3)
    for net in (agent.actor, agent.critic):
        assert len(list(net.parameters())) == 2
        torch.testing.assert_close(net((a + b) / 2), (net(a) + net(b)) / 2)


# ---- what train() learns from. REINFORCE's episodes and weights are in test_reinforce.py.


@each(a2c, ppo, trpo)
@pytest.mark.parametrize("num_steps", [2, 16, 17])
def test_each_update_sees_each_transition_once_and_no_reset_step(module, num_steps, monkeypatch, tmp_path):
    updates, rollouts = watch(module, monkeypatch), 5
    args = dict(num_steps=num_steps, total_timesteps=4 * num_steps * rollouts, update_epochs=1)
    train(module, "Trace-v0", tmp_path, **args)
    assert len(updates) == rollouts
    steps = {step.key: step for timeline in played(num_steps) for step in timeline}
    for rollout, update in enumerate(updates):
        expected = [step.key for step in steps.values() if step.rollout == rollout]
        assert sorted(keys(update)) == sorted(expected)
        assert update.actions.tolist() == [steps[key].action for key in keys(update)]


@each(a2c, ppo, reinforce, trpo)
def test_each_action_is_drawn_for_the_observation_at_hand_and_with_noise_of_its_own(module, monkeypatch, tmp_path):
    played_actions, numbers, original = {}, [], module.Agent.policy

    def spy(agent):
        act = original(agent)

        def act_and_tell(obs, noise):
            actions = act(obs, noise)
            numbers.extend(noise.flatten().tolist())
            played_actions.update(zip((tuple(map(int, row)) for row in obs), actions.tolist(), strict=True))
            return actions

        return act_and_tell

    monkeypatch.setattr(module.Agent, "policy", spy)
    train(module, "Trace-v0", tmp_path, total_timesteps=3 * 64)
    assert len(Trace.log) > 100
    for step in Trace.log:
        assert played_actions[step.env, step.episode, step.step] == step.action
    assert len(numbers) == len(set(numbers)) == 3 * 64 * 3  # one for each of three actions


@each(a2c, ppo, trpo)
@pytest.mark.parametrize(
    ("env", "args"),
    [
        ("Trace-v0", {}),
        ("Trace-v0", {"gae_lambda": 0.0}),
        ("Trace-v0", {"gae_lambda": 1.0}),
        ("Trace-v0", {"norm_adv": True}),
        ("Trace-v0", {"norm_reward": True}),
        ("Jackpot-v0", {"norm_reward": True}),  # the jackpot is clipped
        ("Jackpot-v0", {}),  # without scaling it is not
        ("PaidResets-v0", {}),
        ("PaidResets-v0", {"norm_reward": True}),
    ],
)
def test_advantages_and_returns_are_those_of_the_steps_played(module, env, args, monkeypatch, tmp_path):
    T, gamma, rollouts, updates = 16, 0.9, 8, watch(module, monkeypatch)
    args = dict(norm_adv=False, learning_rate=1e-3, update_epochs=1, gamma=gamma, gae_lambda=0.7) | args
    train(module, env, tmp_path, total_timesteps=4 * T * rollouts, **args)
    environments = played(T)
    for rollout, update in enumerate(updates):
        scale = reward_scale(environments, rollout, gamma) if args.get("norm_reward") else None
        values = values_of_steps(update.agent, environments, rollout)  # of the critic as it was before the update
        expected = {}
        for timeline in environments:
            for i, step in enumerate(timeline):
                if step.rollout == rollout:
                    expected[step.key] = advantage_of(timeline[i:], values, scale, gamma, args["gae_lambda"])
        advantages = np.array([expected[key] for key in keys(update)])
        returns = advantages + [values[key] for key in keys(update)]
        if args["norm_adv"]:
            advantages = (advantages - advantages.mean()) / advantages.std()
        for passed, numbers in ((update.advantages, advantages), (update.returns, returns)):
            np.testing.assert_allclose(passed, numbers, rtol=1e-3, atol=1e-3)
    assert not np.allclose(value_of(updates[0].agent, [(1, 0, 0)]), value_of(updates[-1].agent, [(1, 0, 0)]))


def test_a_jackpot_is_more_than_ten_deviations_of_the_return(tmp_path):
    train(ppo, "Jackpot-v0", tmp_path, total_timesteps=8 * 64)  # else the test above proves less
    assert max(step.reward for step in Trace.log) / reward_scale(played(16), 7, 0.9) > 12


def values_of_steps(agent, environments, rollout) -> dict:
    """V of each observation of a rollout, and of the one after each, by (environment, episode, step)."""
    steps = [step.key for timeline in environments for step in timeline if step.rollout == rollout]
    states = [*steps, *((env, episode, t + 1) for env, episode, t in steps)]
    return dict(zip(states, value_of(agent, states), strict=True))


def reward_scale(environments, rollout, gamma) -> float:
    """The standard deviation of the discounted sums of rewards at every step up to this rollout."""
    sums = []
    for timeline in environments:
        for i, step in enumerate(timeline):
            if step.rollout <= rollout:
                sums.append(sum(gamma**k * timeline[i - k].reward for k in range(step.step + 1)))
    return float(np.std(sums))


def advantage_of(steps, values, scale, gamma, gae_lambda) -> float:
    """GAE of the first of these steps of one environment; later rollouts and episodes do not count."""
    total = 0.0
    for k, step in enumerate(steps):
        if (step.rollout, step.episode) != (steps[0].rollout, steps[0].episode):
            break
        env, episode, t = step.key
        value, next_value = values[env, episode, t], values[env, episode, t + 1]
        reward = step.reward if scale is None else np.clip(step.reward / scale, -10, 10)
        total += (gamma * gae_lambda) ** k * (reward + gamma * next_value * (not step.terminated) - value)
    return total


@each(a2c, ppo, trpo)
def test_standardised_advantages_have_mean_0_and_deviation_1_over_the_transitions(module, monkeypatch, tmp_path):
    updates = watch(module, monkeypatch)
    train(module, "Trace-v0", tmp_path, total_timesteps=3 * 64, update_epochs=1, norm_adv=True)
    for update in updates:
        assert update.advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert update.advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@each(a2c, ppo, reinforce, trpo)
def test_observation_statistics_are_those_of_all_transitions_and_change_only_between_updates(
    module, monkeypatch, tmp_path
):
    updates, uses = watch(module, monkeypatch), []  # the statistics each time the agent is used
    for name in ("policy", "features"):
        original = getattr(module.Agent, name)

        def spy(agent, *args, name=name, original=original):
            if agent.obs_stats is not None:
                uses.append((name, agent.obs_stats.mean[2].item()))
            return original(agent, *args)

        monkeypatch.setattr(module.Agent, name, spy)
    agent = train(module, "Trace-v0", tmp_path, total_timesteps=3 * 64, norm_obs=True, update_epochs=2)
    updates = updates[:: 2 if module is ppo else 1]  # PPO's second epochs see the same transitions
    rows, expected = [], [0.0]
    for update in updates:
        rows += keys(update)
        expected.append(np.mean(rows, 0)[2])
    uses = uses[[name for name, _ in uses].index("policy") :]  # not those while it was made
    rollouts = [[name for name, _ in group] for _, group in groupby(uses, key=lambda use: use[1])]
    assert [mean for mean, _ in groupby(mean for _, mean in uses)] == pytest.approx(expected[: len(rollouts)], rel=1e-4)
    assert len(rollouts) == len(updates) + 1  # the evaluation
    for names in rollouts[: len(updates)]:
        assert names[0] == "policy"
        assert names.count("policy") == 1
        assert "features" in names
    np.testing.assert_allclose(agent.obs_stats.mean, np.mean(rows, 0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(agent.obs_stats.var, np.var(rows, 0), rtol=1e-4, atol=1e-4)


@each(a2c, ppo, reinforce, trpo)
def test_the_actions_learned_from_are_those_before_they_are_clipped(module, monkeypatch, tmp_path):
    updates = watch(module, monkeypatch)
    train(module, "Target-v0", tmp_path, update_epochs=1)
    actions = torch.cat([update.actions for update in updates])
    assert actions.std(0) == pytest.approx(np.ones(3), abs=0.5)
    assert (actions[:, :2].abs() > 1).any(0).all()  # a standard deviation of 1 often leaves [-1, 1]


# ---- the optimizers


@each(a2c, ppo, reinforce)
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_learning_rate_falls_linearly_to_zero_or_stays(module, anneal_lr, monkeypatch, tmp_path):
    steps = spy_on_optimizers(monkeypatch)
    train(module, "Trace-v0", tmp_path, total_timesteps=4 * 64, learning_rate=0.01, anneal_lr=anneal_lr)
    logged = scalars(tmp_path)["charts/learning_rate"]
    before = [0, *(x for x, _ in logged[:-1])]  # environment steps before each update
    if module is not reinforce:
        assert before == [0, 64, 128, 192]
    rates = [0.01 * (1 - x / 256 if anneal_lr else 1) for x in before]
    per_update = {a2c: 1, ppo: 2 * 3, reinforce: 1 + 2 * 3}[module]  # epochs times minibatches
    assert [step.lr for step in steps] == pytest.approx(np.repeat(rates, per_update).tolist())
    assert [y for _, y in logged] == pytest.approx(rates)


def test_the_learning_rate_of_trpos_critic_stays(monkeypatch, tmp_path):
    steps = spy_on_optimizers(monkeypatch)
    train(trpo, "Trace-v0", tmp_path, total_timesteps=4 * 64, learning_rate=0.01)
    assert [step.lr for step in steps] == pytest.approx([0.01] * 4 * 2 * 3)
    assert [y for _, y in scalars(tmp_path)["charts/learning_rate"]] == pytest.approx([0.01] * 4)


@each(a2c, ppo, reinforce, trpo)
def test_each_layer_learns_from_pictures(module, monkeypatch, tmp_path):
    updates = watch(module, monkeypatch)
    agent = train(module, "PictureBandit-v0", tmp_path, learning_rate=1e-3)
    for name, x in updates[0].agent.named_parameters():
        assert not torch.equal(x, agent.get_parameter(name)), name


# ---- what is logged, and the evaluation


@each(a2c, ppo, reinforce, trpo)
@pytest.mark.parametrize("env", ["Trace-v0", "PaidResets-v0"])
def test_each_finished_episode_is_logged_once_with_its_return_length_and_step(module, env, monkeypatch, tmp_path):
    updates = watch(module, monkeypatch)
    train(module, env, tmp_path, total_timesteps=5 * 64)
    expected_returns, expected_lengths = [], []
    for timeline in played(16):
        episodes = defaultdict(list)
        for step in timeline:
            episodes[step.episode].append(step)
        for steps in episodes.values():
            x = (steps[-1].t + 1) * 4  # steps of all four environments
            if module is reinforce:  # one episode of each environment counts, in an update whose first seed is x0 + 1
                starts = [min(keys(update))[0] - 1 for update in updates]
                if steps[0].episode > 0 or steps[0].env > starts[-1] + 4:
                    continue
                x += max(start for start in starts if start < steps[0].env)
            if steps[-1].ended:
                expected_returns.append((x, sum(step.reward for step in steps)))
                expected_lengths.append((x, len(steps)))
    logged = scalars(tmp_path)
    assert sorted(logged["charts/episodic_length"]) == sorted(expected_lengths)
    assert np.array(sorted(logged["charts/episodic_return"])) == pytest.approx(
        np.array(sorted(expected_returns)), rel=1e-4, abs=1e-4
    )


@each(a2c, ppo, trpo)
def test_the_explained_variance_is_that_of_the_returns_by_the_values_before_the_update(module, monkeypatch, tmp_path):
    updates = watch(module, monkeypatch)
    train(module, "Trace-v0", tmp_path, total_timesteps=3 * 64, update_epochs=1, norm_adv=False, learning_rate=0.01)
    for i, update in enumerate(updates):
        errors = update.returns - torch.as_tensor(value_of(update.agent, update.obs.tolist()))
        explained = 1 - (errors.var(correction=0) / update.returns.var(correction=0)).item()
        assert scalars(tmp_path)["losses/explained_variance"][i] == ((i + 1) * 64, pytest.approx(explained, rel=1e-3))


@pytest.mark.parametrize("env", ["Trace-v0", "PaidResets-v0"])
@pytest.mark.parametrize("episodes", [1, 7, 20])
def test_evaluation_plays_whole_episodes_of_the_mode_whichever_ends_first(env, episodes, tmp_path, capsys):
    args = ppo.Args(env_id=f"tests.tiny_envs:{env}", eval_episodes=episodes, seed=3)
    agent = make_agent(Trace.observation_space, Trace.action_space, scale=0.3, norm_obs=True, norm_reward=True)
    agent.obs_stats.update(torch.tensor([[1e6, 0.0, 0.0], [1e6 + 16.0, 1.0, 1.0]]))
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    results = [ppo.evaluate(agent, args, tmp_path / "checkpoint.pt") for _ in range(2)]
    assert results[0] == results[1]  # deterministic
    for name, x in agent.state_dict().items():
        assert torch.equal(x, before[name]), f"evaluation changed {name}"

    expected, actions = [], Counter()
    for episode in range(episodes):
        single = gym.make("tests.tiny_envs:Trace-v0")
        obs, _ = single.reset(seed=3 + 10**7 + episode)
        episodic_return, done = 0.0, False
        while not done:
            action = agent.actor(agent.features(torch.as_tensor(obs)[None])).argmax().item()
            obs, reward, terminated, truncated, _ = single.step(action)
            episodic_return, done = episodic_return + reward, terminated or truncated
            actions[action] += 1
        expected.append(episodic_return)
    assert results[0] == pytest.approx(expected)
    line = f"mean_return={np.mean(expected):.2f} std={np.std(expected):.2f} episodes={episodes} checkpoint={tmp_path}"
    assert capsys.readouterr().out == 2 * f"eval: {line}/checkpoint.pt\n"
    assert episodes == 1 or len(actions) > 1  # else any policy would do


def test_an_evaluation_episode_that_does_not_end_is_cut_at_the_atari_limit(tmp_path):
    agent = make_agent(Endless.observation_space, Endless.action_space)
    args = ppo.Args(env_id="tests.tiny_envs:Endless-v0", eval_episodes=1)
    assert ppo.evaluate(agent, args, tmp_path / "checkpoint.pt") == [27_000]


# ---- learning on environments whose best policy is known

LEARNING = {
    a2c: dict(num_envs=16, num_steps=5, learning_rate=5e-3, hidden_sizes=(16,), total_timesteps=4000),
    ppo: dict(num_envs=8, num_steps=32, learning_rate=3e-3, update_epochs=10, num_minibatches=4, total_timesteps=3072),
    reinforce: dict(num_envs=8, learning_rate=2e-2, hidden_sizes=(16,), critic_updates=5, num_minibatches=1),
    trpo: dict(num_envs=8, num_steps=32, learning_rate=1e-2, target_kl=0.05, critic_updates=5, total_timesteps=3072),
}
LEARNING[reinforce] |= dict(norm_weight=True, total_timesteps=1200)
PICTURES = {
    a2c: dict(learning_rate=1e-3, total_timesteps=1600),
    ppo: dict(learning_rate=1e-3, update_epochs=4, total_timesteps=1024),
    reinforce: dict(learning_rate=1e-3, total_timesteps=256),
    trpo: dict(total_timesteps=768),
}
# On bounded axes a mean far outside is a trap, while the deviation is large; without hidden layers it moves slowly.
TARGETS = {
    a2c: dict(learning_rate=0.03, hidden_sizes=(), total_timesteps=4000),
    ppo: dict(total_timesteps=5120),
    reinforce: dict(learning_rate=0.05, hidden_sizes=(), total_timesteps=1600),
    trpo: dict(target_kl=0.1, total_timesteps=5120),
}


def learn(module, env: str, log_dir: Path, capsys, **args) -> tuple[nn.Module, float]:
    """A trained agent, and its mean return over 32 evaluation episodes."""
    agent = train(module, env, log_dir, **LEARNING[module] | dict(eval_episodes=32) | args)
    return agent, mean_return(capsys)


@each(a2c, ppo, reinforce, trpo)
@pytest.mark.parametrize("env", ["Bandit-v0", "StartBandit-v0", "DictBandit-v0", "PictureBandit-v0"])
def test_learns_which_action_pays(module, env, tmp_path, capsys):
    args = PICTURES[module] if env == "PictureBandit-v0" else {}
    assert learn(module, env, tmp_path, capsys, **args)[1] == 1.0


@each(a2c, ppo, reinforce, trpo)
def test_learns_that_a_later_reward_is_worth_more_than_one_at_once(module, tmp_path, capsys):
    agent, score = learn(module, "Delay-v0", tmp_path, capsys, total_timesteps=5120, gamma=0.9)
    assert score == 1.0
    after_right_choice = torch.cat([torch.eye(4), torch.ones(4, 1)], 1)[1:].numpy()
    assert value_of(agent, after_right_choice) == pytest.approx([0.81, 0.9, 1.0], abs=0.05)


@each(a2c, ppo, trpo)
def test_a_time_limit_takes_nothing_from_the_value_of_staying_alive(module, tmp_path, capsys):
    agent, score = learn(module, "Alive-v0", tmp_path, capsys, total_timesteps=8000, gamma=0.9)
    assert score == 10  # the time limit
    # Taken as an end, the limit would make the mean value of the ten steps 4.1. TRPO's policy still errs now and then.
    assert value_of(agent, np.eye(2)) == pytest.approx([10, 10], abs=2.0 if module is trpo else 0.3)


def test_reinforce_counts_what_is_paid_within_the_time_limit(tmp_path, capsys):
    agent, score = learn(reinforce, "Alive-v0", tmp_path, capsys, total_timesteps=5120, gamma=0.9)
    assert score == 10
    assert value_of(agent, np.eye(2)) == pytest.approx([4.1, 4.1], abs=0.6)  # the mean over the ten steps


@each(a2c, ppo, reinforce, trpo)
@pytest.mark.parametrize("norm", [False, True])
def test_learns_targets_on_axes_with_any_bounds(module, norm, tmp_path, capsys):
    args = TARGETS[module] | dict(norm_obs=norm, norm_reward=norm)
    assert learn(module, "Target-v0", tmp_path, capsys, **args)[1] > -0.1  # doing nothing gets -3.1
