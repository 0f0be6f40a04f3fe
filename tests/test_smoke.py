"""What a run does and leaves behind, on every kind of environment; on ppo.py alone where the text is shared."""

import importlib
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import PPO, ROOT, STEPS, load, only, read_checkpoint, read_events, run_inside, small, takes, train
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny_envs import ACTIONS, OBSERVATIONS, Odd


def weights(value) -> list[torch.Tensor]:
    """All tensors in the dicts and lists of a checkpoint, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in weights(item)]


def same(some, others) -> bool:
    """Whether these tensors are those, to the bit."""
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# ---- what a run leaves


def test_copied_file_runs_alone_with_an_environment_of_the_current_directory(tmp_path, launch):
    """As a user runs it: no warnings, a progress bar, and a folder whose name says what it is.

    The environment is what the template says: copied, and the class and the ids renamed; its processes import it, too.
    """
    (tmp_path / "scripts").mkdir()
    shutil.copy(PPO, tmp_path / "scripts")
    template = (ROOT / "envs/template.py").read_text()
    (tmp_path / "my_env.py").write_text(template.replace("Template", "My"))
    flags = small(PPO, "--env-id my_env:MyContinuous-v0 --async-envs --seed 3 --total-timesteps 256")
    result = launch(tmp_path / "scripts/ppo.py", flags, tmp_path).stop().check()
    assert re.fullmatch(r"my_env-MyContinuous-v0__ppo__3__\d{10,}", result.folder.name)
    assert re.search(r"my_env:MyContinuous-v0: +\d+%.* steps/s, return -?\d+\.\d", result.err)
    assert "warn" not in result.err.lower()


def command(algo, flags="") -> str:
    """The command line of `run`, with statistics where there are any."""
    statistics = "--norm-obs --norm-reward" * hasattr(load(algo).Args, "norm_obs")
    return small(algo, f"--total-timesteps {2 * STEPS} --eval-episodes 3 --seed 3 {statistics} {flags}")


@pytest.fixture(scope="module")
def run(algo, tmp_path_factory):
    """A run of each file, which tests only read."""
    return run_inside(algo, command(algo), tmp_path_factory.mktemp(algo.stem)).check()


def test_results(algo, run):
    checkpoint, events = read_checkpoint(run.folder), read_events(run.folder)
    assert checkpoint["global_step"] == 2 * STEPS
    assert checkpoint["args"].keys() == vars(load(algo).Args()).keys()
    assert checkpoint["args"]["seed"] == 3
    assert weights(checkpoint["agent"])
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"} <= events.keys()
    assert any(tag.startswith("losses/") for tag in events)
    assert all(math.isfinite(value) for points in events.values() for _, value in points)
    assert len(events["eval/episodic_return"]) == 3
    assert max(step for tag in events if tag[:4] != "eval" for step, _ in events[tag]) == 2 * STEPS
    assert EventAccumulator(str(run.folder)).Reload().Tags()["tensors"] == ["args/text_summary"]
    assert torch.tensor(1e-40) * 1 == 0, "main() flushes the numbers that are slow"


def test_same_seed_same_run(algo, cli, run):
    def results(run):
        points = {tag: points for tag, points in read_events(run.folder).items() if tag != "charts/SPS"}
        return weights(read_checkpoint(run.folder)), points

    (first, first_points), (second, second_points) = results(run), results(cli(algo, command(algo)))
    third, third_points = results(cli(algo, command(algo, "--seed 4")))
    assert same(first, second)
    assert first_points == second_points
    assert not same(first, third)
    assert first_points["charts/episodic_return"] != third_points["charts/episodic_return"]


def test_points_of_episodes(cli):
    """Each episode is one point, at the step where it ends; the step that only resets adds nothing to it."""
    folder = cli(PPO, small(PPO, "--env-kwargs reward step length 3 growth 2 --eval-episodes 2")).check().folder
    events, ends = read_events(folder), np.repeat([3, 9, 13, 19, 23, 29, 33, 39], 2)  # of 3 and 5 steps in turn
    lengths, returns = np.tile([3, 3, 5, 5], 4), np.tile([6, 6, 15, 15], 4)
    assert events["charts/episodic_length"] == list(zip(2 * ends, lengths, strict=True))
    assert events["charts/episodic_return"] == list(zip(2 * ends, returns, strict=True))
    assert [value for _, value in events["eval/episodic_return"]] == [6, 15]


def test_from_a_notebook(tmp_path):
    """train() works in a thread, and twice in one process; neither it nor the import leaves anything behind.

    A Path and a NumPy number among the arguments are plain values in the checkpoint.
    """

    def state():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.excepthook, [*sys.path]

    before = state()
    module, agents = importlib.reload(load(PPO)), []
    thread = threading.Thread(target=lambda: agents.append(train(module, "Odd", tmp_path, gamma=np.float64(0.9))))
    thread.start()
    thread.join()
    agents.append(train(module, "Odd", tmp_path, gamma=0.9))
    assert same(agents[0].parameters(), agents[1].parameters())
    saved = [read_checkpoint(folder)["args"] for folder in tmp_path.iterdir()]
    assert [(args["log_dir"], args["gamma"]) for args in saved] == [(str(tmp_path), 0.9)] * 2
    assert before == state()


@pytest.mark.parametrize("name", ["Vector", "ChannelsLast", "Dict", "Discrete"])
def test_the_snippet_of_the_readme(name, cli, monkeypatch):
    """Loads a checkpoint and acts with it, whatever is observed."""
    monkeypatch.chdir(cli(PPO, small(PPO, f"--env-kwargs observe {name}")).check().folder)
    names = {}
    exec((ROOT / "README.md").read_text().split("<!-- snippet -->")[1].strip("\n`python"), names)
    assert names["rewards"].shape == (1,)


def test_interrupt_in_a_notebook(monkeypatch, tmp_path, capsys):
    """The KeyboardInterrupt goes on, but first the agent is saved, even if the log's end blocks and is interrupted."""
    module, step_of_odd = load(PPO), Odd.step

    def interrupted(env, action):
        if len(Odd.seen_actions) == 60:
            raise KeyboardInterrupt
        return step_of_odd(env, action)

    def interrupted_close(writer):
        raise KeyboardInterrupt

    Odd.seen_actions.clear()
    monkeypatch.setattr(Odd, "step", interrupted)
    monkeypatch.setattr(module.SummaryWriter, "close", interrupted_close)
    with pytest.raises(KeyboardInterrupt):
        train(module, "Odd", tmp_path)
    folder = only(tmp_path)
    assert 60 <= read_checkpoint(folder)["global_step"] < STEPS
    assert f"python '{PPO}' --resume '{folder}/checkpoint.pt'" in capsys.readouterr().out


