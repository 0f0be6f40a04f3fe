"""Small environments with spaces of every kind, which check what an algorithm sends them.

ids: Observe{NAME}-v0 with Discrete and Observe{NAME}Continuous-v0 with Box actions, for NAME in OBSERVATIONS;
Act{NAME}-v0 for NAME in ACTIONS; and {NAME}-v0 and {NAME}Continuous-v0 for NAME in ODDITIES.
"""

import copy

import gymnasium as gym
import numpy as np
from gymnasium import spaces

VECTOR = spaces.Box(-1, 1, (3,))
PUSH = spaces.Box(-1, 1, (2,))
MAX = np.finfo(np.float32).max


class Opaque(gym.Space):
    """A space of one's own, which Gymnasium cannot flatten."""

    def sample(self, mask=None, probability=None):
        return "?"

    def contains(self, x):
        return x == "?"


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
    "Tuple": spaces.Tuple((VECTOR, spaces.Discrete(3), spaces.Box(0, 255, (2, 2), np.uint8))),
    "ChannelsFirst": spaces.Box(0, 255, (3, 36, 40), np.uint8),
    "ChannelsLast": spaces.Box(0, 255, (40, 36, 1), np.uint8),
    "ChannelsMiddle": spaces.Box(0, 255, (40, 3, 40), np.uint8),
    "SmallImage": spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "GreyImage": spaces.Box(0, 255, (40, 40), np.uint8),
    "Sequence": spaces.Sequence(VECTOR),
    "Graph": spaces.Graph(VECTOR, None),
    "DictOfSequence": spaces.Dict({"a": VECTOR, "b": spaces.Sequence(VECTOR)}),
    "Opaque": Opaque((), np.float32),
}
UNFIT_OBSERVATIONS = "Sequence", "Graph", "DictOfSequence", "Opaque"

ACTIONS = {
    "Discrete": spaces.Discrete(3),
    "Start": spaces.Discrete(3, start=5),
    "NegativeStart": spaces.Discrete(3, start=-1),
    "Int32": spaces.Discrete(3, start=2, dtype=np.int32),
    "Scalar": spaces.Box(-2, 2, ()),
    "Matrix": spaces.Box(-1, 1, (2, 3)),
    "Float64": spaces.Box(-1, 1, (2,), np.float64),
    "Float16": spaces.Box(-1, 1, (2,), np.float16),
    "Asymmetric": spaces.Box(np.array([2, -300], np.float32), np.array([6, -100], np.float32)),
    "Unbounded": spaces.Box(np.array([-np.inf, -1], np.float32), np.array([np.inf, 1], np.float32)),
    "HalfBounded": spaces.Box(np.array([0, -np.inf], np.float32), np.array([np.inf, 0], np.float32)),
    "Widest": spaces.Box(-MAX, MAX, (2,)),
    "MultiDiscrete": spaces.MultiDiscrete([2, 2]),
    "MultiBinary": spaces.MultiBinary(2),
    "IntBox": spaces.Box(0, 3, (2,), np.int64),
    "Dict": spaces.Dict({"a": PUSH}),
}
UNFIT_ACTIONS = "MultiDiscrete", "MultiBinary", "IntBox", "Dict"

ODDITIES = {
    "Known": {"reward": "the step's number", "length": 3},
    "NanReward": {"reward": np.nan},
    "NanObservation": {"flaw": np.nan},
    "OneStep": {"length": 1},
    "Endless": {"length": np.inf},
    "Broken": {"broken": True},
}

seen_actions, seen_seeds = [], []  # by all environments of this process; a test empties them before it looks


class OddEnv(gym.Env):
    """Random observations and rewards; ends after some steps, in turn by truncation and by termination.

    A wrongly shaped, typed or scaled action is an AssertionError. growth: how much longer the second episode is than
    the first, the fourth than the third and so on. flaw: what an observation has now and then.
    """

    def __init__(self, observation_space, action_space, reward=None, length=5, growth=0, flaw=None, broken=False):
        if broken:
            raise RuntimeError("no licence for the simulator")
        self.observation_space, self.action_space = copy.deepcopy((observation_space, action_space))
        self.reward, self.length, self.growth, self.flaw, self.episodes = reward, length, growth, flaw, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
            seen_seeds.append(seed)
        self.steps, self.episodes = 0, self.episodes + 1
        return self.observation_space.sample(), {}

    def step(self, action):
        if self.action_space.shape == ():  # a vector environment hands out numpy's scalars
            action = np.asarray(action)
        assert self.action_space.contains(action), f"{self.action_space} does not contain {action!r}"
        seen_actions.append(action)
        self.steps += 1
        even = self.episodes % 2 == 0
        ended = self.steps == self.length + self.growth * even
        reward = self.np_random.normal() if self.reward is None else self.reward
        if self.reward == "the step's number":
            reward = self.steps
        obs = self.observation_space.sample()
        if self.flaw is not None and self.steps == 3 and self.episodes > 3:
            obs[1] = self.flaw
        return obs, reward, ended and even, ended and not even, {}


def make_same_step(num_envs: int, **kwargs):
    mode = gym.vector.AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv([lambda: OddEnv(VECTOR, spaces.Discrete(2))] * num_envs, autoreset_mode=mode)


def register(name: str, observation_space, action_space, **kwargs) -> None:
    if f"{name}-v0" not in gym.registry:
        spaces_of_it = {"observation_space": observation_space, "action_space": action_space}
        gym.register(f"{name}-v0", f"{__name__}:OddEnv", kwargs=spaces_of_it | kwargs, disable_env_checker=True)


for name, space in OBSERVATIONS.items():
    register(f"Observe{name}", space, spaces.Discrete(2))
    register(f"Observe{name}Continuous", space, PUSH)
for name, space in ACTIONS.items():
    register(f"Act{name}", VECTOR, space)
for name, kwargs in ODDITIES.items():
    register(name, VECTOR, spaces.Discrete(2), **kwargs)
    register(f"{name}Continuous", VECTOR, PUSH, **kwargs)
if "SameStep-v0" not in gym.registry:
    gym.register("SameStep-v0", entry_point=f"{__name__}:OddEnv", vector_entry_point=make_same_step)
