r"""Deep Q-Network (DQN), and Double DQN.

Q-learning with a network: Q(s, a) estimates the return of action a in state s when all later actions are the best
ones. It is fitted by regression to its own estimate one step later, the Bellman target. Two things make that stable:
transitions are drawn at random from a replay buffer, so that those of a batch are seldom neighbours in time, and the
target is computed by a copy of the network, Q_targ, that follows only slowly.

    y = r + γ (1 - terminated) max_a' Q_targ(s', a')
    L = E[ (Q(s, a) - y)² ], minimised with Adam; y is a constant

The maximum of noisy estimates is too high on average. Double DQN (--double-q) lets one network choose the action and
the other tell its value:

    y = r + γ (1 - terminated) Q_targ(s', argmax_a' Q(s', a'))

(The paper clips the error of each transition to ±1. We do not: with that, the many small errors outweigh the few large
ones at the ends of episodes, and on CartPole Q diverged.)

Actions are ε-greedy: the best one, or with probability ε, which falls linearly, a random one. With no --hidden-sizes Q
is linear, and on a Discrete observation, which is flattened to one-hot, a table (plus a bias for each action): tabular
Q-learning with replay.

V. Mnih et al.: Human-level control through deep reinforcement learning, Nature 518, 2015. Double DQN: H. van Hasselt,
A. Guez, D. Silver: Deep Reinforcement Learning with Double Q-learning, 2016, arXiv:1509.06461.

    python algos/dqn.py --env-id CartPole-v1
    python algos/dqn.py --env-id CliffWalking-v1 --hidden-sizes --learning-rate 0.1 --total-timesteps 20000 \
        --train-frequency 2 --target-network-frequency 50 --tau 1 --exploration-fraction 0.5
    python algos/dqn.py --env-id ALE/Pong-v5 --total-timesteps 10000000 --num-envs 4 --buffer-size 1000000 \
        --learning-starts 80000 --train-frequency 4 --batch-size 32 --hidden-sizes 512 --learning-rate 1e-4 \
        --target-network-frequency 1000 --tau 1 --exploration-fraction 0.1 --end-e 0.01
"""