# ---- evaluation


def test_evaluate(algo, cli, run):
    """--evaluate repeats the evaluation after the training, of episodes not seen in training, and writes nothing."""
    before = [(path, path.stat().st_mtime_ns) for path in sorted(run.cwd.rglob("*"))]
    Odd.seen_seeds.clear()
    evaluated = cli(algo, f"--evaluate {run.folder.relative_to(run.cwd)}/checkpoint.pt", run.cwd).check()
    assert Odd.seen_seeds == [10_030_000, 10_030_001, 10_030_002]
    assert evaluated.out == run.out
    assert "episodes=3" in evaluated.out
    assert [(path, path.stat().st_mtime_ns) for path in sorted(run.cwd.rglob("*"))] == before
    shutil.copy(run.folder / "checkpoint.pt", run.cwd / "best.pt")
    fewer = cli(algo, "--evaluate best.pt --eval-episodes 2", run.cwd).check()
    assert "episodes=2 checkpoint=best.pt" in fewer.out


def test_endless_episode(cli):
    result = cli(PPO, small(PPO, "--env-kwargs length inf"))
    assert result.status == 0, result.err
    assert "evaluation (up to 27,000 steps each)" in result.err


# ---- resume


def test_resume(algo, cli):
    """It goes on in the run's folder, from its step, with its arguments; a flag given beside it wins."""
    flags = "--seed 5 --learning-rate 0.005 --gamma 0.9 --hidden-sizes"  # no hidden layers
    trained = cli(algo, small(algo, flags)).check()
    path, before = trained.folder / "checkpoint.pt", read_checkpoint(trained.folder)
    Odd.seen_seeds.clear()
    new = {"total_timesteps": 2 * STEPS, "gamma": 0.5, "learning_rate": 0.125}
    flags = f"--resume {path} --total-timesteps {2 * STEPS} --gamma 0.5 --learning-rate 0.125"
    if "anneal_lr" in before["args"]:
        new["anneal_lr"] = False
        flags += " --no-anneal-lr"
    resumed = cli(algo, flags, trained.cwd).check()
    if algo.stem != "a3c":  # whose environments are in other processes
        assert Odd.seen_seeds[:2] == [5 + STEPS, 6 + STEPS]  # it does not play the same episodes again
    after = read_checkpoint(resumed.folder)  # .folder: there is still only one
    assert (before["global_step"], after["global_step"]) == (STEPS, 2 * STEPS)
    assert after["args"] == before["args"] | new
    rates = [state["param_groups"][0]["lr"] for name, state in after.items() if "optimizer" in name]
    assert rates == [0.125] * {"a3c": 0, "ddpg": 2, "reinforce": 2}.get(algo.stem, 1)  # not the one that it had


