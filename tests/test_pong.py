"""Pong: what the agent sees is what the screen shows, an episode is a game, and every file plays it."""

import warnings
from collections import Counter

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ALGOS, ROOT, load, read_checkpoint, small, takes
from gymnasium.utils.env_checker import check_env

GAME = "envs.pong:PongDifference-v0"
pong_weights = load(ROOT / "benchmark/pong_weights.py")


def slow_court(picture):
    """Every other pixel of the screen between the walls that is not of the commonest colour."""
    colours = [[tuple(picture[34 + 2 * row, 2 * column]) for column in range(80)] for row in range(80)]
    ((background, _),) = Counter(colour for row in colours for colour in row).most_common(1)
    return np.array([[colour != background for colour in row] for row in colours], int)


def test_observation_is_the_difference_of_two_courts():
    env = gym.make(GAME, render_mode="rgb_array")
    obs, _ = env.reset(seed=3)
    courts, moved = [slow_court(env.render())], 0
    assert not obs.any()
    for step in range(100):
        obs, *_ = env.step(step // 5 % 2)
        courts.append(slow_court(env.render()))
        np.testing.assert_array_equal(obs, courts[-1] - courts[-2])
        moved += obs.any()
    assert moved > 50
    assert (obs.dtype, courts[-1].sum() < 200) == (np.int8, True)


def test_gymnasiums_checker_has_no_complaint():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(GAME, render_mode="rgb_array").unwrapped)


def test_a_game_ends_at_21_points():
    env, rng, rewards, ended = gym.make(GAME), np.random.default_rng(1), [], False
    env.reset(seed=1)
    while not ended:
        _, reward, terminated, truncated, _ = env.step(rng.integers(2))
        rewards.append(reward)
        ended = terminated or truncated
    assert set(rewards) <= {-1, 0, 1}
    assert (max(rewards.count(1), rewards.count(-1)), terminated, truncated) == (21, True, False)


def test_actions_move_the_paddle_up_and_down():
    for flags, up, down in (({}, 0, 1), ({"all_actions": True}, 2, 3)):
        env = gym.make(GAME, repeat_action_probability=0.0, **flags, render_mode="rgb_array")
        assert env.action_space.n == (6 if flags else 2)
        rows = []
        for action in (up, down):
            env.reset(seed=0)
            for _ in range(20):
                env.step(action)
            rows.append(np.nonzero(slow_court(env.render())[:, 70:74])[0].mean())  # where the right paddle is
        assert rows[0] < 20 < 60 < rows[1]


def test_actions_may_be_repeated():
    """With probability 1 the last action is done again, and the first one of a game is to do nothing."""
    env = gym.make(GAME, repeat_action_probability=1.0, render_mode="rgb_array")
    env.reset(seed=0)
    before = slow_court(env.render())[:, 70:74]
    for _ in range(10):
        env.step(0)
    np.testing.assert_array_equal(slow_court(env.render())[:, 70:74], before)


@pytest.mark.parametrize("seed", [None, 1])
def test_a_reset_begins_a_new_game(seed):
    env = gym.make(GAME)
    env.reset(seed=1)
    for _ in range(10):
        env.step(0)
    assert env.unwrapped.game.unwrapped.ale.getEpisodeFrameNumber() == 40
    obs, _ = env.reset(seed=seed)
    assert not obs.any()
    assert env.unwrapped.game.unwrapped.ale.getEpisodeFrameNumber() == 0


@pytest.mark.parametrize("path", [path for path in ALGOS if takes(path, "Discrete")], ids=lambda path: path.stem)
def test_every_file_plays_it(path, cli):
    """With a learning rate of 0 the first weights, which the pictures show, are those after training."""
    result = cli(path, small(path, f"--env-id {GAME} --seed 3 --hidden-sizes 24 8 --learning-rate 0")).check()
    if path.stem not in ("dqn", "trpo"):  # whose policies have no such rate
        before, after = pong_weights.first_weights(read_checkpoint(result.folder))
        assert before.shape == (24, 80, 80)
        np.testing.assert_array_equal(before, after)


def test_pictures_of_the_weights(tmp_path):
    checkpoint = {"args": {"seed": 1, "hidden_sizes": (24,)}, "agent": {"actor.0.weight": torch.randn(24, 80 * 80)}}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    pong_weights.main(tmp_path / "checkpoint.pt", tmp_path / "weights.png")
    colours = plt.imread(tmp_path / "weights.png")[..., :3]
    assert (np.ptp(colours, axis=2) > 0.1).mean() > 0.1  # more than the colour bars
