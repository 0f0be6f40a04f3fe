r"""Deep Q-Network (DQN), and Double DQN.

Q-learning with a network: Q(s, a) estimates the return of action a in state s when all later actions are the best
ones. It is fitted by regression to its own estimate one step later, the Bellman target. Two things make that stable:
batches are drawn at random from a replay buffer, and targets come from Q_targ, a copy of the network that lags behind.

    y = r + γ (1 - terminated) max_a' Q_targ(s', a')
    L = E[ (Q(s, a) - y)² ], minimised with Adam; y is a constant

The maximum of noisy estimates is too high on average. Double DQN (the default; --no-double-q is the first form) lets
one network choose the action and the other evaluate it:

    y = r + γ (1 - terminated) Q_targ(s', argmax_a' Q(s', a'))

Actions are ε-greedy: the best one, or with probability ε, which falls linearly, a random one. With an empty
--hidden-sizes Q is linear; on a Discrete observation, flattened to one-hot, a table of Q-values plus a bias per action.
The paper clips errors to ±1. We do not: the many small ones would outweigh the few large ones at the ends of episodes.

V. Mnih et al.: Human-level control through deep reinforcement learning, Nature 518, 2015. Double DQN: H. van Hasselt,
A. Guez, D. Silver: Deep Reinforcement Learning with Double Q-learning, 2016, arXiv:1509.06461.

    python algos/dqn.py --env-id CartPole-v1
    python algos/dqn.py --env-id CliffWalking-v1 --hidden-sizes --learning-rate 0.1 --total-timesteps 20000 \
        --train-frequency 2 --target-network-frequency 50 --tau 1 --exploration-fraction 0.5
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

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    total_timesteps: int = 100_000  # environment steps to train for, all environments together
    num_envs: int = 1  # N parallel environments
    hidden_sizes: tuple[int, ...] = (120, 84)  # hidden layers of Q; none: linear (images: always 512)
    learning_rate: float = 2e-3  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the total timesteps
    gamma: float = 0.99  # discount γ
    buffer_size: int = 100_000  # latest steps that the replay buffer keeps, rounded down to a multiple of num_envs
    batch_size: int = 128  # transitions of a gradient step
    learning_starts: int = 1000  # steps before learning; as many again after a resume, since the buffer is not saved
    train_frequency: int = 4  # steps between updates of Q, rounded down to a multiple of num_envs, but not to 0
    gradient_steps: int = 1  # gradient steps of each update
    target_network_frequency: int = 20  # environment steps between updates of Q_targ
    tau: float = 0.05  # τ, Q_targ ← τ Q + (1-τ) Q_targ: 1 is a plain copy
    start_e: float = 1.0  # ε at the start
    end_e: float = 0.05  # ε at the end
    exploration_fraction: float = 0.2  # share of the total timesteps in which ε falls from start_e to end_e
    double_q: bool = True  # Double DQN: Q chooses the action in y, Q_targ evaluates it
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment; `module:Id-v0` imports the module first
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


def nature_cnn(channels, height, width):
    """A network from images in [0, 1], (B, channels, height, width), to features, (B, 512): Mnih et al. (2015)."""
    conv1 = nn.Conv2d(channels, 32, 8, stride=4)
    conv2 = nn.Conv2d(32, 64, 4, stride=2)
    conv3 = nn.Conv2d(64, 64, 3, stride=1)
    convolutions = nn.Sequential(conv1, nn.ReLU(), conv2, nn.ReLU(), conv3, nn.ReLU(), nn.Flatten())
    num_features = convolutions(torch.zeros(1, channels, height, width)).shape[1]
    return nn.Sequential(convolutions, nn.Linear(num_features, 512), nn.ReLU())


class Agent(nn.Module):
    """Q(s, ·) of vectors or images (three axes), and the policy that is greedy with respect to it."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        if not isinstance(action_space, gym.spaces.Discrete):
            fail(f"{Path(__file__).name} takes Discrete actions, not {action_space}; ppo.py takes others, too")
        self.obs_space, self.action_space = obs_space, action_space
        self.is_image = len(obs_space.shape) == 3
        shape = self.preprocess(np.zeros(obs_space.shape, obs_space.dtype)).shape
        self.encoder = nature_cnn(*shape) if self.is_image else nn.Identity()
        num_features, hidden_sizes = (512, ()) if self.is_image else (shape[0], args.hidden_sizes)
        self.q = mlp(num_features, hidden_sizes, int(action_space.n))

    def preprocess(self, obs):
        """Arrays (..., *obs_space.shape) as forward takes them: float32, or images of bytes, channels first."""
        x = obs if self.is_image else obs.astype(np.float32)
        channels_last = self.is_image and self.obs_space.shape[2] < self.obs_space.shape[0]
        return np.moveaxis(x, -1, -3) if channels_last else x

    def forward(self, x):
        """Q(s, ·), (B, number of actions), of preprocessed observations x. Images become floats only on the device."""
        return self.q(self.encoder(x / 255 if self.is_image else x))

    def numpy_policy(self):
        """argmax_a Q(s, a) as a function of arrays (B, ...), in NumPy for speed. Make it anew after an update."""
        layers = [(layer.weight.numpy(force=True).T, layer.bias.numpy(force=True)) for layer in self.q[::2]]

        def act(obs):
            x = self.preprocess(obs)
            if self.is_image:
                with torch.inference_mode():
                    x = self.encoder(torch.as_tensor(x, device=self.q[0].weight.device) / 255).numpy(force=True)
            for weight, bias in layers[:-1]:
                x = np.maximum(x @ weight + bias, 0)
            return (x @ layers[-1][0] + layers[-1][1]).argmax(-1)

        return act

    def to_env(self, actions):
        """Actions as the environment takes them: counted from the start of its space."""
        return (actions + self.action_space.start).astype(self.action_space.dtype, copy=False)


