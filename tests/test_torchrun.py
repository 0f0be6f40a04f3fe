"""ppo.py under torchrun: the processes learn as one, stop as one, and none is left behind."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import PPO, children, only, read_checkpoint, read_events, small
from torch.nn.utils import parameters_to_vector

from algos import ppo
from tests.tiny_envs import Trace

NUM_PROCESSES = 2
ARGS = dict(num_envs=2, num_steps=8, total_timesteps=160, num_minibatches=2, update_epochs=3)
ARGS |= dict(norm_obs=True, norm_reward=True, target_kl=1e-3, learning_rate=0.01)


def gradient_of_ppo(agent, batch):
    """That of the loss of these transitions, after which torchrun's processes have averaged theirs."""
    agent.zero_grad()
    ppo.ppo_loss(agent, *batch, ppo.Args(ent_coef=0.1))[0].backward()
    ppo.average_gradients(list(agent.parameters()))
    return parameters_to_vector([x.grad for x in agent.parameters()])


def make_batch():
    """x, actions, old_log_probs, advantages and returns of 12 transitions."""
    generator = torch.Generator().manual_seed(0)
    x, (old_log_probs, advantages, returns) = (
        torch.randn(12, 3, generator=generator),
        torch.randn(3, 12, generator=generator),
    )
    return x, torch.arange(12) % 3, old_log_probs - 1, advantages, returns


def process(rank, folder, port):
    """One of torchrun's: it trains, then computes a gradient, and saves what it saw."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    batches, gradients, loss, clip = [], [], ppo.ppo_loss, torch.nn.utils.clip_grad_norm_

    def spy(agent, x, actions, old_log_probs, advantages, returns, args):
        batches.append((parameters_to_vector(agent.parameters()).detach().clone(), advantages))
        return loss(agent, x, actions, old_log_probs, advantages, returns, args)

    def spy_on_clipping(parameters, max_norm):
        gradients.append(parameters_to_vector([x.grad for x in parameters]).clone())
        return clip(parameters, max_norm)

    ppo.ppo_loss, torch.nn.utils.clip_grad_norm_ = spy, spy_on_clipping
    agent = conftest.train(ppo, "Trace", folder / "runs", **ARGS)
    ppo.ppo_loss = loss
    half = [x[6 * rank : 6 * rank + 6] for x in make_batch()]
    saved = {
        "agent": agent.state_dict(),
        "batches": batches,
        "clipped": gradients,
        "gradient": gradient_of_ppo(agent, half),
    }
    torch.save(saved | {"log": [tuple(step) for step in Trace.training()]}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder in which two processes have trained together, and what each of them has saved."""
    folder = tmp_path_factory.mktemp("torchrun")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    processes = torch.multiprocessing.spawn(process, (folder, port), NUM_PROCESSES, join=False)
    finished = any(processes.join(timeout=60) for _ in range(NUM_PROCESSES))
    for left in processes.processes:
        left.kill()
    assert finished, "they wait for each other"
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(NUM_PROCESSES)]


def test_parameters_and_statistics_are_equal_after_every_step(runs):
    _, (first, second) = runs
    assert len(first["batches"]) == len(second["batches"])
    assert len(first["batches"]) < 5 * 3 * 2, "target_kl ended no update early"
    for gradient, other_gradient in zip(first["clipped"], second["clipped"], strict=True):
        assert torch.equal(gradient, other_gradient), "clipped before they were averaged"
    for (theta, _), (other_theta, _) in zip(first["batches"], second["batches"], strict=True):
        assert torch.equal(theta, other_theta)
    for name, x in first["agent"].items():
        assert torch.equal(x, second["agent"][name]), name


def test_two_processes_have_the_gradient_of_one_with_both_batches(runs):
    _, saved = runs
    envs = ppo.make_envs(ppo.Args(env_id="tests.tiny_envs:Trace-v0"), 1)
    args = ppo.Args(hidden_sizes=(8,), norm_obs=True, norm_reward=True)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.load_state_dict(saved[0]["agent"])
    expected = gradient_of_ppo(agent, make_batch())
    for run in saved:
        torch.testing.assert_close(run["gradient"], expected, rtol=1e-6, atol=1e-6)


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
    each = [torch.cat([advantages for _, advantages in run["batches"][:2]]) for run in saved]  # one epoch
    assert all(abs(advantages.mean()) > 0.01 for advantages in each)
    assert torch.cat(each).mean().item() == pytest.approx(0, abs=1e-6)
    assert torch.cat(each).std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_one_folder_with_the_episodes_of_all_processes(runs):
    folder, saved = runs
    run = only(folder / "runs")
    assert read_checkpoint(run)["global_step"] == 160
    assert all(torch.equal(x, saved[0]["agent"][name]) for name, x in read_checkpoint(run)["agent"].items())
    returns, under_way = [], {}
    for env, _, _, _, reward, terminated, truncated in (step for process in saved for step in process["log"]):
        under_way[env] = under_way.get(env, 0.0) + reward
        if terminated or truncated:
            returns.append(under_way.pop(env))
    logged = read_events(run)["charts/episodic_return"]
    assert sorted(value for _, value in logged) == pytest.approx(sorted(returns), abs=1e-5)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("stop", ["SIGTERM", "SIGTERM to one process", "kill a process"])
def test_all_stop_together(stop, launch, tmp_path):
    """With one checkpoint, after a signal one command that resumes, and no process left behind."""
    torchrun = f"torch.distributed.run --nproc-per-node {NUM_PROCESSES} {PPO}"
    flags = small(PPO, "--env-id CartPole-v1 --total-timesteps 10000000 --checkpoint-interval 64 --device cpu")
    script = launch("-m", f"{torchrun} {flags}", tmp_path)
    script.wait_for("return")
    processes = children(script.process)
    if stop == "SIGTERM":
        result = script.stop(signal.SIGTERM)
        assert result.err.count("Traceback") == 1  # torchrun's own
    else:
        os.kill(processes[-1], signal.SIGKILL if stop == "kill a process" else signal.SIGTERM)
        result = script.stop()
    assert result.status != 0
    assert len(re.findall("resume with: .*checkpoint.pt", result.out)) == (stop != "kill a process")
    for _ in range(100):
        alive = [number for number in processes if Path(f"/proc/{number}").exists()]
        time.sleep(0.1 * bool(alive))
    assert len(processes) == NUM_PROCESSES
    assert not alive
    step = read_checkpoint(result.folder)["global_step"]
    assert step % (NUM_PROCESSES * 16) == 0
    if stop == "SIGTERM":
        flags = f"--resume {result.folder}/checkpoint.pt --total-timesteps {step + 160}"
        launch("-m", f"{torchrun} {flags}", tmp_path).stop().check()
        assert read_checkpoint(result.folder)["global_step"] == step + 160
