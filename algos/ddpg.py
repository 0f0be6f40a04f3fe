r"""Deep Deterministic Policy Gradient (DDPG).

DQN takes a maximum over actions, which a continuous space does not allow. DDPG trains a second network to find it:
the actor μ(s) climbs the gradient of the critic Q(s, a) with respect to the action. The critic is fitted as in DQN, on
transitions from a replay buffer, with the actor's action instead of the best one, and targets from slow copies of both.

    y = r + γ (1 - terminated) Q_targ(s', μ_targ(s'))
    critic:   minimise E[ (Q(s, a) - y)² ]; y is a constant           actor:   maximise E[ Q(s, μ(s)) ]
    φ_targ ← τ φ + (1 - τ) φ_targ, for the parameters φ of both

μ is deterministic, so noise is added to its actions for exploration. Both are in units of half the range of each axis,
so that the bounds are -1 and 1 (where one is missing, a unit to each side of 0, or of the allowed number nearest to 0).
The noise of each step is new, ε_t ~ N(0, σ²), or an Ornstein-Uhlenbeck process, which pushes one way for ~ 1/θ steps:

    x_t = (1 - θ) x_{t-1} + √(1 - (1 - θ)²) ε_t,   x = 0 before an episode, θ = 0.15;  its std is σ in the long run, too

T. P. Lillicrap et al.: Continuous control with deep reinforcement learning, 2016, arXiv:1509.02971. Most defaults: S.
Fujimoto et al.: Addressing Function Approximation Error in Actor-Critic Methods, 2018, arXiv:1802.09477.

    python algos/ddpg.py --env-id Pendulum-v1
    python algos/ddpg.py --env-id Pendulum-v1 --noise ou
"""

import copy
import signal
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    total_timesteps: int = 20_000  # environment steps to train for, all environments together
    num_envs: int = 1  # N parallel environments
    hidden_sizes: tuple[int, ...] = (256, 256)  # hidden layers of actor and critic; none: linear
    learning_rate: float = 1e-3  # step size of Adam, for actor and critic; if actions stick to a bound, lower it
    gamma: float = 0.98  # discount γ
    buffer_size: int = 1_000_000  # the replay buffer keeps this many of the latest transitions
    batch_size: int = 256  # transitions of a gradient step
    learning_starts: int = 1000  # random steps before learning; after a resume, policy steps that refill the buffer
    tau: float = 0.005  # τ, φ_targ ← τ φ + (1-τ) φ_targ after each gradient step
    noise: Literal["gaussian", "ou"] = "gaussian"  # exploration noise: independent, or Ornstein-Uhlenbeck
    exploration_noise: float = 0.1  # σ of the noise, in units of half the range of each action
    env_id: str = "Pendulum-v1"  # Gymnasium id of the environment; `module:Id-v0` imports the module first
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # its arguments: NAME True NAME 0.5 …
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # random seed
    device: str = "auto"  # auto (an accelerator if there is one), cpu, cuda, cuda:N or mps
    async_envs: bool = False  # one process per environment, for slow ones
    log_dir: str = "runs"  # where the run's folder is made
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    eval_episodes: int = 10  # episodes of the deterministic policy after training
    capture_video: bool = False  # record the evaluation episodes as mp4
    checkpoint_interval: int = 50_000  # environment steps between checkpoints
    resume: str = ""  # go on from this checkpoint, in its folder, with its arguments; a flag given beside it wins
    evaluate: str = ""  # no training: play the evaluation episodes of this checkpoint
    init_from: str = ""  # start from the weights of another run of this file, where names and shapes agree
    freeze: int = 0  # the first N layers of each network do not learn (convolutions count)

    def __post_init__(self):
        for name, kind in Args.__annotations__.items():  # the same in every file, so it names flags of others, too
            if kind in (int, float, str):  # a Path or a NumPy number would make a checkpoint that cannot be read
                setattr(self, name, kind(getattr(self, name)))
            low = 0 if kind is float or name in ("seed", "freeze", "learning_starts", "line_search_steps") else 1
            numbers = np.ravel(getattr(self, name)) if kind in (int, float, tuple[int, ...]) else []
            if not all(np.isfinite(x) and (x >= low or name == "log_std_init") for x in numbers):
                fail(f"--{name.replace('_', '-')} must be finite" + f" and at least {low}" * (name != "log_std_init"))