class ReplayBuffer:
    """The last steps of N environments, in a ring of rows; s' is the observation of the next row.

    Of ale-py's stacks of four frames (stack=4) only the newest frame is stored, so that a million steps take 7 GB: the
    stack of row t is the frames of rows t-3 to t, black before the start of the episode.
    """

    def __init__(self, size, num_envs, obs_space, stack=1):
        self.num_rows, self.num_envs, self.stack = size // num_envs + stack, num_envs, stack
        shape = (self.num_rows, num_envs)
        frame_shape = obs_space.shape[1:] if stack > 1 else obs_space.shape
        self.frames = np.zeros((*shape, *frame_shape), obs_space.dtype)
        self.actions, self.age = np.zeros((2, *shape), np.int64)  # age: steps since the start of the episode
        self.rewards = np.zeros(shape, np.float32)
        self.terminated, self.valid = np.zeros((2, *shape), bool)
        self.row = 0  # never wraps; its place in the ring is row % num_rows

    def add(self, obs, actions, rewards, next_obs, terminated, valid):
        """A step of all environments, arrays (N, ...). valid: false if it only reset."""
        place, next_place = self.row % self.num_rows, (self.row + 1) % self.num_rows
        self.frames[place] = obs[:, -1] if self.stack > 1 else obs
        self.frames[next_place] = next_obs[:, -1] if self.stack > 1 else next_obs
        self.actions[place] = actions
        self.rewards[place] = rewards
        self.terminated[place] = terminated
        self.valid[place] = valid
        self.age[next_place] = (self.age[place] + 1) * valid  # 0 after a reset
        self.row += 1

    def observations(self, rows, envs):
        """The observations at B rows and environments, (B, *obs_space.shape)."""
        if self.stack == 1:
            return self.frames[rows % self.num_rows, envs]
        back = np.arange(self.stack)[::-1]
        frames = self.frames[(rows[:, None] - back) % self.num_rows, envs[:, None]]
        frames[back > self.age[rows % self.num_rows, envs][:, None]] = 0
        return frames

    def sample(self, batch_size, rng):
        """B transitions, drawn uniformly: obs, actions, rewards, next_obs, terminated, each (B, ...)."""
        oldest = max(0, self.row - self.num_rows + self.stack)
        rows, envs = rng.integers(oldest, self.row, batch_size), rng.integers(self.num_envs, size=batch_size)
        while not (valid := self.valid[rows % self.num_rows, envs]).all():  # draw again in the place of resets
            rows[~valid] = rng.integers(oldest, self.row, (~valid).sum())
            envs[~valid] = rng.integers(self.num_envs, size=(~valid).sum())
        at = rows % self.num_rows, envs
        obs, next_obs = self.observations(rows, envs), self.observations(rows + 1, envs)
        return obs, self.actions[at], self.rewards[at], next_obs, self.terminated[at]


