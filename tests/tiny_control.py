"""More tiny environments, for DQN and DDPG. Use one as `tests.tiny_control:Reach-v0`, from the repository's root."""

from typing import ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class BoxStep(NamedTuple):
    """One real step of an environment (a reset is none)."""

    env: int
    episode: int
    step: int
    action: np.ndarray
    reward: float
    terminated: bool
    truncated: bool


class BoxTrace(gym.Env):
    """Trace of tiny_envs with Box actions: every observation tells which one it is, and `log` has every step.

    Episodes are 1 to `longest` steps long and end at random by termination, truncation or both at once.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Box(np.float32([2, -300]), np.float32([6, -100]))
    centre, half_range = np.array([4, -200]), np.array([2, 100])
    log: ClassVar[list[BoxStep]] = []

    def __init__(self, longest: int = 6):
        self.longest = longest

    def observation(self):
        return np.float32([self.env, self.episode, self.t])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env, self.episode = seed, -1
        self.episode, self.t, self.length = self.episode + 1, 0, self.np_random.integers(1, self.longest + 1)
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        reward = float(self.np_random.normal())
        end = self.np_random.integers(3) if self.t + 1 == self.length else None
        terminated, truncated = end in (0, 2), end in (1, 2)
        self.log.append(BoxStep(self.env, self.episode, self.t, action.copy(), reward, terminated, truncated))
        self.t += 1
        return self.observation(), reward, terminated, truncated, {}


class Reach(gym.Env):
    """One step: minus the squared distance to one of two targets, in halves of the length of each axis.

    The observation, -1 or 1, says which: (-0.5, 0.8) or (0.5, -0.8) in units where the bounds are -1 and 1.
    """

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = BoxTrace.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.side = int(self.np_random.choice([-1, 1]))
        return np.float32([self.side]), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        distance = (action - BoxTrace.centre) / BoxTrace.half_range - self.side * np.array([0.5, -0.8])
        return np.float32([self.side]), -float(np.square(distance).sum()), True, False, {}


class Balance(gym.Env):
    """Each step pays 1 minus the squared distance of the action to 0.5. Never ends, but a time limit cuts it.

    Every state is worth 1 / (1 - gamma).
    """

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), 1 - float((action[0] - 0.5) ** 2), False, False, {}


class PaidResets(gym.vector.SyncVectorEnv):
    """A vector environment in which a step that only resets pays a fortune. Nobody may count it."""

    def step(self, actions):
        resets = self._autoreset_envs.copy()
        obs, rewards, *rest = super().step(actions)
        return obs, rewards + 1000.0 * resets, *rest


def make_paid_resets(num_envs: int, **kwargs):
    return PaidResets([BoxTrace] * num_envs)


ENVS = {
    "BoxTrace-v0": dict(entry_point=BoxTrace),
    "LongBoxTrace-v0": dict(entry_point=BoxTrace, kwargs={"longest": 40}),
    "PaidBoxResets-v0": dict(entry_point=BoxTrace, vector_entry_point=make_paid_resets),
    "Reach-v0": dict(entry_point=Reach),
    "Balance-v0": dict(entry_point=Balance, max_episode_steps=10),
    "DryLake-v0": dict(
        entry_point="gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv",
        kwargs={"map_name": "4x4", "is_slippery": False},
        max_episode_steps=50,
    ),
}

for env_id, spec in ENVS.items():
    if env_id not in gym.registry:  # a second import must not register it twice
        gym.register(env_id, disable_env_checker=True, **spec)
