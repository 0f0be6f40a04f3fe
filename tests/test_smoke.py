"""What a run does and leaves behind, on every kind of environment; on ppo.py alone where the text is shared."""

import math
import re
import shlex
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import EVAL_LINE, PPO, ROOT, budget, fresh, load, odd, read_events, run_script, small, takes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.odd_envs import ACTIONS, OBSERVATIONS, UNFIT_ACTIONS, UNFIT_OBSERVATIONS, seen_actions, seen_seeds

KNOWN = "--env-id tests.odd_envs:Known-v0 --num-envs 2"  # episodes of 3 steps, with the rewards 1, 2 and 3


def read(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def weights(value) -> list[torch.Tensor]:
    """All tensors in the dicts and lists of a checkpoint, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in weights(item)]


# ---- what a run leaves


def test_script(tmp_path):
    """As a user runs it: no warnings, a progress bar, and a folder whose name says what it is."""
    result = run_script(PPO, small(PPO, "--total-timesteps 640 --seed 3 --eval-episodes 2"), tmp_path).check()
    assert re.fullmatch(r"CartPole-v1__ppo__3__\d{10,}", result.folder.name)
    last_line = result.out.splitlines()[-1]
    assert "episodes=2" in last_line
    assert tmp_path / re.fullmatch(EVAL_LINE, last_line)[1] == result.folder / "checkpoint.pt"
    assert re.search(r"CartPole-v1: +\d+%.* steps/s, return \d+\.\d", result.err)
    assert "warn" not in result.err.lower()


def test_copied_file_runs_alone_beside_an_environment(algo, tmp_path, launch):
    """What the template says: copy it, rename the class and the ids, train."""
    shutil.copy(algo, tmp_path)
    template = (ROOT / "envs/template.py").read_text()
    (tmp_path / "my_env.py").write_text(template.replace("Template", "My"))
    env_id = "my_env:My-v0" if takes(algo, "Discrete") else "my_env:MyContinuous-v0"
    result = launch(tmp_path / algo.name, small(algo, f"--env-id {env_id}"), tmp_path).stop().check()
    assert result.folder.name.startswith(f"{env_id.replace(':', '-')}__{algo.stem}__1__")


def test_results(algo, cli):
    result = cli(algo, small(algo, f"--total-timesteps {5 * budget(algo)} --eval-episodes 2 --seed 3")).check()
    checkpoint, events = read(result.folder), read_events(result.folder)
    assert checkpoint["global_step"] == 5 * budget(algo)
    assert checkpoint["args"].keys() == vars(load(algo).Args()).keys()
    assert checkpoint["args"]["seed"] == 3
    assert weights(checkpoint["agent"])
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"} <= events.keys()
    assert any(tag.startswith("losses/") for tag in events)
    assert all(math.isfinite(value) for points in events.values() for _, value in points)
    assert len(events["eval/episodic_return"]) == 2
    assert max(step for tag in events if tag[:4] != "eval" for step, _ in events[tag]) == 5 * budget(algo)
    assert EventAccumulator(str(result.folder)).Reload().Tags()["tensors"] == ["args/text_summary"]


def test_points_of_episodes(cli):
    """Each episode is one point, at the step where it ends; the step that only resets adds nothing to it."""
    folder = cli(PPO, small(PPO, f"{KNOWN} --env-kwargs growth 2 --eval-episodes 2")).check().folder
    events, ends = read_events(folder), (3, 9, 13, 19, 23, 29)  # the lengths are 3 and 5 in turn
    assert events["charts/episodic_return"] == [
        (2 * end, x) for end, x in zip(ends, [6, 15] * 3, strict=True) for _ in range(2)
    ]
    assert events["charts/episodic_length"] == [
        (2 * end, x) for end, x in zip(ends, [3, 5] * 3, strict=True) for _ in range(2)
    ]
    assert [value for _, value in events["eval/episodic_return"]] == [6, 15]


def test_same_seed_same_run(algo, cli):
    def run(seed):
        flags = f"--seed {seed} --total-timesteps {5 * budget(algo)} --eval-episodes 2"
        folder = cli(algo, small(algo, flags)).check().folder
        points = {tag: points for tag, points in read_events(folder).items() if tag != "charts/SPS"}
        return weights(read(folder)), points

    (first, first_points), (second, second_points), (third, third_points) = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first_points == second_points
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert first_points["charts/episodic_return"] != third_points["charts/episodic_return"]


def test_from_a_notebook(tmp_path):
    """train() works in a thread, and twice in one process; neither it nor the import leaves anything behind."""

    def state():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.excepthook, [*sys.path]

    before = state()
    module, agents = fresh(PPO), []
    args = module.Args(total_timesteps=64, num_envs=2, num_steps=8, eval_episodes=1, log_dir=str(tmp_path))
    thread = threading.Thread(target=lambda: agents.append(module.train(args)))
    thread.start()
    thread.join()
    agents.append(module.train(args))
    assert all(torch.equal(a, b) for a, b in zip(agents[0].parameters(), agents[1].parameters(), strict=True))
    assert len(list(tmp_path.iterdir())) == 2
    assert before == state()


def test_interrupt_in_a_notebook(monkeypatch, tmp_path, capsys):
    """The KeyboardInterrupt goes on, but first the agent is saved."""
    module = load(PPO)
    args = module.Args(total_timesteps=640, num_envs=2, num_steps=8, log_dir=str(tmp_path))
    log_step = module.Run.log_step

    def interrupted(run, *args):
        log_step(run, *args)
        if run.global_step == 300:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Run, "log_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.train(args)
    (folder,) = tmp_path.iterdir()
    assert read(folder)["global_step"] == 300
    assert f"python '{PPO}' --resume '{folder}/checkpoint.pt'" in capsys.readouterr().out


# ---- evaluation


def test_evaluate(algo, cli):
    """--evaluate repeats the evaluation after the training, and writes nothing."""
    trained = cli(algo, small(algo, "--eval-episodes 3 --seed 5")).check()
    before = [(path, path.stat().st_mtime_ns) for path in sorted(trained.cwd.rglob("*"))]
    evaluated = cli(algo, f"--evaluate {trained.folder.relative_to(trained.cwd)}/checkpoint.pt", trained.cwd).check()
    assert evaluated.out.splitlines()[-1] == trained.out.splitlines()[-1]
    assert "episodes=3" in evaluated.out
    assert [(path, path.stat().st_mtime_ns) for path in sorted(trained.cwd.rglob("*"))] == before
    fewer = cli(algo, f"--evaluate {trained.folder}/checkpoint.pt --eval-episodes 2", trained.cwd).check()
    assert "episodes=2" in fewer.out


def test_evaluated_episodes(cli):
    """They are whole, not seen in training, and the same again, also with running statistics."""
    flags = "--norm-obs --norm-reward --seed 2 --eval-episodes 3 --env-id tests.odd_envs:ActFloat64-v0"
    trained = cli(PPO, small(PPO, flags)).check()
    seen_seeds.clear()
    seen_actions.clear()
    evaluated = cli(PPO, f"--evaluate {trained.folder}/checkpoint.pt").check()
    assert seen_seeds == [10_020_000, 10_020_001, 10_020_002]
    assert len(seen_actions) == 3 * 5
    assert evaluated.out == trained.out.replace("=runs/", f"={trained.cwd}/runs/")


def test_endless_episode(cli):
    result = cli(PPO, small(PPO, "--env-id tests.odd_envs:Endless-v0"))
    assert result.status == 0, result.err
    assert "evaluation (up to 27,000 steps each)" in result.err


# ---- resume


def test_resume(algo, cli):
    """It goes on in the run's folder, from its step, with its arguments; a flag given beside it wins."""
    unit = budget(algo)
    trained = cli(algo, small(algo, "--seed 5 --learning-rate 0.005 --gamma 0.9 --eval-episodes 2")).check()
    path, before = trained.folder / "checkpoint.pt", read(trained.folder)
    flags = f"--resume {path} --total-timesteps {2 * unit} --gamma 0.5"
    resumed = cli(algo, flags, trained.cwd).check()
    assert re.fullmatch(EVAL_LINE, resumed.out.splitlines()[-1])[1] == str(path)
    after = read(resumed.folder)  # .folder: there is still only one
    assert (before["global_step"], after["global_step"]) == (unit, 2 * unit)
    assert after["args"] == before["args"] | {"total_timesteps": 2 * unit, "gamma": 0.5}
    torch.save(before, path)  # as if it had been killed before the next checkpoint: the curves must not overlap
    flags = f"--resume {path} --total-timesteps {3 * unit} --learning-rate 0.125"
    cli(algo, flags + " --no-anneal-lr" * ("anneal_lr" in before["args"]), trained.cwd).check()
    events = read_events(path.parent)
    steps = [step for step, _ in events["charts/SPS"]]
    assert steps == sorted(set(steps))
    assert steps[0] <= unit < steps[-1] == 3 * unit
    assert len(events["eval/episodic_return"]) == 2  # of the last agent alone
    assert events["charts/learning_rate"][-1][1] == 0.125  # not the one that the optimizer had


def test_learning_rate_of_a_resumed_run(cli):
    """It is that of the longer schedule."""
    trained = cli(PPO, small(PPO, "--learning-rate 0.5")).check()
    cli(PPO, f"--resume {trained.folder}/checkpoint.pt --total-timesteps 128").check()
    rates = dict(read_events(trained.folder)["charts/learning_rate"])
    short = {n: 0.5 * (1 - (n - 16) / 64) for n in (16, 32, 48, 64)}  # of the rollout that ends at step n
    assert rates == short | {n: 0.5 * (1 - (n - 16) / 128) for n in (80, 96, 112, 128)}


def test_kwargs_of_the_environment(cli):
    """They reach it in training and evaluation, and those beside --resume are added to those of the checkpoint."""
    trained = cli(PPO, small(PPO, f"{KNOWN} --env-kwargs growth 2 length 1")).check()
    returns = [value for _, value in read_events(trained.folder)["charts/episodic_return"]]
    assert {*returns[::4], *returns[1::4]} == {1}
    assert {*returns[2::4], *returns[3::4]} == {6}
    assert "mean_return=1.00" in trained.out
    resumed = cli(PPO, f"--resume {trained.folder}/checkpoint.pt --total-timesteps 128 --env-kwargs length 4").check()
    assert "mean_return=10.00" in resumed.out
    assert read(trained.folder)["args"]["env_kwargs"] == {"growth": 2, "length": 4}


def test_kill(tmp_path, launch):
    """Whenever a run is killed, the checkpoint is whole, and the run can go on to its end."""
    flags, step = small(PPO, "--checkpoint-interval 16 --total-timesteps 1000000"), 0
    for n in range(2):
        run = launch(PPO, flags, tmp_path)
        run.wait_for("return")
        time.sleep(n * 0.03)
        result = run.stop(signal.SIGKILL)
        assert result.status == -signal.SIGKILL
        last_step, step = step, read(result.folder)["global_step"]
        assert last_step < step < 1_000_000
        flags = f"--resume {result.folder}/checkpoint.pt"
    finished = launch(PPO, f"{flags} --total-timesteps {step + 64}", tmp_path).stop().check()
    assert read(finished.folder)["global_step"] == step + 64
    assert not list(finished.folder.glob("*tmp*"))


@pytest.mark.parametrize(
    ("number", "group", "flags"),
    [(signal.SIGINT, True, ""), (signal.SIGTERM, False, "--async-envs"), (signal.SIGINT, True, "--async-envs")],
)
def test_interrupt(tmp_path, cli, launch, number, group, flags):
    """Ctrl-C, which reaches the children too, and `kill`: the command that is printed goes on from the checkpoint."""
    run = launch(PPO, small(PPO, f"--total-timesteps 1000000 --log-dir 'my runs' {flags}"), tmp_path)
    run.wait_for("return")
    result = run.stop(number, group, timeout=20)
    assert result.status == 130, result.err
    if not flags:  # Gymnasium's own workers show what interrupted them
        assert "Traceback" not in result.err
        assert "warn" not in result.err.lower()
    (path,) = tmp_path.glob("my runs/*/checkpoint.pt")
    step = torch.load(path, weights_only=True)["global_step"]
    assert 0 < step < 1_000_000
    command = shlex.split(re.search(r"python .*", result.out.splitlines()[-1])[0])
    assert command[1:] == [str(PPO), "--resume", str(path.relative_to(tmp_path))]
    resumed = cli(PPO, shlex.join([*command[2:], "--total-timesteps", str(step + 64), "--no-async-envs"]), tmp_path)
    assert resumed.status == 0
    assert torch.load(path, weights_only=True)["global_step"] == step + 64


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("NanReward", "", r"rewards?"),
        ("NanObservation", "", r"observations?|losses/\w+"),
        ("ObserveVector", "--learning-rate 1e30", r"losses/\w+|weights?"),
    ],
)
def test_numbers_that_are_not_finite(algo, cli, name, flags, words):
    """The last line names what is not finite, and it does not get into the checkpoint."""
    flags += f" --env-id {odd(algo, name)} --num-envs 1 --total-timesteps {5 * budget(algo)} --checkpoint-interval 1"
    result = cli(algo, small(algo, flags))
    assert result.status == 1, result.err
    assert re.search(rf"\b({words})\b.* not finite", result.err.splitlines()[-1]), result.err
    assert all(tensor.isfinite().all() for tensor in weights(read(result.folder)))


