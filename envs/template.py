"""The environment to copy when you write your own: a point in a square that must reach a goal.

    python envs/template.py                                           # check it against Gymnasium's rules
    python algos/ppo.py --env-id envs.template:Template-v0            # Discrete actions: push in 4 directions
    python algos/ppo.py --env-id envs.template:TemplateContinuous-v0  # Box actions: push with any force

To write your own: copy this file, rename the class and the ids at its end; say in `__init__` what the agent sees and
what it can do; then write `reset` (a first state), `step` (the next one), the reward and the end of an episode. Scale
observations and rewards to about 1, and pay for progress where chance rarely finds the goal. Run your file to check it
(each warning is a bug in waiting), then train: python algos/ppo.py --env-id my_env:MyEnv-v0
"""

import math
from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled

# The unit of length is half the side of the square, so positions are in [-1, 1]. The unit of time is one step.
MAX_SPEED = 0.1  # along each axis, length per step
RESPONSE = 0.2  # next velocity = RESPONSE * MAX_SPEED * push + (1 - RESPONSE) * velocity: 1 would be no inertia
GOAL_RADIUS = 0.1
MIN_START_DISTANCE = 0.5  # nearer starts would make an episode too easy
GOAL_BONUS = 1.0
STEP_COST = 0.01

DIRECTIONS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # right, up, left, down

FRAME_SIZE = 400  # pixels; a multiple of 16 suits every video encoder
WALL, FLOOR, TRAIL, AGENT = (214, 209, 200), (252, 251, 248), (166, 193, 222), (38, 94, 160)
GOAL, GOAL_EDGE = (251, 226, 207), (224, 122, 60)


