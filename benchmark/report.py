"""Tables and pictures of finished benchmark runs.

    python benchmark/report.py RUNS_FOLDER RESULTS_FOLDER [ENV__NAME__SEED …]

reads the TensorBoard logs of RUNS_FOLDER/ENV__NAME__SEED/ (made by benchmark.sh; all, or those named) and writes to
RESULTS_FOLDER

    results.csv, results.md    a row per environment and algorithm, or other run of it (a2c-200k: with fewer steps); an
                               overview of the algorithms, also in the README.md beside the folder
    seeds.csv                  a row per run: its seed, evaluation and commit
    curves.csv                 the learning curves: a row per window of environment steps, mean and std over seeds
    ENV.png                    the curves of every algorithm, against steps and against seconds
    reinforce-weights.png      the three weights of REINFORCE: their curves, and the variance of the gradient if
                               RESULTS_FOLDER has a gradient_variance.csv, made by gradient_variance.py

Rows of which RUNS_FOLDER has no finished run stay as they are. Where one has failed or is still to come, the row is
made of the seeds that are there.

What the columns mean:

    episodes               of the deterministic policy after training, each seed
    mean, std              of the seeds' evaluations: each is the mean return of its episodes; std is the sample
                           deviation (with n - 1), empty for one seed; in seeds.csv it is that of the episodes (with n)
    training               mean return of the last 100 training episodes, mean over seeds
    iqm, iqm_low, _high    interquartile mean over the episodes of all seeds, with a 95 % bootstrap interval that draws
                           whole seeds: they are what is independent (after R. Agarwal et al., 2021, arXiv:2108.13264).
                           With three seeds it is the range from the worst to the best, and covers less than 95 %.
    seconds                of training, without imports (but for a3c's workers: 2 s) and evaluation, mean over seeds
    commit                 of the code that made the runs, + if it had changes that were not committed, resumed if a run
                           was cut and went on (one of dqn.py or ddpg.py had lost its replay buffer then)
    bold                   at or above all published figures of published.csv, with at most as many steps as the best of
                           them had. A published training return is compared with ours, which is stricter than an
                           evaluation; a maximum over training with our final evaluation, which is stricter than it.
                           Sampled actions score less than the deterministic policy: for the steps, such figures do not
                           count. Bold compares means; it is no test of significance.

published.csv has a row per published figure. Its std is that over seeds, empty where the source has one run or another
spread. Its metric is "final deterministic", "training return", "maximum over training", or, where the evaluation
samples its actions, "final sampled" or "maximum sampled".
"""

import sys
from collections.abc import Collection
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WINDOWS = 50  # points of a learning curve

ALGORITHMS = ("reinforce", "a2c", "a3c", "ppo", "trpo", "dqn", "ddpg")
WEIGHTS = {  # --weight of REINFORCE: the name of its runs
    "baseline": "reinforce",
    "reward-to-go": "reinforce-reward-to-go",
    "total-return": "reinforce-total-return",
}
COLOURS = {  # distinguishable for the colour-blind: M. Okabe, K. Ito: Color Universal Design, 2008
    "reinforce": "#E69F00",
    "a2c": "#56B4E9",
    "a3c": "#000000",
    "ppo": "#D55E00",
    "trpo": "#009E73",
    "dqn": "#0072B2",
    "ddpg": "#CC79A7",
    "reinforce-reward-to-go": "#0072B2",
    "reinforce-total-return": "#000000",
}

PUBLISHED = pd.read_csv(Path(__file__).with_name("published.csv")).rename(columns={"return": "mean"})


def training_seconds(wall_times: np.ndarray) -> np.ndarray:
    """Seconds since the first of these times, same shape. The pause before a resume does not count."""
    gaps = np.diff(wall_times, prepend=wall_times[0])
    usual = np.median(gaps)
    return np.cumsum(np.where(gaps > 60 + 10 * usual, usual, gaps))


