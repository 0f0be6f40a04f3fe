"""benchmark.sh: its list, what it skips, resumes and survives. report.py: known numbers from small logs."""

import os
import re
import shutil
import signal
import stat
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

# In the place of python: a training that takes no time. It writes its command line to the file `calls`; with seed 2 it
# fails, where a file `fails` exists; where a file `cut` exists it stops like a run that was interrupted.
FAKE_PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0") args="$*"
echo "$args" >>"$here/calls"
[[ $1 == benchmark/report.py ]] && exit
[[ $args == *"--seed 2"* && -e $here/fails ]] && { echo "error: the fake failed"; exit 1; }
if [[ $args == *--log-dir* ]]; then
  folder=${args##*--log-dir }/run
  mkdir "$folder" && touch "$folder/checkpoint.pt"
fi
[[ -e $here/cut ]] && { echo "stopped (step 1); resume with: python"; exit 130; }
echo "eval: mean_return=1.00 std=0.00 episodes=100 checkpoint=$folder/checkpoint.pt"
"""


@pytest.fixture
def fake(tmp_path):
    """run(**knobs) starts benchmark.sh with a fake python: (exit status, output, command lines that were run)."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)

    def run(*arguments, **knobs):
        (tmp_path / "calls").write_text("")
        knobs = {"ENVS": "CartPole-v1", "ALGOS": "ppo", "RUNS": str(tmp_path / "runs")} | knobs
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | knobs
        result = subprocess.run([ROOT / "benchmark.sh", *arguments], env=env, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines()
        return result.returncode, result.stdout + result.stderr, [call for call in calls if "report.py" not in call]

    run.folder = tmp_path
    return run


def test_the_list_is_complete_and_its_flags_exist(fake, monkeypatch):
    """And they differ from the defaults: the list says what is special about an experiment."""
    status, output, calls = fake("--dry-run", ENVS="", ALGOS="", SEEDS="2", SCALE="0.1")
    assert status == 0
    assert not calls
    commands = output.splitlines()
    experiments = Counter()
    for command in commands:
        _, script, *flags = command.split()
        monkeypatch.setattr("sys.argv", [script, *flags])
        module = load(ROOT / script)
        args, defaults = (
            tyro.cli(module.Args),
            module.Args(),
        )  # refuses unknown flags, and budgets of less than an update
        given = {name.replace("-", "_") for name in re.findall(r"--(?:no-)?([a-z-]+)", command)}
        for name in given - {"env_id", "total_timesteps", "seed"}:
            assert getattr(args, name) != getattr(defaults, name), command
        experiments[args.env_id, args.exp_name] += 1
        assert args.seed == experiments[args.env_id, args.exp_name]
    assert set(experiments.values()) == {2}
    wanted = set(report.PUBLISHED[["environment", "algorithm"]].itertuples(index=False, name=None))
    assert wanted <= set(experiments)
    assert {("CartPole-v1", name) for name in report.WEIGHTS} <= set(experiments)


def test_knobs(fake):
    _, output, _ = fake("--dry-run", ENVS="CartPole-v1 Hopper-v5", ALGOS="trpo ppo", SEEDS="1", SCALE="0.1")
    assert [line.split()[1:6] for line in output.splitlines()] == [
        ["algos/ppo.py", "--env-id", "CartPole-v1", "--total-timesteps", "6000"],
        ["algos/trpo.py", "--env-id", "CartPole-v1", "--total-timesteps", "10000"],
        ["algos/ppo.py", "--env-id", "Hopper-v5", "--total-timesteps", "100000"],
        ["algos/trpo.py", "--env-id", "Hopper-v5", "--total-timesteps", "100000"],
    ]


@pytest.mark.parametrize(
    ("arguments", "knobs", "sentence"),
    [
        ((), {"ENVS": "CartPole"}, 'no experiment with ALGOS="ppo" ENVS="CartPole"'),
        (("-n",), {}, "unknown argument -n"),
    ],
)
def test_bad_input(fake, arguments, knobs, sentence):
    status, output, calls = fake(*arguments, **knobs)
    assert (status, calls) == (2, [])
    assert output.startswith("error: ")
    assert sentence in output


def test_finished_runs_are_skipped(fake):
    status, output, calls = fake(SEEDS="2")
    assert status == 0
    assert len(calls) == 2
    assert "[2/2] CartPole-v1__ppo__2" in output
    assert fake(SEEDS="2")[2] == []
    (call,) = fake(SEEDS="3")[2]
    assert "--seed 3" in call
    assert len(fake(SEEDS="2", SCALE="2")[2]) == 2  # other settings: they start anew
    assert len(list((fake.folder / "runs").glob("*/*/checkpoint.pt"))) == 3  # and leave no run of the old ones


def test_cut_runs_are_resumed(fake):
    (fake.folder / "cut").touch()
    assert fake(SEEDS="1")[0] == 1
    (fake.folder / "cut").unlink()
    status, _, (call,) = fake(SEEDS="1")
    checkpoint = fake.folder / "runs/CartPole-v1__ppo__1/run/checkpoint.pt"
    assert (status, call) == (0, f"algos/ppo.py --resume {checkpoint}")
    assert fake(SEEDS="1")[2] == []  # finished now


def test_a_failing_run_is_survived_and_named(fake):
    (fake.folder / "fails").touch()
    status, output, calls = fake(SEEDS="3", JOBS="1")
    assert status == 1
    assert len(calls) == 3
    assert "1 of 3 runs failed" in output
    assert output.rstrip().endswith("CartPole-v1__ppo__2/log.txt: error: the fake failed")
    (fake.folder / "fails").unlink()
    status, _, (call,) = fake(SEEDS="3")  # the next time only that one runs
    assert status == 0
    assert "--seed 2" in call


def test_a_real_run_that_is_cut_goes_on_and_is_reported(tmp_path):
    knobs = {
        "ALGOS": "ppo",
        "ENVS": "CartPole-v1",
        "SEEDS": "1",
        "SCALE": "0.5",
        "RUNS": f"{tmp_path}/runs",
        "RESULTS": f"{tmp_path}/results",
    }
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | knobs
    process = subprocess.Popen([ROOT / "benchmark.sh"], env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(tmp_path.glob("runs/*/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping" in output
    (log,) = tmp_path.glob("runs/*/log.txt")
    assert "stopped; resume with" in log.read_text()

    result = subprocess.run([ROOT / "benchmark.sh"], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert log.read_text().splitlines()[-1].startswith("eval: mean_return=")
    table = pd.read_csv(tmp_path / "results/results.csv").iloc[0]
    assert (table.environment, table.algorithm, table.seeds, table.steps) == ("CartPole-v1", "ppo", 1, 29696)
    assert table["mean"] > 100
    names = {"results.csv", "results.md", "curves.csv", "CartPole-v1.png"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names


# ---- the report


def write_run(
    runs: Path, env_id: str, name: str, seed: int, returns, evaluation, pause_after: int | None = None
) -> None:
    """The log of a finished run: an episode of ten steps every second with these returns, then the evaluation."""
    folder = runs / f"{env_id}__{name}__{seed}" / "run"
    writer = SummaryWriter(str(folder))
    writer.add_text("args", "", 0, walltime=1000)
    for i, episodic_return in enumerate(returns, start=1):
        now = 1000 + i + (5000 if pause_after is not None and i > pause_after else 0)
        writer.add_scalar("charts/episodic_return", episodic_return, 10 * i, walltime=now)
        writer.add_scalar("charts/SPS", 10, 10 * i, walltime=now)
        if name.startswith("reinforce"):
            writer.add_scalar("losses/gradient_variance", 7, 10 * i, walltime=now)
    for episode, value in enumerate(evaluation):
        writer.add_scalar("eval/episodic_return", value, 10 * len(returns) + episode)
    writer.close()
    (folder / "checkpoint.pt").touch()
    (folder.parent / "log.txt").write_text("12e4567 python algos/x.py\neval: mean_return=\n")


def test_report_of_known_numbers(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    write_run(runs, "Hopper-v5", "ppo", 1, np.arange(100), [0, 10, 20, 30], pause_after=50)
    write_run(runs, "Hopper-v5", "ppo", 2, np.arange(100) + 2, [4000, 4010, 4020, 4030])
    report.main(runs, results)

    (row,) = pd.read_csv(results / "results.csv", dtype={"commit": str}).itertuples()
    assert (row.environment, row.algorithm, row.seeds, row.commit) == ("Hopper-v5", "ppo", 2, "12e4567")
    assert (row.mean, row.std) == (2015, 2000)  # of 15 and 4015
    assert row.iqm == np.mean([20, 30, 4000, 4010])  # the quarter at either end is left out
    assert (row.iqm_low, row.iqm_high) == (15, 4015)  # a draw of one seed twice is among the 95 %
    assert (row.published, row.source) == (2410, "zoo")
    assert (row.steps, row.seconds, row.steps_per_second) == (1000, 100, 10)  # the pause of an hour does not count

    curve = pd.read_csv(results / "curves.csv")
    assert len(curve) == report.WINDOWS == 50  # so that each window has two episodes
    np.testing.assert_array_equal(curve.steps, np.arange(20, 1001, 20))
    np.testing.assert_allclose(curve.seconds, np.arange(2, 101, 2))
    np.testing.assert_allclose(curve["mean"], np.arange(0, 100, 2) + 1.5)
    np.testing.assert_allclose(curve["std"], 1)

    text = (results / "results.md").read_text()
    row = "2 | 4 | 2015.0 ± 2000.0 | 2015.0 [15.0, 4015.0] | 2410 (zoo) | 1,000 | 100 | 10 | 12e4567"
    assert f"| Hopper-v5 | ppo | {row} |" in text
    assert (results / "Hopper-v5.png").stat().st_size > 10_000


def test_report_keeps_what_it_has_no_runs_of(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- results -->\nafter\n")
    for seed in (1, 2):
        write_run(runs, "CartPole-v1", "trpo", seed, np.ones(60), [500])
    write_run(runs, "CartPole-v1", "a2c", 1, np.ones(60), [300])
    report.main(runs, results)
    shutil.rmtree(runs)
    write_run(runs, "CartPole-v1", "a2c", 1, np.zeros(60), [400])
    write_run(runs, "Acrobot-v1", "ppo", 1, np.ones(60), [-80])
    for weight in report.WEIGHTS:
        write_run(runs, "CartPole-v1", weight, 1, np.ones(60), [500])
    report.main(runs, results)

    table = pd.read_csv(results / "results.csv", dtype={"commit": str})
    means = {(row.environment, row.algorithm): row.mean for row in table.itertuples()}
    weights = {("CartPole-v1", weight): 500 for weight in report.WEIGHTS}
    assert means == {("CartPole-v1", "a2c"): 400, ("CartPole-v1", "trpo"): 500, ("Acrobot-v1", "ppo"): -80} | weights
    np.testing.assert_array_equal(np.isnan(table.iqm_low), table.seeds == 1)
    curves = pd.read_csv(results / "curves.csv")
    a2c = curves[(curves.environment == "CartPole-v1") & (curves.algorithm == "a2c")]
    assert len(a2c) == 50
    assert (a2c["mean"] == 0).all()  # the new curve alone
    assert len(curves) == 6 * 50
    assert (curves[curves.algorithm.isin(report.WEIGHTS)].gradient_variance == 7).all()
    assert "| **500.0** |" in (results / "results.md").read_text()  # at the published figure
    assert "| 400.0 |" in (results / "results.md").read_text()  # below it
    assert set(table.commit) == {"12e4567"}  # not read as a number when the rows of before were kept
    assert (results / "reinforce-weights.png").exists()
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[:3] == ["before", "<!-- results -->", "|  | reinforce | a2c | ppo | trpo | dqn | ddpg |"]
    assert "| CartPole-v1 | **500** (1) | 400 (1) |  | **500 ± 0** |  |  |" in lines  # the number of seeds in brackets
    assert lines[-2:] == ["<!-- results -->", "after"]
    assert "old" not in lines


def test_report_leaves_out_runs_that_are_not_finished(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for seed in (1, 2):
        write_run(runs, "Acrobot-v1", "ppo", seed, np.ones(60), [-80])
    (runs / "Acrobot-v1__ppo__2/log.txt").write_text("abc1234 python algos/x.py\nstopped (step 10)\n")
    report.main(runs, results)
    assert pd.read_csv(results / "results.csv").seeds.tolist() == [1]
    (runs / "Acrobot-v1__ppo__1/log.txt").unlink()
    with pytest.raises(SystemExit, match="no finished run"):
        report.main(runs, results)


def test_the_report_reads_what_a_training_writes(tmp_path):
    """The curve of a real log is made of its episodes, and the evaluation is the printed one."""
    folder = tmp_path / "runs"
    result = run_inside(
        ROOT / "algos/reinforce.py",
        "--total-timesteps 2000 --num-envs 2 --log-dir runs --log-gradient-variance",
        tmp_path,
    )
    curve, evaluation = report.read_run(next(folder.iterdir()))
    assert f"mean_return={evaluation.mean():.2f}" in result.check().out
    assert curve.notna().to_numpy()[5:].all()
    assert curve.steps.is_monotonic_increasing
    assert curve.seconds.is_monotonic_increasing
    assert curve["mean"].between(1, 500).all()


def test_a_quick_look_does_not_replace_the_results(fake):
    """Runs and results of another SCALE go to a folder of their own."""
    scale = "0.0123"
    folder = ROOT / f"runs/benchmark-{scale}"
    try:
        status, _, (call,) = fake(SCALE=scale, SEEDS="1", RUNS="")
        assert status == 0
        assert f"--log-dir runs/benchmark-{scale}/CartPole-v1__ppo__1" in call
        report_call = (fake.folder / "calls").read_text().splitlines()[-1]
        assert report_call == f"benchmark/report.py runs/benchmark-{scale} runs/benchmark-{scale}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