import contextlib
import copy
import importlib.util
import io
import math
import os
import shlex
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class UsageError(Exception):
    """What the user asked for cannot be done: `main` prints the sentence and exits with status 2."""


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment; `module:Id-v0` imports the module first
    # shared: arguments
    exp_name: str = Path(__file__).stem  # a part of the run folder's name
    seed: int = 1  # random seed of the weights, actions, minibatches and environments
    device: str = "auto"  # auto (the best there is), cpu, cuda, cuda:N or mps
    async_envs: bool = False  # train with a process per environment, if several, for slow ones (Atari has threads)
    log_dir: str = "runs"  # where the run's folder is made
    track: bool = False  # mirror the run to Weights & Biases (needs the package wandb)
    eval_episodes: int = 10  # episodes of the deterministic policy after training (0: none)
    capture_video: bool = False  # record the evaluation episodes as mp4 into the run's folder
    checkpoint_interval: int = 50_000  # environment steps between checkpoints
    resume: str = ""  # resume from this checkpoint, in its folder, with its arguments; a flag given beside it wins
    evaluate: str = ""  # no training: evaluate this checkpoint
    # shared: end
    total_timesteps: int = 100_000  # environment steps to train for, all environments together
    num_envs: int = 1  # N parallel environments
    hidden_sizes: tuple[int, ...] = (120, 84)  # widths of the hidden layers of Q; none: linear
    learning_rate: float = 1e-3  # step size of Adam
    gamma: float = 0.99  # discount γ
    buffer_size: int = 100_000  # the replay buffer keeps the last transitions, about this many
    batch_size: int = 128  # transitions of a gradient step
    learning_starts: int = 1000  # steps before learning; so many again after a resume: the buffer is not saved
    train_frequency: int = 4  # environment steps between updates of Q, rounded down to whole steps of all environments
    gradient_steps: int = 1  # gradient steps of each update
    target_network_frequency: int = 20  # environment steps between updates of Q_targ
    tau: float = 0.05  # τ, Q_targ ← τ Q + (1-τ) Q_targ: 1 copies
    start_e: float = 1.0  # ε at the start
    end_e: float = 0.05  # ε at the end
    exploration_fraction: float = 0.2  # share of the training in which ε falls from start_e to end_e
    double_q: bool = False  # Double DQN: Q chooses the action in y, Q_targ tells its value

    def __post_init__(self):
        limits = (
            ("total_timesteps checkpoint_interval", 1, 1e12),
            ("num_envs hidden_sizes gradient_steps", 1, 1e4),
            ("batch_size", 1, 1e6),
            ("buffer_size train_frequency target_network_frequency", 1, 1e9),
            ("learning_rate", 1e-9, 1e9),
            ("tau", 1e-9, 1),
            ("gamma start_e end_e exploration_fraction", 0, 1),
            ("learning_starts eval_episodes seed", 0, 1e9),
        )
        # shared: validation
        for names, low, high in limits:
            for name in names.split():
                for value in np.atleast_1d(getattr(self, name)):
                    if value is not None and not low <= value <= high:  # NaN fails this, too
                        raise UsageError(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}, not {value}")
        if self.evaluate and (self.resume or self.eval_episodes == 0):
            raise UsageError("--evaluate needs --eval-episodes of at least 1, and does not go with --resume")
        # shared: end
        if self.buffer_size < 2 * self.num_envs:
            raise UsageError("--buffer-size must be at least twice --num-envs")
        stride = self.num_envs * max(self.train_frequency // self.num_envs, 1)  # between updates
        if self.total_timesteps // stride * stride < max(stride, self.learning_starts):
            raise UsageError(f"--total-timesteps must reach --learning-starts in multiples of {stride} steps")


# ==== shared: command line
def parse_args() -> Args:
    """Read the command line. With --resume or --evaluate, the checkpoint's arguments are the defaults."""

    def checkpoint_path(resume: str = "", evaluate: str = "") -> str:
        return resume or evaluate

    box = io.StringIO()  # tyro complains in a drawn box: what is above its first inner line becomes one sentence
    try:
        with contextlib.redirect_stderr(box):
            path, _ = tyro.cli(checkpoint_path, return_unknown_args=True, add_help=False)  # sets the defaults
            default = Args(**load_checkpoint(path)["args"]) if path else Args()
            return tyro.cli(Args, default=default, description=__doc__)
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        sentence = box.getvalue().split("│ ─")[0].splitlines()[1:]
        raise UsageError(" ".join(line.strip("│╰╯─ ") for line in sentence)) from None


def select_device(name: str) -> torch.device:
    """The device of that name; for "auto" the best there is."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if name == "auto" else name)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0].split('. ')[0]}") from error


# ==== shared: environments
def make_envs(args: Args, num_envs: int, evaluation: bool = False, video_folder: Path | None = None):
    """Make a vector environment that resets on the next step and has Box observations (other spaces are flattened).

    Atari's rewards, and so its curves, are clipped to ±1 in training but not in evaluation. With `video_folder`
    every episode is written there as mp4.
    """
    atari = args.env_id.split(":")[-1].startswith("ALE/")
    env_id = f"ale_py:{args.env_id}" if args.env_id.startswith("ALE/") else args.env_id
    options = {"vectorization_mode": "async" if args.async_envs and not (atari or evaluation) else None}
    if video_folder:
        wrappers = [lambda env: gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda _: True)]
        if atari:  # what ale-py's vector environment, which cannot render, does in C++ (but for its fire-reset)
            stack = [gym.wrappers.AtariPreprocessing, lambda env: gym.wrappers.FrameStackObservation(env, 4)]
            options["frameskip"], wrappers = 1, stack + wrappers
        options |= {"vectorization_mode": "sync", "render_mode": "rgb_array", "wrappers": wrappers}
    elif atari:
        options["reward_clipping"] = not evaluation
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # environments draw off screen, and there may be no screen
    if args.capture_video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes of --async-envs
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of an old id
            module, _, name = env_id.rpartition(":")
            if env_id.startswith((".", ":")):
                raise gym.error.Error("a module is named as in envs.template:Template-v0")
            if module:
                importlib.import_module(module)
            if num_envs == 1 and not atari and name in gym.registry and gym.registry[name].entry_point:
                options["vectorization_mode"] = "sync"  # for one, faster than its own vector implementation
            envs = gym.make_vec(env_id, num_envs, **options)
        if args.capture_video and "rgb_array" not in envs.metadata.get("render_modes", ["rgb_array"]):
            raise UsageError(f"--capture-video needs the render mode rgb_array, which {args.env_id} lacks")
        if args.capture_video and not video_folder:  # what cannot be rendered should show now, not after the training
            with contextlib.closing(gym.make(env_id, render_mode="rgb_array")) as probe:
                probe.reset()
                try:
                    probe.render()
                except Exception as error:  # each renderer fails in its own way
                    raise UsageError(f"--capture-video: {args.env_id} cannot be rendered here: {error}") from error
    except (gym.error.Error, ImportError) as error:
        install = " (pip install ale-py)" if atari and isinstance(error, ImportError) else ""
        raise UsageError(f"cannot make the environment {args.env_id}: {error}{install}") from error
    finally:
        signal.signal(signal.SIGINT, handler)
    space = envs.single_observation_space
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UsageError(f"{args.env_id} must reset on the next step (AutoresetMode.NEXT_STEP)")
    if not space.is_np_flattenable:
        raise UsageError(f"{args.env_id} has observations that cannot be flattened to an array: {space}")
    return envs if isinstance(space, gym.spaces.Box) else gym.wrappers.vector.FlattenObservation(envs)


# ==== shared: networks
def layer_init(layer: nn.Module, gain: float = np.sqrt(2)) -> nn.Module:
    """Orthogonal weights, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(input_size: int, hidden_sizes: tuple[int, ...], output_size: int, gain: float, activation=nn.Tanh):
    """Linear layers with activations between them; a single linear one if there are no hidden sizes."""
    layers = []
    for size in hidden_sizes:
        layers += [layer_init(nn.Linear(input_size, size)), activation()]
        input_size = size
    return nn.Sequential(*layers, layer_init(nn.Linear(input_size, output_size), gain))


def numpy_mlp(network: nn.Sequential):
    """An `mlp` as a function of arrays, to be made anew after each update.

    For the few rows of one step numpy takes a third of torch's time, and need not wait for a GPU.
    """
    *hidden, last = [(layer.weight.numpy(force=True).T, layer.bias.numpy(force=True)) for layer in [*network][::2]]
    activate = np.tanh if nn.Tanh in map(type, network) else lambda x: np.maximum(x, 0)

    def forward(x: np.ndarray) -> np.ndarray:
        for weight, bias in hidden:
            x = activate(x @ weight + bias)
        return x @ last[0] + last[1]

    return forward


# ==== shared: images
class Convolutions(nn.Sequential):
    """Those of Mnih et al. (2015), for images with their channels, the shortest axis, first or last."""

    def __init__(self, space: gym.spaces.Box):
        self.channels_last = space.shape[2] < space.shape[0]  # a plain bool may be set before super().__init__
        sizes = (min(space.shape[0], space.shape[2]), 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)  # in, out, size, stride
        layers = [layer for size in sizes for layer in (layer_init(nn.Conv2d(*size)), nn.ReLU())]
        super().__init__(*layers, nn.Flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, shape (B, num_features), of uint8 images."""
        return super().forward((images.permute(0, 3, 1, 2) if self.channels_last else images) / 255)


# ==== Q
class Agent(nn.Module):
    """Q(s, ·), and the policy that is greedy with respect to it.

    obs_space: Box. uint8 images (three axes, channels first or last, 36 pixels a side or more) go through the
        convolutions of Mnih et al. (2015); anything else is a vector.
    action_space: Discrete(n). Any other is a UsageError.
    """

    def __init__(self, obs_space: gym.spaces.Box, action_space: gym.Space, args: Args):
        super().__init__()
        if not isinstance(action_space, gym.spaces.Discrete):
            raise UsageError(f"dqn.py takes Discrete actions, not {action_space}; for float Box use ddpg.py or ppo.py")
        self.num_actions = int(action_space.n)
        self.to_env = lambda actions: (actions + action_space.start).astype(action_space.dtype, copy=False)
        shape = obs_space.shape
        self.is_image = obs_space.dtype == np.uint8 and len(shape) == 3 and min(shape[1], max(shape[0], shape[2])) >= 36
        self.obs_dtype = np.uint8 if self.is_image else np.float32
        self.convolutions = Convolutions(obs_space) if self.is_image else None
        num_features = self.features(torch.zeros(1, *obs_space.shape)).shape[1]
        self.q = mlp(num_features, args.hidden_sizes, self.num_actions, 1.0, nn.ReLU)

    def features(self, obs: torch.Tensor) -> torch.Tensor:
        """The input of the linear layers, shape (B, num_features), made of `obs`, shape (B, *obs_space.shape)."""
        return self.convolutions(obs) if self.is_image else obs.reshape(len(obs), -1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Q(s, ·), shape (B, num_actions)."""
        return self.q(self.features(obs))

    def policy(self):
        """argmax_a Q(s, a) as a function of arrays, obs to actions of shape (B,), to be made anew after each update."""
        if not self.is_image:
            q = numpy_mlp(self.q)
            return lambda obs: q(obs.reshape(len(obs), -1)).argmax(-1)

        @torch.inference_mode()
        def act(obs):
            return self(torch.as_tensor(obs, device=self.q[0].weight.device)).argmax(-1).numpy(force=True)

        return act


# ==== replay buffer
class ReplayBuffer:
    """The last transitions (s, a, r, s', terminated) of N environments, in a ring that stores every frame once.

    A place of the ring holds an observation and what was done there; `next_place` says where s' is, the one that the
    same environment stores next. The step that only resets leads from the end of an episode to the start of the next:
    no transition, and never sampled. Of an image with channels first, taken for stacked frames, only the newest frame
    is stored if the others are those of the observation before. So a million Atari transitions take 7.1 GB (56 GB with
    both stacks of each); an image that is no such stack takes a place for each of its channels.

    size: places, of all environments together. A UsageError if they take more memory than is free.
    """

    def __init__(self, size: int, num_envs: int, obs_shape: tuple, obs_dtype):
        is_stack = obs_dtype == np.uint8 and len(obs_shape) == 3 and obs_shape[0] < obs_shape[2]
        self.stack, frame_shape = (obs_shape[0], obs_shape[1:]) if is_stack else (1, obs_shape)
        self.num_envs, self.obs_shape = num_envs, obs_shape
        self.places = num_envs * (math.ceil(size / num_envs) + 3 * self.stack - 2)
        other = 8 + 4 + 1 + 1 + 8  # bytes of action, reward, terminated, valid, next_place
        needed = self.places * (np.zeros(frame_shape, obs_dtype).nbytes + other)
        free = psutil.virtual_memory().available
        if needed > free:
            raise UsageError(f"--buffer-size {size} takes {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free")
        self.frames = np.zeros((self.places, *frame_shape), obs_dtype)
        self.actions, self.next_place = np.zeros((2, self.places), np.int64)
        self.rewards = np.zeros(self.places, np.float32)
        self.terminated, self.valid = np.zeros((2, self.places), bool)
        self.place = np.arange(num_envs) - num_envs  # of each environment's last observation; the next is N further
        self.last_obs = np.zeros((num_envs, self.stack, *frame_shape), obs_dtype)
        self.used = 0  # places before this one may be in use

    def store(self, obs: np.ndarray) -> None:
        """Put in the environments' observations, shape (N, *obs_shape)."""
        obs = obs.reshape(self.num_envs, self.stack, *self.frames.shape[1:])
        if self.stack > 1:
            changed = np.flatnonzero((obs[:, :-1] != self.last_obs[:, 1:]).any(axis=(1, 2, 3)))
            self.last_obs[:] = obs
        for k in range(self.stack):  # the older frames only where they are not those of the observation before
            n = changed if k < self.stack - 1 else slice(None)
            self.place[n] = place = (self.place[n] + self.num_envs) % self.places
            self.frames[place], self.valid[place] = obs[n, k], False
            for later in range(1, self.stack):  # these, too, contained the frame that was here
                self.valid[(place + later * self.num_envs) % self.places] = False
            if self.used < self.places:
                self.used = max(self.used, place.max(initial=-1) + 1)

    def add(self, actions, rewards, next_obs, terminated, valid) -> None:
        """Put in the transitions from the observations that were stored last, arrays (N, ...)."""
        place = self.place.copy()
        self.actions[place], self.rewards[place], self.terminated[place] = actions, rewards, terminated
        self.store(next_obs)
        self.next_place[place], self.valid[place] = self.place, valid

    def sample(self, batch_size: int, rng: np.random.Generator, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Draw B transitions uniformly: obs (B, *obs_shape), actions (B,), rewards, next_obs, terminated."""
        place = rng.integers(self.used, size=batch_size)
        while not (valid := self.valid[place]).all():
            place[~valid] = rng.integers(self.used, size=batch_size - valid.sum())
        back = self.num_envs * np.arange(self.stack)[::-1]
        obs, next_obs = (
            self.frames[(p[:, None] - back) % self.places].reshape(batch_size, *self.obs_shape)
            for p in (place, self.next_place[place])
        )
        batch = (obs, self.actions[place], self.rewards[place], next_obs, self.terminated[place])
        return tuple(torch.as_tensor(x, device=device) for x in batch)


# ==== shared: target network
def update_target(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Polyak averaging, φ_targ ← τ φ + (1-τ) φ_targ; with τ = 1 a copy."""
    with torch.no_grad():  # all parameters in one call, as in torch.optim.swa_utils
        torch._foreach_lerp_([*target.parameters()], [*online.parameters()], tau)


# ==== shared: evaluation
def evaluate(agent: Agent, args: Args, checkpoint: Path) -> list[float]:
    """Play and print `args.eval_episodes` whole episodes of the deterministic policy; gives their returns.

    They are played in batches, one in each environment. Of the last batch those of the first environments count: to
    take those that end first would favour the short ones. One that does not end is cut after 27,000 steps (Atari's half
    hour). Videos go beside the checkpoint.
    """
    num_envs, returns = 1 if args.capture_video else min(max(args.eval_episodes, 1), 16), []
    video_folder = checkpoint.parent / f"videos-{int(time.time())}" if args.capture_video else None
    envs = make_envs(args, num_envs, evaluation=True, video_folder=video_folder)
    act = agent.policy()
    while len(returns) < args.eval_episodes:
        obs, _ = envs.reset(seed=args.seed + 10**7 + len(returns))  # others than those of the training
        totals, ended = np.zeros(num_envs), np.zeros(num_envs, bool)
        for _ in range(27_000):
            actions = agent.to_env(act(obs.astype(agent.obs_dtype)))
            obs, rewards, terminated, truncated, _ = envs.step(actions)
            totals += rewards * ~ended
            ended |= terminated | truncated
            if ended.all():
                break
        returns += totals.tolist()
    envs.close()
    returns = returns[: args.eval_episodes]
    mean, std = (np.mean(returns), np.std(returns)) if returns else (np.nan, np.nan)
    print(f"eval: mean_return={mean:.2f} std={std:.2f} episodes={len(returns)} checkpoint={checkpoint}")
    return returns


# ==== shared: run
def load_checkpoint(path: str | Path, **modules) -> dict:
    """Read a checkpoint (plain types and tensors only, which cannot run code), and restore `modules` from it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        Args(**checkpoint["args"])  # raises if these are not the arguments of this file
        checkpoint["global_step"], checkpoint["rng"]  # KeyError if one of these is missing
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        return checkpoint
    except Exception as error:  # whatever a missing, damaged or foreign file leads to
        fits = "that fits this environment and these arguments" if modules else "that can be read"
        why = getattr(error, "strerror", None) or f"it is not a checkpoint of {Path(__file__).name} {fits}"
        raise UsageError(f"cannot use the checkpoint {path}: {why}") from error


class Run:
    """A run's folder with its checkpoint and TensorBoard events, the progress bar, and the answer to Ctrl-C.

    modules: what the checkpoint keeps, by name; each has a `state_dict`.
    """

    def __init__(self, args: Args, rng: np.random.Generator, **modules):
        for flag, package in {"track": "wandb", "capture_video": "moviepy"}.items():
            if getattr(args, flag) and not importlib.util.find_spec(package):
                raise UsageError(f"--{flag.replace('_', '-')} needs a package that is missing: pip install {package}")
        self.args, self.rng, self.modules, self.global_step, self.interrupted = args, rng, modules, 0, False
        folder = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.folder = Path(args.log_dir) / folder.replace("/", "-").replace(":", "-")
        if args.resume:
            checkpoint = load_checkpoint(args.resume, **modules)
            self.global_step, rng.bit_generator.state = checkpoint["global_step"], checkpoint["rng"]
            self.folder = Path(args.resume).parent
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(args.resume))
        except OSError as error:
            raise UsageError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        if args.track:
            import wandb

            options = {"name": self.folder.name, "dir": self.folder.parent, "config": vars(args)}
            try:
                self.wandb_run = wandb.init(**options, sync_tensorboard=True)
            except wandb.errors.Error as error:  # not logged in, say
                with contextlib.suppress(OSError):  # that of a resumed run is not empty, and stays
                    self.folder.rmdir()
                raise UsageError(f"--track: {error}") from error
        self.writer = SummaryWriter(str(self.folder), purge_step=(self.global_step + 1) if args.resume else None)
        self.writer.add_text("args", "\n".join(f"    {k} = {v}" for k, v in vars(args).items()), self.global_step)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.first_step, self.start_time = self.global_step, time.perf_counter()
        self.running, self.returns = np.zeros((2, args.num_envs)), []
        self.bar = tqdm(desc=args.env_id, total=args.total_timesteps, initial=self.global_step, unit=" steps")
        self.show_error, sys.excepthook = sys.excepthook, self.crash
        self.save()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.interrupt)

    def interrupt(self, signum: int, frame) -> None:
        """Ctrl-C or SIGTERM: stop at the next point where all is whole; a second one kills at once."""
        self.interrupted = True
        signal.signal(signum, signal.SIG_DFL)
        os.write(2, b"\nstopping soon; once more stops at once, at the last checkpoint\n")

    def log_rollout(self, obs, rewards, ended, valid, scalars: dict[str, float]) -> None:
        """Log T steps of N environments, arrays (T, N), and the episodes that ended in them; a checkpoint when due.

        obs, of any shape: what the environments have shown since the last call. What is not finite ends the run.
        """
        totals = self.running[:, None] + np.cumsum([rewards, valid], axis=1, dtype=float)  # return, length so far
        for t, n in np.argwhere(ended):
            episodic_return, length = totals[:, t, n]
            totals[:, t:, n] -= [[episodic_return], [length]]  # the next episode counts from here
            step = self.global_step + (t + 1) * ended.shape[1]
            self.writer.add_scalar("charts/episodic_return", episodic_return, step)
            self.writer.add_scalar("charts/episodic_length", length, step)
            self.returns.append(episodic_return)
        self.running = totals[:, -1]

        self.global_step += ended.size
        for name, numbers in {"an observation": obs, "a reward": rewards, **scalars}.items():
            if not np.isfinite(numbers).all():  # must not get into the checkpoint
                hint = "; a lower --learning-rate may help" if name in scalars else ""
                self.stop(1, f"error: {name} is not finite{hint}")
        if self.global_step % max(self.args.total_timesteps // 1000, 1) < ended.size:  # 1000 points make a curve
            sps = (self.global_step - self.first_step) / (time.perf_counter() - self.start_time)
            for name, value in {**scalars, "charts/SPS": sps}.items():
                self.writer.add_scalar(name, value, self.global_step)
            if self.returns:
                self.bar.set_postfix_str(f"return {np.mean(self.returns[-100:]):.1f}", refresh=False)
        self.bar.update(ended.size)
        if self.interrupted or self.global_step % self.args.checkpoint_interval < ended.size:
            self.save()

    def stop(self, status: int, reason: str) -> None:
        """Say why the run ends here and how to go on, and exit."""
        self.bar.close()
        with contextlib.suppress(OSError):  # of a full disk
            self.writer.close()
        command = shlex.join(["python", sys.argv[0], "--resume", str(self.checkpoint)])
        sentence = f"{reason} (step {self.global_step}); resume from the last checkpoint with: {command}"
        print(sentence, file=sys.stdout if status == 130 else sys.stderr)
        sys.exit(status)

    def crash(self, kind: type, error: BaseException, traceback) -> None:
        """Python calls it with what nobody has caught, such as an error of the environment, or a full disk."""
        died = self.args.async_envs and isinstance(error, EOFError | ConnectionError)
        if died and self.interrupted:  # SIGTERM was sent to the processes, too; no update was under way
            sys.stderr = io.StringIO()  # for Gymnasium's complaints that it cannot close what has died
            self.save()  # and exit
        self.show_error(kind, error, traceback)
        what = "an environment's process has died" if died else f"{kind.__name__}: {' '.join(str(error).split())}"
        self.stop(1, f"error: {what}")

    def save(self) -> None:
        """Write the checkpoint to another file, flush and rename it: a kill at any moment leaves a whole one."""
        if not all(tensor.isfinite().all() for tensor in self.modules["agent"].state_dict().values()):
            self.stop(1, "error: a weight is not finite; a lower --learning-rate may help")
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"global_step": self.global_step, "rng": self.rng.bit_generator.state}
        state["args"] = vars(self.args) | {"resume": "", "evaluate": ""}
        temporary = self.checkpoint.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.checkpoint)
        if self.interrupted:
            self.stop(130, "stopped")

    def finish(self, agent: Agent) -> None:
        """Write the last checkpoint, evaluate the agent, and print the result."""
        self.save()
        self.bar.total = self.bar.n  # the rest of the budget is too short for an update
        self.bar.close()
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.default_int_handler)  # raises KeyboardInterrupt
            returns = evaluate(agent, self.args, self.checkpoint)
        except KeyboardInterrupt:
            self.stop(130, "stopped")
        for episode, episodic_return in enumerate(returns):
            self.writer.add_scalar("eval/episodic_return", episodic_return, self.global_step + episode)  # a point each
        self.writer.close()
        if self.args.track:
            self.wandb_run.finish()


# ==== DQN
def bellman_target(agent: Agent, target: Agent, rewards, next_obs, terminated, args: Args) -> torch.Tensor:
    """y of B transitions, shape (B,)."""
    with torch.no_grad():
        next_q = target(next_obs)
        best = (agent(next_obs) if args.double_q else next_q).argmax(1, keepdim=True)
        return rewards + args.gamma * ~terminated * next_q.gather(1, best).squeeze(1)


def linear_epsilon(args: Args, step):
    """ε at a step, or at an array of steps."""
    share = np.minimum(step / max(args.exploration_fraction * args.total_timesteps, 1e-9), 1)
    return args.start_e + share * (args.end_e - args.start_e)


def train(args: Args) -> Agent:
    """Train an agent, evaluate it, return it. A UsageError comes before anything is written."""
    # shared: setup
    device = select_device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    rng = np.random.default_rng(args.seed)
    envs = make_envs(args, args.num_envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    # shared: end
    target = copy.deepcopy(agent).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)

    N = args.num_envs
    T = max(args.train_frequency // N, 1)  # steps of each environment between updates
    buffer = ReplayBuffer(args.buffer_size, N, envs.single_observation_space.shape, agent.obs_dtype)
    obs = np.zeros((T + 1, *envs.observation_space.shape), agent.obs_dtype)  # row T: what follows the T steps
    rewards = np.zeros((T, N), np.float32)
    ended, valid = np.zeros((T, N), bool), np.ones((T, N), bool)  # valid: false on steps that only reset

    run = Run(args, rng, agent=agent, target=target, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = args.learning_rate  # not that of a resumed optimizer
    obs[T], _ = envs.reset(seed=args.seed + run.global_step)
    buffer.store(obs[T])
    while run.global_step + T * N <= args.total_timesteps:
        # T steps of N environments, ε-greedy, into the buffer.
        epsilon = linear_epsilon(args, run.global_step + N * np.arange(T))
        explore, random_actions = rng.random((T, N)) < epsilon[:, None], rng.integers(agent.num_actions, size=(T, N))
        obs[0], act = obs[T], agent.policy()
        for t in range(T):
            actions = random_actions[t] if explore[t].all() else np.where(explore[t], random_actions[t], act(obs[t]))
            obs[t + 1], rewards[t], terminated, truncated, _ = envs.step(agent.to_env(actions))
            valid[t] = ~ended[t - 1]  # row -1 is, until it is overwritten, the last of the steps before
            rewards[t] *= valid[t]
            buffer.add(actions, rewards[t], obs[t + 1], terminated, valid[t])
            ended[t] = terminated | truncated

        # Gradient steps, on transitions from the buffer.
        scalars = {"charts/epsilon": epsilon[-1], "charts/learning_rate": args.learning_rate}
        if run.global_step + T * N >= run.first_step + args.learning_starts:
            for _ in range(args.gradient_steps):
                b_obs, b_actions, b_rewards, b_next_obs, b_terminated = buffer.sample(args.batch_size, rng, device)
                y = bellman_target(agent, target, b_rewards, b_next_obs, b_terminated, args)
                q = agent(b_obs).gather(1, b_actions[:, None]).squeeze(1)
                loss = F.mse_loss(q, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scalars |= {"losses/q_loss": loss.item(), "losses/q_values": q.mean().item()}
            if run.global_step % args.target_network_frequency < T * N:
                update_target(target, agent, args.tau)
        run.log_rollout(obs, rewards, ended, valid, scalars)
    envs.close()
    run.finish(agent)
    return agent


# ==== shared: main
def main() -> None:
    """Run the command line. Exit status: 0 done, 1 failed, 2 bad arguments, 130 interrupted."""
    sys.path.insert(0, os.getcwd())  # `my_env:MyEnv-v0` finds my_env.py in the folder the user stands in
    try:
        args = parse_args()
        if not args.evaluate:
            train(args)
            return
        envs = make_envs(args, num_envs=1, evaluation=True)
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(select_device(args.device))
        load_checkpoint(args.evaluate, agent=agent)
        evaluate(agent, args, Path(args.evaluate))
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
# shared: end