def test_curves_of_a_resumed_run(cli):
    """They do not overlap, also if the last run was killed after its last checkpoint; the learning rate goes on."""
    trained = cli(PPO, small(PPO, "--learning-rate 0.5 --total-timesteps 64 --eval-episodes 2")).check()
    path, checkpoint = trained.folder / "checkpoint.pt", read_checkpoint(trained.folder)
    torch.save(checkpoint | {"global_step": 48}, path)
    time.sleep(1)  # TensorBoard orders the logs of a folder by the second in which they begin
    cli(PPO, f"--resume {path} --total-timesteps 128").check()
    events = read_events(trained.folder)
    rates = {n: 0.5 * (1 - (n - 16) / 64) for n in (16, 32, 48)}  # of the rollout that ends at step n
    rates |= {n: 0.5 * (1 - (n - 16) / 128) for n in (64, 80, 96, 112, 128)}
    assert events["charts/learning_rate"] == list(rates.items())
    assert [step for step, _ in events["charts/SPS"]] == list(rates)
    assert [step for step, _ in events["eval/episodic_return"]] == [129, 130]  # of the last agent alone


def test_a_long_run_shows_progress_every_thousand_steps(tmp_path):
    ppo = load(PPO)
    with ppo.Run(ppo.Args(log_dir=tmp_path, total_timesteps=10**7), agent=torch.nn.Module()) as run:
        shown = []
        for run.global_step in (999, 1000, 1999, 2000):
            run.log_update({})
            shown.append(run.bar.n)
    assert shown == [0, 1000, 1000, 2000]


def test_kwargs_of_the_environment(cli):
    """Those beside --resume are added to those of the checkpoint."""
    trained = cli(PPO, small(PPO, "--env-kwargs reward step length 1 growth 2")).check()
    resumed = cli(PPO, f"--resume {trained.folder}/checkpoint.pt --total-timesteps 128 --env-kwargs length 4").check()
    assert "mean_return=10.00" in resumed.out
    assert read_checkpoint(trained.folder)["args"]["env_kwargs"] == {"reward": "step", "length": 4, "growth": 2}


def test_kwargs_win(monkeypatch):
    """Over what the file itself would pass to an Atari environment: rewards are clipped in training only."""
    passed = []
    monkeypatch.setattr(gym, "make_vec", lambda *_, **options: passed.append(options))
    for kwargs, eval_folder in (({}, None), ({}, "runs"), ({"reward_clipping": False}, None)):
        with pytest.raises(SystemExit):  # no environment
            load(PPO).make_envs(load(PPO).Args(env_id="ALE/Pong-v5", env_kwargs=kwargs), 1, eval_folder)
    assert [options["reward_clipping"] for options in passed] == [True, False, False]


