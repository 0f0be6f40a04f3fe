"""The rules that every algorithm file keeps: its form, its command line, and what it refuses."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import PPO, load, run_inside, small, takes

from tests.shared import BLOCKS, find_block, with_blocks
from tests.tiny_envs import UNFIT_ACTIONS, UNFIT_OBSERVATIONS

PACKAGES = {"torch", "numpy", "gymnasium", "tyro", "tqdm"}
MAX_LINES = {"ppo": 560, "a2c": 480, "reinforce": 489, "a3c": 551, "trpo": 546, "dqn": 460, "ddpg": 410}
MAX_PLUMBING_LINES = 160
TRAIN_BEGINS = {"trpo": 300}  # before this line, or the one below
TRAIN_BEGINS_ELSEWHERE = 250
HAVE = {  # the files that have a block which is not in all of them
    "networks": {"a2c", "a3c", "ppo", "reinforce", "trpo"},
    "advantages": {"a2c", "a3c", "ppo", "trpo"},
    "collect": {"a2c", "ppo", "trpo"},
}

# ---- the form of a file


def test_shared_blocks(algo):
    """Each file has its blocks, and they are equal (if not, see shared.py); a change in one file reaches the others."""

    def changed(text):
        return text.replace("# random seed", "# the seed").replace("def fail(", "def failed(")

    source = algo.read_text()
    for name in BLOCKS:
        assert bool(find_block(name, source)) == (algo.stem in HAVE.get(name, {algo.stem})), name
    assert with_blocks(source, PPO.read_text()) == source
    assert with_blocks(source, changed(PPO.read_text())) == changed(source)


def test_stands_alone(algo):
    tree = ast.parse(algo.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert not getattr(node, "level", 0), "a relative import"
            assert {module.split(".")[0] for module in modules} <= PACKAGES | sys.stdlib_module_names


def test_length(algo):
    source = algo.read_text()
    assert source.count("\n") <= MAX_LINES[algo.stem]
    assert find_block("plumbing", source).count("\n") <= MAX_PLUMBING_LINES
    train = source[: source.index("\ndef train(")].count("\n") + 2
    assert train < TRAIN_BEGINS.get(algo.stem, TRAIN_BEGINS_ELSEWHERE)


# ---- the command line

FLAGS = """env-id total-timesteps num-envs seed learning-rate gamma env-kwargs hidden-sizes device async-envs exp-name
    log-dir track eval-episodes capture-video checkpoint-interval resume evaluate init-from freeze"""


def test_help(algo, cli, monkeypatch):
    """It describes the algorithm and every flag."""
    monkeypatch.setenv("COLUMNS", "120")
    result = cli(algo, "--help")
    assert result.status == 0
    assert load(algo).__doc__.split("\n")[0] in result.out
    help_of = {}
    for row in re.split(r"\n\W+ --(?=[a-z])", result.out)[1:]:
        flag, *words = row.split("(default: ")[0].split()
        help_of[flag.rstrip(",")] = [word for word in words if word != word.upper() and word[:2] != "--"]
    assert help_of.keys() >= {*FLAGS.split()}
    assert [flag for flag, words in help_of.items() if len(words) < 2] == [], "no description"


def test_commands_of_the_docstring(algo):
    module = load(algo)
    commands = re.findall(
        r"^    (?:python|torchrun --nproc-per-node 2) (.+)$", module.__doc__.replace("\\\n", " "), re.MULTILINE
    )
    assert len(commands) >= 2
    for command in commands:
        script, *flags = shlex.split(command)
        assert script == f"algos/{algo.name}"
        module.tyro.cli(module.Args, args=flags)


# ---- what is refused: status 2, one message, no traceback, no folder


def assert_refused(result, *words: str) -> None:
    assert result.status == 2, result.err
    assert len(re.findall(r"^error: |For full helptext", result.err, re.MULTILINE)) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word.lower() in result.err.lower()
    assert not list(result.cwd.glob("runs*")), "something is left behind"
    assert result.out == ""


BAD = [  # flags, a word of the message
    ("--env-id Nope-v0", "Nope"),
    ("--env-id LunarLander-v2", "LunarLander-v3"),
    ("--env-id ALE/Nope-v5", "ALE/Nope-v5"),
    ("--env-id no_such_module:Nope-v0", "no_such_module"),
    ("--env-id ./my_env:My-v0", "./my_env:My-v0"),
    ("--env-id ''", "environment"),
    ("--env-id tests.tiny_envs:Odd-v0 --env-kwargs broken True", "no licence for the simulator"),
    ("--env-id tests.tiny_envs:SameStep-v0", "next step"),
    ("--env-kwargs wings 2", "wings"),
    *[(f"--env-id tests.tiny_envs:Odd-v0 --env-kwargs observe {name}", "Odd-v0") for name in UNFIT_OBSERVATIONS],
    ("--nope 3", "--nope"),
    ("--seed 1.5", "1.5"),
    ("--seed -1", "--seed"),
    *[(f"--learning-rate {value}", "--learning-rate") for value in ("inf", "nan", "-0.1")],
    *[(f"--log-std-init {value}", "--log-std-init") for value in ("inf", "nan")],
    *[(f"--{flag} 0", f"--{flag}") for flag in ("num-envs", "eval-episodes")],
    ("--hidden-sizes 8 0", "--hidden-sizes"),
    ("--num-envs 2 --num-steps 8 --total-timesteps 15", "--total-timesteps"),
    ("--num-envs 2 --num-steps 8 --num-minibatches 9", "--num-minibatches"),
    ("--num-envs 2 --num-steps 7 --num-minibatches 7", "--num-minibatches"),
    *[(f"--device {name}", "--device") for name in ("cuda:99", "gpu")],
    *[(f"--resume {{files}}/{name}", name) for name in ("missing", "directory", "list", "foreign", "weightless")],
    *[(f"--evaluate {{files}}/{name}", name) for name in ("missing", "empty", "truncated", "malicious", "weightless")],
    *[(f"--init-from {{files}}/{name}", word) for name, word in (("garbage", "garbage"), ("weightless", "no weights"))],
    ("--resume {files}/a2c", "update_epochs"),
    ("--init-from {files}/good", "no weights"),  # CartPole's networks have other shapes
    ("--init-from {files}/good --env-id tests.tiny_envs:Odd-v0 --hidden-sizes 8 --norm-obs", "--norm-obs"),
    ("--freeze -1", "--freeze"),
    ("--freeze 3", "--freeze"),
    ("--resume {files}/good --env-kwargs observe Matrix", "good"),
    ("--resume {files}/good --gamma -2", "--gamma"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a good checkpoint of PPO and many bad ones; what is malicious has more than plain types."""
    folder = tmp_path_factory.mktemp("files")
    good = (run_inside(PPO, small(PPO), folder).check().folder / "checkpoint.pt").read_bytes()
    (folder / "directory").mkdir()
    for name, content in (("good", good), ("empty", b""), ("garbage", b"?" * 10_000), ("truncated", good[:-1000])):
        (folder / name).write_bytes(content)
    args = torch.load(folder / "good", weights_only=True)["args"]
    of_a2c = {name: args[name] for name in load(PPO.with_stem("a2c")).Args.__annotations__}  # all are flags of PPO, too
    torch.save([1, 2], folder / "list")
    torch.save({"args": {"env_id": "CartPole-v1", "wings": 2}, "global_step": 0}, folder / "foreign")
    torch.save({"args": args, "global_step": 0}, folder / "weightless")
    for name, changes in (("a2c", {"args": of_a2c}), ("malicious", {"code": Path()})):
        torch.save(torch.load(folder / "good", weights_only=True) | changes, folder / name)
    return folder


@pytest.mark.parametrize(("flags", "word"), BAD, ids=[flags[:60] for flags, _ in BAD])
def test_bad_input(cli, files, flags, word):
    assert_refused(cli(PPO, flags.format(files=files)), word)


@pytest.mark.parametrize("name", [*UNFIT_ACTIONS, "Discrete", "Box", "MultiDiscrete"])
def test_unfit_actions(algo, cli, name):
    """The message names what the file takes, what it got, and the file to use instead where there is one."""
    if takes(algo, name):
        pytest.skip("this file takes them")
    words = [f"{algo.name} takes"] + ["ppo.py"] * (name not in UNFIT_ACTIONS)
    assert_refused(cli(algo, f"--env-id tests.tiny_envs:Odd-v0 --env-kwargs act {name}"), *words)


def test_missing_package(cli, monkeypatch):
    monkeypatch.delitem(sys.modules, "envs.pong", raising=False)
    monkeypatch.setitem(sys.modules, "ale_py", None)  # Python's own way to make an import fail
    assert_refused(cli(PPO, "--env-id envs.pong:PongDifference-v0"), "run `pip install ale-py`.")
