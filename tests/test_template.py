"""The environment to copy: it keeps Gymnasium's rules and its own promises, and PPO solves it."""

import importlib
import re
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from algos import ppo
from envs import template

IDS = ["Template-v0", "TemplateContinuous-v0"]


@pytest.fixture(params=IDS)
def env(request):
    env = gym.make(f"envs.template:{request.param}", render_mode="rgb_array")
    yield env
    env.close()


def push(env: gym.Env, direction: np.ndarray):
    """The action nearest to this direction."""
    if env.unwrapped.continuous:
        return np.float32(np.clip(direction, -1, 1))
    return int(np.argmax(template.DIRECTIONS @ direction))


def play(env: gym.Env, seed: int, choose) -> tuple[list, list[float], bool, bool, dict]:
    """One episode: its observations and rewards, how it ended, and the last info."""
    obs, info = env.reset(seed=seed)
    observations, rewards, terminated, truncated = [obs], [], False, False
    while not (terminated or truncated):
        obs, reward, terminated, truncated, info = env.step(choose(observations[-1]))
        observations.append(obs)
        rewards.append(reward)
    return observations, rewards, terminated, truncated, info


def towards_goal(env):
    """A good player: the observation ends with the vector to the goal."""
    return lambda obs: push(env, 10 * obs[4:] - obs[2:4])


def to_and_fro(env):
    """A player who never arrives."""
    direction = np.array([1.0, 0.0])

    def choose(obs):
        direction[:] *= -1
        return push(env, direction)

    return choose


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_checker_has_no_complaint(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(f"envs.template:{env_id}", render_mode="rgb_array").unwrapped)


def test_reaching_the_goal_terminates_with_the_bonus(env):
    for seed in range(5):
        observations, rewards, terminated, truncated, info = play(env, seed, towards_goal(env))
        assert (terminated, truncated, info["is_success"]) == (True, False, True)
        assert info["distance"] <= template.GOAL_RADIUS
        start, end = (2 * np.linalg.norm(obs[4:]) for obs in (observations[0], observations[-1]))
        expected = start - end - template.STEP_COST * len(rewards) + template.GOAL_BONUS
        assert sum(rewards) == pytest.approx(expected, abs=1e-5)
        assert rewards[-1] > 0.9  # the bonus comes with the arrival
        assert max(rewards[:-1]) < 0.15


def test_starts_are_at_rest_and_away_from_the_goal(env):
    starts = np.array([env.reset(seed=seed)[0] for seed in range(100)])
    assert (2 * np.linalg.norm(starts[:, 4:], axis=1) >= template.MIN_START_DISTANCE).all()
    assert not starts[:, 2:4].any()


def test_the_time_limit_truncates(env):
    _, rewards, terminated, truncated, info = play(env, 0, to_and_fro(env))
    assert (terminated, truncated, info["is_success"]) == (False, True, False)
    assert len(rewards) == env.unwrapped.time_limit == 100


def test_arriving_on_the_last_step_terminates(env):
    steps = len(play(env, 0, towards_goal(env))[1])
    env.unwrapped.time_limit = steps
    assert play(env, 0, towards_goal(env))[2:4] == (True, False)
    env.unwrapped.time_limit = steps - 1
    assert play(env, 0, towards_goal(env))[2:4] == (False, True)


def test_a_seed_repeats_an_episode_and_another_seed_does_not(env):
    first, again, other = (play(env, seed, towards_goal(env)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert not np.array_equal(first[0][0], other[0][0])
    env.reset(seed=1)
    assert not np.array_equal(env.reset()[0], first[0][0])  # without a seed the next episode is a new one


def test_walls_stop_the_point_and_observations_stay_in_their_space(env):
    for direction in np.array([[1.0, 1.0], [-1.0, 0.5], [0.0, -1.0]]):
        observations = play(env, 3, lambda obs, direction=direction: push(env, direction))[0]
        assert all(env.observation_space.contains(obs) for obs in observations)
        assert len({id(obs) for obs in observations}) == len(observations)


def test_pushes_out_of_bounds_are_clipped():
    env = gym.make("envs.template:TemplateContinuous-v0").unwrapped
    ends = []
    for action in ([1.0, -1.0], [5.0, -1e9]):
        env.reset(seed=0)
        ends.append(env.step(np.array(action))[0])
    np.testing.assert_array_equal(*ends)


def test_rendering_gives_a_picture_with_the_point_in_its_place(env):
    for seed in range(3):
        env.reset(seed=seed)
        env.step(push(env, np.array([1.0, 0.0])))
        picture = env.render()
        size = template.FRAME_SIZE
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        row, column = np.argwhere((picture == template.AGENT).all(-1)).mean(0)
        x, y = env.unwrapped.position
        assert ((column - size / 2) * 2.3 / size, (size / 2 - row) * 2.3 / size) == pytest.approx((x, y), abs=0.02)


def test_importing_it_again_is_silent_and_leaves_the_ids_usable():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(template)
        for env_id in IDS:
            gym.make(f"envs.template:{env_id}").reset(seed=0)


def test_ppo_solves_it(tmp_path, capsys):
    # Starts are 1.2 from the goal on average and the bonus is 1: a good policy gets about 1.9, a random one -1.0.
    args = dict(num_envs=16, num_steps=64, total_timesteps=30_720, update_epochs=4, learning_rate=3e-3)
    args |= dict(gamma=0.98, gae_lambda=0.9, eval_episodes=32, device="cpu", log_dir=str(tmp_path))
    ppo.train(ppo.Args(env_id="envs.template:Template-v0", **args))
    assert float(re.search(r"mean_return=(\S+)", capsys.readouterr().out)[1]) > 1.5


def test_the_snippet_of_the_readme_acts(tmp_path, monkeypatch):
    args = dict(total_timesteps=64, num_envs=2, num_steps=8, num_minibatches=2, eval_episodes=1, log_dir=str(tmp_path))
    ppo.train(ppo.Args(env_id="envs.template:TemplateContinuous-v0", norm_obs=True, **args))
    (path,) = tmp_path.glob("*/checkpoint.pt")
    monkeypatch.chdir(path.parent)
    code = (Path(__file__).parent.parent / "README.md").read_text().split("<!-- snippet -->")[1].strip("\n`python")
    names = {}
    exec(code, names)
    assert names["obs"].shape == (1, 6)
    assert names["rewards"].shape == (1,)