def read_run(folder: Path, windows: int = WINDOWS) -> tuple[pd.DataFrame, np.ndarray, float]:
    """The run in `folder`: its learning curve, a row per window; its evaluation returns, shape (episodes,); and the
    mean return of its last 100 training episodes."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()

    def points(tag: str) -> pd.DataFrame:
        known = tag in events.Tags()["scalars"]
        return pd.DataFrame(events.Scalars(tag) if known else [], columns=["wall_time", "step", "value"], dtype=float)

    def curve(tag: str) -> pd.Series:
        """Mean of a quantity in each window, of one without a value that of the window before."""
        of_tag = points(tag)
        means = of_tag.value.groupby(np.searchsorted(edges, of_tag.step)).mean()
        return means.reindex(range(windows)).ffill()

    clock = points("charts/SPS")
    start = events.Tensors("args/text_summary")[0].wall_time
    seconds = training_seconds(np.append(start, clock.wall_time))
    edges = clock.step.max() * np.arange(1, windows + 1) / windows
    curves = pd.DataFrame(
        {
            "steps": edges.round().astype(int),
            "seconds": np.interp(edges, np.append(0, clock.step), seconds),
            "mean": curve("charts/episodic_return"),
        }
    )
    training = points("charts/episodic_return").value.tail(100).mean()
    return curves, points("eval/episodic_return").value.to_numpy(), training


def interquartile_mean(evaluations: np.ndarray) -> tuple[float, float, float]:
    """Interquartile mean of evaluations, shape (seeds, episodes), and the ends of its 95 % bootstrap interval."""

    def iqm(seeds: np.ndarray) -> float:
        return stats.trim_mean(evaluations[seeds], 0.25, axis=None)

    seeds = np.arange(len(evaluations))
    if len(seeds) == 1:
        return iqm(seeds), np.nan, np.nan
    interval = stats.bootstrap((seeds,), iqm, vectorized=False, method="percentile", n_resamples=2000, rng=0)
    return iqm(seeds), *interval.confidence_interval


def commits(folder: Path) -> str:
    """Those that made the run in `folder`."""
    lines = (folder.parent / "log.txt").read_text().splitlines()
    made = {line.split()[0] for line in lines if " python algos/" in line}
    return ", ".join(sorted(made | {line for line in lines if line.startswith("resumed ")}))


def summarise(folders: list[Path], env_id: str, name: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The rows of results.csv, seeds.csv and curves.csv of one algorithm on one environment; a folder per seed."""
    curves, evaluations, training = zip(*(read_run(folder) for folder in folders), strict=True)
    last = pd.concat([curve.iloc[[-1]] for curve in curves])
    means = np.mean(evaluations, axis=1)
    iqm, low, high = interquartile_mean(np.array(evaluations))
    key = {"environment": env_id, "algorithm": name}
    runs = {
        "seed": [int(folder.parent.name.rsplit("__", 1)[1]) for folder in folders],
        "mean": means,
        "std": np.std(evaluations, axis=1),
        "training": training,
        "commit": [commits(folder) for folder in folders],
    }
    row = {
        **key,
        "seeds": len(folders),
        "episodes": len(evaluations[0]),
        "mean": means.mean(),
        "std": means.std(ddof=1) if len(means) > 1 else np.nan,
        "training": np.mean(training),
        "iqm": iqm,
        "iqm_low": low,
        "iqm_high": high,
        "steps": round(last.steps.mean()),
        "seconds": last.seconds.mean(),
        "steps_per_second": round((last.steps / last.seconds).mean()),
        "commit": ", ".join(sorted({commit for of_run in runs["commit"] for commit in of_run.split(", ")})),
    }
    by_window = pd.concat(curves).groupby(level=0)
    curve = by_window.mean()
    curve.insert(3, "std", by_window["mean"].std())
    curve.insert(0, "environment", env_id)
    curve.insert(1, "algorithm", name)
    return pd.DataFrame([row]), pd.DataFrame(key | runs), curve


def update(path: Path, new: pd.DataFrame) -> pd.DataFrame:
    """Write `new` to a CSV file, in which the rows of other environments and algorithms stay; return all its rows."""
    key = ["environment", "algorithm"]
    if path.exists():
        old = pd.read_csv(path, dtype={"commit": str})  # not 12e4567, a number
        kept = old[~old.set_index(key).index.isin(new.set_index(key).index)]
        new = pd.concat([kept, new])[new.columns]  # a file of before may have others
    order = {name: i for i, name in enumerate(dict.fromkeys([*PUBLISHED.environment, *COLOURS]))}
    new = new.sort_values(key, key=lambda column: column.map(order), kind="stable")  # what is not in it comes last
    new.to_csv(path, index=False, float_format="%.5g")
    return new


def published(row) -> pd.DataFrame:
    """The published figures of a row of results.csv, the best first, of equal ones that with the fewest steps."""
    algorithm = row.algorithm.split("-")[0]  # of a2c-200k, too
    here = PUBLISHED[(PUBLISHED.environment == row.environment) & (PUBLISHED.algorithm == algorithm)]
    return here.sort_values(["mean", "steps"], ascending=[False, True])


def at_or_above(row, figures: pd.DataFrame) -> bool:
    """Is our row at or above the published figures, with at most as many steps as the best of them?"""
    if figures.empty:
        return False
    ours = np.where(figures.metric == "training return", row.training, row.mean)
    steps = figures.steps[~figures.metric.str.endswith("sampled")]
    return bool((ours >= figures["mean"]).all() and len(steps) and row.steps <= steps.iloc[0])


