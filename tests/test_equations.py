"""The equations of each file against slow, obvious computations, and learning on environments whose answer is known."""

import copy
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import read_events
from torch import nn

from algos import a2c, ddpg, dqn, ppo, reinforce, trpo
from tests.tiny_envs import Trace

VECTOR, PUSH = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,))


def train(module, env, log_dir, **args):
    module_args = dict(env_id=f"tests.tiny_envs:{env}", log_dir=str(log_dir), device="cpu", eval_episodes=1) | args
    return module.train(module.Args(**module_args))


def mean_return(capsys):
    return float(re.findall(r"mean_return=(\S+)", capsys.readouterr().out)[-1])


def shaken(module, action_space, **args):
    """An agent whose weights are far from their start."""
    torch.manual_seed(0)
    agent = module.Agent(VECTOR, action_space, module.Args(**args))
    for x in agent.parameters():
        x.data += 0.3 * torch.randn_like(x)
    return agent


# ---- advantages, statistics, losses


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.9, 0.7), (0.9, 0.0), (0.9, 1.0), (1.0, 0.5)])
def test_gae_is_the_sum_of_its_definition(gamma, gae_lambda):
    rng, T, N = np.random.default_rng(0), 40, 3
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    terminated, truncated = rng.random((2, T, N)) < 0.15
    terminated[10, 0] = truncated[10, 0] = terminated[-1, 1] = truncated[-1, 2] = True
    advantages, returns = ppo.compute_gae(rewards, values, terminated, truncated, gamma, gae_lambda)
    for t, n in np.ndindex(T, N):
        total = 0.0
        for k in range(t, T):
            next_value = 0.0 if terminated[k, n] else values[k + 1, n]
            total += (gamma * gae_lambda) ** (k - t) * (rewards[k, n] + gamma * next_value - values[k, n])
            if terminated[k, n] or truncated[k, n]:
                break
        assert advantages[t, n] == pytest.approx(total, abs=1e-9)
        assert returns[t, n] == pytest.approx(total + values[t, n], abs=1e-9)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_running_mean_and_variance_are_those_of_all_rows(shape):
    rng, stats = np.random.default_rng(0), ppo.RunningMeanStd(*shape)
    batches = [rng.normal(10 * k, 1 + k, (size, *shape)).astype(np.float32) for k, size in enumerate((200, 1, 50, 7))]
    for batch in batches:
        stats.update(batch)
    np.testing.assert_allclose(stats.mean, np.concatenate(batches).mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, np.concatenate(batches).var(0), rtol=1e-4)


