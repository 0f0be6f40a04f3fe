"""More tiny environments, for DQN and DDPG. Use one as `tests.tiny_control:Reach-v0`, from the repository's root."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from tests.tiny_envs import Step, Target, Trace, paid_resets_of, register


class BoxTrace(Trace):
    """Trace with Box actions, of two axes with very different bounds, which the rewards do not depend on."""

    action_space = spaces.Box(np.float32([2, -300]), np.float32([6, -100]))
    centre, half_range = np.array([4, -200]), np.array([2, 100])
    log: ClassVar[list[Step]] = []

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return self.play(action.copy(), float(self.np_random.normal()))


class Reach(Target):
    """Target without its third axis: in units where the bounds are -1 and 1, (-0.5, 0.8) or (0.5, -0.8)."""

    action_space = BoxTrace.action_space
    targets: ClassVar[dict] = {side: target[:2] for side, target in Target.targets.items()}
    unit = Target.unit[:2]


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


ENVS = {
    "BoxTrace-v0": dict(entry_point=BoxTrace),
    "LongBoxTrace-v0": dict(entry_point=BoxTrace, kwargs={"longest": 40}),
    "PaidBoxResets-v0": dict(entry_point=BoxTrace, vector_entry_point=paid_resets_of(BoxTrace)),
    "Reach-v0": dict(entry_point=Reach),
    "Balance-v0": dict(entry_point=Balance, max_episode_steps=10),
    "DryLake-v0": dict(
        entry_point="gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv",
        kwargs={"map_name": "4x4", "is_slippery": False},
        max_episode_steps=50,
    ),
}

register(ENVS)
