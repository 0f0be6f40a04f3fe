"""benchmark.sh: its list, what it skips, resumes and survives. report.py: known numbers from small logs."""

import contextlib
import fcntl
import os
import pty
import re
import shutil
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tyro
from conftest import ROOT, load, run_inside
from torch.utils.tensorboard import SummaryWriter

report = load(ROOT / "benchmark/report.py")
MEASUREMENT = "benchmark/gradient_variance.py --out {}/gradient_variance.csv"
REPORT = "benchmark/report.py runs/benchmark {} CartPole-v1__ppo__11"
PART = "runs/benchmark"  # where a part of the list has its tables and pictures

# In the place of python: a training that takes no time. It writes its command line to the file `calls`. With seed 12 it
# fails where a file `fails` exists; where a file `cut` exists it stops like a run that was interrupted.
FAKE_PYTHON = """#!/usr/bin/env bash
args="$*" && echo "$args" >>calls
[[ $1 == benchmark/* ]] && exit
[[ $args == *"--seed 12"* && -e fails ]] && { echo "error: the fake failed"; exit 1; }
[[ $args != *--log-dir* ]] || { cd "${args##*--log-dir }" && mkdir run && touch run/checkpoint.pt && cd - || exit; }
[[ -e cut ]] && { echo "stopped (step 1); resume with: python"; exit 130; }
echo "eval: mean_return=1.00"
"""
FAKE_SLEEP = f"""#!/usr/bin/env bash
exec {shutil.which("sleep")} 0.1
"""


@pytest.fixture
def run(tmp_path):
    """run(**knobs) runs a copy of benchmark.sh with the fakes: (exit status, output, calls of python).

    It has a terminal of its own, at which Ctrl-C is pressed, if so told, as soon as there is a checkpoint.
    """
    script = (ROOT / "benchmark.sh").read_text().replace("--eval-episodes 100", "--eval-episodes 5")
    for name, text in {"benchmark.sh": script, "python": FAKE_PYTHON, "sleep": FAKE_SLEEP}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.path.dirname(sys.executable), os.environ["PATH"]])
    environ = os.environ | {"PATH": path, "ALGOS": "ppo", "ENVS": "CartPole-v1", "SEEDS": "1"}

    def run(*args, ctrl_c=False, **knobs):
        (tmp_path / "calls").write_text("")
        script, terminal = pty.fork()
        if script == 0:
            os.execve(tmp_path / "benchmark.sh", ["benchmark.sh", *args], environ | knobs)
        while ctrl_c and not [*tmp_path.glob("runs/*/*/*/checkpoint.pt")]:
            time.sleep(0.01)
        if ctrl_c:
            os.write(terminal, b"\x03")
        output = b""
        with contextlib.suppress(OSError):  # at its end a script's terminal cannot be read (macOS: reads as empty)
            while chunk := os.read(terminal, 1000):
                output += chunk
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
        return status, output.decode().replace("\r\n", "\n"), (tmp_path / "calls").read_text().splitlines()

    return run


def test_list(run):
    """It is complete, and has the seeds of the results. Its flags exist and differ from the defaults."""
    status, output, calls = run("--dry-run", ENVS="", ALGOS="", SEEDS="")
    *commands, last = output.splitlines()
    assert (status, calls, last) == (0, [], f"python {MEASUREMENT.format('benchmark')}")
    experiments = set()
    for command in commands:
        _, script, *flags = command.split()
        Args = load(ROOT / script).Args
        args = tyro.cli(Args, args=flags)  # refuses unknown flags
        special = set(re.findall(r"--(?:no-)?([a-z-]+)", command))
        special -= {"env-id", "total-timesteps", "seed", "device", "num-workers"}  # (that is the number of cores)
        for name in special:
            assert vars(args)[name.replace("-", "_")] != vars(Args())[name.replace("-", "_")], command
        experiments.add((args.env_id, args.exp_name, args.seed))
    for env_id, name in {experiment[:2] for experiment in experiments}:
        seeds = sorted(seed for *experiment, seed in experiments if experiment == [env_id, name])
        assert seeds[0] in (11, 21, 31, 61)
        number = 5 if env_id in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1") else 3
        assert seeds == list(range(seeds[0], seeds[0] + number))
    assert {("CartPole-v1", name, 11) for name in report.WEIGHTS.values()} < experiments
    made = pd.read_csv(ROOT / "benchmark/seeds.csv")[["environment", "algorithm", "seed"]]
    listed = {(env_id.split(":")[-1], *others) for env_id, *others in experiments}
    assert set(made.itertuples(index=False, name=None)) <= listed