def test_ppo_loss_clips_only_what_would_pay_more():
    agent, args = shaken(ppo, gym.spaces.Discrete(3)), ppo.Args(clip_coef=0.2, vf_coef=0.7, ent_coef=0.3)
    x, actions = torch.randn(200, 3), torch.randint(3, (200,))
    policy, values = agent(x)
    old_log_probs = policy.log_prob(actions).detach() + 0.4 * torch.randn(200)
    advantages, returns = torch.randn(2, 200)
    loss, policy_loss, value_loss, entropy, _ = ppo.ppo_loss(
        agent, x, actions, old_log_probs, advantages, returns, args
    )
    terms = []
    for b in range(200):
        p = agent(x[b : b + 1])[0].probs[0]
        ratio, A = (p[actions[b]].log() - old_log_probs[b]).exp().item(), advantages[b].item()
        terms.append(min(ratio, 1.2) * A if A > 0 else max(ratio, 0.8) * A)
    assert -policy_loss.item() == pytest.approx(np.mean(terms), rel=1e-4)
    assert value_loss.item() == pytest.approx(((values - returns) ** 2).mean().item(), rel=1e-5)
    assert entropy.item() == pytest.approx(-(policy.probs * policy.probs.log()).sum(1).mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx((policy_loss + 0.7 * value_loss - 0.3 * entropy).item(), rel=1e-5)


def test_a2c_loss():
    log_probs, entropy, values, advantages, returns = torch.randn(5, 50)
    loss, *_ = a2c.a2c_loss(log_probs, entropy, values, advantages, returns, a2c.Args(vf_coef=0.7, ent_coef=0.3))
    expected = -(log_probs * advantages) + 0.7 * (values - returns) ** 2 - 0.3 * entropy
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("action_space", [gym.spaces.Discrete(4), PUSH])
def test_actions_follow_the_policy_that_gives_their_probabilities(action_space):
    agent, rng = shaken(ppo, action_space), np.random.default_rng(0)
    obs = np.tile(np.float32([[0.3, -0.5, 0.8]]), (20_000, 1))
    actions = agent.numpy_policy(rng)(obs)
    policy, _ = agent(torch.as_tensor(obs[:1]))
    if agent.is_discrete:
        np.testing.assert_allclose(np.bincount(actions, minlength=4) / 20_000, policy.probs[0].detach(), atol=0.015)
        assert agent.numpy_policy()(obs[:1]).item() == policy.probs.argmax().item()
    else:
        np.testing.assert_allclose(actions.mean(0), policy.mean[0].detach(), atol=0.03)
        np.testing.assert_allclose(actions.std(0), policy.stddev[0].detach(), rtol=0.03)
        np.testing.assert_allclose(agent.numpy_policy()(obs[:1]), policy.mean.detach(), rtol=1e-5)


# ---- what a loss sees, on an environment whose observations say which they are


@pytest.mark.parametrize("norm", [False, True])
def test_ppo_learns_from_each_real_step_once_an_epoch(norm, monkeypatch, tmp_path):
    batches, original = [], ppo.ppo_loss

    def spy(agent, x, actions, *others):
        batches.append((x, actions))
        return original(agent, x, actions, *others)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    Trace.log.clear()
    args = dict(num_envs=4, num_steps=16, num_minibatches=3, update_epochs=2, total_timesteps=128, seed=1)
    train(ppo, "PaidResets-v0", tmp_path, norm_reward=norm, **args)
    assert len(batches) == 2 * 2 * 3
    rows = [row for x, actions in batches for row in torch.cat([x, actions[:, None]], 1).int().tolist()]
    played = [[s.env, s.episode, s.step, int(s.action)] for s in Trace.log if s.env < 10**7]
    assert sorted(rows) == sorted(2 * played)


def test_the_ratio_of_the_first_minibatch_is_one(monkeypatch, tmp_path):
    log_ratios, original = [], ppo.ppo_loss

    def spy(*batch):
        result = original(*batch)
        log_ratios.append(result[-1])
        return result

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    args = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2, total_timesteps=192)
    train(ppo, "Trace-v0", tmp_path, norm_obs=True, norm_reward=True, **args)
    assert log_ratios[4].abs().max() < 1e-5  # the second rollout's first minibatch
    assert log_ratios[5].abs().max() > 1e-5


@pytest.mark.parametrize("target_kl", [None, 1e-9])
def test_target_kl_ends_the_update(target_kl, monkeypatch, tmp_path):
    calls, original = [], ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *batch: calls.append(1) or original(*batch))
    args = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=5, total_timesteps=64, target_kl=target_kl)
    train(ppo, "Trace-v0", tmp_path, **args)
    assert len(calls) == (10 if target_kl is None else 2)


@pytest.mark.parametrize("module", [a2c, ppo])
def test_the_learning_rate_falls_linearly_to_zero(module, tmp_path):
    train(module, "Trace-v0", tmp_path, num_envs=4, num_steps=16, total_timesteps=256, learning_rate=0.01)
    (folder,) = tmp_path.iterdir()
    rates = [rate for _, rate in read_events(folder)["charts/learning_rate"]]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


# ---- TRPO


def test_conjugate_gradient_solves():
    torch.manual_seed(0)
    A = torch.randn(6, 6)
    H, b = A @ A.T + torch.eye(6), torch.randn(6)
    torch.testing.assert_close(trpo.conjugate_gradient(lambda v: H @ v, b, 20), torch.linalg.solve(H, b))


