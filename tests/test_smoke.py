"""Every script runs on every kind of environment, and leaves behind what it should."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import EVAL_LINE, PPO, ROOT, budget, load, odd, read_events, run_script, small, takes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.odd_envs import ACTIONS, OBSERVATIONS, UNFIT_ACTIONS, UNFIT_OBSERVATIONS, seen_actions

# ---- as a user runs it


def test_script(algo, tmp_path):
    flags = "--total-timesteps 1600 --num-envs 1 --seed 3 --eval-episodes 2"
    flags = small(algo, flags + (" --num-steps 32" if "num_steps" in load(algo).Args().__dict__ else ""))
    result = run_script(algo, flags, tmp_path).check()
    env_id = flags.split()[1]
    assert re.fullmatch(rf"{env_id}__{algo.stem}__3__\d{{10}}", result.folder.name)
    last_line = result.out.splitlines()[-1]
    assert "episodes=2" in last_line
    assert tmp_path / re.fullmatch(EVAL_LINE, last_line)[1] == result.folder / "checkpoint.pt"
    assert re.search(rf"{env_id}: +\d+%.* steps/s, return -?\d+\.\d", result.err)
    assert "warn" not in result.err.lower()

    checkpoint = torch.load(result.folder / "checkpoint.pt", weights_only=True)
    assert 1500 < checkpoint["global_step"] <= 1600
    assert checkpoint["args"]["seed"] == 3
    assert checkpoint["args"].keys() == load(algo).Args().__dict__.keys()
    if algo == PPO:
        assert checkpoint.keys() == {"global_step", "args", "agent", "optimizer", "rng"}

    events = read_events(result.folder)
    assert {"charts/episodic_return", "charts/SPS", "charts/learning_rate", "eval/episodic_return"} <= events.keys()
    assert any(tag.startswith("losses/") for tag in events)
    assert all(math.isfinite(value) for points in events.values() for _, value in points)
    assert len(events["eval/episodic_return"]) == 2
    assert events["charts/SPS"][-1][0] == checkpoint["global_step"]
    # One environment: the steps so far are the lengths of the episodes so far, and the steps between that only reset.
    lengths = events["charts/episodic_length"]
    assert len(lengths) > 3
    for n, (step, _) in enumerate(lengths):
        assert 0 <= step - sum(length for _, length in lengths[: n + 1]) <= n
    if env_id == "CartPole-v1":
        assert events["charts/episodic_return"] == lengths
    else:
        assert [step for step, _ in events["charts/episodic_return"]] == [step for step, _ in lengths]
    texts = EventAccumulator(str(result.folder)).Reload().Tags()["tensors"]
    assert texts == ["args/text_summary"]


def test_copied_file_runs_alone_beside_an_environment(algo, tmp_path):
    """What the template says: copy it, rename the class and the ids, train."""
    shutil.copy(algo, tmp_path)
    template = (ROOT / "envs/template.py").read_text()
    (tmp_path / "my_env.py").write_text(template.replace("Template", "My"))
    env_id = "my_env:My-v0" if takes(algo, "Discrete") else "my_env:MyContinuous-v0"
    result = run_script(tmp_path / algo.name, small(algo, f"--env-id {env_id}"), tmp_path).check()
    assert result.folder.name.startswith(f"{env_id.replace(':', '-')}__{algo.stem}__1__")


def test_track(tmp_path):
    pytest.importorskip("wandb")
    run_script(PPO, small(PPO, "--track"), tmp_path, env={"WANDB_MODE": "offline"}).check()
    assert len(list(tmp_path.glob("runs/**/offline-run-*/*.wandb"))) == 1
    assert len(list(tmp_path.rglob("events.*"))) <= 2  # the run's, and perhaps a copy: no copies of copies
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# ---- every kind of space


@pytest.mark.parametrize("name", [name for name in OBSERVATIONS if name not in UNFIT_OBSERVATIONS])
def test_observations(algo, cli, name):
    result = cli(algo, small(algo, f"--env-id {odd(algo, 'Observe' + name)}")).check()
    weights = torch.load(result.folder / "checkpoint.pt", weights_only=True)["agent"]
    assert any("conv" in name for name in weights) == (
        name in ("ChannelsFirst", "ChannelsLast") and algo.stem != "ddpg"
    )


@pytest.mark.parametrize("name", ["Scalar", "Matrix", "Discrete"])
def test_standardised_observations(algo, cli, name):
    if "norm_obs" not in load(algo).Args().__dict__:
        pytest.skip("not for this algorithm")
    cli(algo, small(algo, f"--env-id {odd(algo, 'Observe' + name)} --norm-obs")).check()


@pytest.mark.parametrize("name", [name for name in ACTIONS if name not in UNFIT_ACTIONS])
def test_actions(algo, cli, name):
    space = ACTIONS[name]
    if not takes(algo, type(space).__name__):
        pytest.skip("not for this algorithm")
    seen_actions.clear()
    flags = f"--env-id tests.odd_envs:Act{name}-v0"
    if algo.stem == "ddpg":  # whose own actions hardly differ after so few steps
        flags += f" --learning-starts {budget(algo)}"
    cli(algo, small(algo, flags)).check()
    seen = np.array(seen_actions, np.float64)
    if type(space).__name__ == "Discrete":
        assert {*seen} == {*range(space.start, space.start + space.n)}
    elif name != "Widest":
        low, high = np.maximum(space.low, -1e6, dtype=float), np.minimum(space.high, 1e6, dtype=float)
        assert (np.ptp(seen, axis=0) >= np.minimum((high - low) / 2, 0.9)).all()
        assert (seen.std(axis=0) > 0.3 * np.minimum(high - low, 2) / 2).all()


@pytest.mark.parametrize("name", ["HugeReward", "OneStep", "Endless", "OnlyTruncates"])
def test_oddities(algo, cli, name):
    result = cli(algo, small(algo, f"--env-id {odd(algo, name)} --eval-episodes {0 if name == 'Endless' else 1}"))
    if name == "Endless" and algo.stem == "reinforce":
        assert result.status == 1
        assert result.err.splitlines()[-1].startswith("error: no update: REINFORCE needs whole episodes")
    else:
        assert result.status == 0, result.err


@pytest.mark.parametrize("env_id", ["envs.template:Template-v0", "envs.template:TemplateContinuous-v0"])
def test_template(algo, cli, env_id):
    if not takes(algo, "Box" if "Continuous" in env_id else "Discrete"):
        pytest.skip("not for this algorithm")
    cli(algo, small(algo, f"--env-id {env_id}")).check()


FAMILIES = {  # id: (package, kind of actions)
    "FrozenLake-v1": ("gymnasium", "Discrete"),
    "LunarLander-v3": ("Box2D", "Discrete"),
    "CarRacing-v3": ("Box2D", "Box"),
    "HalfCheetah-v5": ("mujoco", "Box"),
    "ALE/Pong-v5": ("ale_py", "Discrete"),
}
PICTURES = {"CarRacing-v3", "ALE/Pong-v5"}


@pytest.mark.parametrize("env_id", FAMILIES)
def test_families(algo, cli, env_id):
    package, kind = FAMILIES[env_id]
    pytest.importorskip(package)
    if not takes(algo, kind):
        pytest.skip("not for this algorithm")
    flags = f"--env-id {env_id} --eval-episodes 0"
    if algo.stem == "reinforce":  # whole episodes of pictures take too long here; the sentence says what is missing
        result = cli(algo, small(algo, f"{flags} --total-timesteps {40 if env_id in PICTURES else 2000}"))
        if env_id in PICTURES:
            assert result.status == 1
            assert result.err.splitlines()[-1].startswith("error: no update: REINFORCE needs whole episodes")
            return
    else:
        result = cli(algo, small(algo, flags))
    assert result.status == 0, result.err
    assert result.out.splitlines()[-1].startswith("eval: mean_return=nan std=nan episodes=0 checkpoint=")
    assert "warn" not in result.err.lower()
    assert "eval/episodic_return" not in read_events(result.folder)
    assert re.fullmatch(rf"{env_id.replace('/', '-')}__{algo.stem}__1__\d+", result.folder.name)


# ---- every flag that changes the way


@pytest.mark.parametrize(
    "flags",
    [
        "--norm-obs",
        "--norm-reward",
        "--norm-obs --norm-reward --hidden-sizes",
        "--hidden-sizes 8 4 2",
        "--target-kl 1e-6",
        "--clip-vloss --no-norm-adv --no-anneal-lr",
        "--ent-coef 0.01 --gae-lambda 1 --gamma 1",
        "--num-envs 1 --num-steps 2 --num-minibatches 1",
        "--num-envs 3 --eval-episodes 20 --device cpu --seed 0",
        "--weight total-return",
        "--weight reward-to-go --norm-weight",
        "--line-search-steps 0",
        "--cg-damping 0 --line-search-decay 0.5 --critic-updates 1",
        "--no-double-q",
        "--tau 0.1",
    ],
)
def test_flags(algo, cli, flags):
    names = load(algo).Args().__dict__
    if any(flag.removeprefix("no-").replace("-", "_") not in names for flag in re.findall(r"--(\S+)", flags)):
        pytest.skip("not for this algorithm")
    cli(algo, small(algo, flags)).check()


def test_async_envs(algo, tmp_path, launch):
    result = launch(algo, small(algo, "--async-envs"), tmp_path).stop().check()
    assert "warn" not in result.err.lower()


def test_compile(cli):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    cli(PPO, small(PPO, "--compile --eval-episodes 1")).check()


# ---- video


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Pong-v5"])
def test_video(cli, env_id):
    read_frames = pytest.importorskip("imageio_ffmpeg").read_frames
    pytest.importorskip("moviepy")
    if "ALE" in env_id:
        pytest.importorskip("ale_py")
    episodes = 2 if env_id == "CartPole-v1" else 1
    result = cli(PPO, small(PPO, f"--env-id {env_id} --capture-video --eval-episodes {episodes}")).check()
    videos = sorted(result.folder.rglob("*.mp4"))
    assert len(videos) == episodes
    for video in videos:
        about, *frames = read_frames(video)
        assert min(about["size"]) > 100
        assert len(frames) > 5
        assert len(set(frames)) > 5  # it moves