def plain_score(row, digits: int) -> str:
    """Mean ± standard deviation, if there are several seeds."""
    return f"{row.mean:z.{digits}f}" + (f" ± {row.std:.{digits}f}" if row.seeds > 1 else "")


def score(row, digits: int) -> str:
    """The same in Markdown, bold where it is at or above what is published."""
    text = plain_score(row, digits)
    return f"**{text}**" if at_or_above(row, published(row)) else text


def short(steps: float) -> str:
    """Steps to two digits, as 60k or 1.5M; ? if they are not known."""
    return "?" if np.isnan(steps) else EngFormatter(sep="")(float(f"{steps:.2g}"))


def figure_text(figure, digits: int) -> str:
    """A published figure with its steps and seeds, and what differs: the environment's version, or the metric."""
    spread = "" if np.isnan(figure.std) else f" ± {figure.std:.{digits}f}"
    version = "" if figure.environment.endswith(figure.env_version) else f", {figure.env_version}"
    words = ["training", "maximum", "sampled"]
    metric = "".join(f", {word}" for word in words if word in figure.metric.replace("over training", ""))
    return f"{figure.mean:.{digits}f}{spread} ({short(figure.steps)} x {figure.seeds}{version}{metric})"


def markdown_rows(rows: list[list]) -> str:
    """A Markdown table; the first row is its head."""
    head, *others = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *others]) + "\n"


def overview(table: pd.DataFrame) -> str:
    """A row per environment, a column per algorithm: our figure, and below it the best published one."""
    rows = [["", *ALGORITHMS]]
    for env_id, here in table.groupby("environment", sort=False):
        cells = {}
        for row in here.itertuples():
            ours = f"{score(row, 0)} ({short(row.steps)} x {row.seeds})"
            figures = published(row)
            best = figure_text(next(figures.itertuples()), 0) if len(figures) else "none"
            cells[row.algorithm] = f"{ours}<br>{best}"
        rows.append([env_id, *(cells.get(name, "") for name in ALGORITHMS)])
    return (
        f"{markdown_rows(rows)}\n"
        "Above: the return of the final deterministic policy, mean ± standard deviation over seeds (steps x seeds).\n"
        "Below: the algorithm's best figure in [published.csv](benchmark/published.csv) (?: its steps are unknown),\n"
        "and where they differ from ours the environment's version and the metric (training returns, the maximum over\n"
        "training, sampled actions).\n"
        "Bold: our mean is at or above every published figure, in no more steps than the best of them (of those whose\n"
        "actions are not sampled). A published training return is compared with ours. Nothing is bold where there is\n"
        "no figure, or where its steps are unknown. Bold compares means and is no test of significance: some leads\n"
        "are smaller than their standard error.\n"
    )


def details(table: pd.DataFrame) -> str:
    """results.csv as a Markdown table, with every published figure."""
    columns = "environment algorithm seeds episodes return training IQM steps seconds steps/s commit published"
    rows = [columns.split()]
    for row in table.itertuples():
        interval = "" if np.isnan(row.iqm_low) else f" [{row.iqm_low:.1f}, {row.iqm_high:.1f}]"
        training = "" if np.isnan(row.training) else f"{row.training:.1f}"
        cells = [row.environment, row.algorithm, row.seeds, row.episodes, score(row, 1), training]
        cells += [f"{row.iqm:.1f}{interval}", f"{row.steps:,}", f"{row.seconds:,.0f}", f"{row.steps_per_second:,}"]
        figures = published(row)
        cells += [row.commit, "; ".join(figure_text(figure, 1) for figure in figures.itertuples())]
        rows.append(cells)
    return (
        f"{markdown_rows(rows)}\n"
        "Training: the last 100 training episodes. IQM: interquartile mean with a bootstrap interval over the seeds;\n"
        "of three seeds it is their range. Every single run: seeds.csv.\n"
        "Seconds and steps/s: of training, a thread per process (a3c: two). Published: return (steps x seeds).\n"
        "What the columns mean: report.py. Sources: published.csv.\n"
    )


def draw(axes: plt.Axes, curve: pd.DataFrame, x: str, label: str) -> None:
    """One algorithm's learning curve, mean and standard deviation over the seeds, against steps or seconds."""
    colour = COLOURS.get(curve.algorithm.iloc[0], "black")
    axes.plot(curve[x], curve["mean"], color=colour, linewidth=1.8, label=label)
    axes.fill_between(
        curve[x], curve["mean"] - curve["std"], curve["mean"] + curve["std"], color=colour, alpha=0.2, lw=0
    )