# ==== networks
def mlp(input_size, hidden_sizes, output_size):
    """Linear layers with ReLU between them."""
    layers = []
    for size in hidden_sizes:
        layers += [nn.Linear(input_size, size), nn.ReLU()]
        input_size = size
    return nn.Sequential(*layers, nn.Linear(input_size, output_size))


class Agent(nn.Module):
    """Actor μ(s), in [-1, 1], and critic Q(s, a), of vectors s."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        if not (isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"):
            fail(f"{Path(__file__).name} takes float Box actions, not {action_space}; ppo.py takes others, too")
        if len(obs_space.shape) == 3:
            fail(f"{Path(__file__).name} takes vectors, not images; ppo.py and a2c.py take images")
        self.action_space = action_space
        bounded = (action_space.low > -1e10) & (action_space.high < 1e10)
        low, high = np.where(bounded, action_space.low, -1), np.where(bounded, action_space.high, 1)
        self.centre = ((low + high) / 2).clip(action_space.low, action_space.high)
        self.half_range = (high - low) / 2
        self.num_actions = int(np.prod(action_space.shape))
        self.actor = nn.Sequential(*mlp(obs_space.shape[0], args.hidden_sizes, self.num_actions), nn.Tanh())
        self.critic = mlp(obs_space.shape[0] + self.num_actions, args.hidden_sizes, 1)

    def q(self, obs, actions):
        """Q(s, a), shape (B,), of observations (B, obs_size) and actions (B, num_actions) in [-1, 1]."""
        return self.critic(torch.cat([obs, actions], 1)).squeeze(1)

    def numpy_policy(self):
        """μ as a function of arrays (B, ...); it follows the weights as they learn."""
        device = self.actor[0].weight.device
        return lambda obs: self.actor(torch.as_tensor(obs, dtype=torch.float32, device=device)).numpy(force=True)

    def to_env(self, actions):
        """Actions as the environment takes them: scaled from [-1, 1] to the bounds of each axis, and clipped."""
        space = self.action_space
        actions = self.centre + self.half_range * actions.reshape(-1, *space.shape)
        return actions.clip(space.low, space.high).astype(space.dtype, copy=False)


class ReplayBuffer:
    """The last transitions (s, a, r, s', terminated), in a ring of `size` places."""

    def __init__(self, size, obs_size, num_actions):
        obs, next_obs = np.zeros((2, size, obs_size), np.float32)
        actions = np.zeros((size, num_actions), np.float32)
        rewards, terminated = np.zeros(size, np.float32), np.zeros(size, bool)
        self.arrays = obs, actions, rewards, next_obs, terminated
        self.size, self.added = size, 0

    def add(self, *transitions):
        """Add B transitions: obs, actions, rewards, next_obs, terminated, arrays (B, ...)."""
        places = (self.added + np.arange(len(transitions[0]))) % self.size
        for array, values in zip(self.arrays, transitions, strict=True):
            array[places] = values
        self.added += len(places)

    def sample(self, batch_size, rng, device):
        """B transitions, drawn uniformly, as tensors: obs, actions, rewards, next_obs, terminated, each (B, ...)."""
        places = rng.integers(min(self.added, self.size), size=batch_size)
        return [torch.as_tensor(array[places], device=device) for array in self.arrays]


# ==== DDPG
@torch.no_grad()
def bellman_target(target, rewards, next_obs, terminated, args):
    """y of B transitions, (B,)."""
    return rewards + args.gamma * ~terminated * target.q(next_obs, target.actor(next_obs))


@torch.no_grad()
def update_target(target, online, tau):
    """Polyak averaging, φ_targ ← τ φ + (1-τ) φ_targ; with τ = 1 a copy."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.lerp_(new, tau)


def train(args):
    """Train an agent, evaluate it and return it."""
    device = select_device(args.device)
    torch.manual_seed(args.seed)
    envs = make_envs(args, args.num_envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    transfer(args, agent, agent.actor, agent.critic)
    target = copy.deepcopy(agent).requires_grad_(False)
    actor_parameters = [x for x in agent.actor.parameters() if x.requires_grad]
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.learning_rate, fused=True)
    N, A = args.num_envs, agent.num_actions
    if args.total_timesteps // N * N < max(args.learning_starts, N):
        fail(f"--total-timesteps must reach --learning-starts in multiples of {N} steps")
    buffer = ReplayBuffer(args.buffer_size, envs.single_observation_space.shape[0], A)

    optimizers = {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    with Run(args, agent=agent, target=target, **optimizers) as run:
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = args.learning_rate  # a flag given beside --resume wins
        first_step = run.global_step
        seed = args.seed + first_step  # a resumed run does not play the same episodes again
        rng = np.random.default_rng(seed).spawn(1)[0]  # not the stream of the environment with this seed
        obs, _ = envs.reset(seed=seed)
        act = agent.numpy_policy()
        valid = np.ones(N, bool)  # false on steps that only reset
        theta = 0.15 if args.noise == "ou" else 1.0  # with θ = 1 there is no memory: x_t = ε_t
        noise = np.zeros((N, A))  # x

        while run.global_step + N <= args.total_timesteps:
            # 1. A step of N environments, with noise, into the buffer.
            innovation = args.exploration_noise * rng.standard_normal((N, A), np.float32)  # ε
            noise = (1 - theta) * noise + np.sqrt(1 - (1 - theta) ** 2) * innovation
            if run.global_step < args.learning_starts:
                actions = rng.uniform(-1, 1, (N, A)).astype(np.float32)
            else:
                actions = (act(obs) + noise).clip(-1, 1)
            next_obs, rewards, terminated, truncated, _ = envs.step(agent.to_env(actions))
            buffer.add(obs[valid], actions[valid], rewards[valid], next_obs[valid], terminated[valid])
            run.log_step(rewards * valid, valid, terminated | truncated)
            noise *= valid[:, None]  # x = 0 before an episode: after a step that only reset
            obs, valid = next_obs, ~(terminated | truncated)

            # 2. As many gradient steps as environment steps, on transitions from the buffer.
            scalars = {"charts/learning_rate": args.learning_rate}
            if run.global_step >= first_step + args.learning_starts:
                for _ in range(N):
                    b_obs, b_actions, b_rewards, b_next_obs, b_terminated = buffer.sample(args.batch_size, rng, device)
                    y = bellman_target(target, b_rewards, b_next_obs, b_terminated, args)
                    q = agent.q(b_obs, b_actions)
                    critic_loss = (q - y).square().mean()
                    critic_optimizer.zero_grad()
                    critic_loss.backward()
                    critic_optimizer.step()

                    actor_loss = -agent.q(b_obs, agent.actor(b_obs)).mean()
                    actor_optimizer.zero_grad()
                    actor_loss.backward(inputs=actor_parameters)
                    actor_optimizer.step()
                    update_target(target, agent, args.tau)
                scalars |= {"losses/critic_loss": critic_loss.item(), "losses/actor_loss": actor_loss.item()}
                scalars["losses/q_values"] = q.mean().item()

            # 3. Log, and save when due.
            run.log_update(scalars, observations=next_obs, rewards=rewards)
        run.finish(agent)
    envs.close()
    return agent


# ==== shared: transfer learning
def transfer(args, agent, *networks):
    """Start with the weights of --init-from that fit; the first --freeze layers of each network do not learn."""
    if args.init_from and not args.resume:
        saved, own = load_checkpoint(args.init_from).get("agent", {}), agent.state_dict()
        taken = {name: x for name, x in saved.items() if name in own and x.shape == own[name].shape}
        if not any(name.endswith("weight") for name in taken) or "obs_stats.mean" in saved.keys() ^ own.keys():
            fail(f"--init-from {args.init_from} does not fit: no weights in common, or --norm-obs in one of them alone")
        agent.load_state_dict(taken, strict=False)
        print(f"taken: {', '.join(taken)}; new: {', '.join(name for name in own if name not in taken) or 'none'}")
    for network in networks:
        parameters = list(network.parameters())  # a weight and a bias of each layer
        if 2 * args.freeze >= len(parameters):
            fail(f"--freeze must be less than the number of layers, {len(parameters) // 2}")
        nn.ParameterList(parameters[: 2 * args.freeze]).requires_grad_(False)


# ==== shared: plumbing. The same in every file, and none of it is about the algorithm: skip it at a first reading.
def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)  # as tyro does for a flag that it does not know


def select_device(name):
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.zeros(1, device=accelerator if name == "auto" else name).device  # raises if there is none
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} cannot be used: {error}")


def make_envs(args, num_envs, eval_folder=None):
    """A vector environment of vectors, or of uint8 images, channels first or last, of at least 36 x 36 pixels."""
    env_id = args.env_id.removeprefix("ale_py:")
    is_atari = env_id.startswith("ALE/")
    options = {"vectorization_mode": "async" if args.async_envs and num_envs > 1 and not is_atari else None}
    if eval_folder and args.capture_video:
        record = partial(gym.wrappers.RecordVideo, video_folder=f"{eval_folder}/videos", episode_trigger=lambda _: True)
        options = {"vectorization_mode": "sync", "render_mode": "rgb_array", "wrappers": [record]}
        if is_atari:  # ale-py's own vector environment cannot render; this substitute does not press FIRE at a start
            stack = partial(gym.wrappers.FrameStackObservation, stack_size=4, padding_type="zero")
            options |= {"frameskip": 1, "wrappers": [gym.wrappers.AtariPreprocessing, stack, record]}
    elif is_atari:
        options["reward_clipping"] = not eval_folder  # to ±1, in training only
    try:
        envs = gym.make_vec(f"ale_py:{env_id}" if is_atari else args.env_id, num_envs, **options | args.env_kwargs)
        space = envs.single_observation_space
        if isinstance(space, gym.spaces.Dict):  # texts, such as MiniGrid's mission, are left out
            parts = [key for key, part in space.items() if part.shape is not None or hasattr(part, "spaces")]
            envs = gym.wrappers.vector.FilterObservation(envs, parts)
        image = space.dtype == np.uint8 and len(space.shape) == 3 and min(space.shape[1], max(space.shape[::2])) >= 36
        if not image and not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            envs = gym.wrappers.vector.FlattenObservation(envs)
        assert isinstance(envs.single_observation_space, gym.spaces.Box), f"{space} cannot be flattened"
        assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP, "it must reset on the next step"
        return envs
    except Exception as error:  # its constructor may raise anything
        fail(f"cannot use the environment {args.env_id}: {error}")


def evaluate(agent, args, folder):
    """Play whole episodes, not seen in training, with the deterministic policy; print and return their returns."""
    envs = make_envs(args, 1, eval_folder=folder)
    act = agent.numpy_policy()
    returns = np.zeros(args.eval_episodes)
    for i in tqdm(range(args.eval_episodes), desc="evaluation (up to 27,000 steps each)"):
        obs, _ = envs.reset(seed=(10**7 + 10**4 * args.seed + i) % 2**31)  # ale-py takes 31 bits
        for _ in range(27_000):  # half an hour of Atari
            obs, rewards, terminated, truncated, _ = envs.step(agent.to_env(act(obs)))
            returns[i] += rewards.item()
            if terminated or truncated:
                break
    envs.close()
    print(f"eval: mean_return={returns.mean():.2f} std={returns.std():.2f} episodes={len(returns)}", end=" ")
    print(f"checkpoint={args.evaluate or folder / 'checkpoint.pt'}")
    return returns


def load_checkpoint(path, **modules):
    """Read a checkpoint, a dict with exactly the arguments of this file, and give `modules` their states in it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["args"] = Args(**{k: checkpoint["args"][k] for k in checkpoint["args"] | Args.__annotations__})
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        return checkpoint
    except Exception as error:
        fail(f"cannot use {path} as a checkpoint of {Path(__file__).name} ({type(error).__name__}: {error})")


class Run(AbstractContextManager):
    """A run's folder with log and checkpoint, and its progress bar. modules: what the checkpoint keeps, by name."""

    def __init__(self, args, **modules):
        self.args, self.modules, self.global_step = args, modules, 0
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"  # milliseconds
        self.folder = Path(args.log_dir) / name.replace("/", "-").replace(":", "-")
        if args.resume:
            self.folder = Path(args.resume).parent
            self.global_step = load_checkpoint(args.resume, **modules)["global_step"]
        if args.track:
            import_module("wandb").init(name=self.folder.name, config=vars(args), sync_tensorboard=True)
        self.writer = SummaryWriter(self.folder, purge_step=self.global_step + 1, max_queue=1000)
        self.writer.add_text("args", "\n".join(f"    {k} = {v}" for k, v in vars(args).items()), self.global_step)
        self.bar = tqdm(None, args.env_id, args.total_timesteps, initial=self.global_step, unit=" steps", disable=False)
        self.episode = np.zeros((2, 1))  # return and length so far; (2, N) from the first step on
        self.returns = []  # of the episodes that have ended
        self.save()

    def log_step(self, rewards, valid, ended):
        self.global_step += len(rewards)
        self.episode = self.episode + [rewards, valid]
        for n in np.flatnonzero(ended):
            self.returns.append(self.episode[0, n])
            self.writer.add_scalar("charts/episodic_return", self.episode[0, n], self.global_step)
            self.writer.add_scalar("charts/episodic_length", self.episode[1, n], self.global_step)
            self.episode[:, n] = 0

    def log_update(self, scalars, **inputs):
        """The inputs (arrays) and scalars of an update must be finite. Log the scalars and save, each when due."""
        for name, values in (inputs | scalars).items():
            assert np.isfinite(values).all(), f"{name} not finite at step {self.global_step}"
        if self.global_step >= self.bar.n + min(self.args.total_timesteps // 1000, 1000):  # enough for a curve
            scalars["charts/SPS"] = (self.global_step - self.bar.initial) / (time.time() - self.bar.start_t)
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, self.global_step)
            self.bar.set_postfix_str(f"return {np.mean(self.returns[-100:]):.1f}" if self.returns else "", False)
            self.bar.update(self.global_step - self.bar.n)
        if self.global_step >= self.saved_step + self.args.checkpoint_interval:
            self.save()

    def save(self):
        """Write another file and rename it: a kill at any moment leaves a whole checkpoint."""
        assert all(x.isfinite().all() for x in self.modules["agent"].state_dict().values()), "a weight is not finite"
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"global_step": self.global_step, "args": vars(self.args) | {"resume": "", "evaluate": ""}}
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")
        self.saved_step = self.global_step

    def finish(self, agent):
        self.save()
        self.bar.close()
        for episode, episodic_return in enumerate(evaluate(agent, self.args, self.folder), start=1):
            self.writer.add_scalar("eval/episodic_return", episodic_return, self.global_step + episode)

    def __exit__(self, error_type, *_):
        self.bar.close()
        if error_type is KeyboardInterrupt:
            self.save()
            print(f"stopped; resume with: python '{__file__}' --resume '{self.folder}/checkpoint.pt'", flush=True)
        self.writer.close()  # last: if a write was interrupted, this may wait for ever
        if error_type is KeyboardInterrupt and __name__ == "__main__":  # in a notebook the KeyboardInterrupt goes on
            sys.exit(130)


def main():
    sys.path.insert(0, str(Path.cwd()))  # `my_env:MyEnv-v0` finds my_env.py in the current directory
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, like Ctrl-C
    torch.backends.cudnn.deterministic = True
    torch.set_flush_denormal(True)  # a CPU is slow on numbers like 1e-40, to which running averages of dead units fade
    args = tyro.cli(Args, description=__doc__)
    if path := args.resume or args.evaluate:  # parse again, with the checkpoint's arguments as the defaults
        saved = load_checkpoint(path)["args"]
        args = tyro.cli(Args, description=__doc__, default=replace(saved, env_kwargs={}))
        args.env_kwargs = saved.env_kwargs | args.env_kwargs  # given a default, tyro refuses names that are not in it
    if args.evaluate:
        envs = make_envs(args, 1)
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(select_device(args.device))
        load_checkpoint(args.evaluate, agent=agent)
        evaluate(agent, args, Path(args.evaluate).parent)
    else:
        train(args)


if __name__ == "__main__":
    main()
