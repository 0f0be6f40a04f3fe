"""ALE/Pong-v5 from its four stacked frames, with the Nature CNN: how far ppo.py and dqn.py got, and in which time.

    python benchmark/ale_pong.py                                    # draw ALE-Pong-v5.png from ale_pong.csv
    python benchmark/ale_pong.py dqn "two CPU cores" 11 runs/…      # first add a run, of seed 11, in this folder

The csv has a row per window of environment steps: the mean return of the games that ended in it, and the seconds since
the start.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import EngFormatter
from report import COLOURS, read_run, style

TABLE = Path(__file__).with_name("ale_pong.csv")
KEY = ["algorithm", "machine", "seed"]


def add(algorithm: str, machine: str, seed: str, folder: str) -> None:
    """Add the curve of a run to the csv."""
    curve, *_ = read_run(Path(folder), windows=25)  # some ten games in each
    curve.insert(0, "algorithm", algorithm)
    curve.insert(1, "machine", machine)
    curve.insert(2, "seed", int(seed))
    table = pd.concat([pd.read_csv(TABLE), curve.rename(columns={"mean": "return"})])
    table.drop_duplicates([*KEY, "steps"], keep="last").to_csv(TABLE, index=False, float_format="%.5g")


def draw(path: Path) -> None:
    figure, (by_steps, by_seconds) = plt.subplots(1, 2, sharey=True, figsize=(10, 3.6), layout="constrained")
    for (algorithm, machine), runs in pd.read_csv(TABLE).groupby(KEY[:2]):
        label = f"{algorithm}, {machine} ({runs.seed.nunique()})"
        for _, run in runs.groupby("seed"):
            for axes, x in ((by_steps, "steps"), (by_seconds, "seconds")):
                axes.plot(run[x], run["return"], color=COLOURS[algorithm], label=label)
            label = None  # one for all seeds
    style(by_steps, "environment steps", "episodic return (training)")
    by_steps.xaxis.set_major_formatter(EngFormatter(sep=""))
    style(by_seconds, "seconds of training", xscale="log")
    by_seconds.xaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle("ALE/Pong-v5: a line per run")
    handles, labels = by_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="machine (runs)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) not in (1, 5):
        sys.exit(__doc__)
    if len(sys.argv) == 5:
        add(*sys.argv[1:])
    draw(TABLE.with_name("ALE-Pong-v5.png"))