def test_part(run):
    assert run(ENVS="CartPole") == (2, 'error: no experiment of ppo with ALGOS="ppo" ENVS="CartPole"\n', [])
    assert run(ALGOS="ppo tpro")[::2] == (2, [])
    assert run("-n")[::2] == (2, [])
    for pong in ("PongDifference-v0", "envs.pong:PongDifference-v0"):
        output = run("--dry-run", ENVS=f"CartPole-v1 {pong}")[1]
        assert (output.count("--env-id envs.pong:PongDifference-v0"), len(output.splitlines())) == (1, 2)
    names = [f"CartPole-v1__reinforce{weight}__11" for weight in ("", "-reward-to-go", "-total-return")]
    report_on_all = REPORT.format(PART).replace("CartPole-v1__ppo__11", " ".join(names))
    assert run(ALGOS="reinforce")[2][3:] == [MEASUREMENT.format(PART), report_on_all]
    call, *others, last = run(ALGOS="reinforce", SCALE="0.1", JOBS="1", FIRST_SEED="3")[2]
    flags = "40000 --seed 3 --eval-episodes 5 --device cpu --log-dir runs/benchmark-0.1/CartPole-v1__reinforce__3"
    assert call.endswith(f" {flags}")
    assert (len(others), last) == (2, report_on_all.replace("benchmark ", "benchmark-0.1 ").replace("__11", "__3"))


def test_only_a_complete_run_or_publish_replaces_the_results(run):
    assert run()[2][-1] == REPORT.format(PART)
    assert run("--publish")[::2] == (0, [REPORT.format("benchmark")])
    assert run(SEEDS="", ALGOS="", ENVS="", JOBS="50")[2][-1].split()[:3] == REPORT.format("benchmark").split()[:3]


def test_it_says_how_long_it_will_take(run, tmp_path):
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark/results.csv").write_text("environment,algorithm,seconds\nCartPole-v1,ppo,7200\n")
    _, output, _ = run(ALGOS="ppo trpo", SEEDS="2", JOBS="4")
    assert "4 runs to go: about 1.0 hours (DDPG 0.0), and 2 runs of unknown length\n" in output
    assert "0 runs to go" in run(ALGOS="ppo trpo", SEEDS="2")[1]


