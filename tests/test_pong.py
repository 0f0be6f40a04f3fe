"""Pong: what the agent sees is what the screen shows, an episode is a rally or a game, and every file plays it."""

import warnings
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from conftest import ALGOS, PPO, ROOT, small, takes
from gymnasium.utils.env_checker import check_env

GAME, RALLY = "envs.pong:PongDifference-v0", "envs.pong:PongRally-v0"


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


@pytest.mark.parametrize("env_id", [GAME, RALLY])
def test_gymnasiums_checker_has_no_complaint(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(env_id, render_mode="rgb_array").unwrapped)


def play(env, rng):
    """An episode of random actions: its rewards and how it ended."""
    rewards, ended = [], False
    while not ended:
        _, reward, terminated, truncated, _ = env.step(rng.integers(2))
        rewards.append(reward)
        ended = terminated or truncated
    return rewards, terminated, truncated


def test_a_game_ends_at_21_points_and_a_rally_with_each():
    game, rally = gym.make(GAME), gym.make(RALLY)
    game.reset(seed=1)
    rewards, *ended = play(game, np.random.default_rng(1))
    assert set(rewards) <= {-1, 0, 1}
    assert (max(rewards.count(1), rewards.count(-1)), ended) == (21, [True, False])
    points = [reward for reward in rewards if reward]

    rng, rallies = np.random.default_rng(1), []
    for number in range(len(points) + 1):
        obs, _ = rally.reset(seed=None if number else 1)
        assert not obs.any()
        rallies.append(play(rally, rng))
    # The same actions make the same game: one rally after the other, and after the last one a new game.
    assert [rewards[-1] for rewards, *_ in rallies[:-1]] == points
    assert all(not any(rewards[:-1]) and rewards[-1] for rewards, *_ in rallies)
    assert sum(len(rewards) for rewards, *_ in rallies[:-1]) == len(rewards)
    assert all(ended == [True, False] for _, *ended in rallies)


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


@pytest.mark.parametrize("path", [path for path in ALGOS if takes(path, "Discrete")], ids=lambda path: path.stem)
def test_every_file_plays_it(path, cli):
    cli(path, small(path, f"--env-id {RALLY} --eval-episodes 2")).check()


def test_without_the_emulator_one_sentence_says_what_to_install(tmp_path, launch):
    (tmp_path / "ale_py.py").write_text("raise ImportError")
    (tmp_path / "envs").symlink_to(ROOT / "envs")
    result = launch(PPO, f"--env-id {GAME}", tmp_path).stop()
    assert (result.status, result.out, (tmp_path / "runs").exists()) == (2, "", False)
    assert result.err.splitlines()[-1].endswith("run `pip install ale-py`.")
