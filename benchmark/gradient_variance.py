"""How much the gradient of REINFORCE varies with each weight Φ, at one and the same policy.

    python benchmark/gradient_variance.py

A better policy plays longer episodes, whose gradients vary more: weights can only be compared at equal policies. So
agents are trained on CartPole-v1, all with the learned baseline, some longer and some shorter; each plays a number of
episodes; and each episode alone gives a gradient with Φ = R(τ), one with R_t and one with R_t - V(s_t). V has not been
fitted to these episodes, just as in training. The CSV file has a row per agent and weight:

    steps                that the agent was trained for
    mean_return          of the episodes, undiscounted
    gradient_variance    over the episodes' gradients, summed over all parameters of the policy. In an update N episodes
                         are averaged, which divides it by N.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported: networks this small are faster so
import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "algos"))
import reinforce


def play(agent, act, envs, seed: int) -> list[np.ndarray]:
    """An episode of the stochastic policy, as arrays (T, ...): observations, actions and rewards."""
    obs, _ = envs.reset(seed=seed)
    steps, ended = [], False
    while not ended:
        actions = act(obs)
        next_obs, rewards, terminated, truncated, _ = envs.step(agent.to_env(actions))
        steps.append((obs[0], actions[0], np.float32(rewards[0])))
        obs, ended = next_obs, terminated[0] or truncated[0]
    return [np.stack(values) for values in zip(*steps, strict=True)]


def measure(seed: int, steps: int, episodes: int) -> list[dict]:
    """Train an agent, and return its row for each weight."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        # The learning rate stays the same, so that the agents of one seed differ by nothing but how far they have come.
        args = dict(total_timesteps=steps, seed=seed, anneal_lr=False, device="cpu", log_dir=folder, eval_episodes=1)
        args = reinforce.Args(weight="baseline", **args)
        agent = reinforce.train(args)
    theta = [x for name, x in agent.named_parameters() if not name.startswith("critic")]
    envs, act = reinforce.make_envs(args, 1), agent.numpy_policy(np.random.default_rng(seed))
    gradients, returns = {}, []  # name of the weight -> a vector per episode
    for episode in range(episodes):
        obs, actions, rewards = play(agent, act, envs, seed=10**6 * seed + episode)  # not seen in training
        x, actions = torch.as_tensor(agent.preprocess(obs)), torch.as_tensor(actions)
        to_go = torch.as_tensor(reinforce.rewards_to_go(rewards, args.gamma))
        values = agent.critic(agent.encoder(x)).detach()
        weights = {"total-return": to_go[0].expand_as(to_go), "reward-to-go": to_go, "baseline": to_go - values}
        for name, weight in weights.items():
            loss, _ = reinforce.reinforce_loss(agent, x, actions, weight, num_episodes=1)
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, theta)])
            gradients.setdefault(name, []).append(gradient.double())
        returns.append(rewards.sum())
    envs.close()
    agent_is = {"seed": seed, "steps": steps, "mean_return": np.mean(returns)}
    variances = {name: torch.stack(rows).var(0, correction=0).sum().item() for name, rows in gradients.items()}
    return [{"weight": name, **agent_is, "gradient_variance": variance} for name, variance in variances.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budgets = [10_000, 25_000, 50_000, 100_000, 200_000, 400_000]
    parser.add_argument("--budgets", type=int, nargs="+", default=budgets, help="environment steps of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="an agent for each, and each budget")
    parser.add_argument("--episodes", type=int, default=50, help="that each agent plays")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"), help="the CSV file")
    args = parser.parse_args()
    rows = [row for seed in args.seeds for steps in args.budgets for row in measure(seed, steps, args.episodes)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).sort_values(["weight", "seed", "steps"]).to_csv(args.out, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
