"""Environments so small that their best policy, its value, or every step of theirs is known; and one with odd spaces.

Use one as `tests.tiny_envs:Bandit-v0`, from the root of the repository.
"""

import copy
from collections import defaultdict
from functools import partial
from typing import ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

# ---- what can be learned is known


class Choice(gym.Env):
    """The observation k, 0 or 1, asks for one of two things. play(action): the reward, and whether the episode ends."""

    observation_space = spaces.Discrete(2)

    def observation(self):
        return self.k

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.k = int(self.np_random.integers(2))
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        reward, terminated = self.play(action)
        self.k = int(self.np_random.integers(2))
        return self.observation(), float(reward), bool(terminated), False, {}


class Bandit(Choice):
    """One step: the k-th of two actions pays 1. The observation is a picture in one of two colours."""

    observation_space = spaces.Box(0, 255, (36, 36, 2), np.uint8)
    action_space = spaces.Discrete(2, start=5)

    def observation(self):
        return np.full((36, 36, 2), 255 * np.eye(2)[self.k], np.uint8)

    def play(self, action):
        return action == 5 + self.k, True


class Alive(Choice):
    """Each step pays 1, and an action other than the one observed ends the episode. A time limit cuts it after ten.

    The best policy lives for ever, but for the clock: every state is worth 1 / (1 - gamma).
    """

    action_space = spaces.Discrete(2)

    def play(self, action):
        return 1, action != self.k


class Copy(Choice):
    """One step: each of three actions with 2, 3 and 4 values should be the k that is observed; the share that is."""

    action_space = spaces.MultiDiscrete([2, 3, 4])

    def play(self, action):
        return np.mean(action == self.k), True


class Target(Choice):
    """One step: minus the squared distance to the target, or to its mirror image.

    The target is in units in which the bounds of an axis are -1 and 1; the last axis has none.
    """

    action_space = spaces.Box(np.float32([2, -300, -np.inf]), np.float32([6, -100, np.inf]))
    centre, half_range = np.array([4, -200, 0]), np.array([2, 100, 1])
    target = np.array([0.5, -0.8, 0.7])

    def play(self, action):
        distance = (action - self.centre) / self.half_range - (2 * self.k - 1) * self.target
        return -np.square(distance).sum(), True


# ---- every step is known


class Step(NamedTuple):
    """One real step of an environment (a reset is none)."""

    env: int
    episode: int
    step: int
    action: int | np.ndarray
    reward: float
    terminated: bool
    truncated: bool


def ended_episodes(steps):
    """Return and length of each episode that has ended in these steps, sorted."""
    episodes = defaultdict(list)
    for step in steps:
        episodes[step.env, step.episode].append(step)
    ended = [episode for episode in episodes.values() if episode[-1].terminated or episode[-1].truncated]
    return sorted((sum(step.reward for step in episode), len(episode)) for episode in ended)


class Trace(gym.Env):
    """Every observation tells which one it is: (the environment's first seed, episode, step). `log` has every step.

    Episodes are 1 to `longest` steps long and end at random by termination, truncation or both at once. Rewards are
    random; `jackpot` is added once, at the end of episode 25 of the environment with seed 1.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    centre, half_range = Target.centre[:2], Target.half_range[:2]  # of the actions, if continuous
    log: ClassVar[list[Step]] = []

    def __init__(self, continuous=False, jackpot=0.0, longest=6):
        self.jackpot, self.longest = jackpot, longest
        box = spaces.Box(np.float32([2, -300]), np.float32([6, -100]))
        self.action_space = box if continuous else spaces.Discrete(3)

    @classmethod
    def training(cls):
        """The steps in the log, without those of the evaluation."""
        return [step for step in cls.log if step.env < 10**6]

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
        end = self.np_random.integers(3) if self.t + 1 == self.length else None
        terminated, truncated = end in (0, 2), end in (1, 2)
        reward = float(self.np_random.normal())
        if end is not None and (self.env, self.episode) == (1, 25):
            reward += self.jackpot
        self.log.append(Step(self.env, self.episode, self.t, action.copy(), reward, terminated, truncated))
        self.t += 1
        return self.observation(), reward, terminated, truncated, {}


class PaidResets(gym.vector.SyncVectorEnv):
    """Many Traces, in which a step that only resets pays a fortune. Nobody may count it.

    Gymnasium's own phys2d/CartPole-v1 is like that: it pays the usual reward on such a step, too.
    """

    def __init__(self, num_envs, **kwargs):
        super().__init__([partial(Trace, **kwargs)] * num_envs)

    def step(self, actions):
        resets = self._autoreset_envs.copy()
        obs, rewards, *rest = super().step(actions)
        return obs, rewards + 1000.0 * resets, *rest


# ---- spaces of every kind


class Mission(gym.Space):
    """A space that Gymnasium does not know, as MiniGrid's of the same name."""

    def sample(self, **_):
        return "get to the goal"

    def seed(self, seed=None):
        return seed

    def contains(self, x):
        return isinstance(x, str)

    def __eq__(self, other):
        return isinstance(other, Mission)


VECTOR = spaces.Box(-1, 1, (3,))
PAIR = spaces.Tuple((spaces.Discrete(2), VECTOR))
MAX = np.finfo(np.float32).max

