"""A3C: one worker is A2C, several share their steps, and none is left behind."""

import os
import re
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from conftest import ROOT, children, only, read_checkpoint, read_events, small, train
from torch.nn.utils import parameters_to_vector

from algos import a2c, a3c
from tests.tiny_envs import Trace, ended_episodes

A3C = ROOT / "algos/a3c.py"


class Counter:
    """In the place of a multiprocessing.Value: who changes it must have held the lock since it was read."""

    def __init__(self, number):
        self.number, self.held, self.read = number, False, False

    @contextmanager
    def get_lock(self):
        self.held, self.read = True, False
        yield
        self.held = False

    @property
    def value(self):
        self.read = self.held
        return self.number

    @value.setter
    def value(self, number):
        assert self.held, "changed without the lock"
        assert self.read, "changed after others may have changed it"
        self.number = number


def play(worker=0, start=0, env="Trace", **args):
    """A worker in this process, from that step on: θ before and after, g, and the messages."""
    Trace.log.clear()
    own = dict(env_id=f"tests.tiny_envs:{env}-v0", hidden_sizes=(8,), num_envs=2, num_steps=8)
    args = a3c.Args(**own | {"total_timesteps": start + 80} | args)
    envs = a3c.make_envs(args, 1)
    shared, squares = (a3c.Agent(envs.single_observation_space, envs.single_action_space, args) for _ in range(2))
    for g in squares.parameters():
        g.data.zero_()
    before, messages = parameters_to_vector(shared.parameters()).detach(), Queue()
    a3c.work(worker, args, shared, squares, (Counter(start), Counter(0)), messages, start)
    after, g = (parameters_to_vector(module.parameters()).detach() for module in (shared, squares))
    return before, after, g, list(messages.queue)


EVERYTHING = dict(norm_obs=True, norm_reward=True, ent_coef=0.1, gae_lambda=0.9)
EVERYTHING |= dict(env_kwargs={"continuous": True, "jackpot": 1000.0})  # at the end of episode 25


@pytest.mark.parametrize("args", [{"anneal_lr": False}, EVERYTHING])
def test_one_worker_is_a2c(args, tmp_path):
    """The same transitions give the same gradients, and the same steps: all weights are the same, bit for bit."""
    args |= dict(total_timesteps=400, num_envs=2, num_steps=8, num_workers=1)
    agents = [train(module, "PaidResets", tmp_path / module.__name__, **args) for module in (a2c, a3c)]
    for (name, x), (other_name, y) in zip(*(agent.state_dict().items() for agent in agents), strict=True):
        assert name == other_name
        assert torch.equal(x, y), name
    logs = [read_events(only(tmp_path / module.__name__)) for module in (a2c, a3c)]
    returns = [sorted(value for _, value in log["charts/episodic_return"]) for log in logs]
    assert returns[0] == pytest.approx(returns[1])
    assert {value for _, value in logs[1]["charts/staleness"]} <= {0}


@pytest.mark.parametrize(("worker", "start", "seed"), [(0, 0, 1), (3, 0, 300_000_001), (1, 80, 100_000_081)])
def test_each_worker_learns_from_its_own_episodes_and_a_resumed_run_from_others(worker, start, seed):
    torch.set_flush_denormal(False)
    before, after, squares, _ = play(worker, start)
    assert torch.tensor(1e-40) * 1 == 0, "each process has a setting of its own"
    assert {step.env for step in Trace.log} == {seed, seed + 1}
    assert not torch.equal(before, after)
    assert (squares >= 0).all()
    assert squares.any()


def test_messages_have_each_episode_once_and_come_often_enough_for_a_curve():
    *_, messages = play(start=99_680, total_timesteps=100_000)
    steps, episodes, scalars = zip(*messages, strict=True)
    assert [step - 99_680 for step in steps] == [16, 128, 240, 320]  # the first, each after 100 steps, the last
    assert [bool(x) for x in scalars] == [True, True, True, False]
    told = sorted((value, length) for some in episodes for _, value, length in some)
    np.testing.assert_allclose(told, ended_episodes(Trace.log), rtol=1e-4, atol=1e-4)
    assert all(step <= last for last, some in zip(steps, episodes, strict=True) for step, *_ in some)


