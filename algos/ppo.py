r"""Proximal Policy Optimization (PPO), the clipped form.

A policy gradient holds only near the policy that collected the data, so A2C takes one step per rollout and throws the
rollout away. PPO takes many: several epochs of minibatches over the same rollout, with an objective that stops
rewarding an action once the probability ratio ρ has left [1-ε, 1+ε] in the direction that its advantage favours.

    ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)
    L   = E_t[ min(ρ_t Â_t, clip(ρ_t, 1-ε, 1+ε) Â_t) - c_v (V_θ(s_t) - R̂_t)² + c_e H[π_θ(·|s_t)] ], maximised
    Â_t = Σ_{l≥0} (γλ)^l δ_{t+l},   δ_t = r_t + γ V(s_{t+1}) - V(s_t),   R̂_t = Â_t + V(s_t)

where V is 0 in a terminal state and the sum stops where the episode ends.

J. Schulman, F. Wolski, P. Dhariwal, A. Radford, O. Klimov: Proximal Policy Optimization Algorithms, 2017,
arXiv:1707.06347. Â_t is GAE(λ): J. Schulman, P. Moritz, S. Levine, M. Jordan, P. Abbeel, 2016, arXiv:1506.02438.

    python algos/ppo.py --env-id CartPole-v1
    python algos/ppo.py --env-id HalfCheetah-v5 --total-timesteps 1000000 --num-envs 1 --num-steps 2048 \
        --num-minibatches 32 --learning-rate 3e-4 --gae-lambda 0.92 --log-std-init -1 --target-kl 0.03 \
        --norm-obs --norm-reward
    python algos/ppo.py --env-id ALE/Pong-v5 --total-timesteps 10000000 --num-envs 8 --num-steps 128 \
        --update-epochs 4 --learning-rate 2.5e-4 --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.01 --hidden-sizes 512
"""

