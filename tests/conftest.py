"""What the tests share: the list of algorithm files, and three ways to run one.

run_script  as a user does, in a new process: true to life, but importing torch takes seconds.
run_inside  the same command line inside the test's process, in milliseconds.
launch      in a process forked from a server that has imported torch: it can be killed, and starts fast.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks gain nothing from threads; read when torch is imported
ROOT = Path(__file__).resolve().parent.parent
ALGOS = sorted((ROOT / "algos").glob("*.py"))
PPO = ROOT / "algos/ppo.py"  # for what is the same text in every file, see shared.py
EVAL_LINE = r"eval: mean_return=-?\d+\.\d\d std=\d+\.\d\d episodes=\d+ checkpoint=(\S+)"

ACTIONS = {"dqn": {"Discrete"}, "ddpg": {"Box"}}  # what a file takes, if not both
SMALL = {  # a budget of milliseconds; each file gets those that it has
    "num_envs": 2,
    "num_steps": 8,
    "eval_episodes": 1,
    "hidden_sizes": 8,
    "num_minibatches": 2,
    "update_epochs": 2,
    "cg_iters": 2,
    "critic_updates": 2,
    "buffer_size": 64,
    "batch_size": 8,
    "learning_starts": 16,
    "train_frequency": 16,
}


@pytest.fixture(params=ALGOS, ids=[path.stem for path in ALGOS])
def algo(request) -> Path:
    """Each algorithm file in turn."""
    return request.param


def fresh(path: Path):
    """Import an algorithm file as a module, anew."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


load = functools.cache(fresh)  # once per process


def takes(path: Path, kind: str) -> bool:
    """Whether the file takes actions of this kind, "Discrete" or "Box"."""
    return kind in ACTIONS.get(path.stem, {"Discrete", "Box"})


def odd(path: Path, name: str) -> str:
    """The id of the odd environment of that name, with actions that the file takes."""
    return f"tests.odd_envs:{name}{'' if takes(path, 'Discrete') else 'Continuous'}-v0"


def budget(path: Path) -> int:
    """Environment steps that are several updates, to the step, with the other flags of `small`."""
    return 60 if path.stem == "reinforce" else 64


def small(path: Path, flags: str = "") -> str:
    """A command line with a tiny budget on an environment that the file takes; `flags` win."""
    env_id = odd(path, "ObserveVector") if path.stem in ("reinforce", "ddpg") else "CartPole-v1"
    names = {field.name for field in dataclasses.fields(load(path).Args)}
    others = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SMALL.items() if name in names)
    return f"--env-id {env_id} --total-timesteps {budget(path)} {others} {flags}"


@dataclasses.dataclass
class Result:
    status: int
    out: str
    err: str
    cwd: Path

    @property
    def folder(self) -> Path:
        """The one run folder, in the default place."""
        (folder,) = (self.cwd / "runs").glob("*__*")
        return folder

    def check(self) -> "Result":
        """Assert that the script ended well, and said so in the agreed form."""
        assert self.status == 0, self.err
        assert re.fullmatch(EVAL_LINE, self.out.splitlines()[-1]), self.out
        return self


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each tag of a run's folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run_script(path: Path, flags: str, cwd: Path) -> Result:
    """Run a command line as a user does."""
    command = [sys.executable, path, *shlex.split(flags)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, timeout=60, env=env, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr, cwd)


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
def cli(tmp_path):
    """run_inside, each time in an empty folder (or in the one given)."""

    def run(path: Path, flags: str = "", cwd: Path | None = None) -> Result:
        if cwd is None:
            cwd = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
            cwd.mkdir()
        if "--resume" in flags:  # TensorBoard orders the logs of a folder by the second in which they begin
            time.sleep(1 - time.time() % 1)
        return run_inside(path, flags, cwd)

    return run


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["pytest", "torch.utils.tensorboard", "torch._dynamo", "gymnasium", "tyro", "tqdm"])


def _run_forked(path: Path, flags: str, cwd: Path, without: tuple[str, ...]) -> None:
    multiprocessing.set_start_method(None, force=True)  # as in a process of its own: the default
    os.setsid()  # a process group of its own, as in a terminal
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.modules |= dict.fromkeys(without)  # Python's own way to make an import fail
    sys.argv = [str(path), *shlex.split(flags)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


class Launched:
    """A running script, whose output goes to the files stdout and stderr in `cwd`."""

    def __init__(self, path: Path, flags: str, cwd: Path, without: tuple[str, ...] = ()):
        self.cwd = cwd
        for name in ("stdout", "stderr"):
            (cwd / name).write_text("")
        self.process = forks.Process(target=_run_forked, args=(path, flags, cwd, without), daemon=False)
        self.process.start()

    def wait_for(self, text: str, timeout: float = 30) -> None:
        """Wait until the script has written `text` to stderr."""
        end = time.monotonic() + timeout
        while text not in (self.cwd / "stderr").read_text():
            assert self.process.is_alive(), (self.cwd / "stderr").read_text()
            assert time.monotonic() < end, f"it does not write {text}"
            time.sleep(0.002)

    def stop(self, number: int = 0, group: bool = False, timeout: float = 60) -> Result:
        """Send a signal (0: none), to its children too if `group`; wait for the end and return the result."""
        if number:
            (os.killpg if group else os.kill)(self.process.pid, number)
        self.process.join(timeout)
        assert not self.process.is_alive(), "it does not end"
        out, err = ((self.cwd / name).read_text() for name in ("stdout", "stderr"))
        return Result(self.process.exitcode, out, err, self.cwd)


@pytest.fixture
def launch():
    """A function that starts a script, Launched(...); whatever the test leaves running is killed."""
    started = []

    def start(*args, **kwargs) -> Launched:
        started.append(Launched(*args, **kwargs))
        return started[-1]

    yield start
    for script in started:
        if script.process.is_alive():
            os.killpg(script.process.pid, signal.SIGKILL)
            script.process.join()