@pytest.mark.parametrize("action_space", [gym.spaces.Discrete(3), PUSH])
def test_a_full_step_is_the_natural_gradient_of_the_explicit_fisher_matrix(action_space):
    args = dict(hidden_sizes=(4,), line_search_steps=0, cg_iters=200, cg_damping=0.1, target_kl=0.01)
    agent, args = shaken(trpo, action_space, **args), trpo.Args(**args)
    parameters = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    x, advantages = torch.randn(60, 3), torch.randn(60)
    old_policy = agent(x)[0]
    actions = old_policy.sample()
    scores = []
    for b in range(60):
        log_prob = agent(x[b : b + 1])[0].log_prob(actions[b : b + 1]).sum()
        scores.append(nn.utils.parameters_to_vector(torch.autograd.grad(log_prob, parameters)))
    g = (torch.stack(scores) * advantages[:, None]).mean(0)
    frozen, theta = copy.deepcopy(agent), nn.utils.parameters_to_vector(parameters).detach()
    names = [name for name, _ in agent.named_parameters() if not name.startswith("critic")]

    def kl(vector):
        pieces = vector.split([p.numel() for p in parameters])
        weights = {n: piece.view_as(p) for n, piece, p in zip(names, pieces, parameters, strict=True)}
        policy = torch.func.functional_call(frozen, weights, (x,))[0]
        return torch.distributions.kl_divergence(frozen(x)[0], policy).mean()

    H = torch.autograd.functional.hessian(kl, theta) + 0.1 * torch.eye(len(theta))
    natural = torch.linalg.solve(H, g)
    expected = theta + (2 * 0.01 / (natural @ H @ natural)).sqrt() * natural
    trpo.trust_region_step(agent, parameters, x, actions, advantages, args)
    torch.testing.assert_close(nn.utils.parameters_to_vector(parameters).detach(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("action_space", [gym.spaces.Discrete(3), PUSH])
def test_the_kl_limit_holds_or_the_old_parameters_stay(action_space):
    agent = shaken(trpo, action_space)
    parameters = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    x, advantages = torch.randn(100, 3), torch.randn(100)
    for delta in (0.01, 1.0, 100.0):
        old = copy.deepcopy(agent)
        actions = old(x)[0].sample()
        log = trpo.trust_region_step(agent, parameters, x, actions, advantages, trpo.Args(target_kl=delta))
        kl = torch.distributions.kl_divergence(old(x)[0], agent(x)[0]).mean().item()
        assert kl <= delta
        assert log["losses/kl"] == pytest.approx(kl, abs=1e-5)
        assert log["losses/surrogate_improvement"] > 0 or kl == 0
        assert all(torch.equal(p, q) for p, q in zip(old.critic.parameters(), agent.critic.parameters(), strict=True))
    before = [p.clone() for p in parameters]
    args = trpo.Args(target_kl=1e6, line_search_steps=1)  # a step far too long for the quadratic model
    log = trpo.trust_region_step(agent, parameters, x, actions, advantages, args)
    if log["losses/line_search_steps"] == 1:
        assert all(torch.equal(p, q) for p, q in zip(before, parameters, strict=True))


# ---- REINFORCE


def test_rewards_to_go():
    rewards = np.array([[1.0, 2.0], [3.0, 0.0], [5.0, 0.0]])
    np.testing.assert_allclose(reinforce.rewards_to_go(rewards, 0.5), [[1 + 1.5 + 1.25, 2], [3 + 2.5, 0], [5, 0]])


def test_the_gradient_is_the_mean_over_episodes_and_its_variance_that_between_them():
    agent = shaken(reinforce, gym.spaces.Discrete(3))
    parameters = list(agent.actor.parameters())
    x, actions, weights = torch.randn(9, 3), torch.randint(3, (9,)), torch.randn(9)
    episodes = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    gradients = []
    for n in range(3):
        i = torch.as_tensor(episodes == n)
        total = (agent(x[i])[0].log_prob(actions[i]) * weights[i]).sum()
        gradients.append(nn.utils.parameters_to_vector(torch.autograd.grad(total, parameters)))
    loss = reinforce.reinforce_loss(agent, x, actions, weights, num_episodes=3)
    g = nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))
    torch.testing.assert_close(-g, torch.stack(gradients).mean(0))
    variance = reinforce.gradient_variance(agent, parameters, x, actions, weights, episodes)
    assert variance == pytest.approx(torch.stack(gradients).var(0).sum().item(), rel=1e-4)


