"""The environment to copy: it keeps Gymnasium's rules and its own promises, and PPO solves it."""

import importlib
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
from conftest import PPO, load
from gymnasium.utils.env_checker import check_env

from envs import template

IDS = ["envs.template:Template-v0", "envs.template:TemplateContinuous-v0"]


@pytest.fixture(params=IDS)
def env(request):
    with gym.make(request.param, render_mode="rgb_array") as env:
        yield env


def play(env, seed, direction):
    """One episode, always pushing in direction(observation): observations, rewards, how it ended, the last info."""
    observations, rewards, terminated, truncated = [env.reset(seed=seed)[0]], [], False, False
    while not (terminated or truncated):
        wanted = direction(observations[-1])
        action = np.float32(wanted.clip(-1, 1)) if env.unwrapped.continuous else np.argmax(template.DIRECTIONS @ wanted)
        obs, reward, terminated, truncated, info = env.step(action)
        observations.append(obs)
        rewards.append(reward)
    return np.array(observations), rewards, terminated, truncated, info


def to_goal(obs):
    return 10 * obs[4:] - obs[2:4]


def test_gymnasiums_checker_has_no_complaint(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        importlib.reload(template)  # does not register the ids twice


def test_goal_terminates_with_the_bonus(env):
    for seed in range(20):
        observations, rewards, *ended, info = play(env, seed, to_goal)
        distances = 2 * np.linalg.norm(observations[:, 4:], axis=1)
        assert (*ended, info) == (True, False, {"distance": pytest.approx(distances[-1], abs=1e-6), "is_success": True})
        assert distances[0] >= template.MIN_START_DISTANCE
        assert distances[-1] <= template.GOAL_RADIUS < distances[:-1].min()
        bonus = template.GOAL_BONUS * (distances[1:] == distances[-1])
        assert rewards == pytest.approx(-np.diff(distances) - template.STEP_COST + bonus, abs=1e-6)


def test_time_limit_truncates_unless_the_goal_is_reached(env):
    observations, _, *ended, info = play(env, 0, lambda obs: -obs[2:4])
    assert (len(observations), *ended, info["is_success"]) == (101, False, True, False)
    env.unwrapped.time_limit = len(play(env, 0, to_goal)[1])
    assert play(env, 0, to_goal)[2:4] == (True, False)
    env.unwrapped.time_limit -= 1
    assert play(env, 0, to_goal)[2:4] == (False, True)


def test_seed_repeats_an_episode(env):
    first, again, other = (play(env, seed, to_goal) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    env.reset(seed=1)
    for start in (other[0][0], env.reset()[0]):  # without a seed the next episode is a new one
        assert not np.array_equal(start, first[0][0])


def test_walls_stop_the_point(env):
    for direction in template.DIRECTIONS:
        observations = play(env, 0, lambda obs, direction=direction: direction)[0]
        assert (np.abs(observations) <= 1).all()
        assert observations[-1, :2] @ direction == 1
        assert (observations[[0, -1], 2:4] == 0).all()  # it starts and ends at rest


def test_pushes_out_of_bounds_are_clipped():
    env = gym.make(IDS[1]).unwrapped
    ends = [(env.reset(seed=0), env.step(np.array(action)))[1][0] for action in ([1.0, -1.0], [5.0, -1e9])]
    np.testing.assert_array_equal(*ends)


def test_picture_shows_the_point_in_its_place(env):
    env.reset(seed=0)
    picture = env.render()
    row, column = np.argwhere((picture == template.AGENT).all(-1)).mean(0) / template.FRAME_SIZE - 0.5
    assert (2.3 * column, -2.3 * row) == pytest.approx(env.unwrapped.position, abs=0.02)


def test_ppo_solves_it(tmp_path, capsys):
    """Starts are 1.2 from the goal on average and the bonus is 1: a good policy gets about 1.9, a random one -1.0."""
    args = dict(num_envs=16, num_steps=64, total_timesteps=30_720, update_epochs=4, learning_rate=3e-3)
    args |= dict(gamma=0.98, gae_lambda=0.9, eval_episodes=32, device="cpu", log_dir=str(tmp_path))
    load(PPO).train(load(PPO).Args(env_id=IDS[0], **args))
    assert float(re.search(r"mean_return=(\S+)", capsys.readouterr().out)[1]) > 1.5
