"""The replay buffer of dqn.py, against a list of all transitions."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from algos import dqn

CPU = torch.device("cpu")


def zero_padded(rng, stack):
    """Frames (4, 5, 6) as ale-py stacks them; None begins an episode."""
    return sliding(rng, np.zeros((4, 5, 6), np.uint8) if stack is None else stack)


def repeated(rng, stack):
    """Frames (4, 5, 6) as Gymnasium's FrameStackObservation stacks them."""
    return np.repeat(sliding(rng, np.zeros((4, 5, 6), np.uint8))[-1:], 4, 0) if stack is None else sliding(rng, stack)


def sliding(rng, stack):
    """The next stack; some pictures stand still, and some are black."""
    still, black = rng.random(2) < 0.2
    frame = stack[-1] if still else (not black) * rng.integers(0, 256, (5, 6), np.uint8)
    return np.append(stack[1:], frame[None], 0)


KINDS = {  # shape, dtype, a function of the last observation of the episode (or None) that makes the next
    "vector": ((3,), np.float32, lambda rng, _: rng.normal(size=3).astype(np.float32)),
    "number": ((), np.float32, lambda rng, _: np.float32(rng.normal())),
    "matrix": ((2, 4), np.float32, lambda rng, _: rng.normal(size=(2, 4)).astype(np.float32)),
    "zero-padded stack": ((4, 5, 6), np.uint8, zero_padded),
    "repeated stack": ((4, 5, 6), np.uint8, repeated),
    "channels first": ((3, 5, 6), np.uint8, lambda rng, _: rng.integers(0, 256, (3, 5, 6), np.uint8)),
    "channels last": ((6, 5, 3), np.uint8, lambda rng, _: rng.integers(0, 256, (6, 5, 3), np.uint8)),
}


def bytes_of(buffer) -> int:
    """What its arrays take."""
    return sum(x.nbytes for x in vars(buffer).values() if isinstance(x, np.ndarray))


class Play:
    """Random episodes of N environments, put into a buffer, and beside it into a list.

    history: for each step a list with each environment's transition (obs, action, reward, next_obs, terminated), or
    None where it only reset. where: the step and the environment of a transition, by its reward.
    """

    def __init__(self, kind: str, size: int, num_envs: int, seed: int = 0, longest: int = 9):
        self.shape, dtype, self.next_obs = KINDS[kind]
        self.is_stack, self.size, self.N, self.longest = kind.endswith("stack"), size, num_envs, longest
        self.rng, self.history, self.where = np.random.default_rng(seed), [], {}
        self.buffer = dqn.ReplayBuffer(size, num_envs, self.shape, dtype)
        self.obs = np.stack([self.next_obs(self.rng, None) for _ in range(num_envs)])
        self.valid = np.ones(num_envs, bool)
        self.buffer.store(self.obs.copy())

    def step(self) -> np.ndarray:
        """A step of all environments; which of them made a transition."""
        rng, valid = self.rng, self.valid
        last = [self.obs[n] if valid[n] else None for n in range(self.N)]
        next_obs = np.stack([self.next_obs(rng, obs) for obs in last])
        rewards = rng.normal(size=self.N).astype(np.float32)
        actions = rng.integers(5, size=self.N)
        ended = valid & (rng.random(self.N) < 2 / self.longest)
        terminated = ended & (rng.random(self.N) < 0.5)  # the others are truncated
        columns = (self.obs, actions, rewards, next_obs, terminated)
        rows = [tuple(np.array(column[n]) for column in columns) for n in range(self.N)]
        self.history.append([row if is_valid else None for row, is_valid in zip(rows, valid, strict=True)])
        self.where |= {float(rewards[n]): (len(self.history) - 1, n) for n in np.flatnonzero(valid)}
        passed = [x.copy() for x in (actions, rewards, next_obs, terminated, valid)]
        self.buffer.add(*passed)
        for x in passed:  # an environment may use its arrays again
            x[...] = 1
        self.obs, self.valid = next_obs, ~ended
        return valid

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def check(self, batch) -> list[tuple[int, int]]:
        """Assert that a batch is of transitions in the list; (step, environment) of each."""
        batch = [x.numpy() for x in batch]
        found = []
        for i, reward in enumerate(batch[2]):
            t, n = self.where[float(reward)]
            for ours, theirs in zip(self.history[t][n], batch, strict=True):
                assert np.array_equal(theirs[i], ours)
            found.append((t, n))
        return found

    def kept(self, n: int, places: int, per_step: int, per_reset: int) -> set[tuple[int, int]]:
        """The transitions of environment n that fit into the last so many places."""
        transitions, used = set(), 0
        for t in reversed(range(len(self.history))):
            row = self.history[t][n]
            used += per_reset if row is None else per_step
            if used > places:
                break
            transitions |= set() if row is None else {(t, n)}
        return transitions


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("size", [1, 20, 43, 500])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_what_was_put_in(kind, size, num_envs):
    play, rng, compared = Play(kind, size, num_envs), np.random.default_rng(1), 0
    for _ in range(150):
        if play.step().any() and play.rng.random() < 0.4:
            compared += len(play.check(play.buffer.sample(8, rng, CPU)))
    assert compared > 300