@pytest.mark.parametrize("weight", ["total-return", "reward-to-go", "baseline"])
def test_reinforce_weighs_whole_episodes_one_of_each_environment(weight, monkeypatch, tmp_path, capsys):
    batches, original = [], reinforce.reinforce_loss

    def spy(agent, x, actions, weights, num_episodes):
        batches.append((x.clone(), weights.numpy().copy(), agent(x)[1].detach().numpy()))
        return original(agent, x, actions, weights, num_episodes)

    monkeypatch.setattr(reinforce, "reinforce_loss", spy)
    Trace.log.clear()
    train(reinforce, "Trace-v0", tmp_path, num_envs=4, total_timesteps=100, gamma=0.9, weight=weight)
    assert "too few for whole episodes" in capsys.readouterr().err
    steps = {(s.env, s.episode, s.step): s.reward for s in Trace.log}
    for x, weights, values in batches:
        keys = [tuple(key) for key in x.int().tolist()]
        assert {env for env, _, _ in keys} == set(range(min(keys)[0], min(keys)[0] + 4))
        assert all(episode == 0 for _, episode, _ in keys)
        for (env, episode, t), w, value in zip(keys, weights, values, strict=True):
            first = 0 if weight == "total-return" else t
            rewards = [steps[key] for key in sorted(steps) if key[:2] == (env, episode) and key[2] >= first]
            expected = sum(0.9**k * reward for k, reward in enumerate(rewards))
            assert w == pytest.approx(expected - (value if weight == "baseline" else 0), rel=1e-3, abs=1e-3)


# ---- Bellman targets, target networks, replay


@pytest.mark.parametrize("double_q", [False, True])
def test_the_target_of_dqn(double_q):
    agent, target = shaken(dqn, gym.spaces.Discrete(4)), shaken(dqn, gym.spaces.Discrete(4))
    for x in target.parameters():
        x.data += torch.randn_like(x)
    rewards, next_x, terminated = torch.randn(30), torch.randn(30, 3), torch.rand(30) < 0.5
    y = dqn.bellman_target(agent, target, rewards, next_x, terminated, dqn.Args(gamma=0.9, double_q=double_q))
    for b in range(30):
        next_q = target(next_x[b : b + 1])[0]
        best = (agent(next_x[b : b + 1])[0] if double_q else next_q).argmax()
        expected = rewards[b] + (0 if terminated[b] else 0.9 * next_q[best])
        assert y[b].item() == pytest.approx(expected.item(), rel=1e-4)
    assert not y.requires_grad


def test_the_target_of_ddpg_and_polyak_averaging():
    target, online = shaken(ddpg, PUSH), shaken(ddpg, PUSH)
    for x in online.parameters():
        x.data += 1
    rewards, next_x, terminated = torch.randn(30), torch.randn(30, 3), torch.rand(30) < 0.5
    y = ddpg.bellman_target(target, rewards, next_x, terminated, ddpg.Args(gamma=0.9))
    next_q = target.critic(torch.cat([next_x, target.actor(next_x).tanh()], 1))[:, 0]
    torch.testing.assert_close(y, rewards + torch.where(terminated, 0, 0.9 * next_q))
    expected = [0.75 * p + 0.25 * q for p, q in zip(target.parameters(), online.parameters(), strict=True)]
    ddpg.update_target(target, online, 0.25)
    for p, q in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("stack", [1, 4])
def test_the_replay_buffer_of_dqn_gives_back_the_real_transitions(stack):
    rng, N = np.random.default_rng(0), 2
    shape = (4, 2, 2) if stack == 4 else (3,)
    space = gym.spaces.Box(0, 255, shape, np.uint8)
    buffer, stored, counter = dqn.ReplayBuffer(40, N, space, stack), {}, iter(range(1, 10**6))

    def observe(last, fresh):
        """A stack of frames that moves on by one, black at first; or a vector of random bytes."""
        if stack == 1:
            return rng.integers(256, size=shape).astype(np.uint8)
        number = next(counter)
        frame = np.full((1, 2, 2), number % 200 + 1, np.uint8)
        frame[0, 0, 0] = number // 200
        return np.concatenate([np.zeros((3, 2, 2), np.uint8) if fresh else last[1:], frame])

    obs, ended, drawn = np.stack([observe(None, True) for _ in range(N)]), np.zeros(N, bool), set()
    for step in range(150):
        valid = ~ended
        next_obs = np.stack([observe(obs[n], ended[n]) for n in range(N)])
        ended = valid & (rng.random(N) < 0.2)
        terminated = ended & (rng.random(N) < 0.5)
        actions, rewards = np.full(N, step), rng.normal(size=N).astype(np.float32)
        buffer.add(obs, actions, rewards, next_obs, terminated, valid)
        for n in np.flatnonzero(valid):
            stored[step, rewards[n]] = obs[n], next_obs[n], terminated[n]
        obs = next_obs
        if step % 10 == 9:
            drawn = set()
            for o, a, r, o2, d in zip(*buffer.sample(400, rng), strict=True):
                expected = stored[a, r]
                np.testing.assert_array_equal(o, expected[0])
                np.testing.assert_array_equal(o2, expected[1])
                assert d == expected[2]
                drawn.add((a, r))
            assert drawn == {key for key in stored if key[0] > step - 20}


