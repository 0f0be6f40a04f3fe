"""Transfer learning: does a policy that lands in calm air learn faster to land in the wind?

    python benchmark/transfer.py [JOBS]

trains TRPO on LunarLander-v3, and then on the same with wind: from scratch, from the weights of the calm run, and from
these with all layers but the last frozen. Seeds 11 to 15, each variant starting from the calm run of its seed; JOBS
runs side by side (2). The runs stay in runs/transfer, where finished ones are not repeated. Writes

    benchmark/transfer.csv    the curves: mean and std over seeds, and the final evaluations
    benchmark/transfer.png    a picture of them
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter
from report import read_run, style

SEEDS = range(11, 16)
RUNS, RESULTS = Path("runs/transfer"), Path("benchmark")
SETTINGS = "--num-envs 16 --num-steps 512 --gamma 0.999 --gae-lambda 0.98 --target-kl 0.03 --norm-reward"
COMMAND = f"python algos/trpo.py --env-id LunarLander-v3 --eval-episodes 100 --device cpu {SETTINGS}"
WIND = "--env-kwargs enable_wind True --total-timesteps 300000"
VARIANTS = {  # flags; the colour of the curve
    "from scratch": ("", "#0072B2"),
    "from the calm run": ("--init-from {calm}/checkpoint.pt", "#009E73"),
    "from the calm run, last layers only": ("--init-from {calm}/checkpoint.pt --freeze 2", "#E69F00"),
}


def run(name: str, seed: int, flags: str) -> Path:
    """Train, unless that is done; return the run's folder."""
    log_dir = RUNS / f"{name.replace(' ', '_')}__{seed}"
    log_dir.mkdir(parents=True, exist_ok=True)
    if not (log_dir / "done").exists():
        command = f"{COMMAND} {flags} --seed {seed} --log-dir {log_dir}"
        with open(log_dir / "log.txt", "w") as log:
            subprocess.run(command.split(), check=True, stdout=log, stderr=log)
        (log_dir / "done").touch()
    return max(path.parent for path in log_dir.glob("*/checkpoint.pt"))


def run_seed(seed: int) -> list[pd.DataFrame]:
    """The curves of one seed, those of one variant after the other."""
    calm = run("calm", seed, "--total-timesteps 1000000")
    curves = []
    for name, (flags, _) in VARIANTS.items():
        curve, evaluation, _ = read_run(run(name, seed, f"{WIND} {flags.format(calm=calm)}"))
        curves.append(curve.assign(variant=name, seed=seed, evaluation=np.mean(evaluation)))
    print(f"seed {seed} done", flush=True)
    return curves


def main(jobs: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(jobs) as pool:
        curves = pd.concat(curve for of_seed in pool.map(run_seed, SEEDS) for curve in of_seed)
    by_variant = curves.groupby(["variant", "steps"], sort=False)
    evaluations = by_variant["evaluation"].agg(["mean", "std"]).add_prefix("evaluation_")
    table = by_variant["mean"].agg(["mean", "std"]).join(evaluations)
    table.reset_index().to_csv(RESULTS / "transfer.csv", index=False, float_format="%.5g")
    plot(table)


def plot(table: pd.DataFrame) -> None:
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for name, (_, colour) in VARIANTS.items():
        here = table.loc[name]
        score = f"{here.evaluation_mean.iloc[-1]:.0f} ± {here.evaluation_std.iloc[-1]:.0f}"
        axes.plot(here.index, here["mean"], color=colour, linewidth=1.8, label=f"{name}  {score}")
        axes.fill_between(
            here.index, here["mean"] - here["std"], here["mean"] + here["std"], color=colour, alpha=0.2, lw=0
        )
    figure.suptitle("TRPO on LunarLander-v3 with wind: mean and standard deviation of five seeds")
    style(axes, "steps in the wind", "episodic return (training)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside right center", frameon=False, title="final evaluation")
    figure.savefig(RESULTS / "transfer.png", dpi=150)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
