"""Each equation against a slow and obvious computation, or against a known answer.

What the files share is tested here once, in ppo.py: another test holds the copies to each other.
"""

import math
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from algos import ppo
from tests.tiny_envs import Endless, Trace

VECTOR, TWO_ACTIONS = spaces.Box(-np.inf, np.inf, (3,)), spaces.Discrete(2)
FROZEN = 1e-9  # a learning rate so small that float32 weights keep their values


def make_agent(obs_space=VECTOR, action_space=TWO_ACTIONS, scale=1.0, **args) -> ppo.Agent:
    """An agent whose outputs differ from observation to observation (a fresh one has nearly constant ones)."""
    torch.manual_seed(0)
    agent = ppo.Agent(obs_space, action_space, ppo.Args(**args))
    with torch.no_grad():
        agent.actor[-1].weight.normal_(0, scale)
        if not agent.is_discrete:
            agent.log_std.uniform_(-1, 1)
    return agent


def train(env: str, log_dir: Path, **args) -> ppo.Agent:
    """Train on the tiny environment of that name: 4 environments and 16 steps a rollout, unless told otherwise."""
    small = dict(num_envs=4, num_steps=16, total_timesteps=4 * 16, update_epochs=2, num_minibatches=3, eval_episodes=0)
    args = small | {"env_id": f"tests.tiny_envs:{env}", "log_dir": str(log_dir), "device": "cpu"} | args
    return ppo.train(ppo.Args(**args))


