"""The rules that every algorithm file keeps: its form, its command line, what it refuses, and its checkpoints."""

import ast
import dataclasses
import itertools
import pickle
import random
import re
import shlex
import signal
import sys
import time
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import ALGOS, EVAL_LINE, PPO, budget, load, odd, read_events, run_inside, run_script, small, takes

from tests.odd_envs import UNFIT_ACTIONS, UNFIT_OBSERVATIONS

MAX_LINES = 772  # the aim is 400; the command line, checkpoints, faults and all kinds of spaces take the rest
MAX_OWN_LINES = 288  # outside of the shared blocks
MAX_HEART_LINES = 80  # from the first action of a rollout to the optimizer's step
PACKAGES = {"torch", "numpy", "gymnasium", "tyro", "tqdm", "psutil"}
EVERYWHERE = {"arguments", "validation", "command line", "environments", "evaluation", "run", "setup", "main"}
POLICY = {"networks", "images", "box actions", "statistics", "actor-critic"}
ROLLOUT = {"advantages", "buffer", "rollout", "targets"}
BLOCKS = {
    "reinforce": EVERYWHERE | POLICY | {"critic"},
    "a2c": EVERYWHERE | POLICY | ROLLOUT,
    "ppo": EVERYWHERE | POLICY | ROLLOUT,
    "trpo": EVERYWHERE | POLICY | ROLLOUT | {"critic"},
    "dqn": EVERYWHERE | {"networks", "images", "target network"},
    "ddpg": EVERYWHERE | {"networks", "box actions", "target network"},
}


# ---- the form of a file


def shared_blocks(source: str) -> list[tuple[str, str]]:
    """(name, text) of the blocks that are the same in every file that has them.

    At the top level a block goes from the line `# ==== shared: NAME` to the next line that starts with `# ====`, or to
    the end of the file; inside a class or function from the line `# shared: NAME` to the line `# shared: end`.
    """
    sections = re.findall(r"^# ==== shared: ([^\n]+)\n(.*?)(?=^# ====|\Z)", source, re.MULTILINE | re.DOTALL)
    return sections + re.findall(r"^ +# shared: ([^\n]+)\n(.*?)^ +# shared: end$", source, re.MULTILINE | re.DOTALL)


def test_marks(algo):
    source = algo.read_text()
    names = [name for name, _ in shared_blocks(source)]
    assert len(names) == len(set(names))
    assert set(names) == BLOCKS[algo.stem]
    assert all(text.strip() for _, text in shared_blocks(source))
    marks = [line for line in source.splitlines() if re.match(r" *#[ =]*shared\b", line)]
    assert len(marks) == len(names) + sum(line.strip() == "# shared: end" for line in marks), marks


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(ALGOS, 2)], ids=lambda path: path.stem)
def test_shared_blocks_are_the_same(one, other):
    mine, others = dict(shared_blocks(one.read_text())), dict(shared_blocks(other.read_text()))
    for name in mine.keys() & others.keys():
        assert mine[name] == others[name], f"the block {name} differs"


def test_stands_alone(algo):
    tree = ast.parse(algo.read_text())
    top_level = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not getattr(node, "level", 0), "a relative import"
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            for module in modules:
                package = module.split(".")[0]
                assert package in PACKAGES | {"wandb"} | sys.stdlib_module_names
                top_level |= {package} if node in tree.body else set()
    assert "wandb" not in top_level  # only who uses it needs it


def test_length(algo):
    lines = algo.read_text().splitlines()
    assert len(lines) <= MAX_LINES
    assert len(lines) - sum(text.count("\n") for _, text in shared_blocks(algo.read_text())) <= MAX_OWN_LINES
    train = next(n for n, line in enumerate(lines) if line.startswith("def train("))
    heart = [n for n, line in enumerate(lines) if n > train and re.search(r"\bact\(|\bstep\(\)|fit_critic\(", line)]
    assert len(heart) >= 2
    assert heart[-1] - heart[0] < MAX_HEART_LINES


# ---- the command line

EVERY_FLAG = """env-id exp-name seed device async-envs log-dir track eval-episodes capture-video checkpoint-interval
    resume evaluate total-timesteps num-envs hidden-sizes learning-rate gamma"""
