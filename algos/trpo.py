r"""Trust Region Policy Optimization (TRPO).

PPO talks the policy out of large changes; TRPO rules them out. Its update is the best step on the surrogate objective
L for which the mean KL divergence from the policy that collected the data stays within δ, the trust region:

    max_θ L(θ) = E_t[ρ_t Â_t]  subject to  E_t[KL(π_old(·|s_t) ‖ π_θ(·|s_t))] ≤ δ,   ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t)

Close to θ_old, L grows by g·(θ-θ_old) and the KL divergence is ½ (θ-θ_old)ᵀ H (θ-θ_old), with the policy gradient g
and the Fisher information matrix H. The best step is then along the natural gradient d = H⁻¹g, and uses up exactly δ.
Farther off these are only approximations, so the step is cut back until it keeps to the limit and improves L:

    θ = θ_old + α^j √(2δ / dᵀHd) d   for the first j = 0, 1, 2, … for which KL ≤ δ and L(θ) > L(θ_old), if there is one

H is never formed: conjugate gradients solve Hd = g with products Hv = ∇(∇KL·v) alone. A little of the identity is
added to H (damping): shorter, more stable steps. Â_t is GAE(λ), standardised in L; V is fitted to R̂_t = Â_t + V(s_t).

J. Schulman et al.: Trust Region Policy Optimization, 2015, arXiv:1502.05477. GAE(λ): arXiv:1506.02438.

    python algos/trpo.py --env-id CartPole-v1
    python algos/trpo.py --env-id Pendulum-v1 --num-envs 2 --num-steps 1024 --gamma 0.95 --critic-updates 15
"""

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
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.nn.utils import vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    total_timesteps: int = 100_000  # environment steps to train for, all environments together
    num_envs: int = 8  # N parallel environments
    num_steps: int = 128  # T steps of each environment per rollout
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of actor and critic; none: linear (images: always 512)
    log_std_init: float = 0.0  # initial log σ of the Gaussian policy; 0: σ is half the range of each action
    learning_rate: float = 1e-3  # step size of Adam, for the critic; the policy's steps are as long as δ allows
    gamma: float = 0.99  # discount γ
    gae_lambda: float = 0.95  # λ of GAE: 0 is the one-step TD error, 1 the Monte-Carlo return with bootstrap
    target_kl: float = 0.01  # δ, limit of the mean KL(π_old‖π) over a rollout (unchecked without line search)
    cg_iters: int = 15  # iterations of conjugate gradients
    cg_damping: float = 0.1  # this much of the identity matrix is added to H
    line_search_steps: int = 10  # lengths of the step to try; 0: take the full step unchecked (natural policy gradient)
    line_search_decay: float = 0.8  # α, each length that is tried is this share of the one before
    critic_updates: int = 10  # epochs of the critic's regression on the returns of each rollout
    num_minibatches: int = 16  # minibatches per epoch of the regression
    norm_obs: bool = False  # standardise observations by running mean and std, clip to ±10 (moves π; δ does not see it)
    norm_reward: bool = False  # divide rewards by the running std of the discounted return, clip to ±10
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


# ==== TRPO
def compute_gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Advantages Â and returns R̂ = Â + V, both (T, N), of rewards, terminated, truncated (T, N) and values (T+1, N).

    A terminal state is worth 0, a truncated one its value; Â ends with the episode. Mask out steps that only reset.
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantages, advantage = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + decay[t] * advantage
        advantages[t] = advantage
    return advantages, advantages + values[:-1]


def conjugate_gradient(product, b, iters):
    """Solve Hx = b for a positive definite matrix H that is known by its product v ↦ Hv (Hestenes, Stiefel 1952)."""
    x = torch.zeros_like(b)
    residual = direction = b
    square = b @ b
    for _ in range(iters):
        if square <= 1e-10 * (b @ b):  # solved, as far as float32 can tell; or b is 0
            break
        H_direction = product(direction)
        step = square / (direction @ H_direction)
        x = x + step * direction
        residual = residual - step * H_direction
        last_square, square = square, residual @ residual
        direction = residual + square / last_square * direction
    return x


def flat(tensors):
    """All numbers of some tensors as one vector (parameters_to_vector fails on the second derivatives of a CNN)."""
    return torch.cat([x.flatten() for x in tensors])