def test_the_replay_buffer_of_ddpg_is_a_ring():
    buffer, rng = ddpg.ReplayBuffer(5, 1, 1), np.random.default_rng(0)
    for i in range(8):
        x = np.float32([[i]])
        buffer.add(x, x / 10, x[0], x + 1, np.array([i % 2 == 0]))
    obs, actions, rewards, next_obs, terminated = buffer.sample(300, rng, "cpu")
    assert set(rewards.tolist()) == {3, 4, 5, 6, 7}
    torch.testing.assert_close(actions, obs / 10)
    torch.testing.assert_close(next_obs, obs + 1)
    assert torch.equal(obs[:, 0], rewards)
    assert torch.equal(terminated, rewards % 2 == 0)


def test_epsilon_falls_linearly():
    args = dqn.Args(total_timesteps=1000, exploration_fraction=0.5, start_e=0.9, end_e=0.1)
    assert [dqn.linear_epsilon(args, step) for step in (0, 250, 500, 900)] == pytest.approx([0.9, 0.5, 0.1, 0.1])


# ---- learning on environments whose best policy is known

LEARNING = {
    a2c: dict(num_envs=16, num_steps=5, learning_rate=5e-3, hidden_sizes=(16,)),
    ppo: dict(num_envs=8, num_steps=32, learning_rate=3e-3),
    reinforce: dict(num_envs=8, learning_rate=2e-2, hidden_sizes=(16,), critic_updates=5, norm_weight=True),
    trpo: dict(num_envs=8, num_steps=32, learning_rate=1e-2, target_kl=0.05, critic_updates=5, num_minibatches=3),
    dqn: dict(num_envs=4, learning_starts=100, batch_size=32, hidden_sizes=(32,), learning_rate=3e-3),
    ddpg: dict(num_envs=4, learning_starts=200, batch_size=64, hidden_sizes=(32, 32), learning_rate=3e-3),
}
STEPS = {a2c: 4000, ppo: 3072, reinforce: 1200, trpo: 3072, dqn: 2000}
DISCRETE = pytest.mark.parametrize("module", list(STEPS), ids=lambda module: module.__name__)


@DISCRETE
@pytest.mark.parametrize("env", ["Bandit-v0", "StartBandit-v0", "DictBandit-v0"])
def test_learns_which_action_pays(module, env, tmp_path, capsys):
    train(module, env, tmp_path, **LEARNING[module], total_timesteps=STEPS[module], eval_episodes=32)
    assert mean_return(capsys) == 1.0


@DISCRETE
def test_learns_that_a_later_reward_is_worth_more_than_one_at_once(module, tmp_path, capsys):
    train(module, "Delay-v0", tmp_path, **LEARNING[module], total_timesteps=5120, gamma=0.9)
    assert mean_return(capsys) == 1.0


@pytest.mark.parametrize("module", [a2c, ppo, dqn], ids=lambda module: module.__name__)
def test_a_time_limit_takes_nothing_from_the_value_of_staying_alive(module, tmp_path, capsys):
    agent = train(module, "Alive-v0", tmp_path, **LEARNING[module], total_timesteps=8000, gamma=0.9)
    assert mean_return(capsys) == 10  # the time limit
    result = agent(torch.eye(2))
    values = result.max(1)[0] if module is dqn else result[1]
    assert values.tolist() == pytest.approx([10, 10], abs=2.0)  # taken as an end the limit would make it 4.1


TARGETS = {
    a2c: dict(learning_rate=0.03, hidden_sizes=(), total_timesteps=4000),
    ppo: dict(total_timesteps=5120),
    reinforce: dict(learning_rate=0.05, hidden_sizes=(), total_timesteps=1600),
    trpo: dict(target_kl=0.1, total_timesteps=5120),
}


@pytest.mark.parametrize("module", list(TARGETS), ids=lambda module: module.__name__)
def test_learns_targets_on_axes_with_any_bounds(module, tmp_path, capsys):
    train(module, "Target-v0", tmp_path, **LEARNING[module] | TARGETS[module], eval_episodes=32, norm_obs=True)
    assert mean_return(capsys) > -0.1  # doing nothing gets -3.1
