"""ppo.py under torchrun: the processes learn as one, stop as one, and none is left behind."""

import contextlib
import os
import re
import runpy
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from conftest import PPO, START_METHOD, children, only, read_checkpoint, read_events, small
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from algos import ppo
from tests.tiny_envs import Trace, ended_episodes

ARGS = dict(num_envs=2, num_steps=8, total_timesteps=160, num_minibatches=2, update_epochs=3, ent_coef=0.1)
ARGS |= dict(norm_obs=True, norm_reward=True, target_kl=1e-3, learning_rate=0.01)


def start(function, *args):
    """Two processes that call function(rank, *args) in torchrun's environment."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context(START_METHOD)
    processes = [context.Process(target=process, args=(rank, port, function, *args)) for rank in range(2)]
    for each in processes:
        each.start()
    return processes


def process(rank, port, function, *args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    function(rank, *args)


def end(processes):
    """Wait for them; their exit statuses."""
    for each in processes:
        each.join(60)
    statuses = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    assert None not in statuses, "they wait for each other"
    return statuses


def train_and_save(rank, folder):
    """Train, and save what was seen: θ and the batch of each step, and the gradient before it is clipped."""
    seen, loss, clip = {"batches": [], "gradients": []}, ppo.ppo_loss, torch.nn.utils.clip_grad_norm_

    def spy_on_loss(agent, *batch):
        seen["batches"].append((parameters_to_vector(agent.parameters()).detach(), *batch))
        return loss(agent, *batch)

    def spy_on_clipping(parameters, max_norm):
        seen["gradients"].append(parameters_to_vector([x.grad for x in parameters]))
        return clip(parameters, max_norm)

    ppo.ppo_loss, torch.nn.utils.clip_grad_norm_ = spy_on_loss, spy_on_clipping
    agent = conftest.train(ppo, "Trace", folder / "runs", **ARGS)
    torch.save(seen | {"agent": agent.state_dict(), "log": Trace.training()}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder in which two processes have trained together, and what each of them has saved."""
    folder = tmp_path_factory.mktemp("torchrun")
    assert end(start(train_and_save, folder)) == [0, 0]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_parameters_and_statistics_are_equal_after_every_step(runs):
    _, (first, second) = runs
    assert len(first["batches"]) == len(second["batches"])
    assert len(first["batches"]) < 5 * 3 * 2, "target_kl ended no update early"
    for (theta, *_), (other_theta, *_) in zip(first["batches"], second["batches"], strict=True):
        assert torch.equal(theta, other_theta)
    for name, x in first["agent"].items():
        assert torch.equal(x, second["agent"][name]), name


def test_gradients_are_averaged_before_they_are_clipped(runs):
    _, saved = runs
    envs = ppo.make_envs(ppo.Args(env_id="tests.tiny_envs:Trace-v0"), 1)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, ppo.Args(hidden_sizes=(8,)))
    for k in range(len(saved[0]["batches"])):
        own = []
        for run in saved:
            theta, *batch = run["batches"][k]
            vector_to_parameters(theta, agent.parameters())
            own.append(parameters_to_vector(torch.autograd.grad(ppo.ppo_loss(agent, *batch)[0], agent.parameters())))
        for run in saved:
            torch.testing.assert_close(run["gradients"][k], (own[0] + own[1]) / 2, rtol=1e-5, atol=1e-6)


def test_each_process_has_its_own_environments_and_all_are_in_the_statistics(runs):
    _, saved = runs
    logs = [run["log"] for run in saved]
    assert [{step[0] for step in log} for log in logs] == [{1, 2}, {3, 4}]
    steps = np.array([step[:3] for log in logs for step in log], float)
    for name in ("obs_stats.count", "return_stats.count"):
        assert (saved[0]["agent"][name] == len(steps)).all()
    torch.testing.assert_close(saved[0]["agent"]["obs_stats.mean"].double(), torch.as_tensor(steps.mean(0)))


def test_advantages_are_standardised_over_all_processes(runs):
    _, saved = runs
    each = [torch.cat([batch[4] for batch in run["batches"][:2]]) for run in saved]  # one epoch
    assert all(abs(advantages.mean()) > 0.01 for advantages in each)
    assert torch.cat(each).mean().item() == pytest.approx(0, abs=1e-6)
    assert torch.cat(each).std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_one_folder_with_the_episodes_of_all_processes(runs):
    folder, saved = runs
    run = only(folder / "runs")
    assert read_checkpoint(run)["global_step"] == 160
    assert all(torch.equal(x, saved[0]["agent"][name]) for name, x in read_checkpoint(run)["agent"].items())
    returns = [value for value, _ in ended_episodes(step for process in saved for step in process["log"])]
    logged = read_events(run)["charts/episodic_return"]
    assert sorted(value for _, value in logged) == pytest.approx(returns, abs=1e-5)


def test_a_resumed_follower_has_the_weights_and_the_optimizer(runs):
    folder, saved = runs
    envs = ppo.make_envs(ppo.Args(env_id="tests.tiny_envs:Trace-v0"), 1)
    args = ppo.Args(hidden_sizes=(8,), norm_obs=True, norm_reward=True, resume=f"{only(folder / 'runs')}/checkpoint.pt")
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    optimizer = torch.optim.Adam(agent.parameters())
    assert ppo.Follower(args, agent=agent, optimizer=optimizer).global_step == 160
    assert all(torch.equal(x, saved[0]["agent"][name]) for name, x in agent.state_dict().items())
    assert optimizer.state_dict()["state"][0]["step"] == len(saved[0]["batches"])


TORCHRUN = "torch.distributed.run --nproc-per-node 2"
LONG = "--env-id CartPole-v1 --total-timesteps 500000 --checkpoint-interval 64 --device cpu"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_torchrun_stops_both(launch, tmp_path):
    script = launch("-m", f"{TORCHRUN} {PPO} {small(PPO, LONG)}", tmp_path)
    script.wait_for("return")
    processes = children(script.process)
    result = script.stop(signal.SIGTERM)
    assert result.err.count("Traceback") == 1  # torchrun's own
    assert len(re.findall("resume with: .*checkpoint.pt", result.out)) == 1
    assert len(processes) == 2
    assert not any(Path(f"/proc/{number}").exists() for number in processes)


def script(rank, cwd, flags):
    """The command line that torchrun runs."""
    os.chdir(cwd)
    sys.argv = [str(PPO), *shlex.split(flags)]
    with open(f"out{rank}", "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        runpy.run_path(str(PPO), run_name="__main__")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_process_stops_both(number, tmp_path):
    """With one checkpoint and, unless a process was killed, one command that resumes."""
    processes, out = start(script, tmp_path, small(PPO, LONG)), tmp_path / "out0"
    while not out.exists() or "return" not in out.read_text():  # in the bar
        assert processes[0].is_alive()
        time.sleep(0.01)
    os.kill(processes[1].pid, number)
    assert end(processes) == ([130, 130] if number == signal.SIGTERM else [1, -signal.SIGKILL])
    path = only(tmp_path / "runs") / "checkpoint.pt"
    step = read_checkpoint(path.parent)["global_step"]
    assert step % (2 * 16) == 0
    commands = re.findall("resume with: .*", out.read_text() + (tmp_path / "out1").read_text())
    assert len(commands) == (number == signal.SIGTERM)
    assert end(start(script, tmp_path, f"--resume {path} --total-timesteps {step + 160}")) == [0, 0]
    assert read_checkpoint(path.parent)["global_step"] == step + 160