def test_ids_of_atari(monkeypatch):
    """With or without the module, which those outside of ALE/ need."""
    passed, ids = [], ["ALE/Pong-v5", "ale_py:ALE/Pong-v5", "ale_py:PongNoFrameskip-v4"]
    monkeypatch.setattr(gym, "make_vec", lambda env_id, *_, **options: passed.append(env_id))
    for env_id in ids:
        with pytest.raises(SystemExit):  # no environment
            load(PPO).make_envs(load(PPO).Args(env_id=env_id), 1)
    assert passed == [ids[1], *ids[1:]]


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_single_environment_has_no_process_of_its_own(num_envs):
    """The evaluation has one, and would show a traceback of its worker at the end."""
    envs = load(PPO).make_envs(load(PPO).Args(env_id="tests.tiny_envs:Odd-v0", async_envs=True), num_envs)
    assert isinstance(envs.unwrapped, gym.vector.AsyncVectorEnv) == (num_envs > 1)
    envs.close()


def test_crash_while_saving(cli, monkeypatch):
    """Whenever a run is killed or the disk is full, the last checkpoint is whole, and the run can go on to its end."""
    saved, save = [], torch.save

    def crash(state, path):
        save(state, path)
        saved.append(state["global_step"])
        if saved[-1] == 48:
            os.truncate(path, 1000)
            raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", crash)
    result = cli(PPO, small(PPO, "--checkpoint-interval 16"))
    assert (result.status, "no space left" in result.err) == (1, True)
    assert saved == [0, 16, 32, 48]
    assert read_checkpoint(result.folder)["global_step"] == 32
    monkeypatch.undo()
    cli(PPO, f"--resume {result.folder}/checkpoint.pt").check()
    assert read_checkpoint(result.folder)["global_step"] == STEPS
    assert not list(result.folder.glob("*tmp*"))


@pytest.mark.parametrize(
    ("number", "flags"), [(signal.SIGINT, ""), (signal.SIGINT, "--async-envs"), (signal.SIGTERM, "--async-envs")]
)
def test_interrupt(tmp_path, cli, launch, number, flags):
    """Ctrl-C, and `kill`: the command that is printed goes on from the checkpoint."""
    flags += " --env-id CartPole-v1 --total-timesteps 200000 --log-dir 'my runs'"
    run = launch(PPO, small(PPO, flags), tmp_path)
    run.wait_for("return")
    result = run.stop(number)
    assert result.status == 130, result.err
    if "--async-envs" not in flags:  # Gymnasium's own workers show what interrupted them
        assert "Traceback" not in result.err
        assert "warn" not in result.err.lower()
    folder = only(tmp_path / "my runs")
    step = read_checkpoint(folder)["global_step"]
    assert 0 < step < 200_000
    command = shlex.split(re.search(r"python .*", result.out.splitlines()[-1])[0])
    assert command[1:] == [str(PPO), "--resume", f"{folder.relative_to(tmp_path)}/checkpoint.pt"]
    flags = shlex.join([*command[2:], "--total-timesteps", str(step + STEPS), "--no-async-envs"])
    assert cli(PPO, flags, tmp_path).status == 0
    assert read_checkpoint(folder)["global_step"] == step + STEPS


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-kwargs reward nan", r"rewards?"),
        ("--env-kwargs flaw inf", r"observations?"),
        ("--learning-rate 3e38", r"losses/\w+|weights?"),  # the first step makes a weight infinite
    ],
)
def test_numbers_that_are_not_finite(algo, cli, flags, words):
    """The last line names what is not finite, at the update that sees it, and it does not get into the checkpoint."""
    flags += " --num-envs 1 --total-timesteps 400000 --checkpoint-interval 1"  # a point of the log is due at 400
    result = cli(algo, small(algo, flags))
    assert result.status == 1, result.err
    message = re.search(rf"\b({words})\b.* not finite(?: at step (\d+))?$", result.err.rstrip())
    assert message, result.err
    assert int(message[2] or 0) < 400 or algo.stem == "a3c"  # whose workers send their losses when a point is due
    assert all(tensor.isfinite().all() for tensor in weights(read_checkpoint(result.folder)))


