"""What the tests share: the list of algorithm files, three ways to run one, and what it leaves.

train   its train(args), as a notebook does.
cli     a command line inside the test's process, in milliseconds.
launch  a command line in a process of its own, which can be killed: true to life, but importing torch takes seconds.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small networks gain nothing from threads
import pytest
import torch
import torch.multiprocessing as multiprocessing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny_envs import Trace

ROOT = Path(__file__).resolve().parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background job ignore it
ALGOS = sorted((ROOT / "algos").glob("*.py"))
PPO = ROOT / "algos/ppo.py"  # for what is the same text in every file, see shared.py
ACTIONS = {"dqn": {"Discrete"}, "ddpg": {"Box"}}  # what a file takes, if not all kinds

# A spawned process imports torch, which takes seconds. So the workers of a run in the test's process are forked, unless
# there is a GPU, which a forked process cannot use. Those of a script that `launch` starts are spawned, as for a user.
START_METHOD = "fork" if sys.platform == "linux" and not torch.accelerator.is_available() else "spawn"


def as_if_spawned(rank, function, *args):
    """Without the signal handler of the process from which this one was forked."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    function(rank, *args)


def spawn(function, args, num_processes, join):
    """In the place of torch.multiprocessing.spawn."""
    args = function, *args
    return multiprocessing.start_processes(as_if_spawned, args, num_processes, join, start_method=START_METHOD)


multiprocessing.spawn = spawn

STEPS = 80  # whole rollouts of every file, with these settings; each file gets those that it has
SMALL = dict(total_timesteps=STEPS, num_envs=2, num_steps=8, num_workers=1, eval_episodes=1, num_minibatches=2)
SMALL |= dict(update_epochs=2, cg_iters=2, critic_updates=2, buffer_size=64, batch_size=8, learning_starts=16)
SMALL |= dict(train_frequency=16)


@pytest.fixture(scope="module", params=ALGOS, ids=[path.stem for path in ALGOS])
def algo(request) -> Path:
    """Each algorithm file in turn."""
    return request.param


def load(path: Path):
    """A file of the repository as a module."""
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def takes(path: Path, kind: str) -> bool:
    """Whether the file takes actions of this kind: "Discrete", "Box", "MultiDiscrete" or "MultiBinary"."""
    return kind in ACTIONS.get(path.stem, {"Discrete", "Box", "MultiDiscrete", "MultiBinary"})


def small(path: Path, flags: str = "") -> str:
    """A command line with a tiny budget on an environment of random numbers; `flags` win."""
    settings = {name: value for name, value in SMALL.items() if name in load(path).Args.__annotations__}
    settings |= {"env_id": f"tests.tiny_envs:Odd{'' if takes(path, 'Discrete') else 'Continuous'}-v0"}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    return f"{' '.join(words)} --hidden-sizes 8 {flags}"


def train(module, env, log_dir, **args):
    """A run on that tiny environment; arguments that the algorithm does not have are left out. Returns the agent."""
    Trace.log.clear()
    own = dict(env_id=f"tests.tiny_envs:{env}-v0", log_dir=log_dir, device="cpu", hidden_sizes=(8,))
    args = {name: value for name, value in (SMALL | own | args).items() if name in module.Args.__annotations__}
    return module.train(module.Args(**args))


# ---- what a run leaves


def only(folder: Path) -> Path:
    """The one thing in that folder."""
    (path,) = folder.iterdir()
    return path


def read_checkpoint(folder: Path) -> dict:
    """That of a run's folder."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each tag of a run's folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@dataclass
class Result:
    """Of a command line: its exit status, what it wrote, and where it ran."""

    status: int
    out: str
    err: str
    cwd: Path

    @property
    def folder(self) -> Path:
        """The one run folder, in the default place."""
        return only(self.cwd / "runs")

    def check(self) -> "Result":
        """Assert that the script ended well, and said so in the agreed form."""
        assert self.status == 0, self.err
        form = r"eval: mean_return=-?\d+\.\d\d std=\d+\.\d\d episodes=\d+ checkpoint=(\S+)"
        last_line = re.fullmatch(form, self.out.splitlines()[-1])
        assert last_line, self.out
        assert (self.cwd / last_line[1]).exists()
        return self


# ---- a command line


def run_inside(path: Path, flags: str, cwd: Path) -> Result:
    """Run a command line by calling main(). Warnings, which pytest would keep back, are added to stderr."""
    module, out, err, status = load(path), io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does, unlike pytest
        warnings.filterwarnings("default", category=DeprecationWarning, module="gymnasium")  # as Gymnasium does
        patch.setattr(sys, "argv", [str(path), *shlex.split(flags)])
        patch.setattr(sys, "path", sys.path.copy())
        patch.chdir(cwd)
        try:
            module.main()
        except SystemExit as stop:
            status = stop.code or 0
        except Exception:
            traceback.print_exc()
            status = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    shown = [f"{warning.category.__name__}: {warning.message}\n" for warning in caught]
    return Result(status, out.getvalue(), "".join(shown) + err.getvalue(), cwd)


@pytest.fixture
def cli(tmp_path_factory):
    """run_inside, each time in an empty folder (or in the one given)."""

    def run(path: Path, flags: str = "", cwd: Path | None = None) -> Result:
        return run_inside(path, flags, cwd or tmp_path_factory.mktemp("run"))

    return run


class Launched:
    """A running script, as a user has started it in a terminal; its output goes to the files stdout and stderr."""

    def __init__(self, path: Path | str, flags: str, cwd: Path):
        self.cwd, command = cwd, [sys.executable, path, *shlex.split(flags)]
        with open(cwd / "stdout", "w") as out, open(cwd / "stderr", "w") as err:
            self.process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=err, process_group=0)

    def wait_for(self, text: str) -> None:
        """Wait until the script has written `text` to stderr."""
        while text not in (self.cwd / "stderr").read_text():
            assert self.process.poll() is None, (self.cwd / "stderr").read_text()
            time.sleep(0.002)

    def stop(self, number: int = 0) -> Result:
        """Send a signal (0: none), Ctrl-C's also to its children; wait for the end and return the result."""
        if number:
            (os.killpg if number == signal.SIGINT else os.kill)(self.process.pid, number)
        status = self.process.wait(timeout=60)
        return Result(status, (self.cwd / "stdout").read_text(), (self.cwd / "stderr").read_text(), self.cwd)


def children(process) -> list[int]:
    """The process ids of its children."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture
def launch():
    """A function that starts a script, Launched(...); whatever the test leaves running is killed."""
    started = []

    def start(path: Path | str, flags: str, cwd: Path) -> Launched:
        started.append(Launched(path, flags, cwd))
        return started[-1]

    yield start
    for script in started:
        if script.process.poll() is None:
            os.killpg(script.process.pid, signal.SIGKILL)
            script.process.wait()
