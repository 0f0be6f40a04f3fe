"""Steps per second with one process and with several: A2C beside A3C, and PPO under torchrun. Prints a Markdown table.

    python benchmark/parallel.py [REPETITIONS]

Every row of a group has the same number of environments and steps in all; but in the last two groups, where the number
of A3C's workers grows to that of the cores, as many for each worker. Processes under torchrun share each update; A3C's
K workers make K times as many, each with a K-th of the transitions. One thread per process; the commands of a group
take turns, REPETITIONS times (3), on a machine that should be idle.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from report import markdown_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CARTPOLE = "--env-id CartPole-v1 --total-timesteps 200000"
PPO = "algos/ppo.py --num-minibatches 32 --learning-rate 3e-4 --env-id HalfCheetah-v5 --total-timesteps 40960"
PONG = "algos/ppo.py --env-id ALE/Pong-v5 --num-steps 128 --update-epochs 4 --total-timesteps 4096"
LANDER = "--env-id LunarLander-v3 --num-steps 128 --gamma 0.995 --gae-lambda 0.98 --norm-obs --norm-reward"
TORCHRUN = "torchrun --nproc-per-node 2"
WORKERS = [2**i for i in range(os.cpu_count().bit_length())]  # 1, 2, 4 …
GROUPS = [  # commands by name; the first is what the others are compared with
    {
        "a2c, CartPole, 16 environments": f"python algos/a2c.py {CARTPOLE}",
        "a3c, 1 worker x 16": f"python algos/a3c.py {CARTPOLE} --num-workers 1 --num-envs 16",
        "a3c, 2 workers x 8": f"python algos/a3c.py {CARTPOLE} --num-workers 2 --num-envs 8",
        "a3c, 4 workers x 4": f"python algos/a3c.py {CARTPOLE} --num-workers 4 --num-envs 4",
    },
    {
        "ppo, CartPole, 32 environments": f"python algos/ppo.py {CARTPOLE}",
        "2 processes x 16": f"{TORCHRUN} algos/ppo.py {CARTPOLE} --num-envs 16",
    },
    {
        "ppo, HalfCheetah, 2 environments, networks 64-64": f"python {PPO} --num-envs 2 --num-steps 1024",
        "2 processes x 1": f"{TORCHRUN} {PPO} --num-envs 1 --num-steps 1024",
    },
    {
        "ppo, Pong, 8 environments": f"python {PONG} --num-envs 8",
        "2 processes x 4": f"{TORCHRUN} {PONG} --num-envs 4",
    },
    {
        f"a3c, CartPole, {k} x 8": f"python algos/a3c.py --num-workers {k} --total-timesteps {100_000 * k}"
        for k in WORKERS
    },
    {"a2c, LunarLander, 16 environments": f"python algos/a2c.py {LANDER} --total-timesteps 100000"}
    | {
        f"a3c, LunarLander, {k} x 8": f"python algos/a3c.py {LANDER} --num-workers {k} --total-timesteps {60_000 * k}"
        for k in WORKERS
    },
]


def measure(command: str) -> tuple[float, float]:
    """Steps per second of a run, without the start of the processes, and the mean staleness (nan: it has none)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--eval-episodes 1 --device cpu --log-dir {folder}"
        subprocess.run([*command.split(), *flags.split()], check=True, capture_output=True)
        (path,) = Path(folder).iterdir()
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        points = events.Scalars("charts/SPS")
        first, last = points[len(points) // 10], points[-1]
        speed = (last.step - first.step) / (last.wall_time - first.wall_time)
        has_staleness = "charts/staleness" in events.Tags()["scalars"]
        staleness = [point.value for point in events.Scalars("charts/staleness")] if has_staleness else [np.nan]
        return speed, np.mean(staleness)


def main(repetitions: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = [["", "steps/s", "ratio, median (all)", "staleness, updates"]]
    for group in GROUPS:
        measured = {name: [] for name in group}
        for _ in range(repetitions):
            for name, command in group.items():
                measured[name].append(measure(command))
        base, *_ = (np.array(values)[:, 0] for values in measured.values())
        for name, values in measured.items():
            speed, staleness = np.array(values).T
            ratio, mean = speed / base, staleness.mean()
            about = f"**{np.median(ratio):.2f}** ({ratio.min():.2f} to {ratio.max():.2f})"
            if (speed == base).all():
                about = "1"
            rows.append([name, f"{np.median(speed):,.0f}", about, "" if np.isnan(mean) else f"{mean:.2f}"])
    print(markdown_rows(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