# ---- transfer


def test_transfer(algo, cli, run):
    """--init-from takes what fits, also the statistics; the first layers do not learn, the others do."""

    def assert_frozen(before, after):
        for name, x in before.items():
            assert torch.equal(x, after[name]) == bool(re.match(r"(actor|critic|q)\.0\.", name)), name

    flags = f"--init-from {run.folder}/checkpoint.pt --freeze 1 --seed 2 --total-timesteps {STEPS}"
    result = cli(algo, command(algo, flags)).check()
    assert re.search("^taken: .*; new: none$", result.out, re.MULTILINE)
    before, after = read_checkpoint(run.folder)["agent"], read_checkpoint(result.folder)
    assert after["global_step"] == STEPS
    assert_frozen(before, after["agent"])
    assert_frozen(before, after.get("target", after["agent"]))
    if hasattr(load(algo).Args, "norm_obs"):
        assert (after["agent"]["obs_stats.count"] > before["obs_stats.count"]).all()
    cli(algo, f"--resume {result.folder}/checkpoint.pt --total-timesteps {2 * STEPS}").check()  # it stays frozen
    assert_frozen(after["agent"], read_checkpoint(result.folder)["agent"])
    cli(algo, f"--resume {result.folder}/checkpoint.pt --total-timesteps {3 * STEPS} --freeze 0").check()
    assert not any(torch.equal(x, after["agent"][name]) for name, x in read_checkpoint(result.folder)["agent"].items())


def test_transfer_to_another_environment(cli):
    """What fits is as it was; the rest is new, the statistics' count with them. A resumed run does not start anew."""
    source = cli(PPO, small(PPO, "--norm-obs")).check().folder
    flags = f"--norm-obs --init-from {source}/checkpoint.pt --learning-rate 0 --env-kwargs act Box observe Matrix"
    result = cli(PPO, small(PPO, flags)).check()
    new = re.search("new: (.*)", result.out)[1].split(", ")
    assert new[:4] == ["log_std", "obs_stats.mean", "obs_stats.var", "obs_stats.count"]
    assert new[4:] == ["actor.0.weight", "actor.2.weight", "actor.2.bias", "critic.0.weight"]
    before, after = read_checkpoint(source)["agent"], read_checkpoint(result.folder)["agent"]
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - {*new})
    for wrong in (flags.replace("Matrix", "Int --hidden-sizes 9 9"), flags.replace("--norm-obs", "")):
        refused = cli(PPO, small(PPO, wrong))  # only the statistics fit, or only they do not
        assert (refused.status, "does not fit" in refused.err) == (2, True)
    (source / "checkpoint.pt").unlink()
    resumed = cli(PPO, f"--resume {result.folder}/checkpoint.pt --total-timesteps {2 * STEPS}").check()
    assert "taken" not in resumed.out


@pytest.mark.parametrize("stem", ["ppo", "trpo", "dqn"])
def test_frozen_convolutions(cli, stem):
    """They count as layers: the third is the last of them."""
    path, flags = PPO.with_stem(stem), "--env-kwargs observe ChannelsLast --freeze 3"
    source = cli(path, small(path, flags.replace("3", "0"))).check().folder
    result = cli(path, small(path, f"{flags} --seed 2 --init-from {source}/checkpoint.pt")).check()
    before, after = read_checkpoint(source)["agent"], read_checkpoint(result.folder)["agent"]
    for name, x in before.items():
        assert torch.equal(x, after[name]) == (x.ndim == 4 or name.startswith("encoder.0")), name


# ---- every kind of space and environment

