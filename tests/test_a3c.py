"""A3C: one worker is A2C, several share their steps, and none is left behind."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, only, read_checkpoint, read_events, small, train

from algos import a2c, a3c

A3C = ROOT / "algos/a3c.py"


def children(process) -> list[int]:
    """The process ids of its workers."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    return [child for child, parent in parents.items() if parent == process.pid]


@pytest.mark.parametrize("args", [{}, {"norm_obs": True, "norm_reward": True, "ent_coef": 0.1, "gae_lambda": 0.9}])
def test_one_worker_is_a2c(args, tmp_path):
    """The same transitions give the same gradients, and the same steps: all weights are the same, bit for bit."""
    args |= dict(total_timesteps=160, num_envs=2, num_steps=8, num_workers=1)
    agents = [train(module, "Trace", tmp_path / module.__name__, **args) for module in (a2c, a3c)]
    for (name, x), (other_name, y) in zip(*(agent.state_dict().items() for agent in agents), strict=True):
        assert name == other_name
        assert torch.equal(x, y), name
    logs = [read_events(only(tmp_path / module.__name__)) for module in (a2c, a3c)]
    returns = [sorted(value for _, value in log["charts/episodic_return"]) for log in logs]
    assert returns[0] == pytest.approx(returns[1])
    assert {value for _, value in logs[1]["charts/staleness"]} <= {0}


def test_workers_share_the_steps(cli):
    result = cli(A3C, small(A3C, "--num-workers 3 --total-timesteps 4800 --num-envs 1 --num-steps 2")).check()
    assert read_checkpoint(result.folder)["global_step"] == 4800
    assert max(value for _, value in read_events(result.folder)["charts/staleness"]) > 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("stop", ["kill a worker", "kill", "Ctrl-C"])
def test_no_worker_is_left_behind(stop, launch, tmp_path):
    script = launch(A3C, small(A3C, "--num-workers 2 --env-id CartPole-v1 --total-timesteps 10000000"), tmp_path)
    script.wait_for("return")  # in the bar
    workers = children(script.process)
    if stop == "kill a worker":
        os.kill(workers[-1], signal.SIGKILL)
        result = script.stop()
    else:
        result = script.stop(signal.SIGKILL if stop == "kill" else signal.SIGINT, group=stop == "Ctrl-C")
    assert result.status == {"kill a worker": 1, "kill": -signal.SIGKILL}.get(stop, 130)
    assert ("SIGKILL" in result.err) == (stop == "kill a worker")
    assert bool(re.search("resume with: .*checkpoint.pt", result.out)) == (result.status == 130)
    weights = read_checkpoint(result.folder)["agent"]
    assert all(x.isfinite().all() for x in weights.values())
    for _ in range(100):
        alive = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        time.sleep(0.1 * bool(alive))
    assert len(workers) >= 2
    assert not alive