def test_two_at_once_on_one_folder(run, tmp_path):
    (tmp_path / "runs/benchmark").mkdir(parents=True)
    with (tmp_path / "runs/benchmark/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run() == (2, f"error: another {tmp_path}/benchmark.sh is at work in runs/benchmark\n", [])


def test_finished_runs_are_skipped_and_cut_ones_resumed(run, tmp_path):
    (tmp_path / "cut").touch()
    assert run()[0] == 1
    (tmp_path / "cut").unlink()
    resume = "algos/ppo.py --resume runs/benchmark/CartPole-v1__ppo__11/run/checkpoint.pt"
    assert run()[::2] == (0, [resume, REPORT.format(PART)])
    assert "\nresumed unknown+\n" in (tmp_path / "runs/benchmark/CartPole-v1__ppo__11/log.txt").read_text()
    assert run()[::2] == (0, [REPORT.format(PART)])
    script = (tmp_path / "benchmark.sh").read_text()
    (tmp_path / "benchmark.sh").write_text(script.replace("CartPole-v1 60000", "CartPole-v1 60000 --gamma 0.9"))
    status, _, (call, _) = run()  # other settings: it starts anew, in an empty folder
    assert (status, "--gamma 0.9" in call) == (0, True)


def test_a_failing_run_is_survived_and_named(run, tmp_path):
    (tmp_path / "fails").touch()
    status, output, calls = run(SEEDS="3", JOBS="1")
    assert (status, len(calls), "1 of 3 runs failed" in output) == (1, 4, True)
    assert output.endswith("CartPole-v1__ppo__12/log.txt: error: the fake failed\n")


def test_a_real_run_that_is_cut_goes_on_and_is_reported(run, tmp_path):
    (tmp_path / "python").unlink()
    for name in ("algos", "benchmark"):
        (tmp_path / name).symlink_to(ROOT / name)
    status, output, _ = run(SCALE="0.3", ctrl_c=True)
    (log,) = tmp_path.glob("runs/benchmark-0.3/*/log.txt")
    assert (status, "stopping" in output, "stopped; resume with" in log.read_text()) == (130, True, True)
    assert run(SCALE="0.3")[0] == 0
    (row,) = pd.read_csv(log.parents[1] / "results.csv").itertuples()
    assert (row.environment, row.algorithm, row.seeds, row.steps // 1000) == ("CartPole-v1", "ppo", 1, 17)
    assert f"eval: mean_return={row.mean:.2f} " in log.read_text().splitlines()[-1]
    curve = pd.read_csv(log.parents[1] / "curves.csv")["mean"].dropna()  # no episode may end in the first window
    assert (len(curve) >= report.WINDOWS - 1, curve.between(8, 500).all()) == (True, True)


def test_gradient_variance(tmp_path):
    flags = "--seeds 1 2 --episodes 60 --budgets 2000 6000 --out new/table.csv"
    assert run_inside(ROOT / "benchmark/gradient_variance.py", flags, tmp_path).status == 0
    table = pd.read_csv(tmp_path / "new/table.csv").pivot(index=["seed", "steps"], columns="weight")
    assert table.index.tolist() == [(1, 2000), (1, 6000), (2, 2000), (2, 6000)]
    assert (table.mean_return.nunique(axis=1) == 1).all()  # the same episodes for all three
    assert (table.gradient_variance["total-return"] > 1.5 * table.gradient_variance["reward-to-go"]).all()
    assert (table.gradient_variance["reward-to-go"] > table.gradient_variance["baseline"]).all()


def write_run(folder, returns, evaluation, end="eval: mean_return=", pause_after=10**9):
    """The log of a run: an episode of ten steps every second with these returns, then the evaluation."""
    with SummaryWriter(str(folder / "run")) as writer:
        writer.add_text("args", "", 0, walltime=1000)
        for i, episodic_return in enumerate(returns, start=1):
            for tag, value in (("charts/episodic_return", episodic_return), ("charts/SPS", 10)):
                writer.add_scalar(tag, value, 10 * i, walltime=1000 + i + 5000 * (i > pause_after))
        for episode, value in enumerate(evaluation):
            writer.add_scalar("eval/episodic_return", value, 10 * len(returns) + episode)
    (folder / "run/checkpoint.pt").touch()
    (folder / "log.txt").write_text(f"12e4567 python algos/x.py\n{end}\n")


def test_report_of_known_numbers(tmp_path):
    write_run(tmp_path / "Hopper-v5__ppo__1", np.arange(200), [0, 10, 20, 30], pause_after=50)
    write_run(tmp_path / "Hopper-v5__ppo__2", np.arange(200) + 2, [4000, 4010, 4820, 4830])
    write_run(tmp_path / "Hopper-v5__ppo__3", np.arange(200), [0, 0, 0, 0], end="stopped (step 10)")  # is left out
    write_run(tmp_path / "Hopper-v5__ppo__4", np.arange(200), [0, 0, 0, 0])  # was not asked for
    report.main(tmp_path, tmp_path, [f"Hopper-v5__ppo__{seed}" for seed in (1, 2, 3)])
    # Mean and sample deviation of 15 and 4415; the last hundred training episodes; the mean of 20, 30, 4000 and 4010,
    # the middle half, with an interval that ends at 15 and 4415, for a draw of one seed twice is among the 95 %. The
    # pause of an hour does not count.
    cells = "2 | 4 | 2215.0 ± 3111.3 | 150.5 | 2015.0 [15.0, 4415.0] | 2,000 | 200 | 10 | 12e4567 | "
    theirs = "2761.2 (1M x 3, v2, maximum, sampled); 2609.3 ± 700.8 (1M x 10, v3, maximum); 2410.4 (1M x 1, v3); "
    assert f"| Hopper-v5 | ppo | {cells}{theirs}" in (tmp_path / "results.md").read_text()
    seeds = (tmp_path / "seeds.csv").read_text().splitlines()
    assert seeds[0] == "environment,algorithm,seed,mean,std,training,commit"
    assert seeds[1:] == ["Hopper-v5,ppo,1,15,11.18,149.5,12e4567", "Hopper-v5,ppo,2,4415,410.03,151.5,12e4567"]
    curve = pd.read_csv(tmp_path / "curves.csv")[["steps", "seconds", "mean", "std"]]
    i = np.arange(50)  # windows of four episodes
    np.testing.assert_allclose(
        curve, np.stack([40 * i + 40, 4 * i + 4, 4 * i + 2.5, 2**0.5 + 0 * i], axis=1), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("mean", "training", "steps", "published", "bold"),
    [
        (100, 90, 1000, [(100, 1000, "final deterministic")], True),
        (100, 90, 1000, [(100, np.nan, "final deterministic")], False),  # who knows how many steps that took
        (100, 90, 1000, [(95, 1000, "training return")], False),  # an evaluation has less noise
        (100, 95, 1000, [(95, 1000, "training return")], True),
        (100, 90, 1000, [(100, 1000, "maximum over training")], True),  # the final policy is at most as good
        (100, 90, 1000, [(90, 500, "final deterministic"), (100, 2000, "final deterministic")], True),
        (100, 90, 1000, [(100, 500, "final deterministic"), (100, 2000, "final deterministic")], False),
        (100, 90, 1000, [(90, 1000, "final deterministic"), (101, 500, "maximum over training")], False),
        (100, 90, 1000, [(101, 500, "final sampled"), (90, 1000, "final deterministic")], False),
        (100, 90, 1000, [(95, 2000, "final sampled"), (90, 1000, "final deterministic")], True),
        (100, 90, 1001, [(95, 2000, "final sampled"), (90, 1000, "final deterministic")], False),  # 95 was sampled
        (100, 90, 1000, [(95, 1000, "maximum sampled")], False),
        (100, 90, 1000, [], False),
    ],
)
def test_bold_is_what_is_at_or_above_like_for_like(mean, training, steps, published, bold, monkeypatch):
    figures = pd.DataFrame(published, columns=["mean", "steps", "metric"])
    monkeypatch.setattr(report, "PUBLISHED", figures.assign(environment="E", algorithm="ppo"))
    table = pd.DataFrame([{"environment": "E", "algorithm": "ppo", "mean": mean, "training": training, "steps": steps}])
    (row,) = table.assign(seeds=1, std=np.nan).itertuples()
    assert report.score(row, 0) == (f"**{mean}**" if bold else f"{mean}")


def test_published_figures():
    figures = report.PUBLISHED
    metrics = ["final deterministic", "final sampled", "training return", "maximum over training", "maximum sampled"]
    assert set(figures.metric) == set(metrics)
    assert set(figures.algorithm) == set(report.ALGORITHMS) - {"a3c"}  # nobody has published it for these
    assert not figures.drop(columns=["std", "steps"]).isna().any(axis=None)
    assert not figures.duplicated().any()


def test_another_run_of_an_algorithm_is_compared_with_its_figures():
    rows = pd.DataFrame({"environment": "CartPole-v1", "algorithm": ["a2c", "a2c-200k"]}).itertuples()
    usual, other = map(report.published, rows)
    assert len(usual) > 0
    pd.testing.assert_frame_equal(usual, other)


def test_report_keeps_what_it_has_no_runs_of(tmp_path):
    """And the README, if its results are of a part and go elsewhere."""
    runs, results, picture = tmp_path / "runs", tmp_path / "benchmark", tmp_path / "benchmark/reinforce-weights.png"
    old = "before\n<!-- results -->\nold\n<!-- results -->\nafter\n"
    (tmp_path / "README.md").write_text(old)
    for name, evaluation in (("trpo__1", 500), ("trpo__2", 500), ("a2c__1", 300)):
        write_run(runs / f"CartPole-v1__{name}", np.ones(60), [evaluation])
    (runs / "empty").mkdir()
    (runs / "empty/log.txt").touch()  # of a run that was cut off at once
    report.main(runs, tmp_path / "quick")
    assert (tmp_path / "README.md").read_text() == old
    report.main(runs, results)
    shutil.rmtree(runs)
    write_run(runs / "CartPole-v1__a2c__1", np.full(60, 500), [400])
    write_run(runs / "CartPole-v1__reinforce__1", np.ones(60), [500])
    pd.read_csv(results / "curves.csv").assign(old=0).to_csv(results / "curves.csv", index=False)
    report.main(runs, results)
    without = picture.read_bytes()
    (results / "gradient_variance.csv").write_text("weight,mean_return,gradient_variance\nbaseline,1,9\n")
    report.main(runs, results)
    assert picture.read_bytes() != without
    assert set(pd.read_csv(results / "results.csv", dtype=str).commit) == {"12e4567"}  # never read as a number
    curves = pd.read_csv(results / "curves.csv")
    assert curves.columns.tolist() == ["environment", "algorithm", "steps", "seconds", "mean", "std"]
    assert curves[curves.algorithm == "a2c"]["mean"].tolist() == [500] * 50  # the new curve alone
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[:3] == ["before", "<!-- results -->", "|  | reinforce | a2c | a3c | ppo | trpo | dqn | ddpg |"]
    cells = (
        "500 (600 x 1)<br>483 (200k x 4, training) | 400 (600 x 1)<br>500 (500k x 1) |  |  "
        "| **500 ± 0** (600 x 2)<br>500"
    )
    assert f"| CartPole-v1 | {cells} (100k x 1) |  |  |" in lines
    assert lines[-2:] == ["<!-- results -->", "after"]