@pytest.mark.parametrize(("kwargs", "word"), [({"flaw": np.nan}, "observations"), ({"reward": np.inf}, "rewards")])
def test_a_worker_learns_nothing_from_numbers_that_are_not_finite(kwargs, word):
    with pytest.raises(AssertionError, match=f"{word} not finite"):
        play(env="Odd", env_kwargs=kwargs)


def test_the_main_process_takes_messages_in_any_order_and_saves_the_shared_squares(monkeypatch, tmp_path):
    """Its workers are in no hurry here: they only write to the shared memory, and send messages."""
    began = []

    def spawn(work, arguments, num_workers, join):
        _, agent, squares, (global_step, _), messages, first_step = arguments
        assert first_step == global_step.value
        assert all(x.is_shared() for module in (agent, squares) for x in module.state_dict().values())
        began.append((num_workers, global_step.value, {g.max().item() for g in squares.parameters()}))
        for g in squares.parameters():
            g.data.fill_(3)
        for step in (48, 80, 64):
            messages.put((step, [(step, 1.5, 3)], {"charts/staleness": step}))
        time.sleep(0.5)  # until they are in the pipe
        return SimpleNamespace(join=lambda timeout: True, processes=[])

    monkeypatch.setattr(a3c.multiprocessing, "spawn", spawn)
    train(a3c, "Trace", tmp_path, num_workers=3)
    folder = only(tmp_path)
    events = read_events(folder)
    assert read_checkpoint(folder)["global_step"] == 80
    assert events["charts/staleness"] == [(48, 48), (80, 80), (80, 64)]
    assert events["charts/episodic_return"] == [(48, 1.5), (80, 1.5), (64, 1.5)]
    train(a3c, "Trace", tmp_path, resume=str(folder / "checkpoint.pt"))
    assert began == [(3, 0, {0}), (1, 80, {3})]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--device cuda", "a2c.py"),
        ("--num-steps 1", "--num-steps"),
        ("--num-envs 2 --num-steps 8 --total-timesteps 15", "--total-timesteps"),
    ],
)
def test_what_is_refused(flags, word, cli):
    result = cli(A3C, flags)
    assert (result.status, word in result.err, (result.cwd / "runs").exists()) == (2, True, False)


def test_workers_share_the_steps(cli):
    result = cli(A3C, small(A3C, "--num-workers 3 --total-timesteps 2400 --num-envs 1 --num-steps 2")).check()
    assert read_checkpoint(result.folder)["global_step"] == 2400
    assert max(value for _, value in read_events(result.folder)["charts/staleness"]) > 0


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGKILL, multiprocessing.ProcessExitedException)],
)
def test_no_worker_outlives_a_stopped_run_or_a_killed_worker(number, error, monkeypatch, tmp_path):
    workers = []

    def stop(run, scalars):
        workers.extend(multiprocessing.active_children())
        os.kill(os.getpid() if number == signal.SIGINT else workers[-1].pid, number)

    monkeypatch.setattr(a3c.Run, "log_update", stop)
    with pytest.raises(error):
        train(a3c, "Trace", tmp_path, num_workers=2, total_timesteps=1_000_000)
    for worker in workers:
        worker.join(10)
    assert len(workers) >= 2
    assert not any(worker.is_alive() for worker in workers)
    assert read_checkpoint(only(tmp_path))["agent"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_is_left_behind(number, launch, tmp_path):
    script = launch(A3C, small(A3C, "--num-workers 2 --env-id CartPole-v1 --total-timesteps 1000000"), tmp_path)
    script.wait_for("return")  # in the bar
    workers = children(script.process)
    result = script.stop(number)
    assert result.status == (130 if number == signal.SIGINT else -number)
    assert bool(re.search("resume with: .*checkpoint.pt", result.out)) == (number == signal.SIGINT)
    assert all(x.isfinite().all() for x in read_checkpoint(result.folder)["agent"].values())
    for _ in range(100):
        alive = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        time.sleep(0.1 * bool(alive))
    assert len(workers) >= 2
    assert not alive
