r"""REINFORCE, the first policy gradient.

Play whole episodes τ with the policy π_θ, then make each action likelier the better things went. The gradient of the
expected return needs no model of the environment, only samples:

    g = E_τ[ Σ_t ∇ log π_θ(a_t|s_t) Φ_t ],   θ ← θ + α g

    total-return   Φ_t = R(τ) = Σ_k γ^k r_k             each action answers for the whole episode
    reward-to-go   Φ_t = R_t = Σ_{k≥t} γ^{k-t} r_k      … only for what came after it, which is all it can change
    baseline       Φ_t = R_t - V(s_t)                   … and only for how that differs from what is usual in this state

With γ = 1 all three give the same gradient on average; what falls from one to the next is its variance, and with it the
number of episodes that it takes to learn. (With γ < 1 the last two lack a factor γ^t, as is usual.) V is fitted to R_t.

R. J. Williams: Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, Machine
Learning 8, 1992. R. S. Sutton, A. G. Barto: Reinforcement Learning, 2nd edition, 2018, chapter 13.

    python algos/reinforce.py --env-id CartPole-v1
    python algos/reinforce.py --env-id CartPole-v1 --weight total-return
"""

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
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    total_timesteps: int = 400_000  # environment steps, all environments together; an update this cuts short is dropped
    num_envs: int = 16  # N parallel environments: one episode of each per update; steps spent waiting count, too
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of actor and critic; none: linear (images: always 512)
    log_std_init: float = 0.0  # initial log σ of the Gaussian policy; 0: σ is half the range of each action
    learning_rate: float = 5e-3  # step size of Adam, for the policy and for V
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the total timesteps
    gamma: float = 0.99  # discount γ
    weight: Literal["total-return", "reward-to-go", "baseline"] = "baseline"  # Φ, the weight of ∇ log π
    restart_returns: bool = False  # R_t ends at the next reward other than 0 (Pong: a rally); not for total-return
    norm_weight: bool = False  # standardise Φ over each update: helps all three on CartPole, but biases g a little
    critic_updates: int = 10  # gradient steps of the critic on the returns of each update (baseline only)
    ent_coef: float = 0.0  # c_e, weight of an entropy bonus: c_e Σ_t ∇ H[π_θ(·|s_t)] is added to g
    norm_obs: bool = False  # standardise observations by their running mean and std, clip to ±10
    norm_reward: bool = False  # divide returns by their running std
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


# ==== shared: networks
def layer_init(layer, gain=2**0.5):
    """Orthogonal weights, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(input_size, hidden_sizes, output_size, gain):
    """Linear layers with tanh between them; the last one's weights have the given gain."""
    layers = []
    for size in hidden_sizes:
        layers += [layer_init(nn.Linear(input_size, size)), nn.Tanh()]
        input_size = size
    return nn.Sequential(*layers, layer_init(nn.Linear(input_size, output_size), gain))


def nature_cnn(channels, height, width):
    """A network from images in [0, 1], (B, channels, height, width), to features, (B, 512): Mnih et al. (2015)."""
    conv1 = layer_init(nn.Conv2d(channels, 32, 8, stride=4))
    conv2 = layer_init(nn.Conv2d(32, 64, 4, stride=2))
    conv3 = layer_init(nn.Conv2d(64, 64, 3, stride=1))
    convolutions = nn.Sequential(conv1, nn.ReLU(), conv2, nn.ReLU(), conv3, nn.ReLU(), nn.Flatten())
    num_features = convolutions(torch.zeros(1, channels, height, width)).shape[1]
    return nn.Sequential(convolutions, layer_init(nn.Linear(num_features, 512)), nn.ReLU())


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far (Chan et al. 1979); buffers, so they are saved with the weights."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(shape))  # of the same shape, so that --init-from takes all or none

    def update(self, rows):
        rows = torch.as_tensor(rows, dtype=torch.float32, device=self.mean.device)
        self.count += len(rows)
        share = len(rows) / self.count  # of the new rows among all
        self.var.lerp_(rows.var(0, correction=0) + (1 - share) * (rows.mean(0) - self.mean).square(), share)
        self.mean.lerp_(rows.mean(0), share)


