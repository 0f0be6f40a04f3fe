"""Learning curves of finished runs: one picture per environment, one curve per experiment, mean and spread over seeds.

    python benchmark/report.py RUNS_FOLDER PICTURE_FOLDER

A run's curve is the mean return of the training episodes that ended in each of 60 equal windows of environment steps.
The band is one standard deviation over the seeds. The title says how many seeds there are, and the legend the mean and
standard deviation over seeds of the evaluation after training.
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WINDOWS = 60


def read_run(folder: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps and returns of a run's training episodes, each of shape (episodes,), and its mean evaluation return."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    episodes = events.Scalars("charts/episodic_return")
    evaluation = np.mean([point.value for point in events.Scalars("eval/episodic_return")])
    return np.array([point.step for point in episodes]), np.array([point.value for point in episodes]), evaluation


def window_means(steps: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of the values between each two edges, shape (len(edges) - 1,); an empty window repeats the last mean."""
    means = np.full(len(edges) - 1, np.nan)
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = values[(steps > low) & (steps <= high)]
        means[i] = inside.mean() if len(inside) else means[i - 1]
    return means


def main(runs_folder: Path, picture_folder: Path) -> None:
    runs = defaultdict(lambda: defaultdict(list))  # environment -> experiment -> runs
    for checkpoint in sorted(runs_folder.glob("*/checkpoint.pt")):
        env_id, experiment, _, _ = checkpoint.parent.name.rsplit("__", 3)
        runs[env_id][experiment].append(read_run(checkpoint.parent))

    picture_folder.mkdir(parents=True, exist_ok=True)
    for env_id, experiments in runs.items():
        figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for experiment, results in experiments.items():
            edges = np.linspace(0, max(steps.max() for steps, _, _ in results), WINDOWS + 1)
            curves = np.array([window_means(steps, values, edges) for steps, values, _ in results])
            mean, std, middle = np.nanmean(curves, axis=0), np.nanstd(curves, axis=0), (edges[:-1] + edges[1:]) / 2
            evaluations = [evaluation for _, _, evaluation in results]
            label = f"{experiment} (evaluation {np.mean(evaluations):.0f} ± {np.std(evaluations):.0f})"
            (line,) = axes.plot(middle, mean, label=label, linewidth=2)
            axes.fill_between(middle, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
        seeds = max(len(results) for results in experiments.values())
        axes.set(title=f"{env_id}, mean ± std of {seeds} seeds", xlabel="environment steps", ylabel="episodic return")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right", frameon=False)
        figure.savefig(picture_folder / f"{env_id}.png", dpi=150)
        print(picture_folder / f"{env_id}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