import contextlib
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
    total_timesteps: int = 60_000  # environment steps to train for, all environments together
    num_envs: int = 32  # N parallel environments
    num_steps: int = 32  # T steps of each environment per rollout
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the hidden layers of actor and critic; none: linear
    log_std_init: float = 0.0  # initial log σ of the Gaussian policy; 0: σ is half the range of each action
    learning_rate: float = 2e-3  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the training
    gamma: float = 0.98  # discount γ
    gae_lambda: float = 0.8  # λ of GAE: 0 is the one-step TD error, 1 the Monte-Carlo return with bootstrap
    update_epochs: int = 10  # K epochs over each rollout
    num_minibatches: int = 4  # minibatches per epoch
    clip_coef: float = 0.2  # ε, how far the probability ratio may move from 1
    clip_vloss: bool = False  # let the value move by ε at most, too
    norm_adv: bool = True  # standardise the advantages of each rollout
    ent_coef: float = 0.0  # c_e, weight of the entropy bonus
    vf_coef: float = 0.5  # c_v, weight of the value loss
    max_grad_norm: float = 0.5  # gradients are clipped to this norm
    target_kl: float | None = None  # no more epochs after one in which KL(π_old‖π) exceeds this
    norm_obs: bool = False  # standardise observations by their running mean and std, clip to ±10
    norm_reward: bool = False  # divide rewards by the running std of the discounted return, clip to ±10
    compile: bool = False  # compile the loss with torch.compile: a slow start, then faster updates

    def __post_init__(self):
        limits = (
            ("total_timesteps checkpoint_interval", 1, 1e12),
            ("num_envs num_minibatches update_epochs hidden_sizes", 1, 1e4),
            ("num_steps", 2, 1e6),
            ("learning_rate max_grad_norm clip_coef target_kl", 1e-9, 1e9),
            ("gamma gae_lambda", 0, 1),
            ("log_std_init", -10, 2),
            ("ent_coef vf_coef eval_episodes seed", 0, 1e9),
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
        if self.num_envs * self.num_steps > self.total_timesteps:
            raise UsageError("--total-timesteps must be at least one rollout, --num-envs times --num-steps")
        if self.num_minibatches > self.num_envs * (self.num_steps // 2):  # half of the steps may be resets
            raise UsageError("--num-minibatches must be at most half of --num-envs times --num-steps")


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


# ==== shared: statistics
class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far (Chan et al. 1979), as buffers that are saved with the weights."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(0.0))

    def update(self, rows: torch.Tensor) -> None:
        """Take in B rows, which are reshaped to (B, *shape)."""
        rows = rows.reshape(len(rows), *self.mean.shape)
        share = len(rows) / (self.count + len(rows))  # of the new rows among all
        delta = rows.mean(0) - self.mean
        self.var += share * (rows.var(0, correction=0) - self.var + (1 - share) * delta.square())
        self.mean += share * delta
        self.count += len(rows)


# ==== shared: actor-critic
class Agent(nn.Module):
    """Policy π(a|s), categorical or diagonal Gaussian, and value function V(s).

    obs_space: Box. uint8 images (three axes, channels first or last, 36 pixels a side or more) go through the
        convolutions of Mnih et al. (2015); anything else is a vector.
    action_space: Discrete(n), or a Box of A floats. On an axis with two finite bounds the Gaussian works in [-1, 1],
        which is scaled to the bounds; elsewhere in the axis's own units. Any other space is a UsageError.
    """

    def __init__(self, obs_space: gym.spaces.Box, action_space: gym.Space, args: Args):
        super().__init__()
        self.is_discrete = isinstance(action_space, gym.spaces.Discrete)
        if not (self.is_discrete or (isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f")):
            raise UsageError(f"{Path(__file__).name} takes Discrete or float Box actions; no file takes {action_space}")
        self.action_dtype = np.int64 if self.is_discrete else np.float32
        self.num_actions = int(action_space.n if self.is_discrete else np.prod(action_space.shape))
        if self.is_discrete:
            self.to_env = lambda actions: (actions + action_space.start).astype(action_space.dtype, copy=False)
        else:
            self.to_env = box_scale(action_space)
            self.log_std = nn.Parameter(torch.full((self.num_actions,), float(args.log_std_init)))

        shape = obs_space.shape
        self.is_image = obs_space.dtype == np.uint8 and len(shape) == 3 and min(shape[1], max(shape[0], shape[2])) >= 36
        self.obs_dtype = np.uint8 if self.is_image else np.float32
        if args.norm_obs and self.is_image:
            raise UsageError("--norm-obs is not for images, which are scaled to [0, 1] anyway")
        self.obs_stats = RunningMeanStd(int(np.prod(obs_space.shape))) if args.norm_obs else None
        self.return_stats = RunningMeanStd() if args.norm_reward else None

        self.convolutions = Convolutions(obs_space) if self.is_image else None
        num_features = self.features(torch.zeros(1, *obs_space.shape)).shape[1]
        self.actor = mlp(num_features, args.hidden_sizes, self.num_actions, 0.01)  # nearly uniform, or of mean 0
        self.critic = mlp(num_features, args.hidden_sizes, 1, 1.0)

    def features(self, obs: torch.Tensor) -> torch.Tensor:
        """The input of actor and critic, shape (B, num_features), made of `obs`, shape (B, *obs_space.shape)."""
        features = self.convolutions(obs) if self.is_image else obs.reshape(len(obs), -1)
        if self.obs_stats is None:
            return features
        return ((features - self.obs_stats.mean) * (self.obs_stats.var + 1e-8).rsqrt()).clamp(-10, 10)

    def policy(self):
        """π as a function of arrays, to be made anew after each update: act(obs, noise) samples a ~ π(·|s), act(obs) is
        the mode or mean. Actions have shape (B,) if Discrete, else (B, num_actions).
        """
        actor = None if self.is_image else numpy_mlp(self.actor)
        if self.obs_stats is not None:
            mean, std = self.obs_stats.mean.numpy(force=True), np.sqrt(self.obs_stats.var.numpy(force=True) + 1e-8)

        def act(obs: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
            if self.is_image:
                with torch.inference_mode():
                    images = torch.as_tensor(obs, device=self.actor[0].weight.device)
                    output = self.actor(self.features(images)).numpy(force=True)
            else:
                x = obs.reshape(len(obs), -1)
                if self.obs_stats is not None:
                    x = ((x - mean) / std).clip(-10, 10)
                output = actor(x)
            return (output + noise).argmax(-1) if self.is_discrete else output + noise

        return act

    def noise(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Noise that makes `act` sample, shape (*shape, num_actions): that of a whole rollout can be drawn at once.

        argmax(logits + Gumbel noise) is a sample of the categorical distribution, mean + std * normal noise one of the
        Gaussian.
        """
        if self.is_discrete:
            return rng.gumbel(size=(*shape, self.num_actions)).astype(np.float32)
        std = self.log_std.exp().numpy(force=True)
        return std * rng.standard_normal((*shape, self.num_actions), np.float32)

    def evaluate_actions(self, obs: torch.Tensor, actions: torch.Tensor):
        """log π(a|s), entropy H[π(·|s)] and V(s), each of shape (B,)."""
        features = self.features(obs)
        log_probs, entropy = self.log_prob(self.actor(features), actions)
        return log_probs, entropy, self.critic(features).squeeze(-1)

    def log_prob(self, output: torch.Tensor, actions: torch.Tensor):
        """log π(a|s) and entropy, each of shape (B,), from the actor's output: logits or means, (B, num_actions)."""
        if self.is_discrete:
            log_p = F.log_softmax(output, dim=-1)
            log_probs = -F.nll_loss(log_p, actions, reduction="none")  # picks log_p[b, actions[b]]
            return log_probs, -(log_p.exp() * log_p).sum(-1)
        z = (actions - output) * (-self.log_std).exp()  # of the action before it is clipped to the bounds
        log_probs = -(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
        return log_probs, (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand_as(log_probs)


# ==== shared: advantages
def compute_gae(rewards, values, terminated, truncated, gamma: float, gae_lambda: float):
    """Generalised advantage estimates Â and returns R̂ = Â + V, both of shape (T, N).

    rewards, terminated, truncated: (T, N). values: (T+1, N), the last row V of the observations after the rollout.
    A terminal state is worth 0 and a truncated one its value; no Â reaches past the end of its episode. On reset
    steps both results are meaningless. Schulman et al. (2016), equations 11 to 16.
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantages, advantage = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decay[t] * advantage
    return advantages, advantages + values[:-1]


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


# ==== PPO
def ppo_loss(agent: Agent, obs, actions, old_log_probs, old_values, advantages, returns, args: Args):
    """The loss -L of B transitions, its parts, and log ρ. All but obs, actions and args: (B,)."""
    log_probs, entropy, values = agent.evaluate_actions(obs, actions)
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()

    value_loss = F.mse_loss(values, returns)
    if args.clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.max((values - returns).square(), (clipped_values - returns).square()).mean()

    entropy = entropy.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, policy_loss, value_loss, entropy, log_ratio


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
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    loss_function = torch.compile(ppo_loss, fullgraph=True) if args.compile else ppo_loss

    # shared: buffer
    # T steps of N environments. Row T of obs is what follows them, for V(s_T); the action there only fills the batch.
    # Row -1 of the others is, until it is overwritten, the last of the rollout before.
    T, N = args.num_steps, args.num_envs
    obs = np.zeros((T + 1, *envs.observation_space.shape), agent.obs_dtype)
    actions = np.zeros((T + 1, N) if agent.is_discrete else (T + 1, N, agent.num_actions), agent.action_dtype)
    rewards = np.zeros((T, N), np.float32)
    terminated, truncated = np.zeros((2, T, N), bool)
    valid = np.ones((T, N), bool)  # false on steps that only reset
    discounted = np.zeros((T, N), np.float32)  # Σ_k γ^k r_{t-k} over the episode so far
    # shared: end

    run = Run(args, rng, agent=agent, optimizer=optimizer)
    obs[T], _ = envs.reset(seed=args.seed + run.global_step)
    while run.global_step + T * N <= args.total_timesteps:
        # shared: rollout
        # Collect T steps of N environments. The rollout begins where the one before ended.
        obs[0], valid[0] = obs[T], ~(terminated[-1] | truncated[-1])
        act, noise = agent.policy(), agent.noise(rng, T, N)
        for t in range(T):
            actions[t] = act(obs[t], noise[t])
            obs[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(agent.to_env(actions[t]))
        ended = terminated | truncated
        valid[1:] = ~ended[:-1]
        rewards *= valid
        b_obs, b_actions = (torch.as_tensor(x, device=device).flatten(0, 1) for x in (obs, actions))
        # shared: end

        # log π_old(a_t|s_t) and V(s_t) of the whole rollout in one batch; from V the targets Â_t and R̂_t.
        with torch.no_grad():
            b_log_probs, _, b_values = agent.evaluate_actions(b_obs, b_actions)
        # shared: targets
        values, scaled = b_values.numpy(force=True).reshape(T + 1, N), rewards
        if args.norm_reward:
            for t in range(T):
                discounted[t] = rewards[t] + args.gamma * discounted[t - 1] * valid[t]
            agent.return_stats.update(torch.as_tensor(discounted[valid], device=device))
            scaled = (rewards / (agent.return_stats.var.item() ** 0.5 + 1e-8)).clip(-10, 10)
        advantages, returns = compute_gae(scaled, values, terminated, truncated, args.gamma, args.gae_lambda)
        explained_variance = 1 - np.var((returns - values[:T])[valid]) / (np.var(returns[valid]) + 1e-8)
        if args.norm_adv:
            advantages = (advantages - advantages[valid].mean()) / (advantages[valid].std() + 1e-8)
        # shared: end
        b_advantages, b_returns = (torch.as_tensor(x, device=device).flatten() for x in (advantages, returns))
        batch = (b_obs, b_actions, b_log_probs, b_values, b_advantages, b_returns)  # the first four go on with row T

        # Maximise L for K epochs of minibatches.
        remaining = 1 - run.global_step / args.total_timesteps if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        transitions = np.flatnonzero(valid)
        for _ in range(args.update_epochs):
            rows, log_ratios = torch.as_tensor(rng.permutation(transitions), device=device), []
            for minibatch in zip(*(x[rows].tensor_split(args.num_minibatches) for x in batch), strict=True):
                loss, policy_loss, value_loss, entropy, log_ratio = loss_function(agent, *minibatch, args)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                log_ratios.append(log_ratio.detach())
            log_ratio = torch.cat(log_ratios)  # of each minibatch as it was just before its step
            ratio = log_ratio.exp()
            approx_kl = (ratio - 1 - log_ratio).mean().item()  # estimates KL(π_old‖π), and is never negative
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        if args.norm_obs:  # only now: all above has seen the same statistics
            agent.obs_stats.update(torch.as_tensor(obs[:T][valid], device=device))

        scalars = {
            "losses/policy_loss": policy_loss.item(),  # this and the next two are of the last minibatch
            "losses/value_loss": value_loss.item(),
            "losses/entropy": entropy.item(),
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean().item(),
            "losses/explained_variance": explained_variance,
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
        }
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