class Agent(nn.Module):
    """Policy π(a|s), categorical or Gaussian, and value function V(s), of vectors or images (three axes)."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.obs_space, self.action_space = obs_space, action_space
        self.is_image = len(obs_space.shape) == 3
        self.is_multi = isinstance(action_space, gym.spaces.MultiDiscrete | gym.spaces.MultiBinary)
        self.is_discrete = self.is_multi or isinstance(action_space, gym.spaces.Discrete)
        self.obs_stats = RunningMeanStd(*obs_space.shape) if args.norm_obs else None
        self.return_stats = RunningMeanStd() if args.norm_reward else None
        if isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f":
            self.log_std = nn.Parameter(torch.full((gym.spaces.flatdim(action_space),), args.log_std_init))
            bounded = (action_space.low > -1e10) & (action_space.high < 1e10)  # these bounds become -1 and 1 for π
            low, high = np.where(bounded, action_space.low, -1), np.where(bounded, action_space.high, 1)
            self.centre = ((low + high) / 2).clip(action_space.low, action_space.high)
            self.half_range = (high - low) / 2
        elif self.is_multi:  # k actions at once, each of up to n values; the values that an action lacks get logit -1e8
            nvec = torch.as_tensor(getattr(action_space, "nvec", np.full(action_space.shape, 2))).flatten()
            self.register_buffer("missing", -1e8 * (torch.arange(nvec.max()) >= nvec[:, None]), persistent=False)
        elif not self.is_discrete:
            fail(f"{Path(__file__).name} takes discrete or float Box actions; no file takes {action_space}")
        shape = self.preprocess(np.zeros(obs_space.shape, obs_space.dtype)).shape
        self.encoder = nature_cnn(*shape) if self.is_image else nn.Identity()
        num_features, hidden_sizes = (512, ()) if self.is_image else (shape[0], args.hidden_sizes)
        num_outputs = self.missing.numel() if self.is_multi else gym.spaces.flatdim(action_space)
        self.actor = mlp(num_features, hidden_sizes, num_outputs, 0.01)  # at first nearly uniform, or of mean 0
        self.critic = nn.Sequential(*mlp(num_features, hidden_sizes, 1, 1.0), nn.Flatten(0))  # (B,), not (B, 1)

    def preprocess(self, obs):
        """Arrays (..., *obs_space.shape) for the networks: float32; images channels first, [0, 1] or standardised."""
        x = obs / np.float32(255) if self.is_image else obs.astype(np.float32)
        if self.obs_stats is not None:
            mean, var = self.obs_stats.mean.numpy(force=True), self.obs_stats.var.numpy(force=True)
            x = ((obs - mean) / np.sqrt(var + 1e-8)).clip(-10, 10).astype(np.float32)
        channels_last = self.is_image and self.obs_space.shape[2] < self.obs_space.shape[0]
        return np.moveaxis(x, -1, -3) if channels_last else x

    def policy(self, features):
        """π(·|s) as a torch distribution, of features = encoder(x)."""
        output = self.actor(features)
        if self.is_multi:
            logits = output.unflatten(-1, self.missing.shape) + self.missing
            return Independent(Categorical(logits=logits, validate_args=False), 1, validate_args=False)
        if self.is_discrete:
            return Categorical(logits=output, validate_args=False)
        return Independent(Normal(output, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def numpy_policy(self, rng=None):
        """a ~ π(·|s), or without rng its mode, as a function of arrays (B, ...). Make it anew after an update."""
        layers = [(fc.weight.T.contiguous().numpy(force=True), fc.bias.numpy(force=True)) for fc in self.actor[::2]]
        std = None if self.is_discrete else self.log_std.exp().numpy(force=True)

        def act(obs):  # in NumPy: on a few rows faster than torch
            x = self.preprocess(obs)
            if self.is_image:
                with torch.inference_mode():
                    x = self.encoder(torch.as_tensor(x, device=self.actor[0].weight.device)).numpy(force=True)
            for weight, bias in layers[:-1]:
                x = np.tanh(x @ weight + bias)
            x = x @ layers[-1][0] + layers[-1][1]
            if self.is_multi:
                x = x.reshape(-1, *self.missing.shape) + self.missing.numpy(force=True)
            if rng is not None:  # Gumbel noise makes the argmax a sample of the softmax
                noise = rng.gumbel(size=x.shape) if self.is_discrete else std * rng.standard_normal(x.shape, np.float32)
                x = x + noise
            return x.argmax(-1) if self.is_discrete else x

        return act

    def to_env(self, actions):
        """Actions as the environment takes them: scaled from [-1, 1] to the bounds of each axis, and clipped."""
        space = self.action_space
        if self.is_discrete:
            return (actions.reshape(-1, *space.shape) + getattr(space, "start", 0)).astype(space.dtype, copy=False)
        actions = self.centre + self.half_range * actions.reshape(-1, *space.shape)
        return actions.clip(space.low, space.high).astype(space.dtype, copy=False)


# ==== REINFORCE
def rewards_to_go(rewards, gamma, restart=False):
    """R_t = Σ_{k≥t} γ^{k-t} r_k, (T, N), of rewards (T, N); with restart up to the first r_k other than 0.

    A column is an episode, then zeros. Rewards after a time limit do not count: g is of the return up to it.
    """
    discount = np.where(restart & (rewards != 0), 0, gamma)
    returns, R = np.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        R = rewards[t] + discount[t] * R
        returns[t] = R
    return returns


def reinforce_loss(agent, x, actions, weights, num_episodes):
    """A loss whose gradient is -g, and the entropies, (B,), of B steps; x and actions: (B, ...), weights Φ: (B,)."""
    policy = agent.policy(agent.encoder(x))
    return -(policy.log_prob(actions) * weights).sum() / num_episodes, policy.entropy()


def train(args):
    """Train an agent, evaluate it and return it."""
    device = select_device(args.device)
    torch.manual_seed(args.seed)
    envs = make_envs(args, args.num_envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    transfer(args, agent, nn.Sequential(agent.encoder, agent.actor), nn.Sequential(agent.encoder, agent.critic))
    theta = [x for name, x in agent.named_parameters() if not name.startswith("critic")]
    optimizer = torch.optim.Adam(theta, lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.learning_rate, fused=True)
    N = args.num_envs
    if args.restart_returns and args.weight == "total-return":
        fail("--restart-returns is not for --weight total-return, where each action answers for the whole episode")

    with Run(args, agent=agent, optimizer=optimizer, critic_optimizer=critic_optimizer) as run:
        seed = args.seed + run.global_step  # a resumed run does not play the same episodes again
        rng = np.random.default_rng(seed).spawn(1)[0]  # not the stream of the environment with this seed
        envs.reset(seed=seed)
        while run.global_step + N <= args.total_timesteps:
            # 1. A whole episode of each environment. (The first N that end, whichever they are, would be short ones.)
            learning_rate = args.learning_rate * (1 - args.anneal_lr * run.global_step / args.total_timesteps)
            next_obs, _ = envs.reset()
            obs, actions, rewards, valid = [], [], [], []  # a list of T arrays (N, ...) each
            active = np.ones(N, bool)
            act = agent.numpy_policy(rng)
            while active.any() and run.global_step + N <= args.total_timesteps:
                obs.append(next_obs)
                valid.append(active)
                actions.append(act(next_obs))
                next_obs, reward, terminated, truncated, _ = envs.step(agent.to_env(actions[-1]))
                rewards.append((reward * active).astype(np.float32))
                run.log_step(rewards[-1], active, active & (terminated | truncated))
                active = active & ~(terminated | truncated)
            if active.any():  # their returns are not known
                tqdm.write(f"not learned from: the last {N} episodes; --total-timesteps cut off {active.sum()}")
                break
            rewards, valid = np.stack(rewards), np.stack(valid)
            b_obs = np.stack(obs)[valid]
            b_x = torch.as_tensor(agent.preprocess(b_obs), device=device)
            b_actions = torch.as_tensor(np.stack(actions)[valid], device=device)

            # 2. The returns R_t, and from them the weights Φ_t.
            returns = rewards_to_go(rewards, args.gamma, args.restart_returns)
            if args.norm_reward:
                agent.return_stats.update(returns[valid])
                returns = returns / (agent.return_stats.var.item() ** 0.5 + 1e-8)
            b_weights = b_returns = torch.as_tensor(returns[valid], device=device)  # reward-to-go
            if args.weight == "total-return":
                b_weights = torch.as_tensor(np.broadcast_to(returns[0], returns.shape)[valid], device=device)
            elif args.weight == "baseline":
                with torch.no_grad():  # images: only the policy trains the encoder
                    features = agent.encoder(b_x)
                    b_values = agent.critic(features)
                b_weights = b_returns - b_values
            if args.norm_weight:
                b_weights = (b_weights - b_weights.mean()) / (b_weights.std(correction=0) + 1e-8)

            # 3. θ ← θ + α g.
            optimizer.param_groups[0]["lr"] = learning_rate
            policy_loss, entropy = reinforce_loss(agent, b_x, b_actions, b_weights, num_episodes=N)
            loss = policy_loss - args.ent_coef * entropy.sum() / N
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # 4. Fit V to R_t. Not before 2: a V that knows these episodes would bias g.
            scalars = {"losses/policy_loss": policy_loss.item(), "losses/entropy": entropy.mean().item()}
            if args.weight == "baseline":
                scalars["losses/value_loss"] = (b_returns - b_values).square().mean().item()
                critic_optimizer.param_groups[0]["lr"] = learning_rate
                for _ in range(args.critic_updates):
                    critic_loss = (agent.critic(features) - b_returns).square().mean()
                    critic_optimizer.zero_grad()
                    critic_loss.backward()
                    critic_optimizer.step()
            if args.norm_obs:  # only now: everything above has seen the same statistics
                agent.obs_stats.update(b_obs)

            # 5. Log, and save when due.
            scalars["charts/learning_rate"] = learning_rate
            run.log_update(scalars, observations=b_obs, rewards=rewards)
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