NETWORKS = [PPO, PPO.with_stem("dqn"), PPO.with_stem("ddpg")]  # those of the policy gradients are the same text


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations(cli, path, name):
    """Images of at least 36 x 36 pixels are for the CNN; ddpg.py, which has none, says so."""
    result = cli(path, small(path, f"--env-kwargs observe {name}"))
    is_image = name in ("ChannelsFirst", "ChannelsLast")
    if is_image and path.stem == "ddpg":
        assert (result.status, "ppo.py" in result.err) == (2, True)
    else:
        agent = read_checkpoint(result.check().folder)["agent"]
        assert any(tensor.ndim == 4 for tensor in weights(agent)) == is_image


def test_texts_in_a_dict_are_left_out(cli):
    result = cli(PPO, small(PPO, "--env-kwargs observe DictWithText")).check()
    assert read_checkpoint(result.folder)["agent"]["actor.0.weight"].shape == (8, 8)


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in NETWORKS for name, space in ACTIONS.items() if takes(path, type(space).__name__)],
    ids=lambda x: getattr(x, "stem", x),
)
def test_actions(cli, path, name):
    """What the environment gets is in its space, and fills it."""
    space = ACTIONS[name]
    Odd.seen_actions.clear()
    flags = f"--env-kwargs act {name}"
    if path.stem == "ddpg":  # whose own actions hardly differ after so few steps
        flags += f" --learning-starts {STEPS}"
    cli(path, small(path, flags)).check()
    seen = np.array(Odd.seen_actions)
    if not isinstance(space, spaces.Box):
        samples = np.array([space.sample() for _ in range(1000)])
        assert [{*x} for x in seen.reshape(len(seen), -1).T] == [{*x} for x in samples.reshape(1000, -1).T]
    elif name != "Widest":
        low, high = np.maximum(space.low, -1e6, dtype=float), np.minimum(space.high, 1e6, dtype=float)
        assert (np.ptp(seen.astype(float), axis=0) >= np.minimum((high - low) / 2, 0.9)).all()


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("gymnasium", "FrozenLake-v1 --env-kwargs is_slippery False"),
        ("Box2D", "LunarLander-v3"),
        ("mujoco", "HalfCheetah-v5"),
        ("ale_py", "ALE/Pong-v5 --seed 300000 --env-kwargs max_num_frames_per_episode 200"),
    ],
)
def test_families(cli, package, flags):
    pytest.importorskip(package)
    assert "warn" not in cli(PPO, small(PPO, f"--env-id {flags}")).check().err.lower()


@pytest.mark.parametrize("stem", ["a2c", "ppo", "trpo"])
def test_rollouts_of_which_half_only_resets(cli, stem):
    """The shortest that are allowed: in one-step episodes every second step is a reset of all environments."""
    path = PPO.with_stem(stem)
    flags = "--env-kwargs length 1 --num-envs 1 --num-steps 2" + " --num-minibatches 1" * (stem != "a2c")
    cli(path, small(path, flags)).check()
    assert cli(path, small(path, flags.replace("steps 2", "steps 1"))).status == 2


def test_track(tmp_path, launch):
    pytest.importorskip("wandb")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nmode = offline\nsilent = true\n")
    launch(PPO, small(PPO, "--env-id CartPole-v1 --track"), tmp_path).stop().check()
    assert len(list(tmp_path.glob("**/offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize("flags", ["CartPole-v1", "ALE/Pong-v5 --env-kwargs max_num_frames_per_episode 200"])
def test_video(cli, flags):
    for package in ("moviepy", "imageio_ffmpeg", "ale_py"):
        pytest.importorskip(package)
    result = cli(PPO, small(PPO, f"--env-id {flags} --capture-video --eval-episodes 2")).check()
    videos = sorted(result.folder.rglob("*.mp4"))
    assert len(videos) == 2
    for video in videos:
        about, *frames = sys.modules["imageio_ffmpeg"].read_frames(video)
        assert min(about["size"]) > 100
        assert len(set(frames)) > 5  # it moves
