"""benchmark.sh: its list, what it skips, resumes and survives. report.py: known numbers from small logs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro
from conftest import ROOT, load, run_inside
from torch.utils.tensorboard import SummaryWriter

report = load(ROOT / "benchmark/report.py")
MEASUREMENT = "benchmark/gradient_variance.py --out benchmark/gradient_variance.csv"
REPORT = "benchmark/report.py runs/benchmark benchmark"

# In the place of python: a training that takes no time. It writes its command line to the file `calls`. With seed 2 it
# fails where a file `fails` exists; where a file `cut` exists it stops like a run that was interrupted.
FAKE_PYTHON = """#!/usr/bin/env bash
args="$*" && echo "$args" >>calls
[[ $1 == benchmark/* ]] && exit
[[ $args == *"--seed 2"* && -e fails ]] && { echo "error: the fake failed"; exit 1; }
[[ $args == *--log-dir* ]] && mkdir "${args##*--log-dir }/run" && touch "${args##*--log-dir }/run/checkpoint.pt"
[[ -e cut ]] && { echo "stopped (step 1); resume with: python"; exit 130; }
echo "eval: mean_return=1.00"
"""


@pytest.fixture
def environ(tmp_path):
    """Environment variables with which benchmark.sh runs one seed of PPO on CartPole, and sleeps a tenth of a second."""
    (tmp_path / "sleep").write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 0.1\n")
    (tmp_path / "sleep").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "ENVS": "CartPole-v1", "ALGOS": "ppo", "SEEDS": "1"}


@pytest.fixture
def fake(tmp_path, environ):
    """run(**knobs) starts a copy of benchmark.sh with a fake python: (exit status, output, calls of python)."""
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    shutil.copy(ROOT / "benchmark.sh", tmp_path)

    def run(*arguments, **knobs):
        (tmp_path / "calls").write_text("")
        result = subprocess.run([tmp_path / "benchmark.sh", *arguments], env=environ | knobs, capture_output=True)
        return (
            result.returncode,
            (result.stdout + result.stderr).decode(),
            (tmp_path / "calls").read_text().splitlines(),
        )

    return run


def test_list(fake):
    """It is complete. Its flags exist and differ from the defaults: they say what is special about an experiment."""
    status, output, calls = fake("--dry-run", ENVS="", ALGOS="", SEEDS="2")
    *commands, last = output.splitlines()
    assert (status, calls, last) == (0, [], f"python {MEASUREMENT}")
    experiments = Counter()
    for command in commands:
        _, script, *flags = command.split()
        Args = load(ROOT / script).Args
        args = tyro.cli(Args, args=flags)  # refuses unknown flags
        given = {name.replace("-", "_") for name in re.findall(r"--(?:no-)?([a-z-]+)", command)}
        for name in given - {"env_id", "total_timesteps", "seed"}:
            assert getattr(args, name) != getattr(Args(), name), command
        experiments[args.env_id, args.exp_name] += 1
        assert args.seed == experiments[args.env_id, args.exp_name]
    assert set(experiments.values()) == {2}
    wanted = set(report.PUBLISHED[["environment", "algorithm"]].itertuples(index=False, name=None))
    assert wanted | {("CartPole-v1", name) for name in report.WEIGHTS.values()} <= set(experiments)


def test_knobs(fake):
    assert fake(ENVS="CartPole")[:2] == (2, 'error: no experiment with ALGOS="ppo" ENVS="CartPole"\n')
    status, output, calls = fake("-n")
    assert (status, output.startswith("error: unknown argument -n"), calls) == (2, True, [])
    *calls, last = fake(ALGOS="reinforce a2c", SCALE="0.1")[2]  # a quick look has a folder of its own
    assert last == "benchmark/report.py runs/benchmark-0.1 runs/benchmark-0.1"
    for call, name in zip(sorted(calls), ("a2c", *report.WEIGHTS.values()), strict=True):
        assert call.startswith(f"algos/{name.split('-')[0]}.py --env-id CartPole-v1 --total-timesteps ")
        assert call.endswith(f"0000 --seed 1 --eval-episodes 100 --log-dir runs/benchmark-0.1/CartPole-v1__{name}__1")
    assert fake(ALGOS="reinforce")[2][3:] == [MEASUREMENT, REPORT]


def test_finished_runs_are_skipped(fake, tmp_path):
    status, output, calls = fake(SEEDS="2")
    assert (status, len(calls), "[2/2] CartPole-v1__ppo__2" in output) == (0, 3, True)
    assert fake(SEEDS="2")[2] == [REPORT]
    call, _ = fake(SEEDS="3")[2]
    assert "--seed 3" in call
    script = (tmp_path / "benchmark.sh").read_text()
    (tmp_path / "benchmark.sh").write_text(script.replace("CartPole-v1 60000", "CartPole-v1 60000 --gamma 0.9"))
    assert len(fake(SEEDS="2")[2]) == 3  # changed settings: they start anew
    assert len(list(tmp_path.glob("runs/benchmark/*/*/checkpoint.pt"))) == 3  # and leave no run of the old ones


def test_cut_runs_are_resumed(fake, tmp_path):
    (tmp_path / "cut").touch()
    assert fake()[0] == 1
    (tmp_path / "cut").unlink()
    resume = "algos/ppo.py --resume runs/benchmark/CartPole-v1__ppo__1/run/checkpoint.pt"
    assert fake()[::2] == (0, [resume, REPORT])
    assert fake()[2] == [REPORT]  # finished now


def test_a_failing_run_is_survived_and_named(fake, tmp_path):
    (tmp_path / "fails").touch()
    status, output, calls = fake(SEEDS="3", JOBS="1")
    assert (status, len(calls), "1 of 3 runs failed" in output) == (1, 4, True)
    assert output.endswith("CartPole-v1__ppo__2/log.txt: error: the fake failed\n")
    (tmp_path / "fails").unlink()
    status, _, (call, _) = fake(SEEDS="3")  # the next time only that one runs
    assert (status, "--seed 2" in call) == (0, True)


def test_a_real_run_that_is_cut_goes_on_and_is_reported(tmp_path, environ):
    environ |= {"SCALE": "0.3", "RUNS": f"{tmp_path}/runs", "RESULTS": f"{tmp_path}/results"}
    process = subprocess.Popen([ROOT / "benchmark.sh"], env=environ, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(tmp_path.glob("runs/*/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "stopping" in process.communicate(timeout=60)[0]
    (log,) = tmp_path.glob("runs/*/log.txt")
    assert (process.returncode, "stopped; resume with" in log.read_text()) == (130, True)

    subprocess.run([ROOT / "benchmark.sh"], env=environ, check=True)
    (row,) = pd.read_csv(tmp_path / "results/results.csv").itertuples()
    assert (row.environment, row.algorithm, row.seeds, row.steps // 1000) == ("CartPole-v1", "ppo", 1, 17)
    assert f"eval: mean_return={row.mean:.2f} " in log.read_text().splitlines()[-1]
    curve = pd.read_csv(tmp_path / "results/curves.csv")
    assert curve.steps.is_monotonic_increasing
    assert curve.seconds.is_monotonic_increasing
    assert curve["mean"].between(8, 500).all()
    names = {"results.csv", "results.md", "curves.csv", "CartPole-v1.png"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names


def test_gradient_variance(tmp_path):
    script, flags = ROOT / "benchmark/gradient_variance.py", "--seeds 1 2 --episodes 20"
    result = run_inside(script, f"{flags} --budgets 2000 6000 --out new/table.csv", tmp_path)
    assert (result.status, result.out) == (0, ""), result.err
    table = pd.read_csv(tmp_path / "new/table.csv").pivot(index=["seed", "steps"], columns="weight")
    assert table.index.tolist() == [(1, 2000), (1, 6000), (2, 2000), (2, 6000)]
    assert (table.mean_return.nunique(axis=1) == 1).all()  # the same episodes for all three
    assert table.mean_return.to_numpy().min() > 10
    variance = table.gradient_variance
    assert (variance["total-return"] > 1.5 * variance["reward-to-go"]).all()
    assert (variance["reward-to-go"] > variance["baseline"]).all()


# ---- the report


def write_run(runs: Path, env_id: str, name: str, seed: int, returns, evaluation, pause_after: int = 10**9) -> None:
    """The log of a finished run: an episode of ten steps every second with these returns, then the evaluation."""
    folder = runs / f"{env_id}__{name}__{seed}" / "run"
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("args", "", 0, walltime=1000)
        for i, episodic_return in enumerate(returns, start=1):
            now = 1000 + i + 5000 * (i > pause_after)
            writer.add_scalar("charts/episodic_return", episodic_return, 10 * i, walltime=now)
            writer.add_scalar("charts/SPS", 10, 10 * i, walltime=now)
        for episode, value in enumerate(evaluation):
            writer.add_scalar("eval/episodic_return", value, 10 * len(returns) + episode)
    (folder / "checkpoint.pt").touch()
    (folder.parent / "log.txt").write_text("12e4567 python algos/x.py\neval: mean_return=\n")


def test_report_of_known_numbers(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    write_run(runs, "Hopper-v5", "ppo", 1, np.arange(100), [0, 10, 20, 30], pause_after=50)
    write_run(runs, "Hopper-v5", "ppo", 2, np.arange(100) + 2, [4000, 4010, 4020, 4030])
    write_run(runs, "Hopper-v5", "ppo", 3, np.arange(100), [0, 0, 0, 0])
    (runs / "Hopper-v5__ppo__3/log.txt").write_text("12e4567 python algos/x.py\nstopped (step 10)\n")  # is left out
    report.main(runs, results)

    (row,) = pd.read_csv(results / "results.csv", dtype={"commit": str}).itertuples()
    assert (row.environment, row.algorithm, row.seeds, row.commit) == ("Hopper-v5", "ppo", 2, "12e4567")
    assert (row.mean, row.std) == (2015, 2000)  # of 15 and 4015
    assert row.iqm == np.mean([20, 30, 4000, 4010])  # the quarter at either end is left out
    assert (row.iqm_low, row.iqm_high) == (15, 4015)  # a draw of one seed twice is among the 95 %
    assert (row.published, row.source) == (2410, "zoo")
    assert (row.steps, row.seconds, row.steps_per_second) == (1000, 100, 10)  # the pause of an hour does not count

    curve = pd.read_csv(results / "curves.csv")
    np.testing.assert_array_equal(curve.steps, np.arange(20, 1001, 20))  # 50 windows of two episodes
    np.testing.assert_allclose(curve.seconds, np.arange(2, 101, 2))
    np.testing.assert_allclose(curve["mean"], np.arange(0, 100, 2) + 1.5)
    np.testing.assert_allclose(curve["std"], 1)
    cells = "2 | 4 | 2015.0 ± 2000.0 | 2015.0 [15.0, 4015.0] | 2410 (zoo) | 1,000 | 100 | 10 | 12e4567"
    assert f"| Hopper-v5 | ppo | {cells} |" in (results / "results.md").read_text()
    assert (results / "Hopper-v5.png").stat().st_size > 10_000


def test_report_keeps_what_it_has_no_runs_of(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- results -->\nafter\n")
    for seed in (1, 2):
        write_run(runs, "CartPole-v1", "trpo", seed, np.ones(60), [500])
    write_run(runs, "CartPole-v1", "a2c", 1, np.ones(60), [300])
    report.main(runs, results)
    shutil.rmtree(runs)
    with pytest.raises(SystemExit, match="no finished run"):
        report.main(runs, results)
    write_run(runs, "CartPole-v1", "a2c", 1, np.zeros(60), [400])
    for name in report.WEIGHTS.values():
        write_run(runs, "CartPole-v1", name, 1, np.ones(60), [500])
    pd.read_csv(results / "curves.csv").assign(losses=0).to_csv(results / "curves.csv", index=False)  # older columns
    sizes = []
    for rows in ("", "baseline,1,20,9\nreward-to-go,1,20,99\ntotal-return,1,20,999\n"):
        (results / "gradient_variance.csv").write_text("weight,seed,mean_return,gradient_variance\n" + rows)
        report.main(runs, results)
        sizes.append((results / "reinforce-weights.png").stat().st_size)
    assert sizes[0] < sizes[1]

    table = pd.read_csv(results / "results.csv", dtype={"commit": str})
    means = dict(zip(table.algorithm, table["mean"], strict=True))
    assert means == {"a2c": 400, "trpo": 500} | dict.fromkeys(report.WEIGHTS.values(), 500)
    np.testing.assert_array_equal(np.isnan(table.iqm_low), table.seeds == 1)
    assert set(table.commit) == {"12e4567"}  # not read as a number when the rows of before were kept
    curves = pd.read_csv(results / "curves.csv")
    assert curves.columns.tolist() == ["environment", "algorithm", "steps", "seconds", "mean", "std"]
    assert len(curves) == 5 * 50
    assert (curves["mean"][curves.algorithm == "a2c"] == 0).all()  # the new curve alone
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[:3] == ["before", "<!-- results -->", "|  | reinforce | a2c | ppo | trpo | dqn | ddpg |"]
    assert "| CartPole-v1 | **500** (1) | 400 (1) |  | **500 ± 0** |  |  |" in lines  # bold: at the published figure
    assert lines[-2:] == ["<!-- results -->", "after"]