def style(axes: plt.Axes, xlabel: str, ylabel: str = "", **settings) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel, **settings)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def plot_environment(env_id: str, table: pd.DataFrame, curves: pd.DataFrame, path: Path) -> None:
    """The curves of every algorithm against steps and seconds; a dot and a bar at their end show the evaluation."""
    figure, (by_steps, by_seconds) = plt.subplots(1, 2, sharey=True, figsize=(10, 3.6), layout="constrained")
    for row in table.itertuples():
        curve = curves[curves.algorithm == row.algorithm]
        for axes, x in ((by_steps, "steps"), (by_seconds, "seconds")):
            draw(axes, curve, x, f"{row.algorithm}  {plain_score(row, 0)} ({row.seeds})")
            end = curve[x].iloc[-1]
            axes.errorbar(
                end, row.mean, row.std, fmt="o", markersize=5, capsize=3, color=COLOURS.get(row.algorithm, "black")
            )
    uneven = table.steps.max() >= 10 * table.steps.min()  # on a linear axis the shorter curves could not be seen
    style(by_steps, "environment steps", "episodic return (training)", xscale="log" if uneven else "linear")
    by_steps.xaxis.set_major_formatter(EngFormatter(sep=""))
    cores = "one core; a3c: two" if "a3c" in set(table.algorithm) else "one core"
    style(by_seconds, f"seconds of training ({cores})", xscale="log")
    by_seconds.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    by_seconds.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
    by_seconds.xaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(f"{env_id}: training, mean and standard deviation over seeds; dots: final evaluation")
    handles, labels = by_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="evaluation (seeds)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_weights(curves: pd.DataFrame, variances: pd.DataFrame | None, path: Path) -> None:
    """The three weights Φ of REINFORCE: their curves, and the variance of the gradient, of gradient_variance.py."""
    panels = 1 if variances is None else 2
    figure, ((returns, *others),) = plt.subplots(1, panels, squeeze=False, figsize=(10, 3.8), layout="constrained")
    for weight, name in WEIGHTS.items():
        if name in set(curves.algorithm):
            draw(returns, curves[curves.algorithm == name], "steps", weight)
    style(returns, "environment steps", "episodic return", title="training (mean and std of the seeds)")
    returns.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in others:
        for weight, points in variances.groupby("weight"):
            axes.scatter(points.mean_return, points.gradient_variance, color=COLOURS[WEIGHTS[weight]], s=14)
        style(axes, "mean return of the policy", yscale="log", title="variance of the gradient of one episode")
    figure.suptitle("REINFORCE on CartPole-v1 with each --weight")
    figure.legend(*returns.get_legend_handles_labels(), loc="outside right center", frameon=False, title="weight")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(runs_folder: Path, results_folder: Path, names: Collection[str] = ()) -> None:
    seeds = {}  # (environment, name) -> folders of the finished runs
    for log in sorted(runs_folder.glob("*/log.txt")):
        last = log.read_text().strip().rpartition("\n")[2]
        if last.startswith("eval:") and (not names or log.parent.name in names):
            env_id, name, _ = log.parent.name.rsplit("__", 2)
            (folder,) = (path.parent for path in log.parent.glob("*/checkpoint.pt"))
            seeds.setdefault((env_id, name), []).append(folder)
    if not seeds:
        sys.exit(f"error: no finished run in {runs_folder}")
    rows, runs, curves = zip(*(summarise(folders, *key) for key, folders in seeds.items()), strict=True)

    results_folder.mkdir(parents=True, exist_ok=True)
    table = update(results_folder / "results.csv", pd.concat(rows))
    update(results_folder / "seeds.csv", pd.concat(runs))
    curves = update(results_folder / "curves.csv", pd.concat(curves))
    (results_folder / "results.md").write_text(f"{overview(table)}\n{details(table)}".replace("(benchmark/", "("))
    readme = results_folder.parent / "README.md"
    if results_folder.name == "benchmark" and readme.exists():  # not in that of a quick look
        mark = "<!-- results -->\n"
        before, _, after = readme.read_text().split(mark)
        readme.write_text(f"{before}{mark}{overview(table)}{mark}{after}")
    for env_id in {env_id for env_id, _ in seeds}:
        here = table[(table.environment == env_id) & table.algorithm.isin(ALGORITHMS)]
        plot_environment(env_id, here, curves[curves.environment == env_id], results_folder / f"{env_id}.png")
    weights = curves[(curves.environment == "CartPole-v1") & curves.algorithm.isin(WEIGHTS.values())]
    if len(weights):
        measured = results_folder / "gradient_variance.csv"
        variances = pd.read_csv(measured) if measured.exists() else None
        plot_weights(weights, variances, results_folder / "reinforce-weights.png")
    print(f"{results_folder}/results.md: {len(table)} rows, {len(rows)} of them new")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
