"""Pong as it is used to teach policy gradients: what moves on the court, and two actions (Karpathy 2016).

    python envs/pong.py                                                # check it against Gymnasium's rules
    python algos/reinforce.py --env-id envs.pong:PongDifference-v0 --total-timesteps 3000000 --num-envs 2 \
        --hidden-sizes 200 --learning-rate 2e-3 --critic-updates 5 --norm-weight --restart-returns --ent-coef 0.01 \
        --norm-obs
    python algos/ppo.py --env-id envs.pong:PongDifference-v0 --total-timesteps 2000000 --num-envs 16 --num-steps 128 \
        --num-minibatches 8 --update-epochs 4 --hidden-sizes 200 --learning-rate 5e-4 --gamma 0.99 --gae-lambda 0.95 \
        --ent-coef 0.01 --norm-obs

How a raw environment becomes one that can be learned from: this one wraps `ALE/Pong-v5` and changes what the agent
sees (6,400 numbers instead of 100,800 bytes) and what it can do. An episode is a game, to 21 points. Nothing after a
point depends on what was done before it, so an action is better judged by its own rally alone: --restart-returns.

A. Karpathy: Deep Reinforcement Learning: Pong from Pixels, 2016, https://karpathy.github.io/2016/05/31/rl.
"""

from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled

try:
    import ale_py
except ImportError as error:
    raise DependencyNotInstalled("Pong needs the Atari emulator: run `pip install ale-py`.") from error

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from every process

COURT = slice(34, 194)  # rows of the screen between the walls; above is the score
BACKGROUND, FIRST_BACKGROUND = 87, 107  # grey of the court, and that of a game's first frame
UP, DOWN = 2, 3  # of the emulator's six actions, where they are called RIGHT and LEFT


class PongEnv(gym.Env):
    """The right paddle of Pong against the computer. A step is four frames; some actions are repeated ("sticky").

    Observation, int8 of shape (80, 80): every other pixel of the court, 1 for paddles and ball and 0 for background,
    minus the same one step earlier: 1 where something has come, -1 where it has left, and 0 everywhere at a start.
    Action: Discrete(2), up or down; with `all_actions` the emulator's Discrete(6).
    Reward: 1 for a point won, -1 for a point lost.
    End: terminated when a side has 21 points; truncated after 27,000 steps.
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(
        self,
        all_actions: bool = False,
        repeat_action_probability: float = 0.25,  # of repeating the last action instead; 0 in NoFrameskip results
        render_mode: str | None = None,
    ):
        self.game = gym.make(
            "ale_py:ALE/Pong-v5",
            obs_type="grayscale",
            repeat_action_probability=repeat_action_probability,
            render_mode=render_mode,
            disable_env_checker=True,
        )
        self.render_mode = render_mode
        self.actions = range(6) if all_actions else (UP, DOWN)
        self.action_space = spaces.Discrete(len(self.actions))
        self.observation_space = spaces.Box(-1, 1, (80, 80), np.int8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin a game; returns (observation, info)."""
        super().reset(seed=seed)
        screen, _ = self.game.reset(seed=seed)
        self.court = crop(screen)
        return np.zeros((80, 80), np.int8), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Play four frames; returns (observation, reward, terminated, truncated, info)."""
        last_court = self.court
        screen, reward, terminated, truncated, _ = self.game.step(self.actions[action])
        self.court = crop(screen)
        return self.court - last_court, float(reward), terminated, truncated, {}

    def render(self) -> np.ndarray | None:
        """The screen as a player sees it, uint8 of shape (210, 160, 3)."""
        return self.game.render()

    def close(self) -> None:
        self.game.close()


def crop(screen: np.ndarray) -> np.ndarray:
    """The court of a grey screen, uint8 (210, 160), as int8 (80, 80): 1 for paddles and ball, 0 for background."""
    court = screen[COURT][::2, ::2]
    return ((court != BACKGROUND) & (court != FIRST_BACKGROUND)).astype(np.int8)


if "PongDifference-v0" not in gym.registry:  # a second import, or a reload, must not register it twice
    gym.register("PongDifference-v0", entry_point=f"{__name__}:PongEnv")


if __name__ == "__main__":
    from gymnasium.utils.env_checker import check_env

    check_env(gym.make("PongDifference-v0", render_mode="rgb_array").unwrapped)
    print("PongDifference-v0: ok")