# ---- every kind of space and environment

# The networks of the policy gradients are the same text.
IMAGES = "ChannelsFirst", "ChannelsLast"
NETWORKS = pytest.mark.parametrize("path", [PPO, PPO.with_stem("dqn"), PPO.with_stem("ddpg")], ids=lambda x: x.stem)


@NETWORKS
@pytest.mark.parametrize("name", [name for name in OBSERVATIONS if name not in UNFIT_OBSERVATIONS])
def test_observations(cli, path, name):
    """Images of at least 36 x 36 pixels are for the CNN; ddpg.py, which has none, says so."""
    result, is_image = cli(path, small(path, f"--env-id {odd(path, 'Observe' + name)}")), name in IMAGES
    if is_image and path.stem == "ddpg":
        assert (result.status, "ppo.py" in result.err) == (2, True)
    else:
        convolutions = [tensor for tensor in weights(read(result.check().folder)["agent"]) if tensor.ndim == 4]
        assert bool(convolutions) == is_image


@pytest.mark.parametrize("name", ["ChannelsFirst", "ChannelsLast", "GreyImage", "SmallImage"])
def test_pixels_are_scaled(name):
    """The first layer sees a white picture as ones, channels first."""
    module = load(PPO)
    args = module.Args(env_id=f"tests.odd_envs:Observe{name}-v0")
    envs = module.make_envs(args, 1)
    agent = module.Agent(envs.single_observation_space, envs.single_action_space, args)
    inputs = []
    first = next(layer for layer in agent.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear))
    first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    white = np.full((1, *envs.single_observation_space.shape), 255, np.uint8)
    agent.actor(agent.encoder(torch.as_tensor(agent.preprocess(white))))
    assert inputs[0].unique().tolist() == [1.0]
    if inputs[0].ndim == 4:
        assert inputs[0].shape == {"ChannelsFirst": (1, 3, 36, 40), "ChannelsLast": (1, 1, 40, 36)}[name]