OBSERVATIONS = {
    "Vector": VECTOR,
    "Matrix": spaces.Box(-1, 1, (3, 4)),
    "Scalar": spaces.Box(-1, 1, ()),
    "Float64": spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "Int": spaces.Box(-5, 5, (3,), np.int64),
    "Discrete": spaces.Discrete(5, start=2),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(4),
    "Dict": spaces.Dict({"b": spaces.Discrete(3), "a": spaces.Dict({"c": VECTOR})}),
    "DictWithText": spaces.Dict(text=spaces.Text(9), mission=Mission(), a=spaces.Discrete(3), b=PAIR),
    "Tuple": spaces.Tuple((VECTOR, spaces.Discrete(3), spaces.Box(0, 255, (2, 2), np.uint8))),
    "ChannelsFirst": spaces.Box(0, 255, (3, 36, 40), np.uint8),
    "ChannelsLast": spaces.Box(0, 255, (40, 36, 1), np.uint8),
    "ChannelsMiddle": spaces.Box(0, 255, (40, 3, 40), np.uint8),
    "SmallImage": spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "GreyImage": spaces.Box(0, 255, (40, 40), np.uint8),
}
UNFIT_OBSERVATIONS = {
    "Sequence": spaces.Sequence(VECTOR),
    "DictOfSequence": spaces.Dict({"a": spaces.Dict({"b": spaces.Sequence(VECTOR)})}),
    "Opaque": gym.Space((), np.float32),  # a space of one's own, which Gymnasium cannot flatten
}
ACTIONS = {
    "Discrete": spaces.Discrete(3),
    "Start": spaces.Discrete(3, start=5),
    "NegativeStart": spaces.Discrete(3, start=-1, dtype=np.int32),
    "Box": spaces.Box(-1, 1, (2,)),
    "Scalar": spaces.Box(-2, 2, ()),
    "Matrix": spaces.Box(-1, 1, (2, 3)),
    "Float64": spaces.Box(-1, 1, (2,), np.float64),
    "Float16": spaces.Box(-1, 1, (2,), np.float16),
    "Asymmetric": spaces.Box(np.array([2, -300], np.float32), np.array([6, -100], np.float32)),
    "Unbounded": spaces.Box(np.array([-np.inf, -1], np.float32), np.array([np.inf, 1], np.float32)),
    "HalfBounded": spaces.Box(np.array([2, -np.inf], np.float32), np.array([np.inf, -5], np.float32)),
    "Widest": spaces.Box(-MAX, MAX, (2,)),
    "MultiDiscrete": spaces.MultiDiscrete([2, 4, 3]),
    "MatrixOfDiscretes": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 5], [-2, 1]]),
    "MultiBinary": spaces.MultiBinary(3),
    "MatrixOfBits": spaces.MultiBinary([2, 2]),
}
UNFIT_ACTIONS = {
    "IntBox": spaces.Box(0, 3, (2,), np.int64),
    "Dict": spaces.Dict({"a": VECTOR}),
}


class Odd(gym.Env):
    """Random observations; episodes are as long as told, and end in turn by truncation and by termination.

    observe, act: names of spaces above. reward: what each step pays; "step" is the step's number, None a random number
    that depends on the action. growth: how much longer every second episode is. flaw: what an observation has at times.
    """

    seen_actions: ClassVar[list] = []  # of all environments of this process; a test empties them before it looks
    seen_seeds: ClassVar[list[int]] = []

    def __init__(self, observe="Vector", act="Discrete", reward=None, length=5, growth=0, flaw=None, broken=False):
        if broken:
            raise RuntimeError("no licence for the simulator")
        self.observation_space = copy.deepcopy((OBSERVATIONS | UNFIT_OBSERVATIONS)[observe])
        self.action_space = copy.deepcopy((ACTIONS | UNFIT_ACTIONS)[act])
        self.reward, self.length, self.growth, self.flaw, self.episodes = reward, length, growth, flaw, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
            self.seen_seeds.append(seed)
        self.steps, self.episodes = 0, self.episodes + 1
        return self.observation_space.sample(), {}

    def step(self, action):
        if self.action_space.shape == ():  # a vector environment hands out numpy's scalars
            action = np.asarray(action)
        assert self.action_space.contains(action), f"{self.action_space} does not contain {action!r}"
        self.seen_actions.append(action)
        self.steps += 1
        even = self.episodes % 2 == 0
        ended = self.steps == self.length + self.growth * even
        reward = self.steps if self.reward == "step" else self.reward
        if reward is None:
            reward = self.np_random.normal() + np.tanh(np.sum(action, dtype=float))
        obs = self.observation_space.sample()
        if self.flaw is not None and self.steps == 3 and self.episodes > 3:
            obs[1] = self.flaw
        return obs, reward, ended and even, ended and not even, {}


def make_same_step(num_envs, **kwargs):
    return gym.vector.SyncVectorEnv([Odd] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


ENVS = {
    "Bandit-v0": dict(entry_point=Bandit),
    "Alive-v0": dict(entry_point=Alive, max_episode_steps=10),
    "Target-v0": dict(entry_point=Target),
    "Copy-v0": dict(entry_point=Copy),
    "Trace-v0": dict(entry_point=Trace),
    "PaidResets-v0": dict(entry_point=Trace, vector_entry_point=PaidResets),
    "Odd-v0": dict(entry_point=Odd),
    "OddContinuous-v0": dict(entry_point=Odd, kwargs={"act": "Box"}),
    "SameStep-v0": dict(entry_point=Odd, vector_entry_point=make_same_step),
}

for env_id, spec in ENVS.items():
    if env_id not in gym.registry:  # a second import must not register it twice
        gym.register(env_id, disable_env_checker=True, **spec)