class TemplateEnv(gym.Env):
    """A point with inertia that must reach a goal in the square [-1, 1] x [-1, 1]. Walls stop it.

    Observation, float32 of shape (6,), each in [-1, 1]: position (x, y), velocity / MAX_SPEED, (goal - position) / 2.
    Action: Discrete(4), a full push right, up, left or down; or, if continuous, Box(-1, 1, (2,)), a push along x and y.
    Reward: how much closer to the goal the step came, minus STEP_COST, plus GOAL_BONUS on arrival.
    Start: a random position at rest and a random goal, at least MIN_START_DISTANCE apart.
    End: terminated within GOAL_RADIUS of the goal; truncated after `time_limit` steps.
    Info: `distance` to the goal (float) and `is_success` (bool).
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, continuous: bool = False, time_limit: int = 100, render_mode: str | None = None):
        assert render_mode is None or render_mode in self.metadata["render_modes"]
        self.continuous = continuous
        self.time_limit = time_limit  # steps
        self.render_mode = render_mode

        # The true bounds, np.inf where there is none: the checker holds observations to them; some code scales by them.
        self.observation_space = spaces.Box(-1.0, 1.0, shape=(6,), dtype=np.float32)
        if continuous:
            self.action_space = spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)
        else:
            self.action_space = spaces.Discrete(len(DIRECTIONS))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode; returns (observation, info). `options` is part of Gymnasium's interface and unused here."""
        super().reset(seed=seed)  # seeds self.np_random: draw all that is random from it, and a seed repeats an episode
        self.steps = 0
        self.velocity = np.zeros(2)
        self.distance = 0.0
        while self.distance < MIN_START_DISTANCE:
            self.position = self.np_random.uniform(-1.0, 1.0, size=2)
            self.goal = self.np_random.uniform(-1.0, 1.0, size=2)
            self.distance = math.dist(self.position, self.goal)
        self.trail = [self.position]
        return self._get_observation(), {"distance": self.distance, "is_success": False}

    def step(self, action: int | np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move on by one step; returns (observation, reward, terminated, truncated, info)."""
        push = np.clip(action, -1.0, 1.0) if self.continuous else DIRECTIONS[action]  # not every caller clips
        old_position, old_distance = self.position, self.distance

        velocity = self.velocity + RESPONSE * (MAX_SPEED * push - self.velocity)
        self.position = np.clip(old_position + velocity, -1.0, 1.0)
        self.velocity = self.position - old_position  # shorter where a wall stopped it
        self.distance = math.dist(self.position, self.goal)
        self.steps += 1
        self.trail.append(self.position)

        # Both end an episode. After `terminated` no reward can follow, so the learner takes what comes next as worth
        # zero; `truncated` says that the clock ran out in an ordinary state, whose value the learner estimates. A time
        # limit reported as `terminated` teaches that good states are suddenly worth nothing.
        terminated = self.distance <= GOAL_RADIUS
        truncated = not terminated and self.steps >= self.time_limit
        # Over an episode the progress adds up to (first distance - last distance): detours and circles earn nothing.
        reward = old_distance - self.distance - STEP_COST + (GOAL_BONUS if terminated else 0.0)
        info = {"distance": self.distance, "is_success": terminated}  # for logs and tests: the agent never sees it
        return self._get_observation(), reward, terminated, truncated, info

    def _get_observation(self) -> np.ndarray:
        """What the agent sees, float32 of shape (6,): all that the next state depends on, scaled to [-1, 1].

        A new array each time, for the learner keeps the old ones, and of the space's dtype: NumPy computes in float64.
        """
        parts = (self.position, self.velocity / MAX_SPEED, (self.goal - self.position) / 2)
        return np.concatenate(parts, dtype=np.float32)

    def render(self) -> np.ndarray | None:
        """Draw the state; returns uint8 of shape (FRAME_SIZE, FRAME_SIZE, 3). Needs no display."""
        if self.render_mode is None:
            gym.logger.warn('To see pictures, make the environment with render_mode="rgb_array".')
            return None
        try:
            import pygame  # here, because training does not need it
        except ImportError as error:
            raise DependencyNotInstalled("Drawing needs pygame: run `pip install pygame-ce`.") from error

        size = 2 * FRAME_SIZE  # drawn at twice the size, then shrunk: that smooths the edges
        scale = size / 2.3  # pixels per unit of length: the square is 2 wide, and a wall is around it
        canvas = pygame.Surface((size, size))
        canvas.fill(WALL)
        canvas.fill(FLOOR, pygame.Rect(size / 2 - scale, size / 2 - scale, 2 * scale, 2 * scale))

        def draw_disc(colour, centre, radius, width=0):
            x, y = centre
            pixel = (size / 2 + x * scale, size / 2 - y * scale)  # rows of pixels count downwards
            pygame.draw.circle(canvas, colour, pixel, radius * scale, width)

        draw_disc(GOAL, self.goal, GOAL_RADIUS)
        draw_disc(GOAL_EDGE, self.goal, GOAL_RADIUS, width=8)
        for position in self.trail:
            draw_disc(TRAIL, position, 0.017)
        draw_disc(AGENT, self.position, 0.045)

        frame = pygame.surfarray.array3d(pygame.transform.smoothscale(canvas, (FRAME_SIZE, FRAME_SIZE)))
        return frame.transpose(1, 0, 2)  # pygame has (x, y, colour), pictures have (row, column, colour)

    # No `close`: nothing to release. Write one if yours opens a window, a file or a simulator.


ENV_IDS = {"Template-v0": {"continuous": False}, "TemplateContinuous-v0": {"continuous": True}}

for env_id, kwargs in ENV_IDS.items():
    if env_id not in gym.registry:  # a second import, or a reload, must not register it twice
        # By name, not by class: so worker processes find it again, and a reload takes effect. If `step` did not count
        # the steps, max_episode_steps=100 here would make the time limit, by a wrapper of Gymnasium's that truncates.
        gym.register(env_id, entry_point=f"{__name__}:TemplateEnv", kwargs=kwargs)


if __name__ == "__main__":
    from gymnasium.utils.env_checker import check_env

    for env_id in ENV_IDS:
        check_env(gym.make(env_id, render_mode="rgb_array").unwrapped)
        print(f"{env_id}: ok")
