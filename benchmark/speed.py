"""Steps per second beside Stable-Baselines3 and sb3-contrib, at equal work.

    pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2      # the peers, which nothing else needs
    python benchmark/speed.py --pairs 5

prints a Markdown table. Each pair trains first ours, then theirs, each in a process of its own on one thread, with the
same environments, network sizes, rollouts, minibatches and numbers of gradient steps, and with TensorBoard logs; the
ratio is that of the two neighbours, because the speed of a machine drifts. Timed is a second training in each process,
from the making of the environments to the last step: the first one, shorter, warms torch up, whose first optimizer
alone takes two seconds. For figures to trust, let nothing else run.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported
import numpy as np

# What the defaults of the peers are, too: gamma and so on.
ROLLOUT = {"num_envs": 1, "num_steps": 2048, "gamma": 0.99, "gae_lambda": 0.95}
REPLAY = {"num_envs": 1, "buffer_size": 100_000, "learning_starts": 1000, "gamma": 0.99}


@dataclass
class Case:
    """The same work for both sides."""

    env_id: str
    steps: int
    ours: dict  # arguments of our file
    theirs: dict  # those of the peer that say the same
    work: str  # in words


CASES = {
    "a2c": Case(
        env_id="CartPole-v1",
        steps=200_000,
        ours={"num_envs": 8, "num_steps": 5},
        theirs={"n_steps": 5},
        work="8 environments x 5 steps, 64-64",
    ),
    "ppo": Case(
        env_id="CartPole-v1",
        steps=100_000,
        ours={"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 10},
        theirs={"n_steps": 128, "batch_size": 256, "n_epochs": 10},
        work="8 x 128, 10 epochs of 4 minibatches, 64-64",
    ),
    "ppo HalfCheetah": Case(
        env_id="HalfCheetah-v5",
        steps=20_480,
        ours=ROLLOUT | {"num_minibatches": 32, "update_epochs": 10},
        theirs={"n_steps": 2048, "batch_size": 64, "n_epochs": 10},
        work="1 x 2048, 10 epochs of 32 minibatches, 64-64",
    ),
    "trpo": Case(
        env_id="HalfCheetah-v5",
        steps=40_960,
        ours=ROLLOUT | {"num_minibatches": 16, "critic_updates": 10},
        theirs={"n_steps": 2048, "batch_size": 128, "n_critic_updates": 10, "cg_max_steps": 15},
        work="1 x 2048, 15 conjugate gradients, 160 critic steps, 64-64",
    ),
    "dqn": Case(
        env_id="CartPole-v1",
        steps=30_000,
        ours=REPLAY
        | {
            "train_frequency": 4,
            "batch_size": 128,
            "target_network_frequency": 500,
            "tau": 1.0,
            "double_q": False,
        },
        theirs={
            "train_freq": 4,
            "batch_size": 128,
            "target_update_interval": 500,
            "policy_kwargs": {"net_arch": [120, 84]},
        },
        work="a batch of 128 every 4 steps, 120-84",
    ),
    "ddpg": Case(
        env_id="HalfCheetah-v5",
        steps=4_000,
        ours=REPLAY | {"batch_size": 256, "hidden_sizes": (256, 256)},
        theirs={"batch_size": 256, "policy_kwargs": {"net_arch": [256, 256]}},
        work="a batch of 256 every step, 256-256",
    ),
}


def ours(name: str):
    """Our training, as a function of a folder and a number of steps."""
    case = CASES[name]
    sys.path.insert(0, str(Path(__file__).parents[1] / "algos"))
    module = importlib.import_module(name.split()[0])
    module.evaluate = lambda *_: []  # the training alone is timed
    same = {"env_id": case.env_id, "device": "cpu", **case.ours}
    return lambda folder, steps: module.train(module.Args(log_dir=folder, total_timesteps=steps, **same))


def theirs(name: str):
    """The peer's training, as a function of a folder and a number of steps."""
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env

    case = CASES[name]
    package = sb3_contrib if name == "trpo" else stable_baselines3
    algorithm = getattr(package, name.split()[0].upper())
    arguments = {"seed": 1, "device": "cpu", **case.theirs}
    arguments |= {key: case.ours[key] for key in ("buffer_size", "learning_starts") if key in case.ours}

    def train(folder: str, steps: int) -> None:
        envs = make_vec_env(case.env_id, case.ours["num_envs"], seed=1)
        algorithm("MlpPolicy", envs, tensorboard_log=folder, **arguments).learn(steps)

    return train


def measure(side: str, name: str) -> float:
    """Steps per second of one training in this process; side is "ours" or "theirs"."""
    import torch

    torch.set_num_threads(1)
    train, steps = {"ours": ours, "theirs": theirs}[side](name), CASES[name].steps
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as warm_up, tempfile.TemporaryDirectory() as folder:
        train(warm_up, steps // 4)
        start = time.perf_counter()
        train(folder, steps)
        return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of runs of each case")
    names = list(CASES)
    parser.add_argument("--cases", nargs="+", default=names, choices=names, metavar="CASE", help="of: %(choices)s")
    parser.add_argument("--measure", choices=["ours", "theirs"], help=argparse.SUPPRESS)  # for the processes of a pair
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure, args.cases[0]))
        return
    if not (importlib.util.find_spec("stable_baselines3") and importlib.util.find_spec("sb3_contrib")):
        parser.error("needs the peers: pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2")

    print("| algorithm, environment | work of an update | ours, steps/s | theirs | ratio, median (all pairs) |")
    print("| --- | --- | --- | --- | --- |")
    for name in args.cases:
        speeds = {"ours": [], "theirs": []}
        for _ in range(args.pairs):
            for side, measured in speeds.items():
                command = [sys.executable, __file__, "--measure", side, "--cases", name]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                measured.append(float(result.stdout.split()[-1]))
        mine, peer = np.array(speeds["ours"]), np.array(speeds["theirs"])
        ratios = np.sort(mine / peer)
        spread = f"**{np.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        label = f"{name.split()[0]}, {CASES[name].env_id} | {CASES[name].work}"
        print(f"| {label} | {np.median(mine):,.0f} | {np.median(peer):,.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