POLICY_FLAGS = "log-std-init norm-obs norm-reward"
ROLLOUT_FLAGS = f"{POLICY_FLAGS} num-steps gae-lambda norm-adv ent-coef vf-coef max-grad-norm anneal-lr"
FLAGS = {  # beside EVERY_FLAG
    "ppo": ROLLOUT_FLAGS + " num-minibatches update-epochs clip-coef clip-vloss target-kl compile",
    "a2c": ROLLOUT_FLAGS,
    "reinforce": f"{POLICY_FLAGS} weight norm-weight critic-updates num-minibatches anneal-lr",
    "trpo": f"""{POLICY_FLAGS} num-steps gae-lambda norm-adv target-kl cg-iters cg-damping line-search-steps
        line-search-decay critic-updates num-minibatches""",
    "dqn": """buffer-size batch-size learning-starts train-frequency gradient-steps tau target-network-frequency start-e
        end-e exploration-fraction double-q""",
    "ddpg": "buffer-size batch-size learning-starts noise exploration-noise tau",
}


def test_help(algo, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = cli(algo, "--help")
    assert result.status == 0
    assert load(algo).__doc__.split("\n")[0] in result.out
    help_of = {}
    for row in re.split(r"\n\W+ --(?=[a-z])", result.out)[1:]:
        flag, *words = row.split("(default: ")[0].split()
        help_of[flag.rstrip(",")] = [word for word in words if word != word.upper() and word[:2] != "--"]
    assert help_of.keys() == {name.replace("_", "-") for name in load(algo).Args().__dict__}
    assert help_of.keys() >= {*f"{EVERY_FLAG} {FLAGS.get(algo.stem, '')}".split()}
    assert [flag for flag, words in help_of.items() if len(words) < 2] == [], "no description"


def test_commands_of_the_docstring(algo, monkeypatch):
    commands = re.findall(r"^    python (.+)$", load(algo).__doc__.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        assert sys.argv[0] == f"algos/{algo.name}"
        load(algo).parse_args()


# ---- what is refused: status 2, one sentence, no traceback, no folder


def assert_refused(result, *words: str) -> None:
    assert result.status == 2, result.err
    assert re.fullmatch(r"error: .+\n", result.err), result.err
    for word in words:
        assert word.lower() in result.err.lower()
    assert not list(result.cwd.glob("runs*")), "something is left behind"
    assert result.out == ""


def assert_failed(result, words: str) -> Path:
    """A line says why (a pattern) and how to go on; the checkpoint, which is returned, is finite."""
    assert result.status == 1, result.err
    path = result.folder / "checkpoint.pt"
    sentence = rf"^error: {words} \(step \d+\); resume from the last checkpoint with: python \S+ --resume (\S+)$"
    match = re.search(sentence, result.err, re.MULTILINE)
    assert match, result.err
    assert result.cwd / match[1] == path
    assert all(tensor.isfinite().all() for tensor in weights(path))
    return path


BAD = [  # flags, words of the sentence
    ("--env-id Nope-v0", ["Nope"]),
    ("--env-id CartPole-v77", ["CartPole", "v77"]),
    ("--env-id LunarLander-v2", ["LunarLander-v3"]),
    ("--env-id ALE/Nope-v5", ["ALE/Nope-v5"]),
    ("--env-id no_such_module:Nope-v0", ["no_such_module"]),
    ("--env-id tests.odd_envs:Nope-v0", ["Nope"]),
    ("--env-id ''", ["environment"]),
    ("--env-id 'Cart Pole'", ["Cart Pole"]),
    ("--env-id ./my_env:My-v0", ["./my_env:My-v0", "module"]),
    ("--env-id :CartPole-v1", [":CartPole-v1", "module"]),
    ("--num-envs 2 --env-id tests.odd_envs:SameStep-v0", ["next step"]),
    *[(f"--env-id tests.odd_envs:Observe{name}-v0", ["observations"]) for name in UNFIT_OBSERVATIONS],
    *[(f"--env-id tests.odd_envs:Act{name}-v0", ["takes", "actions", f"{name}("]) for name in UNFIT_ACTIONS[:2]],
    ("--env-id tests.odd_envs:ActIntBox-v0", ["takes", "actions", "int64"]),
    ("--env-id tests.odd_envs:ActDict-v0", ["takes", "actions", "Dict"]),
    ("--capture-video --env-id tests.odd_envs:ObserveVector{continuous}-v0", ["rgb_array"]),
    ("--norm-obs --env-id tests.odd_envs:ObserveChannelsLast{continuous}-v0", ["--norm-obs"]),
    ("--nope 3", ["--nope"]),
    ("nope", ["nope"]),
    ("--seed", ["--seed"]),
    ("--seed one", ["--seed", "one"]),
    ("--seed 1.5", ["--seed", "1.5"]),
    ("--learning-rate fast", ["--learning-rate", "fast"]),
    ("--learning-rate inf", ["--learning-rate", "inf"]),
    ("--hidden-sizes 8 wide", ["--hidden-sizes", "wide"]),
    ("--hidden-sizes 8 0", ["--hidden-sizes", "0"]),
    ("--target-kl small", ["--target-kl", "small"]),
    ("--num-envs 2 --num-steps 8 --total-timesteps 15", ["--total-timesteps", "rollout"]),
    ("--num-envs 64 --total-timesteps 1000 --learning-starts 1000", ["--total-timesteps", "--learning-starts"]),
    ("--num-envs 4 --buffer-size 3", ["--buffer-size", "--num-envs"]),
    ("--clip-coef 0.2 --num-envs 2 --num-steps 8 --num-minibatches 9", ["--num-minibatches"]),
    ("--device cuda:99", ["--device cuda:99"]),
    ("--device gpu", ["--device", "gpu"]),
    ("--device meta", ["--device", "meta"]),
    ("--log-dir {files}/empty/runs", ["folder", "empty"]),
    ("--log-dir {files}/empty", ["folder", "empty"]),
    *[
        (f"--{flag} {{files}}/{name}", words)
        for flag in ("resume", "evaluate")
        for name, words in (
            ("missing", ["missing", "no such file"]),
            ("directory", ["directory", "is a directory"]),
            ("empty", ["empty", "checkpoint"]),
            ("garbage", ["garbage", "checkpoint"]),
            ("truncated", ["truncated", "checkpoint"]),
            ("list", ["list", "checkpoint"]),
            ("foreign", ["foreign", "checkpoint"]),  # of another algorithm
            ("weightless", ["weightless", "checkpoint"]),
            ("malicious", ["malicious", "checkpoint"]),
            ("pickled", ["pickled", "checkpoint"]),
            ("good --env-id tests.odd_envs:ObserveMatrix{continuous}-v0", ["good", "environment"]),
            ("good --hidden-sizes 9", ["good", "arguments"]),
            ("good --gamma 2", ["--gamma", "2"]),
        )
    ],
    ("--resume {files}/stateless", ["stateless", "checkpoint"]),
    ("--resume {files}/good --evaluate {files}/good", ["--evaluate", "--resume"]),
    ("--evaluate {files}/good --eval-episodes 0", ["--evaluate", "--eval-episodes"]),
]


class Malice:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A function that gives, for an algorithm, a folder with a good checkpoint and many bad ones."""
    folders = {}

    def make(algo: Path) -> Path:
        if algo not in folders:
            folder = folders[algo] = tmp_path_factory.mktemp(algo.stem)
            good = run_inside(algo, small(algo), folder).check().folder / "checkpoint.pt"
            state = torch.load(good, weights_only=True)
            (folder / "good").write_bytes(good.read_bytes())
            (folder / "directory").mkdir()
            (folder / "empty").touch()
            (folder / "garbage").write_bytes(random.Random(1).randbytes(10_000))
            (folder / "truncated").write_bytes(good.read_bytes()[:-1000])
            torch.save([1, 2], folder / "list")
            torch.save({"args": {"env_id": "CartPole-v1", "wings": 2}, "global_step": 0}, folder / "foreign")
            torch.save({"args": state["args"], "global_step": 0}, folder / "weightless")
            kept = {name: value for name, value in state.items() if name not in ("rng", "global_step")}
            torch.save(kept, folder / "stateless")
            torch.save({"args": Malice(folder / "payload")}, folder / "malicious")
            (folder / "pickled").write_bytes(pickle.dumps(Malice(folder / "payload")))
        return folders[algo]

    return make


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[flags[:60] for flags, _ in BAD])
def test_bad_input(algo, cli, files, flags, words):
    names = load(algo).Args().__dict__
    given = re.findall(r"--([a-z-]+)", flags)
    if "nope" not in given and any(flag.replace("-", "_") not in names for flag in given):
        pytest.skip("not for this algorithm")
    folder = files(algo)
    continuous = "" if takes(algo, "Discrete") else "Continuous"
    assert_refused(cli(algo, flags.format(files=folder, continuous=continuous)), *words)
    assert not (folder / "payload").exists()


ZERO_IS_FINE = """seed eval-episodes gamma gae-lambda ent-coef vf-coef learning-starts start-e end-e
    exploration-fraction exploration-noise cg-damping line-search-steps log-std-init"""


def test_bad_numbers(algo, cli):
    """Every number refuses what is negative, absurdly large, not a number, and zero where it makes no sense."""
    for field in dataclasses.fields(load(algo).Args):
        kinds = {int, float} & {field.type, *typing.get_args(field.type)}
        if not kinds:
            continue
        flag = field.name.replace("_", "-")
        negative = -100 if flag == "log-std-init" else -1  # it is a logarithm
        for value in [negative, "nan", 10**30] + ([] if flag in ZERO_IS_FINE.split() else [0]):
            assert_refused(cli(algo, f"--{flag} {value}"), f"--{flag}")


@pytest.mark.parametrize("kind", ["Discrete", "Box"])
def test_actions_of_another_kind(algo, cli, kind):
    """The sentence names the file to use instead."""
    if takes(algo, kind):
        pytest.skip("this file takes them")
    assert_refused(cli(algo, f"--env-id tests.odd_envs:Act{kind}-v0"), f"{algo.name} takes", f"{kind}(", "ppo.py")


@pytest.mark.parametrize(
    ("missing", "flags"),
    [
        ("Box2D", "--env-id LunarLander-v3"),
        ("mujoco", "--env-id HalfCheetah-v5"),
        ("ale_py", "--env-id ALE/Pong-v5"),
        ("wandb", "--track"),
        ("moviepy", "--capture-video"),
        ("pygame", "--capture-video"),
        ("pygame", "--capture-video --evaluate {files}/good"),
    ],
)
def test_missing_package(tmp_path, launch, files, missing, flags):
    """The packages that only some environments and flags need; the sentence says what to install."""
    if missing == "pygame":
        pytest.importorskip("moviepy")
    result = launch(PPO, small(PPO, flags.format(files=files(PPO))), tmp_path, without=(missing,)).stop()
    assert_refused(result, missing, "install")


def test_track_without_a_login(algo, tmp_path, launch):
    (tmp_path / "wandb.py").write_text("""
class errors:
    class Error(Exception):
        pass

def init(**kwargs):
    raise errors.Error("No API key configured")
""")
    result = launch(algo, small(algo, "--track --log-dir logs"), tmp_path).stop()
    assert_refused(result, "--track: No API key")
    assert not list(tmp_path.glob("logs/*"))


@pytest.mark.parametrize("path", [path for path in ALGOS if path.stem in ("dqn", "ddpg")], ids=lambda path: path.stem)
def test_buffer_larger_than_the_free_memory(path, cli, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**7))
    cli(path, small(path)).check()
    result = cli(path, small(path, "--buffer-size 1000000"))
    assert_refused(result, "--buffer-size", "GB")


def test_bad_input_of_a_script(tmp_path):
    assert_refused(run_script(PPO, "--env-id CartPole-v77", tmp_path), "CartPole", "v77")
    assert_refused(run_script(PPO, "--seed one", tmp_path), "--seed", "one")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NanReward", "a reward is not finite"),
        ("InfiniteReward", "a reward is not finite"),
        ("NanObservation", "an observation is not finite"),
        ("InfiniteObservation", "an observation is not finite"),
    ],
)
def test_numbers_that_are_not_finite(algo, cli, name, words):
    """No bad argument: status 1, one sentence, and nothing that is not a number gets into the checkpoint."""
    result = cli(algo, small(algo, f"--env-id {odd(algo, name)} --num-envs 1 --checkpoint-interval 1"))
    assert_failed(result, words)
    assert "Traceback" not in result.err


def test_diverged_training(algo, cli):
    result = cli(algo, small(algo, f"--env-id {odd(algo, 'Overflow')}"))
    assert_failed(result, r"(?:losses/\w+|a weight) is not finite; a lower --learning-rate may help")
    assert "Traceback" not in result.err


@pytest.fixture
def start_run(algo, tmp_path, monkeypatch):
    """A function that gives the Run, with an agent, that the file makes before it trains."""
    module = load(algo)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def start(rng: np.random.Generator, **flags):
        args = module.Args(env_id=small(algo).split()[1], log_dir=str(tmp_path / "runs"), device="cpu", **flags)
        envs = module.make_envs(args, 1)
        return module.Run(args, rng, agent=module.Agent(envs.single_observation_space, envs.single_action_space, args))

    return start


def test_weights_that_are_not_finite(start_run, capsys):
    """They never get into a checkpoint, even if no loss has told of them."""
    run = start_run(np.random.default_rng())
    before = run.checkpoint.read_bytes()
    next(run.modules["agent"].parameters()).data[0] = np.inf
    with pytest.raises(SystemExit) as stop:
        run.save()
    assert stop.value.code == 1
    assert "\nerror: a weight is not finite" in capsys.readouterr().err
    assert run.checkpoint.read_bytes() == before


# ---- checkpoints


def weights(checkpoint: Path) -> list[torch.Tensor]:
    """All tensors of a checkpoint, in order."""

    def tensors(value):
        if isinstance(value, dict | list | tuple):
            return [x for item in (value.values() if isinstance(value, dict) else value) for x in tensors(item)]
        return [value] if isinstance(value, torch.Tensor) else []

    found = tensors(torch.load(checkpoint, weights_only=True))
    assert len(found) > 5
    return found


def test_same_seed_same_run(algo, cli):
    def run(seed):
        folder = (
            cli(algo, small(algo, f"--seed {seed} --total-timesteps {5 * budget(algo)} --eval-episodes 3"))
            .check()
            .folder
        )
        points = {tag: points for tag, points in read_events(folder).items() if tag != "charts/SPS"}
        return weights(folder / "checkpoint.pt"), points

    (first, first_points), (second, second_points), (third, third_points) = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first_points == second_points
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert first_points["charts/episodic_return"] != third_points["charts/episodic_return"]


def test_seed_of_the_weights(algo, cli):
    """With next to no learning, the weights are still those of the start."""
    runs = [cli(algo, small(algo, f"--seed {seed} --learning-rate 1e-9")).check() for seed in (1, 2)]
    one, other = (max(weights(run.folder / "checkpoint.pt"), key=torch.Tensor.numel) for run in runs)
    assert (one - other).abs().max() > 0.05


def test_evaluate(algo, cli):
    """It repeats the evaluation after the training, and writes nothing."""
    flags = "--eval-episodes 3 --seed 5"
    if "norm_obs" in load(algo).Args().__dict__:
        flags += " --norm-obs"
    trained = cli(algo, small(algo, flags)).check()
    before = [(path, path.stat().st_mtime_ns) for path in sorted(trained.cwd.rglob("*"))]
    evaluated = cli(algo, f"--evaluate {trained.folder.relative_to(trained.cwd)}/checkpoint.pt", trained.cwd).check()
    assert evaluated.out.splitlines()[-1] == trained.out.splitlines()[-1]
    assert "episodes=3" in evaluated.out
    assert [(path, path.stat().st_mtime_ns) for path in sorted(trained.cwd.rglob("*"))] == before
    fewer = cli(algo, f"--evaluate {trained.folder}/checkpoint.pt --eval-episodes 2", trained.cwd).check()
    assert "episodes=2" in fewer.out


def test_resume(algo, tmp_path, launch):
    """It goes on where the run was, in its folder, with its arguments; a flag given beside it wins."""
    trained = launch(algo, small(algo, "--seed 5 --learning-rate 0.005 --gamma 0.9"), tmp_path).stop().check()
    path, unit = trained.folder / "checkpoint.pt", budget(algo)
    before = torch.load(path, weights_only=True)
    resumed = launch(algo, f"--resume {path} --total-timesteps {2 * unit} --gamma 0.5", tmp_path).stop().check()
    assert re.fullmatch(EVAL_LINE, resumed.out.splitlines()[-1])[1] == str(path)
    after = torch.load(resumed.folder / "checkpoint.pt", weights_only=True)  # .folder: there is still only one
    assert before["global_step"] == unit
    assert after["global_step"] == 2 * unit
    assert after["args"] == before["args"] | {"total_timesteps": 2 * unit, "gamma": 0.5}
    torch.save(before, path)  # as if it had been killed before the next checkpoint: the curves must not overlap
    flags = f"--total-timesteps {3 * unit} --learning-rate 0.125"
    flags += " --no-anneal-lr" if "anneal_lr" in before["args"] else ""
    launch(algo, f"--resume {path} {flags}", tmp_path).stop().check()
    events = read_events(path.parent)
    steps = [step for step, _ in events["charts/SPS"]]
    assert steps == sorted(set(steps))
    assert steps[0] <= unit < steps[-1] == 3 * unit
    assert events["charts/learning_rate"][-1][1] == 0.125  # not the one that the optimizer had


def test_random_numbers_of_a_resumed_run(start_run):
    """They are those that would have come next."""
    rng, resumed_rng = np.random.default_rng(1), np.random.default_rng(2)
    run = start_run(rng)
    rng.random(10)
    run.save()
    start_run(resumed_rng, resume=str(run.checkpoint))
    assert resumed_rng.random() == rng.random()


def test_kill(algo, tmp_path, launch):
    """Whenever a run is killed, the checkpoint is whole, and the run can go on to its end."""
    chance, step = random.Random(1), 0
    flags = small(algo, f"--checkpoint-interval {budget(algo) // 4} --total-timesteps 1000000")
    for _ in range(6):
        run = launch(algo, flags, tmp_path)
        run.wait_for("return")
        time.sleep(chance.uniform(0, 0.2))
        result = run.stop(signal.SIGKILL)
        assert result.status == -signal.SIGKILL
        path = result.folder / "checkpoint.pt"
        last_step, step = step, torch.load(path, weights_only=True)["global_step"]
        assert last_step < step < 1_000_000
        flags = f"--resume {path}"
    end = step + 2 * budget(algo)
    finished = launch(algo, f"{flags} --total-timesteps {end} --checkpoint-interval 1000", tmp_path).stop().check()
    assert torch.load(finished.folder / "checkpoint.pt", weights_only=True)["global_step"] == end
    assert not list(finished.folder.glob("*tmp*"))


@pytest.mark.parametrize(
    ("file", "flags", "words"),
    [
        ("raise", "", "RuntimeError: the simulator broke"),
        ("kill", "--async-envs", "an environment's process has died"),
    ],
)
def test_failing_environment(algo, tmp_path, launch, file, flags, words):
    """One that raises an error, or whose process dies: the run ends with its last checkpoint, and can go on."""
    flags = small(algo, f"--env-id {odd(algo, 'Fault')} --total-timesteps 1000000 --checkpoint-interval 1 {flags}")
    run = launch(algo, flags, tmp_path)
    run.wait_for("return")
    (tmp_path / file).touch()
    result = run.stop(timeout=20)
    assert "Traceback" in result.err  # says where in the environment
    path = assert_failed(result, words)
    (tmp_path / file).unlink()
    step = torch.load(path, weights_only=True)["global_step"]
    flags = f"--resume {path} --total-timesteps {step + budget(algo)} --no-async-envs"
    launch(algo, flags, tmp_path).stop().check()


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_FSIZE"), reason="only Linux limits another process")
def test_full_disk(algo, tmp_path, launch):
    """A checkpoint that cannot be written to its end leaves the one before it whole."""
    flags = small(algo, "--total-timesteps 1000000 --checkpoint-interval 1 --hidden-sizes 64 64")
    run = launch(algo, flags, tmp_path)
    run.wait_for("return")
    limit = next(tmp_path.glob("runs/*/checkpoint.pt")).stat().st_size // 2  # for any file, even the TensorBoard log
    psutil.Process(run.process.pid).rlimit(psutil.RLIMIT_FSIZE, (limit, limit))
    result = run.stop(timeout=20)
    path = assert_failed(result, r"\w+: .*File too large.*")
    step = torch.load(path, weights_only=True)["global_step"]
    assert step > 0
    launch(algo, f"--resume {path} --total-timesteps {step + budget(algo)}", tmp_path).stop().check()


@pytest.mark.parametrize(
    ("number", "flags"),
    [(signal.SIGINT, ""), (signal.SIGTERM, ""), (signal.SIGINT, "--async-envs"), (signal.SIGTERM, "--async-envs")],
)
def test_interrupt(algo, tmp_path, cli, launch, number, flags):
    """Ctrl-C and `kill`: the checkpoint is written, and the command that is printed goes on from it."""
    run = launch(algo, small(algo, f"--total-timesteps 1000000 {flags}"), tmp_path)
    run.wait_for("return")
    group = number == signal.SIGINT or "async" in flags  # a terminal and `timeout` send it to all processes
    result = run.stop(number, group, timeout=20)
    assert result.status == 130
    assert "Traceback" not in result.err
    assert "warn" not in result.err.lower()
    path = result.folder / "checkpoint.pt"
    step = torch.load(path, weights_only=True)["global_step"]
    assert 0 < step < 1_000_000
    command = shlex.split(re.search(r"python .*", result.out.splitlines()[-1])[0])
    assert command[1:] == [str(algo), "--resume", str(path.relative_to(tmp_path))]
    flags = ["--total-timesteps", str(step + budget(algo)), "--no-async-envs"]
    resumed = cli(algo, shlex.join([*command[2:], *flags]), tmp_path).check()
    assert resumed.folder == result.folder
    assert torch.load(path, weights_only=True)["global_step"] == step + budget(algo)
