r"""Deep Deterministic Policy Gradient (DDPG).

DQN takes a maximum over actions, which a continuous space does not allow. DDPG trains a second network to find it: the
actor μ(s) climbs up the gradient of the critic Q(s, a) with respect to the action. The critic is fitted as in DQN,
on transitions from a replay buffer, with the actor's action in place of the best one; the targets come from slow copies
of both networks.

    y = r + γ (1 - terminated) Q_targ(s', μ_targ(s'))
    critic:   minimise E[ (Q(s, a) - y)² ]; y is a constant           actor:   maximise E[ Q(s, μ(s)) ]
    φ_targ ← τ φ + (1 - τ) φ_targ, for the parameters φ of both

μ is deterministic, so noise is added to its actions for exploration. Actions and noise are in units of half the range
of each axis, so that the bounds are -1 and 1; an axis without two bounds is played in its own units, but within [-1, 1]
all the same. Either every step's noise is new, ε_t ~ N(0, σ²), or it follows an Ornstein-Uhlenbeck process, whose
correlation falls by a factor 1 - θ a step, so that the noise keeps pushing one way for about 1/θ steps:

    x_t = (1 - θ) x_{t-1} + √(1 - (1 - θ)²) ε_t,   x = 0 before an episode, θ = 0.15 (θ = 1 is white noise again)

In the long run its standard deviation is σ, too (the paper's σ = 0.2, of the increments, is σ = 0.38 here).

T. P. Lillicrap, J. J. Hunt, A. Pritzel, N. Heess, T. Erez, Y. Tassa, D. Silver, D. Wierstra: Continuous control with
deep reinforcement learning, 2016, arXiv:1509.02971. Most defaults are those of S. Fujimoto, H. van Hoof, D. Meger:
Addressing Function Approximation Error in Actor-Critic Methods, 2018, arXiv:1802.09477, and of its later code.

    python algos/ddpg.py --env-id Pendulum-v1
    python algos/ddpg.py --env-id LunarLanderContinuous-v3 --total-timesteps 300000 --noise ou
    python algos/ddpg.py --env-id HalfCheetah-v5 --total-timesteps 1000000 --learning-starts 25000 \
        --learning-rate 3e-4 --gamma 0.99
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
from typing import Literal

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
    env_id: str = "Pendulum-v1"  # Gymnasium id of the environment; `module:Id-v0` imports the module first
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
    total_timesteps: int = 20_000  # environment steps to train for, all environments together
    num_envs: int = 1  # N parallel environments
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of actor and critic; none: linear
    learning_rate: float = 1e-3  # step size of Adam, for actor and critic
    gamma: float = 0.98  # discount γ
    buffer_size: int = 1_000_000  # the replay buffer keeps this many transitions, the last ones
    batch_size: int = 256  # transitions of a gradient step
    learning_starts: int = 1000  # random steps before learning; as many of the policy after a resume (empty buffer)
    tau: float = 0.005  # τ, φ_targ ← τ φ + (1-τ) φ_targ after each gradient step
    noise: Literal["gaussian", "ou"] = "gaussian"  # exploration noise: independent, or Ornstein-Uhlenbeck
    exploration_noise: float = 0.1  # σ of the noise, in units of half the range of each action

    def __post_init__(self):
        limits = (
            ("total_timesteps checkpoint_interval", 1, 1e12),
            ("num_envs hidden_sizes", 1, 1e4),
            ("batch_size", 1, 1e6),
            ("buffer_size", 1, 1e9),
            ("learning_rate", 1e-9, 1e9),
            ("tau", 1e-9, 1),
            ("gamma", 0, 1),
            ("exploration_noise learning_starts eval_episodes seed", 0, 1e9),
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
        if self.buffer_size < self.num_envs:
            raise UsageError("--buffer-size must be at least --num-envs")
        if self.total_timesteps // self.num_envs * self.num_envs < max(self.num_envs, self.learning_starts):
            raise UsageError(f"--total-timesteps must reach --learning-starts in multiples of {self.num_envs} steps")


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


# ==== shared: box actions
def box_scale(space: gym.spaces.Box):
    """A function that scales actions, shape (B, number of axes), to elements of a Box, shape (B, *space.shape).

    -1 and 1 become the low and the high of each axis, whatever they are. An axis without two finite bounds is passed
    through in its own units. What exceeds a bound is cut to it.
    """
    with np.errstate(over="ignore"):  # the largest floats as bounds are none
        bounded = np.isfinite(space.high - space.low)
    low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
    centre, half_range = (low + high) / 2, (high - low) / 2

    def scale(actions: np.ndarray) -> np.ndarray:
        actions = centre + half_range * actions.reshape(-1, *space.shape)
        return np.maximum(space.low, np.minimum(space.high, actions)).astype(space.dtype, copy=False)

    return scale


# ==== actor and critic
class Agent(nn.Module):
    """Actor μ(s) and critic Q(s, a).

    obs_space: Box, of any shape, which is flattened.
    action_space: Box of A floats. On an axis with two finite bounds μ in [-1, 1] is scaled to the bounds; elsewhere it
        is in the axis's own units, and in [-1, 1] all the same. Any other space is a UsageError.
    """

    obs_dtype = np.float32

    def __init__(self, obs_space: gym.spaces.Box, action_space: gym.Space, args: Args):
        super().__init__()
        if not (isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"):
            raise UsageError(f"ddpg.py takes float Box actions, not {action_space}; for Discrete use dqn.py or ppo.py")
        self.to_env = box_scale(action_space)
        self.num_actions = int(np.prod(action_space.shape))
        obs_size = int(np.prod(obs_space.shape))
        self.actor = mlp(obs_size, args.hidden_sizes, self.num_actions, 0.01, nn.ReLU)
        self.critic = mlp(obs_size + self.num_actions, args.hidden_sizes, 1, 1.0, nn.ReLU)

    def mu(self, obs: torch.Tensor) -> torch.Tensor:
        """μ(s) in [-1, 1], shape (B, num_actions)."""
        return self.actor(obs.reshape(len(obs), -1)).tanh()

    def q(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q(s, a), shape (B,), for actions in [-1, 1]."""
        return self.critic(torch.cat([obs.reshape(len(obs), -1), actions], 1)).squeeze(1)

    def policy(self):
        """μ as a function of arrays, obs to actions in [-1, 1] of shape (B, A), to be made anew after each update."""
        actor = numpy_mlp(self.actor)
        return lambda obs: np.tanh(actor(obs.reshape(len(obs), -1)))