def scalars(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (x, y) of each tag of the only run in that folder."""
    (folder,) = log_dir.iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.flatten() for x in tensors])


@pytest.fixture
def losses(monkeypatch):
    """Every call of ppo_loss in the test: its arguments by name, its results, and the gradient of the loss."""
    calls, original = [], ppo.ppo_loss

    def spy(agent, obs, actions, old_log_probs, old_values, advantages, returns, args):
        batch = (obs, actions, old_log_probs, old_values, advantages, returns)
        assert not any(x.requires_grad for x in batch), "the data of a rollout are constants"
        results = original(agent, *batch, args)
        names = ("obs", "actions", "old_log_probs", "old_values", "advantages", "returns")
        names += ("loss", "policy_loss", "value_loss", "entropy", "log_ratio")
        call = {name: x.detach().clone() for name, x in zip(names, (*batch, *results), strict=True)}
        gradients = torch.autograd.grad(results[0], list(agent.parameters()), retain_graph=True)
        with torch.no_grad():
            log_probs = agent.evaluate_actions(obs, actions)[0]
        calls.append(SimpleNamespace(**call, gradient=flat(gradients), log_probs=log_probs))
        return results

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    return calls


@pytest.fixture
def adam_steps(monkeypatch):
    """Every step of Adam in the test: the learning rate and the gradient it was given."""
    steps = []

    class Spy(torch.optim.Adam):
        def step(self):
            (group,) = self.param_groups
            gradients = [parameter.grad for parameter in group["params"]]
            steps.append(SimpleNamespace(lr=float(group["lr"]), gradient=flat(gradients)))
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Spy)
    return steps


@pytest.fixture(autouse=True)
def clear_trace():
    Trace.log.clear()


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
        batches = [rng.normal(5, 1 + k, (size, *shape)).astype(np.float32) for k, size in enumerate((200, 1, 50, 7))]
        for batch in batches:
            stats.update(torch.as_tensor(batch))
        rows = np.concatenate(batches)
        np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-4)
        np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-4)
        assert set(stats.state_dict()) == {"mean", "var", "count"}


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


# ---- the policy


@pytest.mark.parametrize("action_space", [spaces.Discrete(5), spaces.Box(-3, 7, (2,)), spaces.Box(-1, 1, ())])
def test_log_probs_and_entropy_are_those_of_torch_distributions(action_space):
    agent = make_agent(action_space=action_space)
    obs = torch.randn(64, 3)
    output = agent.actor(obs)
    if agent.is_discrete:
        policy = torch.distributions.Categorical(logits=output)
    else:
        policy = torch.distributions.Independent(torch.distributions.Normal(output, agent.log_std.exp()), 1)
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
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
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
    torch.testing.assert_close(features, first.convolutions(pictures / 255))
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


# ---- what train() passes to the loss


def played(num_steps: int) -> list[list[SimpleNamespace]]:
    """What Trace logged: for each environment its steps in order, each with the time t at which it was played."""
    environments = []
    for _, steps in groupby(sorted(Trace.log), key=lambda step: step.env):
        t, timeline = 0, []
        for step in steps:
            ended = step.terminated or step.truncated
            key = (step.env, step.episode, step.step)
            timeline.append(SimpleNamespace(**step._asdict(), key=key, ended=ended, t=t, rollout=t // num_steps))
            t += 2 if ended else 1  # the step after an end only resets
        environments.append(timeline)
    return environments


def keys(call) -> list[tuple[int, int, int]]:
    """Which transitions a call of the loss is about: the observation says it."""
    return [tuple(map(int, row)) for row in call.obs]


@pytest.mark.parametrize("num_steps", [2, 16, 17])
def test_each_epoch_sees_each_transition_once_and_no_reset_step(num_steps, losses, tmp_path):
    K, M, rollouts = 3, 3, 5
    args = dict(num_steps=num_steps, total_timesteps=4 * num_steps * rollouts, update_epochs=K, num_minibatches=M)
    train("Trace-v0", tmp_path, **args)
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


def test_each_action_is_drawn_for_the_observation_at_hand_and_with_noise_of_its_own(monkeypatch, tmp_path):
    calls, original = [], ppo.Agent.policy

    def spy(agent):
        act = original(agent)

        def act_and_tell(obs, *noise):
            actions = act(obs, *noise)
            if noise:  # not in the evaluation
                calls.append((obs.tolist(), noise[0].tolist(), actions.tolist()))
            return actions

        return act_and_tell

    monkeypatch.setattr(ppo.Agent, "policy", spy)
    train("Trace-v0", tmp_path, total_timesteps=3 * 64)
    for n, timeline in enumerate(played(16)):
        for step in timeline:
            obs, _, actions = calls[step.t]
            assert tuple(obs[n]) == step.key
            assert actions[n] == step.action
    numbers = np.ravel([noise for _, noise, _ in calls])
    assert len(numbers) == len(set(numbers)) == 3 * 64 * 3  # one for each of three actions


@pytest.mark.parametrize(
    ("env", "args"),
    [
        ("Trace-v0", {}),
        ("Trace-v0", {"norm_adv": True}),
        ("Trace-v0", {"norm_reward": True}),
        ("Jackpot-v0", {"norm_reward": True}),  # the jackpot is clipped
        ("Jackpot-v0", {}),  # without scaling it is not
        ("PaidResets-v0", {}),
        ("PaidResets-v0", {"norm_reward": True}),
    ],
)
def test_advantages_and_returns_are_those_of_the_steps_played(env, args, losses, tmp_path):
    T, M, gamma, gae_lambda, rollouts = 16, 3, 0.9, 0.7, 8
    args = dict(norm_adv=False, learning_rate=FROZEN, update_epochs=1, gamma=gamma, gae_lambda=gae_lambda) | args
    agent = train(env, tmp_path, total_timesteps=4 * T * rollouts, **args)
    environments = played(T)
    for rollout in range(rollouts):
        scale = reward_scale(environments, rollout, gamma) if args.get("norm_reward") else None
        expected = {}
        for timeline in environments:
            for i, step in enumerate(timeline):
                if step.rollout == rollout:
                    expected[step.key] = advantage_of(timeline[i:], agent, scale, gamma, gae_lambda)
        calls = losses[rollout * M : (rollout + 1) * M]
        order = [key for call in calls for key in keys(call)]
        advantages = np.array([expected[key] for key in order])
        values = value_of(agent, order)
        log_probs = torch.cat([call.log_probs for call in calls])
        standardised = (advantages - advantages.mean()) / advantages.std()
        for name, numbers in dict(
            advantages=standardised if args["norm_adv"] else advantages,
            returns=advantages + values,
            old_values=values,
            old_log_probs=log_probs,  # the policy is frozen, so it is the old one still
        ).items():
            passed = torch.cat([getattr(call, name) for call in calls])
            np.testing.assert_allclose(passed, numbers, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_jackpot_is_more_than_ten_deviations_of_the_return(tmp_path):
    train("Jackpot-v0", tmp_path, total_timesteps=8 * 64, learning_rate=FROZEN)  # else the test above proves less
    assert max(step.reward for step in Trace.log) / reward_scale(played(16), 7, 0.9) > 12


def value_of(agent, observations) -> np.ndarray:
    with torch.no_grad():
        return agent.critic(torch.tensor(observations, dtype=torch.float32))[:, 0].numpy()


def reward_scale(environments, rollout, gamma) -> float:
    """The standard deviation of the discounted sums of rewards at every step up to this rollout."""
    sums = []
    for timeline in environments:
        for i, step in enumerate(timeline):
            if step.rollout <= rollout:
                sums.append(sum(gamma**k * timeline[i - k].reward for k in range(step.step + 1)))
    return float(np.std(sums))


def advantage_of(steps, agent, scale, gamma, gae_lambda) -> float:
    """GAE of the first of these steps of one environment; later rollouts and episodes do not count."""
    total = 0.0
    for k, step in enumerate(steps):
        if (step.rollout, step.episode) != (steps[0].rollout, steps[0].episode):
            break
        env, episode, t = step.key
        value, next_value = value_of(agent, [(env, episode, t), (env, episode, t + 1)])
        reward = step.reward if scale is None else np.clip(step.reward / scale, -10, 10)
        total += (gamma * gae_lambda) ** k * (reward + gamma * next_value * (not step.terminated) - value)
    return total


def test_standardised_advantages_have_mean_0_and_deviation_1_over_the_transitions(losses, tmp_path):
    train("Trace-v0", tmp_path, total_timesteps=3 * 64, update_epochs=1, norm_adv=True)
    for rollout in range(3):
        advantages = torch.cat([call.advantages for call in losses[3 * rollout : 3 * rollout + 3]])
        assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("env", ["Bandit-v0", "Trace-v0", "Target-v0", "PictureBandit-v0"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_ratio_is_1_until_the_first_optimizer_step_of_each_rollout(env, norm, losses, tmp_path):
    norm_obs = norm and env != "PictureBandit-v0"
    train(env, tmp_path, total_timesteps=3 * 64, norm_obs=norm_obs, norm_reward=norm, learning_rate=3e-3)
    assert len(losses) == 3 * 6
    for i, call in enumerate(losses):
        if i % 6 == 0:
            assert call.log_ratio.abs().max() < 2e-5
        else:
            assert call.log_ratio.abs().max() > 2e-5  # else the first half of this test would prove nothing


def test_observation_statistics_are_those_of_all_transitions_and_change_only_between_rollouts(monkeypatch, tmp_path):
    seen, rows = [], []  # the statistics each time the agent is used
    for name in ("policy", "evaluate_actions"):
        original = getattr(ppo.Agent, name)

        def spy(agent, *args, original=original):
            seen.append(agent.obs_stats.mean[2].item())
            return original(agent, *args)

        monkeypatch.setattr(ppo.Agent, name, spy)
    agent = train("Trace-v0", tmp_path, total_timesteps=3 * 64, norm_obs=True)
    steps = [step for timeline in played(16) for step in timeline]
    uses = 1 + 1 + 2 * 3  # of the agent in a rollout: to act, for log π_old, 2 epochs of 3 minibatches
    expected = [0.0]
    for rollout in range(3):
        rows = np.array([step.key for step in steps if step.rollout <= rollout])
        expected.append(rows[:, 2].mean())
    assert seen == pytest.approx(np.repeat(expected[:3], uses).tolist(), rel=1e-4)
    np.testing.assert_allclose(agent.obs_stats.mean, rows.mean(0), rtol=1e-4)
    np.testing.assert_allclose(agent.obs_stats.var, rows.var(0), rtol=1e-4)


def test_log_probs_are_of_the_actions_before_they_are_clipped(losses, tmp_path):
    agent = train("Target-v0", tmp_path, learning_rate=FROZEN, update_epochs=1)
    actions = torch.cat([call.actions for call in losses])
    assert (actions[:, :2].abs() > 1).any(0).all()  # a standard deviation of 1 often leaves [-1, 1]
    policy = torch.distributions.Normal(agent.actor(torch.cat([call.obs for call in losses])), agent.log_std.exp())
    old_log_probs = torch.cat([call.old_log_probs for call in losses])
    torch.testing.assert_close(old_log_probs, policy.log_prob(actions).sum(-1).detach())


# ---- the optimizer


def test_the_learning_rate_falls_linearly_to_zero(adam_steps, tmp_path):
    train("Trace-v0", tmp_path, total_timesteps=4 * 64, learning_rate=0.01)
    rates = [step.lr for step in adam_steps]
    assert rates == pytest.approx([rate for rate in (0.01, 0.0075, 0.005, 0.0025) for _ in range(6)])
    assert [y for _, y in scalars(tmp_path)["charts/learning_rate"]] == pytest.approx(rates[::6])


def test_the_learning_rate_stays_if_not_annealed(adam_steps, tmp_path):
    train("Trace-v0", tmp_path, total_timesteps=4 * 64, learning_rate=0.01, anneal_lr=False)
    assert [step.lr for step in adam_steps] == pytest.approx([0.01] * 4 * 6)


@pytest.mark.parametrize(("max_grad_norm", "clipped"), [(1e-3, "all"), (1e6, "none")])
def test_each_step_takes_the_gradient_of_its_minibatch_clipped_to_the_norm(
    max_grad_norm, clipped, losses, adam_steps, tmp_path
):
    train("Trace-v0", tmp_path, max_grad_norm=max_grad_norm, ent_coef=0.1)
    assert len(losses) == len(adam_steps) == 6
    for call, step in zip(losses, adam_steps, strict=True):
        norm = call.gradient.norm()
        assert (norm > max_grad_norm) == (clipped == "all")
        expected = call.gradient * min(1.0, max_grad_norm / norm)
        torch.testing.assert_close(step.gradient, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("target_kl", [None, 1e-9, 0.01, 1e9])
def test_epochs_end_with_the_first_that_exceeds_the_target_kl(target_kl, losses, tmp_path):
    K, M, rollouts = 8, 2, 4
    args = dict(update_epochs=K, num_minibatches=M, total_timesteps=64 * rollouts, learning_rate=3e-3)
    train("Trace-v0", tmp_path, target_kl=target_kl, **args)
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


# ---- what is logged, and the evaluation


def test_logged_losses_are_those_of_the_last_epoch_of_each_rollout(losses, tmp_path):
    K, M = 3, 2
    train("Trace-v0", tmp_path, total_timesteps=3 * 64, update_epochs=K, num_minibatches=M, learning_rate=0.01)
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
        for name, y in expected.items():
            x_logged, y_logged = logged[f"losses/{name}"][rollout]
            assert x_logged == (rollout + 1) * 64
            assert y_logged == pytest.approx(float(y), rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("env", ["Trace-v0", "PaidResets-v0"])
def test_each_finished_episode_is_logged_once_with_its_return_length_and_step(env, tmp_path):
    train(env, tmp_path, total_timesteps=5 * 64)
    expected_returns, expected_lengths = [], []
    for timeline in played(16):
        episodes = defaultdict(list)
        for step in timeline:
            episodes[step.episode].append(step)
        for steps in episodes.values():
            if steps[-1].ended:
                x = (steps[-1].t + 1) * 4  # steps of all four environments
                expected_returns.append((x, sum(step.reward for step in steps)))
                expected_lengths.append((x, len(steps)))
    logged = scalars(tmp_path)
    assert sorted(logged["charts/episodic_length"]) == sorted(expected_lengths)
    assert np.array(sorted(logged["charts/episodic_return"])) == pytest.approx(
        np.array(sorted(expected_returns)), rel=1e-4, abs=1e-4
    )


def test_the_last_line_has_mean_and_deviation_of_the_returns(capsys):
    ppo.print_evaluation([1.0, 4.0], Path("runs/x/checkpoint.pt"))
    expected = "eval: mean_return=2.50 std=1.50 episodes=2 checkpoint=runs/x/checkpoint.pt\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("env", ["Trace-v0", "PaidResets-v0"])
@pytest.mark.parametrize("episodes", [1, 7, 20])
def test_evaluation_plays_whole_episodes_of_the_mode_whichever_ends_first(env, episodes, tmp_path):
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
        obs, _ = single.reset(seed=3 + 10**6 + episode)
        episodic_return, done = 0.0, False
        while not done:
            action = agent.actor(agent.features(torch.as_tensor(obs)[None])).argmax().item()
            obs, reward, terminated, truncated, _ = single.step(action)
            episodic_return, done = episodic_return + reward, terminated or truncated
            actions[action] += 1
        expected.append(episodic_return)
    assert results[0] == pytest.approx(expected)
    assert episodes == 1 or len(actions) > 1  # else any policy would do


def test_an_evaluation_episode_that_does_not_end_is_cut_at_the_atari_limit(tmp_path):
    agent = make_agent(Endless.observation_space, Endless.action_space)
    args = ppo.Args(env_id="tests.tiny_envs:Endless-v0", eval_episodes=1)
    assert ppo.evaluate(agent, args, tmp_path / "checkpoint.pt") == [27_000]


# ---- learning on environments whose best policy is known


def learn(env: str, log_dir: Path, capsys, **args) -> tuple[ppo.Agent, float]:
    """A trained agent, and its mean return over 32 evaluation episodes."""
    defaults = dict(num_envs=8, num_steps=32, total_timesteps=3072, update_epochs=10, num_minibatches=4)
    agent = train(env, log_dir, **defaults | dict(learning_rate=3e-3, eval_episodes=32) | args)
    line = capsys.readouterr().out.splitlines()[-1]
    return agent, float(line.split("mean_return=")[1].split()[0])


@pytest.mark.parametrize(
    ("env", "args"),
    [
        ("Bandit-v0", {}),
        ("StartBandit-v0", {}),
        ("DictBandit-v0", {"total_timesteps": 4096}),
        ("PictureBandit-v0", {"total_timesteps": 1024, "update_epochs": 4, "learning_rate": 1e-3}),
    ],
)
def test_learns_which_action_pays(env, args, tmp_path, capsys):
    assert learn(env, tmp_path, capsys, **args)[1] == 1.0


def test_learns_that_a_later_reward_is_worth_more_than_one_at_once(tmp_path, capsys):
    agent, mean_return = learn("Delay-v0", tmp_path, capsys, total_timesteps=5120, gamma=0.9)
    assert mean_return == 1.0
    after_right_choice = torch.cat([torch.eye(4), torch.ones(4, 1)], 1)[1:].numpy()
    assert value_of(agent, after_right_choice) == pytest.approx([0.81, 0.9, 1.0], abs=0.05)


def test_a_time_limit_takes_nothing_from_the_value_of_staying_alive(tmp_path, capsys):
    agent, mean_return = learn("Alive-v0", tmp_path, capsys, total_timesteps=6144, gamma=0.9)
    assert mean_return == 10  # the time limit
    # Taken as an end, the limit would make the mean value of the ten steps 4.1.
    assert value_of(agent, np.eye(2)) == pytest.approx([10, 10], abs=0.3)


@pytest.mark.parametrize("norm", [False, True])
def test_learns_targets_on_axes_with_any_bounds(norm, tmp_path, capsys):
    args = dict(total_timesteps=5120, norm_obs=norm, norm_reward=norm)
    assert learn("Target-v0", tmp_path, capsys, **args)[1] > -0.1  # doing nothing gets -3.1
