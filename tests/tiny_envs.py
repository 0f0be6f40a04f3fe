"""Environments so small that their best policy, its value, or every transition of theirs is known.

Use one as `tests.tiny_envs:Bandit-v0`, from the root of the repository.
"""

from typing import ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Bandit(gym.Env):
    """One step: the observation k pays 1 for the action start + k. As a picture or a dict it says the same."""

    def __init__(self, n: int = 4, start: int = 0, kind: str = "number"):
        self.n, self.kind = n, kind
        self.action_space = spaces.Discrete(n, start=start)
        self.observation_space = {
            "number": spaces.Discrete(n),
            "dict": spaces.Dict({"noise": spaces.Box(-1, 1, (2, 2)), "which": spaces.Discrete(n)}),
            "picture": spaces.Box(0, 255, (36, 36, n), np.uint8),
        }[kind]

    def observation(self):
        if self.kind == "dict":
            return {"noise": self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32), "which": self.which}
        if self.kind == "picture":
            return np.full((36, 36, self.n), 255 * np.eye(self.n)[self.which], np.uint8)
        return self.which

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.which = int(self.np_random.integers(self.n))
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        reward = float(action == self.action_space.start + self.which)
        return self.observation(), reward, True, False, {}


class Delay(gym.Env):
    """Four steps. Action 1 in the first pays 1 after the last; action 0 pays 0.2 at once. Later actions do nothing.

    Observation: the step as one-hot (4), then the choice. After choice 1, step t is worth gamma^(3-t); after 0, 0.
    """

    observation_space = spaces.Box(0, 1, (5,))
    action_space = spaces.Discrete(2)

    def observation(self):
        return np.append(np.arange(4) == self.t, self.choice).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.choice = 0, 0
        return self.observation(), {}

    def step(self, action):
        reward = 0.2 * (self.t == 0 and action == 0) + 1.0 * (self.t == 3 and self.choice == 1)
        self.choice = int(action) if self.t == 0 else self.choice
        self.t += 1
        return self.observation(), float(reward), self.t == 4, False, {}


class Alive(gym.Env):
    """Each step pays 1, and an action other than the one observed ends the episode. A time limit cuts it after ten.

    The best policy lives for ever, but for the clock: every state is worth 1 / (1 - gamma).
    """

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.safe = int(self.np_random.integers(2))
        return self.safe, {}

    def step(self, action):
        terminated = bool(action != self.safe)
        self.safe = int(self.np_random.integers(2))
        return self.safe, 1.0, terminated, False, {}


class Target(gym.Env):
    """One step: minus the squared distance to a target; on axes with two bounds in halves of their length.

    Two bounded axes of very different place and length, and one without bounds. The observation, -1 or 1, says which
    of two targets it is, neither at the centre: (3, -120, 1.5) or (5, -280, -1.5).
    """

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(np.float32([2, -300, -np.inf]), np.float32([6, -100, np.inf]))
    targets: ClassVar[dict] = {-1: np.array([3, -120, 1.5]), 1: np.array([5, -280, -1.5])}
    unit = np.array([2, 100, 1])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.side = int(self.np_random.choice([-1, 1]))
        return np.float32([self.side]), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        distance = (action - self.targets[self.side]) / self.unit
        return np.float32([self.side]), -float(np.square(distance).sum()), True, False, {}


class Step(NamedTuple):
    """One real step of an environment (a reset is none)."""

    env: int
    episode: int
    step: int
    action: int | np.ndarray
    reward: float
    terminated: bool
    truncated: bool


class Trace(gym.Env):
    """Every observation tells which one it is: (the environment's first seed, episode, step). `log` has every step.

    Episodes are 1 to `longest` steps long and end at random by termination, truncation or both at once. Rewards are
    random and depend on the action; `jackpot` is paid once, at the end of episode `when[1]` of the environment with
    seed `when[0]`.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Discrete(3)
    log: ClassVar[list[Step]] = []

    def __init__(self, jackpot: float = 0.0, when: tuple[int, int] = (1, 25), longest: int = 6):
        self.jackpot, self.when, self.longest = jackpot, when, longest

    def observation(self):
        return np.float32([self.env, self.episode, self.t])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env, self.episode = seed, -1
        self.episode, self.t, self.length = self.episode + 1, 0, self.np_random.integers(1, self.longest + 1)
        return self.observation(), {}

    def step(self, action):
        return self.play(int(action), float(self.np_random.normal() + 2 * action))

    def play(self, action, reward: float):
        end = self.np_random.integers(3) if self.t + 1 == self.length else None
        terminated, truncated = end in (0, 2), end in (1, 2)
        if end is not None and (self.env, self.episode) == self.when:
            reward += self.jackpot
        self.log.append(Step(self.env, self.episode, self.t, action, reward, terminated, truncated))
        self.t += 1
        return self.observation(), reward, terminated, truncated, {}


class PaidResets(gym.vector.SyncVectorEnv):
    """A vector environment in which a step that only resets pays a fortune. Nobody may count it.

    Gymnasium's own phys2d/CartPole-v1 is like that: it pays the usual reward on such a step, too.
    """

    def step(self, actions):
        resets = self._autoreset_envs.copy()
        obs, rewards, *rest = super().step(actions)
        return obs, rewards + 1000.0 * resets, *rest


def paid_resets_of(env: type[gym.Env]):
    return lambda num_envs, **kwargs: PaidResets([env] * num_envs)


def register(envs: dict[str, dict]) -> None:
    for env_id, spec in envs.items():
        if env_id not in gym.registry:  # a second import must not register it twice
            gym.register(env_id, disable_env_checker=True, **spec)


ENVS = {
    "Bandit-v0": dict(entry_point=Bandit),
    "DictBandit-v0": dict(entry_point=Bandit, kwargs={"kind": "dict"}),
    "PictureBandit-v0": dict(entry_point=Bandit, kwargs={"n": 2, "kind": "picture"}),
    "StartBandit-v0": dict(entry_point=Bandit, kwargs={"n": 3, "start": 5}),
    "Delay-v0": dict(entry_point=Delay),
    "Alive-v0": dict(entry_point=Alive, max_episode_steps=10),
    "Target-v0": dict(entry_point=Target),
    "Trace-v0": dict(entry_point=Trace),
    "Jackpot-v0": dict(entry_point=Trace, kwargs={"jackpot": 1000.0}),
    "PaidResets-v0": dict(entry_point=Trace, vector_entry_point=paid_resets_of(Trace)),
}

register(ENVS)