@NETWORKS
@pytest.mark.parametrize("name", [name for name in ACTIONS if name not in UNFIT_ACTIONS])
def test_actions(cli, path, name):
    """What the environment gets is in its space, and fills it."""
    space = ACTIONS[name]
    if not takes(path, type(space).__name__):
        pytest.skip("not for this algorithm")
    seen_actions.clear()
    flags = f"--env-id tests.odd_envs:Act{name}-v0"
    if path.stem == "ddpg":  # whose own actions hardly differ after so few steps
        flags += f" --learning-starts {budget(path)}"
    cli(path, small(path, flags)).check()
    seen = np.array(seen_actions, np.float64)
    if type(space).__name__ == "Discrete":
        assert {*seen} == {*range(space.start, space.start + space.n)}
    elif name != "Widest":
        low, high = np.maximum(space.low, -1e6, dtype=float), np.minimum(space.high, 1e6, dtype=float)
        assert (np.ptp(seen, axis=0) >= np.minimum((high - low) / 2, 0.9)).all()


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "LunarLander-v3", "HalfCheetah-v5", "ALE/Pong-v5", "OneStep"])
def test_families(cli, env_id):
    flags = {
        "FrozenLake-v1": "--env-kwargs is_slippery False",
        "ALE/Pong-v5": "--env-kwargs max_num_frames_per_episode 200",
    }
    package = {"LunarLander-v3": "Box2D", "HalfCheetah-v5": "mujoco", "ALE/Pong-v5": "ale_py"}.get(env_id, "gymnasium")
    pytest.importorskip(package)
    name = f"tests.odd_envs:{env_id}-v0" if env_id == "OneStep" else env_id
    result = cli(PPO, small(PPO, f"--env-id {name} {flags.get(env_id, '')}")).check()
    assert "warn" not in result.err.lower()