def trust_region_step(agent, parameters, x, actions, advantages, args):
    """Move θ, the policy's `parameters`, by one step on B transitions. Returns what to log."""
    with torch.no_grad():
        old_policy = agent.policy(agent.encoder(x))
        old_log_probs = old_policy.log_prob(actions)

    def surrogate():
        """L(θ), and the mean KL(π_old‖π_θ)."""
        policy = agent.policy(agent.encoder(x))
        ratio = (policy.log_prob(actions) - old_log_probs).exp()
        return (ratio * advantages).mean(), kl_divergence(old_policy, policy).mean()

    # g = ∇L, and ∇KL. At θ_old the latter is 0, but not its derivative H: create_graph lets it be differentiated again.
    old_objective, kl = surrogate()
    g = flat(torch.autograd.grad(old_objective, parameters, retain_graph=True))
    kl_gradient = flat(torch.autograd.grad(kl, parameters, create_graph=True))

    def fisher_vector_product(v):
        """Hv = ∇(∇KL·v), with damping."""
        return flat(torch.autograd.grad(kl_gradient @ v, parameters, retain_graph=True)) + args.cg_damping * v

    # The natural gradient d = H⁻¹g, and the step along it that uses up δ if the KL is quadratic and H not damped.
    natural_gradient = conjugate_gradient(fisher_vector_product, g, args.cg_iters)
    Hd = fisher_vector_product(natural_gradient)
    dHd = (natural_gradient @ Hd).clamp(min=1e-20)
    full_step = (2 * args.target_kl / dHd).sqrt() * natural_gradient

    # The line search: the longest of the steps that keeps to δ and improves L, or else 0, which changes nothing.
    old_theta = flat(parameters).detach()
    steps = [args.line_search_decay**j * full_step for j in range(args.line_search_steps)] + [0]
    if args.line_search_steps == 0:  # the natural policy gradient takes the full step, unchecked
        steps = [full_step]
    with torch.no_grad():
        for j in range(len(steps)):
            vector_to_parameters(old_theta + steps[j], parameters)
            objective, kl = surrogate()
            if kl <= args.target_kl and objective > old_objective:
                break
    return {
        "losses/kl": kl.item(),
        "losses/entropy": old_policy.entropy().mean().item(),
        "losses/surrogate_improvement": (objective - old_objective).item(),
        "losses/line_search_steps": j,  # how often it was shortened; line_search_steps (if not 0): none was accepted
        "losses/cg_residual": ((g - Hd).norm() / g.norm().clamp(min=1e-20)).item(),
    }


def train(args):
    """Train an agent, evaluate it and return it."""
    device = select_device(args.device)
    torch.manual_seed(args.seed)
    envs = make_envs(args, args.num_envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    transfer(args, agent, nn.Sequential(agent.encoder, agent.actor), nn.Sequential(agent.encoder, agent.critic))
    parameters = [x for name, x in agent.named_parameters() if x.requires_grad and not name.startswith("critic")]  # θ
    optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.learning_rate, fused=True)
    T, N = args.num_steps, args.num_envs
    if args.total_timesteps < T * N or args.num_minibatches > T // 2 * N:  # every second step may be a reset
        fail("--total-timesteps must cover a rollout, and --num-minibatches be at most num_envs * (num_steps // 2)")

    with Run(args, agent=agent, critic_optimizer=optimizer) as run:
        optimizer.param_groups[0]["lr"] = args.learning_rate  # a flag given beside --resume wins
        seed = args.seed + run.global_step  # a resumed run does not play the same episodes again
        rng = np.random.default_rng(seed).spawn(1)[0]  # not the stream of the environment with this seed
        obs = np.stack([envs.reset(seed=seed)[0]] * (T + 1))  # obs[T], where a rollout ends, is where the next begins
        actions = np.stack([agent.numpy_policy()(obs[0])] * T)  # for their shape and dtype
        rewards, discounted = np.zeros((T, N), np.float32), np.zeros((T + 1, N))
        terminated, truncated, valid = np.zeros((3, T, N), bool)
        ended = np.zeros(N, bool)

        while run.global_step + T * N <= args.total_timesteps:
            # 1. Collect T steps of N environments. The step after the end of an episode only resets: it is not valid.
            act = agent.numpy_policy(rng)
            obs[0] = obs[T]
            for t in range(T):
                valid[t] = ~ended
                actions[t] = act(obs[t])
                obs[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(agent.to_env(actions[t]))
                rewards[t] *= valid[t]
                ended = terminated[t] | truncated[t]
                run.log_step(rewards[t], valid[t], ended)

            # 2. V(s_t) in one batch; from it the returns R̂_t and the standardised advantages Â_t.
            x = torch.as_tensor(agent.preprocess(obs), device=device)
            with torch.no_grad():
                values = agent.critic(agent.encoder(x.flatten(0, 1))).numpy(force=True).reshape(T + 1, N)
            scaled = rewards
            if args.norm_reward:  # discounted: Σ_k γ^k r_{t-k} of each episode so far
                discounted[0] = discounted[T]
                for t in range(T):
                    discounted[t + 1] = rewards[t] + args.gamma * valid[t] * discounted[t]
                agent.return_stats.update(discounted[1:][valid])
                scaled = np.clip(rewards / (agent.return_stats.var.item() ** 0.5 + 1e-8), -10, 10)
            advantages, returns = compute_gae(scaled, values, terminated, truncated, args.gamma, args.gae_lambda)
            advantages = (advantages - advantages[valid].mean()) / (advantages[valid].std() + 1e-8)

            # 3. One step along the natural gradient, on the valid transitions.
            b_x, b_actions = x[:T][valid], torch.as_tensor(actions[valid], device=device)
            b_advantages, b_returns = torch.as_tensor(np.stack([advantages[valid], returns[valid]]), device=device)
            scalars = trust_region_step(agent, parameters, b_x, b_actions, b_advantages, args)

            # 4. Fit V to R̂_t by least squares, in epochs of minibatches.
            with torch.no_grad():  # images: only the policy trains the encoder
                features = agent.encoder(b_x)
            for _ in range(args.critic_updates):
                order = torch.as_tensor(rng.permutation(len(b_x)), device=device)
                for i in order.tensor_split(args.num_minibatches):
                    value_loss = (agent.critic(features[i]) - b_returns[i]).square().mean()
                    optimizer.zero_grad()
                    value_loss.backward()
                    optimizer.step()
            if args.norm_obs:  # only now: everything above has seen the same statistics
                agent.obs_stats.update(obs[:T][valid])

            # 5. Log, and save when due.
            scalars |= {"losses/value_loss": value_loss.item(), "charts/learning_rate": args.learning_rate}
            run.log_update(scalars, observations=obs, rewards=rewards)
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