def test_a_batch_has_the_types_of_the_observations_and_actions():
    play = Play("zero-padded stack", 30, 2)
    play.go_on(50)
    batch = play.buffer.sample(20, np.random.default_rng(0), CPU)
    assert [x.dtype for x in batch] == [torch.uint8, torch.int64, torch.float32, torch.uint8, torch.bool]
    assert [x.shape for x in batch] == [(20, 4, 5, 6), (20,), (20,), (20, 4, 5, 6), (20,)]


def test_a_batch_stays_what_it_was_when_the_ring_goes_on():
    play = Play("vector", 10, 1)
    play.go_on(20)
    batch = play.buffer.sample(20, np.random.default_rng(0), CPU)
    play.go_on(20)
    play.check(batch)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("size", [20, 43])
@pytest.mark.parametrize("steps", [14, 17, 211])
@pytest.mark.parametrize("kind", ["vector", "zero-padded stack", "repeated stack", "channels first", "channels last"])
def test_all_that_is_kept_is_drawn_equally_often_and_nothing_older(kind, steps, size, num_envs):
    play, channels = Play(kind, size, num_envs, seed=steps), KINDS[kind][0][0]
    play.go_on(steps)
    draws = 30 * size
    counts = Counter(play.check(play.buffer.sample(draws, np.random.default_rng(2), CPU)))
    share = -(-size // num_envs)  # of each environment
    if play.is_stack:  # an episode may take a place for each frame of its first observation
        sure, possible = (share, 1, channels), (share + 2 * channels - 1, 1, 1)
    elif kind == "channels first":  # taken for a stack whose frames never match
        sure, possible = (share, channels, channels), (share + 2 * channels - 1, channels, channels)
    else:
        sure = possible = (share, 1, 1)
    for n in range(num_envs):
        drawn = {key for key in counts if key[1] == n}
        assert play.kept(n, *sure) <= drawn <= play.kept(n, *possible)
    expected = draws / len(counts)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = len(counts) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 6


def test_a_million_atari_transitions_take_less_than_8_gb():
    few, many = (bytes_of(dqn.ReplayBuffer(size, 1, (4, 84, 84), np.uint8)) for size in (100, 300))
    assert (many - few) / 200 <= 8000
    assert many <= 8000 * (300 + 8) + 4 * 84 * 84


@pytest.mark.parametrize("shape", [(4, 84, 84), (5,), ()])
def test_a_buffer_larger_than_the_free_memory_is_refused_before_it_is_made(shape, monkeypatch):
    dtype, size, made, zeros = np.uint8 if shape == (4, 84, 84) else np.float32, 3000, [], np.zeros
    needed = bytes_of(dqn.ReplayBuffer(size, 2, shape, dtype))

    def spy(*args, **kwargs):
        made.append(zeros(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1.02 * needed))
    dqn.ReplayBuffer(size, 2, shape, dtype)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0.98 * needed))
    monkeypatch.setattr(np, "zeros", spy)
    with pytest.raises(dqn.UsageError, match="--buffer-size 3000 "):
        dqn.ReplayBuffer(size, 2, shape, dtype)
    assert sum(x.nbytes for x in made) < 0.1 * needed


def test_stacked_frames_of_atari_come_back_as_they_were():
    pytest.importorskip("ale_py")
    args, N, rng = dqn.Args(env_id="ALE/Breakout-v5"), 2, np.random.default_rng(0)
    envs = dqn.make_envs(args, N)
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (N, 4, 84, 84)
    buffer = dqn.ReplayBuffer(200, N, obs.shape[1:], np.uint8)
    buffer.store(obs)
    obs, valid, history, first = obs.copy(), np.ones(N, bool), {}, set()
    for t in range(150):
        actions, numbers = rng.integers(4, size=N), np.float32([N * t, N * t + 1])
        next_obs, _, terminated, truncated, _ = envs.step(actions)
        buffer.add(actions, numbers, next_obs, terminated, valid)  # the reward tells which transition it is
        for n in np.flatnonzero(valid):
            history[numbers[n]] = obs[n], actions[n], next_obs[n].copy(), terminated[n]
        first |= set(numbers[~valid] + N)
        obs, valid = next_obs.copy(), ~(terminated | truncated)
    envs.close()
    b_obs, b_actions, b_numbers, b_next_obs, b_terminated = (x.numpy() for x in buffer.sample(600, rng, CPU))
    for i, number in enumerate(b_numbers):
        for ours, theirs in zip(history[number], (b_obs[i], b_actions[i], b_next_obs[i], b_terminated[i]), strict=True):
            np.testing.assert_array_equal(theirs, ours)
    assert b_terminated.any()
    assert first & set(b_numbers)
    assert len(set(b_numbers)) > 150