@pytest.mark.parametrize("stem", ["a2c", "ppo", "trpo"])
def test_rollouts_of_which_half_only_resets(cli, stem):
    """The shortest that are allowed: in one-step episodes every second step is a reset of all environments."""
    path = PPO.with_stem(stem)
    flags = "--env-id tests.odd_envs:OneStep-v0 --num-envs 1 --num-steps 2" + " --num-minibatches 1" * (stem != "a2c")
    cli(path, small(path, flags)).check()
    assert cli(path, small(path, flags.replace("steps 2", "steps 1"))).status == 2


@pytest.mark.parametrize("flags", ["--norm-obs --norm-reward --hidden-sizes", "--hidden-sizes 8 4 2", "--num-envs 3"])
def test_flags(algo, cli, flags):
    if "norm_obs" not in vars(load(algo).Args()) and "--norm-obs" in flags:
        pytest.skip("not for this algorithm")
    cli(algo, small(algo, flags)).check()


def test_async_envs(tmp_path, launch):
    result = launch(PPO, small(PPO, "--async-envs --env-id tests.odd_envs:ObserveDict-v0"), tmp_path).stop().check()
    assert "warn" not in result.err.lower()


def test_track(tmp_path, launch):
    pytest.importorskip("wandb")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nmode = offline\nsilent = true\n")
    launch(PPO, small(PPO, "--track"), tmp_path).stop().check()
    assert len(list(tmp_path.glob("**/offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Pong-v5 --env-kwargs max_num_frames_per_episode 200"])
def test_video(cli, env_id):
    pytest.importorskip("moviepy")
    read_frames = pytest.importorskip("imageio_ffmpeg").read_frames
    if "ALE" in env_id:
        pytest.importorskip("ale_py")
    result = cli(PPO, small(PPO, f"--env-id {env_id} --capture-video --eval-episodes 2")).check()
    videos = sorted(result.folder.rglob("*.mp4"))
    assert len(videos) == 2
    for video in videos:
        about, *frames = read_frames(video)
        assert min(about["size"]) > 100
        assert len(set(frames)) > 5  # it moves