# ==== replay buffer
class ReplayBuffer:
    """The last transitions (s, a, r, s', terminated), in a ring.

    size: transitions. A UsageError if they take more memory than is free.
    """

    def __init__(self, size: int, obs_shape: tuple, num_actions: int):
        needed = size * (4 * (2 * math.prod(obs_shape) + num_actions + 1) + 1)  # bytes
        free = psutil.virtual_memory().available
        if needed > free:
            raise UsageError(f"--buffer-size {size} takes {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free")
        self.obs, self.next_obs = np.zeros((2, size, *obs_shape), np.float32)
        self.actions = np.zeros((size, num_actions), np.float32)
        self.rewards = np.zeros(size, np.float32)
        self.terminated = np.zeros(size, bool)
        self.size, self.added = size, 0

    def add(self, obs, actions, rewards, next_obs, terminated) -> None:
        """Put in B transitions, arrays of shape (B, ...)."""
        place = (self.added + np.arange(len(rewards))) % self.size
        self.obs[place], self.actions[place], self.rewards[place] = obs, actions, rewards
        self.next_obs[place], self.terminated[place] = next_obs, terminated
        self.added += len(rewards)

    def sample(self, batch_size: int, rng: np.random.Generator, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Draw B transitions uniformly: obs (B, *obs_shape), actions (B, A), rewards, next_obs, terminated."""
        place = rng.integers(min(self.added, self.size), size=batch_size)
        arrays = (self.obs, self.actions, self.rewards, self.next_obs, self.terminated)
        return tuple(torch.as_tensor(x[place], device=device) for x in arrays)


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


# ==== DDPG
def bellman_target(target: Agent, rewards, next_obs, terminated, args: Args) -> torch.Tensor:
    """y of B transitions, shape (B,)."""
    with torch.no_grad():
        return rewards + args.gamma * ~terminated * target.q(next_obs, target.mu(next_obs))


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
    actor_parameters = list(agent.actor.parameters())
    actor_optimizer = torch.optim.Adam(actor_parameters, lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.learning_rate, fused=True)

    N, A = args.num_envs, agent.num_actions
    buffer = ReplayBuffer(args.buffer_size, envs.single_observation_space.shape, A)
    valid = np.ones(N, bool)  # false on steps that only reset
    noise, memory = np.zeros((N, A), np.float32), 0.85 if args.noise == "ou" else 0.0  # x and 1 - θ

    run = Run(args, rng, agent=agent, target=target, actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    actor_optimizer.param_groups[0]["lr"] = critic_optimizer.param_groups[0]["lr"] = args.learning_rate  # not resumed
    obs, _ = envs.reset(seed=args.seed + run.global_step)
    obs = obs.astype(agent.obs_dtype)
    while run.global_step + N <= args.total_timesteps:
        # A step of N environments, with noise, into the buffer.
        innovation = args.exploration_noise * rng.standard_normal((N, A), np.float32)  # ε
        noise = memory * noise + math.sqrt(1 - memory**2) * innovation
        if run.global_step < args.learning_starts:
            actions = rng.uniform(-1, 1, (N, A)).astype(np.float32)
        else:
            actions = (agent.policy()(obs) + noise).clip(-1, 1)
        next_obs, rewards, terminated, truncated, _ = envs.step(agent.to_env(actions))
        next_obs, rewards = next_obs.astype(agent.obs_dtype), rewards * valid
        ended = terminated | truncated
        buffer.add(*(x[valid] for x in (obs, actions, rewards, next_obs, terminated)))

        # N gradient steps, as many as environment steps, on transitions from the buffer.
        scalars = {"charts/learning_rate": args.learning_rate}
        if run.global_step + N >= run.first_step + args.learning_starts:
            for _ in range(N):
                b_obs, b_actions, b_rewards, b_next_obs, b_terminated = buffer.sample(args.batch_size, rng, device)
                y = bellman_target(target, b_rewards, b_next_obs, b_terminated, args)
                q = agent.q(b_obs, b_actions)
                critic_loss = F.mse_loss(q, y)
                critic_optimizer.zero_grad()
                critic_loss.backward()
                critic_optimizer.step()

                actor_loss = -agent.q(b_obs, agent.mu(b_obs)).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward(inputs=actor_parameters)
                actor_optimizer.step()
                update_target(target, agent, args.tau)
            scalars |= {
                "losses/critic_loss": critic_loss.item(),
                "losses/actor_loss": actor_loss.item(),
                "losses/q_values": q.mean().item(),
            }
        run.log_rollout(next_obs, rewards[None], ended[None], valid[None], scalars)
        noise *= valid[:, None]  # x = 0 before an episode: after a step that only reset
        obs, valid = next_obs, ~ended
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