# ==== DQN
@torch.no_grad()
def bellman_target(agent, target, rewards, next_x, terminated, args):
    """y of B transitions, (B,)."""
    next_q = target(next_x)
    best = (agent(next_x) if args.double_q else next_q).argmax(1, keepdim=True)
    return rewards + args.gamma * ~terminated * next_q.gather(1, best).squeeze(1)


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
    transfer(args, agent, agent)
    target = copy.deepcopy(agent).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    N, num_actions = args.num_envs, int(envs.single_action_space.n)
    T = max(args.train_frequency // N, 1)  # steps of each environment between updates
    if args.buffer_size < 2 * N or args.total_timesteps // (T * N) * T * N < max(args.learning_starts, T * N):
        fail(f"--buffer-size must be {2 * N} or more and --total-timesteps reach --learning-starts in steps of {T * N}")
    stack = agent.obs_space.shape[0] if agent.is_image and args.env_id.startswith(("ALE/", "ale_py:ALE/")) else 1
    buffer = ReplayBuffer(args.buffer_size, N, agent.obs_space, stack)

    with Run(args, agent=agent, target=target, optimizer=optimizer) as run:
        seed = args.seed + run.global_step  # a resumed run does not play the same episodes again
        rng = np.random.default_rng(seed).spawn(1)[0]  # not the stream of the environment with this seed
        obs, _ = envs.reset(seed=seed)
        valid = np.ones(N, bool)

        while run.global_step + T * N <= args.total_timesteps:
            learning_rate = args.learning_rate * (1 - args.anneal_lr * run.global_step / args.total_timesteps)
            # 1. T ε-greedy steps of N environments. The step after the end of an episode only resets: it is not valid.
            act = agent.numpy_policy()
            for _ in range(T):
                share = min(run.global_step / max(args.exploration_fraction * args.total_timesteps, 1), 1)
                epsilon = args.start_e + share * (args.end_e - args.start_e)
                actions = np.where(rng.random(N) < epsilon, rng.integers(num_actions, size=N), act(obs))
                next_obs, rewards, terminated, truncated, _ = envs.step(agent.to_env(actions))
                buffer.add(obs, actions, rewards, next_obs, terminated, valid)
                run.log_step(rewards * valid, valid, terminated | truncated)
                obs, valid = next_obs, ~(terminated | truncated)

            # 2. Gradient steps, on transitions from the buffer.
            optimizer.param_groups[0]["lr"] = learning_rate
            scalars = {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate}
            if buffer.row * N >= args.learning_starts:
                for _ in range(args.gradient_steps):
                    b_obs, b_actions, b_rewards, b_next_obs, b_terminated = buffer.sample(args.batch_size, rng)
                    arrays = agent.preprocess(b_obs), b_actions, b_rewards, agent.preprocess(b_next_obs), b_terminated
                    x, b_actions, b_rewards, next_x, b_terminated = [torch.as_tensor(a, device=device) for a in arrays]
                    y = bellman_target(agent, target, b_rewards, next_x, b_terminated, args)
                    q = agent(x).gather(1, b_actions[:, None]).squeeze(1)
                    loss = (q - y).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                scalars |= {"losses/q_loss": loss.item(), "losses/q_values": q.mean().item()}

                # 3. The target network follows.
                if run.global_step % args.target_network_frequency < T * N:  # a multiple of it was passed
                    update_target(target, agent, args.tau)

            # 4. Log, and save when due.
            rows = (buffer.row - np.arange(T + 1)) % buffer.num_rows  # those of these T steps, after the next one
            run.log_update(scalars, observations=buffer.frames[rows], rewards=buffer.rewards[rows[1:]])
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
