"""More tiny environments, for DQN and DDPG. Use one as `tests.tiny_control:Reach-v0`, from the repository's root."""

import time
from collections import defaultdict
from typing import ClassVar

import gymnasium as gym
import numpy as np
from conftest import read_events
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
}

register(ENVS)


# ---- short runs, and what they learn from

SMALL = dict(eval_episodes=1, device="cpu", hidden_sizes=(16,), batch_size=16, buffer_size=500, learning_starts=20)


def train(module, env, log_dir, **args):
    """A run; an environment without a module is one of tiny_envs."""
    Trace.log.clear()
    BoxTrace.log.clear()
    env_id = env if ":" in env else f"tests.tiny_envs:{env}"
    return module.train(module.Args(**SMALL | {"env_id": env_id, "log_dir": str(log_dir)} | args))


def resume(module, env, log_dir, **args):
    """Go on with the only run in that folder."""
    time.sleep(1 - time.time() % 1)  # TensorBoard orders logs by the second in which they begin
    return train(module, env, log_dir, resume=str(next(log_dir.glob("*/checkpoint.pt"))), **args)


def watch(module, patch):
    """A list to which each batch that is drawn will be added, with the environment steps until then."""
    batches, now, log_step, sample = [], [0], module.Run.log_step, module.ReplayBuffer.sample

    def spy_on_step(run, *args):
        log_step(run, *args)
        now[0] = run.global_step

    def spy_on_sample(buffer, *args):
        batch = sample(buffer, *args)
        batches.append((now[0], [np.asarray(x).copy() for x in batch]))
        return batch

    patch.setattr(module.Run, "log_step", spy_on_step)
    patch.setattr(module.ReplayBuffer, "sample", spy_on_sample)
    return batches


def check_transitions(batches, log, log_dir, to_env=lambda action: action):
    """Assert that what was drawn is what was played, nearly all of it, and that the log has its episodes."""
    played, drawn, returns, ended = {step[:3]: step for step in log if step.env < 10**6}, set(), defaultdict(float), []
    for step in played.values():
        returns[step[:2]] += step.reward
        ended += [returns[step[:2]]] * (step.terminated or step.truncated)
    for _, batch in batches:
        for obs, action, reward, next_obs, terminated in zip(*batch, strict=True):
            step = played[tuple(map(int, obs))]
            drawn.add(step[:3])
            assert next_obs.tolist() == [step.env, step.episode, step.step + 1]  # not the first of the next episode
            np.testing.assert_allclose(to_env(action), step.action, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(reward, step.reward, rtol=1e-4, atol=1e-4)
            assert terminated == step.terminated  # a truncation is none
    assert len(drawn) > 0.9 * len(played)
    logged = read_events(next(log_dir.iterdir()))["charts/episodic_return"]
    np.testing.assert_allclose(sorted(x for _, x in logged), sorted(ended), rtol=1e-4, atol=1e-4)
