#!/usr/bin/env bash
# Reproduces the table of results and the learning curves of the README: trains each algorithm on its environments with
# several seeds, then writes tables and pictures. (The README names the scripts of its other numbers.)
#
#   ./benchmark.sh                                     everything
#   ./benchmark.sh --dry-run                           only print the commands
#   ALGOS="ppo trpo" ENVS=Hopper-v5 ./benchmark.sh     a part; its tables and pictures go to the folder of the runs
#   ALGOS=ppo ./benchmark.sh --publish                 … or into benchmark/ and the README, where the other rows stay
#   SEEDS=1 SCALE=0.1 ./benchmark.sh                   a quick look: one seed, a tenth of the steps
#
# SEEDS          number of seeds (5 on CartPole, Acrobot and Pendulum, 3 elsewhere)
# FIRST_SEED     the first of them. The settings were chosen on seeds 1 to 3, so results start at seed 11, or where
#                settings were replaced later at 21, 31 or 61: on new seeds again.
# JOBS           runs side by side (as many as there are cores)
# ALGOS, ENVS    what to run (all)
# SCALE          factor on the steps (1)
# DEVICE         cpu, cuda … (cpu: for networks of this size a GPU is slower)
# RUNS           folder of the runs (runs/benchmark, or runs/benchmark-SCALE)
# RESULTS        folder of the tables and pictures (benchmark for a complete run or with --publish, else that of the runs)
#
# After Ctrl-C or a power cut start it again: finished runs are skipped, cut ones resumed, and those whose settings here
# have changed start anew.
set -euo pipefail
cd "$(dirname "$0")"
complete=true # a part, or a quick look, must not replace the results of hours
[[ ${SEEDS:-}${FIRST_SEED:-}${ALGOS:-}${ENVS:-} || ${SCALE:-1} != 1 ]] && complete=false
SEEDS=${SEEDS:-} FIRST_SEED=${FIRST_SEED:-} JOBS=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
ALGOS=${ALGOS:-} ENVS=${ENVS:-} SCALE=${SCALE:-1} DEVICE=${DEVICE:-cpu}
RUNS=${RUNS:-runs/benchmark$([[ $SCALE == 1 ]] || echo "-$SCALE")}
[[ $complete == true || ${1:-} == --publish ]] && RESULTS=${RESULTS:-benchmark}
RESULTS=${RESULTS:-$RUNS}
ENVS=$(sed 's/[^ ]*://g' <<<"$ENVS") # the names of environments, without their modules
export OMP_NUM_THREADS=1  # faster with several runs side by side
export TQDM_MININTERVAL=10 # seconds between two lines of progress in the logs

experiments() { # algorithm, environment, steps, settings that differ from the algorithm's defaults
  local rollout="--num-envs 1 --num-steps 2048 --norm-obs --norm-reward" # PPO's and TRPO's for most of MuJoCo
  local many=${SEEDS:-5} few=${SEEDS:-3} seeds # of short runs, and of longer ones
  # On gamma: with 0.99 some runs on Hopper and Walker2d learn to be faster and to fall earlier; with 0.995 TRPO stays
  # upright on Hopper and PPO on Walker2d. With 0.995 TRPO's LunarLander hovers for 800,000 steps or more; with 0.999 two
  # seeds of three land after 400,000. On Pendulum 0.95 instead of 0.9 is worth 17 to 36 points of return.
  # On REINFORCE's Acrobot: before V knows the returns, R - V is near -99 for most actions, and the policy runs off;
  # with norm-weight it learned on four seeds of five, without it on two.
  # On Swimmer: even with gamma 0.9999 TRPO and PPO stayed at returns of 130 to 150 with one environment, on two seeds
  # each; with four environments they reached 350 and 310 there.
  # On TRPO's InvertedDoublePendulum: once the pole stands, advantages are little more than noise, and every step goes
  # as far as target-kl allows. With 0.02 and rollouts of 2048 steps the pole fell in many episodes after a million
  # (7127, 3363, 4903).
  # On A2C's LunarLanderContinuous: it hovers long before it lands. In training, seed 1 was at 90 after 1.5 million steps
  # and at 224 after 5 million; with 32 steps a rollout it was at 146, fell to -48, and came back to 148.
  # On A2C's Walker2d: with gamma 0.99 and λ 0.9 seeds 21 and 22 had stayed at 660 and 318. With 8 environments at 7e-4
  # seeds 1 and 2 learned to stand (1,037 and 1,012 in training after 780,000 steps) and went no further.
  # On A2C's HalfCheetah: with 8 steps of 8 environments at 7e-4 and λ 0.9 seven runs of eight stay near 1,600; with 16
  # of 16 at 2e-3 and λ 0.95 four of five (1 and 2, 31 to 33) get past 3,000.
  # On DDPG's InvertedDoublePendulum see benchmark/README.md: with 1e-3 it balances after 20,000 steps, but not for
  # long.
  # On REINFORCE's LunarLander: over the last 150,000 steps of training, returns were 155 and 241 with 4 episodes an
  # update at 3e-3, 129 and 142 with 16 at 5e-3, which make a quarter of the updates (seeds 1 and 2).
  # On REINFORCE's Pong see benchmark/README.md.
  # On target-kl: without it ten epochs at 3e-4 moved PPO's HalfCheetah (256-256, first σ e^-2) by a KL of 0.15 a
  # rollout, and threw a policy worth 4,500 onto its back, where it stayed for 150,000 steps.

  seeds=$many
  experiment reinforce CartPole-v1 400000
  experiment reinforce CartPole-v1 400000 --exp-name reinforce-reward-to-go --weight reward-to-go
  experiment reinforce CartPole-v1 400000 --exp-name reinforce-total-return --weight total-return
  experiment a2c  CartPole-v1 200000
  experiment a3c  CartPole-v1 200000 --num-workers 2
  experiment ppo  CartPole-v1 60000
  experiment trpo CartPole-v1 100000
  from=21 experiment dqn  CartPole-v1 100000
  from=21 experiment dqn  CartPole-v1 50000 --exp-name dqn-50k --train-frequency 2

  from=21 experiment reinforce Acrobot-v1 500000 --norm-weight
  experiment a2c  Acrobot-v1 500000 --num-steps 16 --norm-obs
  experiment ppo  Acrobot-v1 1000000 --norm-obs
  experiment trpo Acrobot-v1 100000 --num-envs 2 --num-steps 1024 --target-kl 0.02 --norm-obs
  from=21 experiment dqn  Acrobot-v1 100000

  from=31 experiment a2c  Pendulum-v1 1000000 --num-envs 32 --num-steps 8 --gamma 0.95 --gae-lambda 0.95 --norm-obs \
    --norm-reward
  experiment a3c  Pendulum-v1 1000000 --num-workers 2 --num-envs 16 --num-steps 8 --gamma 0.95 --gae-lambda 0.95 \
    --norm-obs --norm-reward
  experiment ppo  Pendulum-v1 100000 --num-envs 8 --num-steps 128 --num-minibatches 16 --learning-rate 1e-3 \
    --gamma 0.95 --gae-lambda 0.95 --norm-reward
  experiment trpo Pendulum-v1 100000 --num-envs 2 --num-steps 1024 --gamma 0.95 --critic-updates 15
  experiment ddpg Pendulum-v1 20000

  seeds=$few
  from=21 experiment reinforce LunarLander-v3 1500000 --num-envs 4 --learning-rate 3e-3 --norm-weight --norm-obs \
    --norm-reward
  from=21 experiment a2c  LunarLander-v3 1500000 --num-envs 8 --num-steps 128 --gamma 0.999 --gae-lambda 0.98 --norm-obs \
    --norm-reward
  experiment a3c  LunarLander-v3 1500000 --num-workers 2 --num-steps 128 --gamma 0.995 --gae-lambda 0.98 --norm-obs \
    --norm-reward
  experiment a2c  LunarLander-v3 200000 --exp-name a2c-200k --num-envs 8 --learning-rate 8.3e-4 --gamma 0.995
  experiment ppo  LunarLander-v3 1000000 --num-envs 16 --num-steps 1024 --num-minibatches 256 --update-epochs 4 \
    --learning-rate 3e-4 --no-anneal-lr --gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01
  experiment trpo LunarLander-v3 1000000 --num-envs 16 --num-steps 512 --gamma 0.999 --gae-lambda 0.98 \
    --target-kl 0.03 --norm-reward
  experiment dqn  LunarLander-v3 300000 --hidden-sizes 256 256 --learning-rate 6e-4 --exploration-fraction 0.15 \
    --end-e 0.1 --buffer-size 300000 --no-anneal-lr

  experiment reinforce LunarLanderContinuous-v3 1500000 --norm-weight --norm-obs --norm-reward
  from=31 experiment a2c  LunarLanderContinuous-v3 5000000 --num-envs 8 --num-steps 128 --gamma 0.999 --gae-lambda 0.98 \
    --norm-obs --norm-reward
  experiment ppo  LunarLanderContinuous-v3 1000000 --num-envs 16 --num-steps 1024 --num-minibatches 256 \
    --update-epochs 4 --learning-rate 3e-4 --no-anneal-lr --gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01
  experiment trpo LunarLanderContinuous-v3 1000000 --num-envs 16 --num-steps 256 --gamma 0.995 --gae-lambda 0.98 \
    --target-kl 0.03 --norm-reward --log-std-init -1
  experiment trpo LunarLanderContinuous-v3 110000 --exp-name trpo-110k --num-envs 2 --num-steps 1024 \
    --gae-lambda 0.98 --target-kl 0.03 --critic-updates 20 --norm-obs --norm-reward
  experiment ddpg LunarLanderContinuous-v3 500000 --hidden-sizes 128 128 --batch-size 128 --learning-starts 10000

  from=31 experiment a2c  HalfCheetah-v5 1000000 --num-steps 16 --learning-rate 2e-3 --gae-lambda 0.95 --norm-obs \
    --norm-reward --log-std-init -1
  experiment ppo  HalfCheetah-v5 1000000 $rollout --num-minibatches 32 --learning-rate 3e-4 --gae-lambda 0.92 \
    --log-std-init -1 --target-kl 0.03
  experiment trpo HalfCheetah-v5 1000000 $rollout --gamma 0.98 --gae-lambda 0.92 --target-kl 0.02 --log-std-init -1
  experiment ddpg HalfCheetah-v5 1000000 --gamma 0.99 --batch-size 100 --learning-starts 10000

  experiment a2c  Hopper-v5 1000000 --num-steps 64 --learning-rate 2e-3 --gamma 0.99 --gae-lambda 0.95 --norm-obs \
    --norm-reward
  experiment ppo  Hopper-v5 1000000 $rollout --num-minibatches 32 --learning-rate 3e-4 --gamma 0.99 --gae-lambda 0.95
  experiment trpo Hopper-v5 1000000 $rollout --gamma 0.995 --gae-lambda 0.97 --target-kl 0.02
  experiment ddpg Hopper-v5 1000000 --gamma 0.99 --batch-size 100

  from=31 experiment a2c  Walker2d-v5 1000000 --num-steps 16 --learning-rate 1e-3 --gamma 0.995 --gae-lambda 0.95 \
    --log-std-init -1 --norm-obs --norm-reward
  experiment ppo  Walker2d-v5 1000000 $rollout --num-minibatches 32 --learning-rate 3e-4 --gamma 0.995 \
    --gae-lambda 0.95 --log-std-init -1 --clip-coef 0.1
  experiment trpo Walker2d-v5 1000000 $rollout --target-kl 0.02 --log-std-init -1
  experiment ddpg Walker2d-v5 1000000 --gamma 0.99 --batch-size 100

  experiment ppo  InvertedDoublePendulum-v5 1000000 $rollout --num-minibatches 32 --learning-rate 3e-4 --gamma 0.99 \
    --gae-lambda 0.95
  from=21 experiment trpo InvertedDoublePendulum-v5 1000000 --num-envs 4 --num-steps 1024 --critic-updates 20 --norm-obs \
    --norm-reward
  from=21 experiment ddpg InvertedDoublePendulum-v5 1000000 --gamma 0.99 --batch-size 100 --learning-rate 1e-4

  experiment ppo  Swimmer-v5 1000000 --num-envs 4 --num-steps 1024 --num-minibatches 16 --learning-rate 6e-4 \
    --gamma 0.9999 --gae-lambda 0.98 --norm-obs --norm-reward
  experiment trpo Swimmer-v5 1000000 --num-envs 4 --num-steps 512 --gamma 0.9999 --critic-updates 20 --norm-obs \
    --norm-reward
  experiment ddpg Swimmer-v5 1000000 --gamma 0.99 --batch-size 100

  from=61 experiment reinforce envs.pong:PongDifference-v0 3000000 --num-envs 2 --hidden-sizes 200 --learning-rate 2e-3 \
    --critic-updates 5 --norm-weight --restart-returns --ent-coef 0.01 --norm-obs
  experiment ppo envs.pong:PongDifference-v0 2000000 --num-envs 16 --num-steps 128 --num-minibatches 8 \
    --update-epochs 4 --hidden-sizes 200 --learning-rate 5e-4 --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.01 --norm-obs
  experiment a2c envs.pong:PongDifference-v0 2000000 --num-steps 16 --hidden-sizes 200 --learning-rate 1e-3 \
    --gamma 0.99 --gae-lambda 0.95 --ent-coef 0.01 --norm-obs
  experiment dqn envs.pong:PongDifference-v0 1000000 --num-envs 8 --hidden-sizes 200 --learning-rate 3e-4 \
    --buffer-size 300000 --batch-size 64 --learning-starts 10000 --train-frequency 8 --target-network-frequency 1000 \
    --tau 1 --exploration-fraction 0.1 --end-e 0.02

  experiment a2c  BipedalWalker-v3 2260000 --num-steps 16 --learning-rate 1e-3 --gamma 0.99 --gae-lambda 0.9 \
    --log-std-init -1 --norm-obs --norm-reward
  experiment ppo  BipedalWalker-v3 2000000 --num-envs 16 --num-steps 1024 --num-minibatches 128 --learning-rate 3e-4 \
    --gamma 0.999 --gae-lambda 0.95 --norm-obs --norm-reward
}

names=() commands=()
experiment() {
  local algo=$1 env=$2 steps exp_name=$1 first=${FIRST_SEED:-${from:-11}} seed
  local name=${env##*:} # without its module
  [[ " ${ALGOS:-$algo} " == *" $algo "* && " ${ENVS:-$name} " == *" $name "* ]] || return 0
  steps=$(awk "BEGIN { printf \"%d\", $3 * $SCALE }")
  shift 3
  [[ ${1:-} == --exp-name ]] && exp_name=$2
  for ((seed = first; seed < first + seeds; seed++)); do
    names+=("${name}__${exp_name}__$seed")
    commands+=("python algos/$algo.py --env-id $env --total-timesteps $steps${*:+ $*} --seed $seed --eval-episodes 100 --device $DEVICE")
  done
}

is_of() { [[ -f $RUNS/$1/log.txt && $(head -n 1 "$RUNS/$1/log.txt") == *" $2" ]]; } # name, command
finished() { is_of "$1" "$2" && [[ $(tail -n 1 "$RUNS/$1/log.txt") == eval:* ]]; }

train() { # name, command
  local folder=$RUNS/$1 checkpoint commit
  trap : TERM # which `stop` sends: wait for the run, which gets it too and writes a checkpoint
  checkpoint=$(ls "$folder"/*/checkpoint.pt 2>/dev/null || true)
  commit=$(git log -1 --format=%h -- algos benchmark.sh 2>/dev/null || echo unknown)
  git diff --quiet HEAD -- algos benchmark.sh 2>/dev/null || commit+=+ # changes that are not committed
  if [[ $checkpoint ]] && is_of "$1" "$2"; then
    printf '\nresumed %s\n' "$commit" >>"$folder/log.txt"
    ${2%% --env-id*} --resume "$checkpoint" >>"$folder/log.txt" 2>&1 || true
  else
    rm -rf "$folder"
    mkdir -p "$folder"
    echo "$commit $2" >"$folder/log.txt"
    $2 --log-dir "$folder" >>"$folder/log.txt" 2>&1 || true
  fi
  echo "        $1 $(tail -n 1 "$folder/log.txt" | sed 's/ checkpoint=.*//')"
}

stop() {
  trap '' INT TERM
  echo "stopping: every run writes a checkpoint; start $0 again to go on"
  for group in $(jobs -rp); do kill -TERM -- "-$group"; done
  wait
  exit 130
}

experiments
measurement="python benchmark/gradient_variance.py --out $RESULTS/gradient_variance.csv"
[[ $SCALE == 1 && " ${names[*]} " == *" CartPole-v1__reinforce__"* ]] || measurement=
for word in $ALGOS $ENVS; do
  [[ " ${commands[*]:-}" == *" algos/$word.py "* || " ${names[*]:-}" == *" ${word}__"* ]] && continue
  echo "error: no experiment of $word with ALGOS=\"$ALGOS\" ENVS=\"$ENVS\"" >&2
  exit 2
done
if [[ ${1:-} == --help ]]; then
  sed -n '2,/^set/ s/^# \{0,1\}//p' "$0"
  exit
elif [[ ${1:-} == --dry-run ]]; then
  printf '%s\n' "${commands[@]}" ${measurement:+"$measurement"}
  exit
elif [[ $# != 0 && $* != --publish ]]; then
  echo "error: unknown argument $1 (see the top of $0)" >&2
  exit 2
fi

mkdir -p "$RUNS"
if type flock &>/dev/null; then # (macOS has none)
  exec 9>"$RUNS/lock"
  flock --nonblock 9 || { echo "error: another $0 is at work in $RUNS" >&2 && exit 2; }
fi

# How long it will take: from the seconds of the committed results, on a machine like theirs.
known=benchmark/results.csv
[[ -f $known ]] || known=/dev/null
for i in "${!names[@]}"; do
  finished "${names[i]}" "${commands[i]}" || echo "${names[i]%__*}"
done | awk -F, -v jobs="$JOBS" -v scale="$SCALE" '
  FILENAME != "-" && FNR == 1 { for (i = 1; i <= NF; i++) if ($i == "seconds") column = i; next }
  FILENAME != "-" { seconds[$1 "__" $2] = $column; next }
  !($0 in seconds) { unknown++; runs++; next }
  { runs++; total += seconds[$0]; if ($0 ~ /__ddpg/) ddpg += seconds[$0] }
  END {
    printf "%d runs to go: about %.1f hours", runs, total * scale / jobs / 3600
    printf " (DDPG %.1f), and %d runs of unknown length\n", ddpg * scale / jobs / 3600, unknown
  }' "$known" -
echo "tables and pictures go to $RESULTS/"

trap stop INT TERM
for i in "${!names[@]}"; do
  finished "${names[i]}" "${commands[i]}" && continue
  while (($(jobs -rp | wc -l) >= JOBS)); do sleep 1; done
  echo "[$((i + 1))/${#names[@]}] ${names[i]}"
  set -m # the run is a process group: a Ctrl-C reaches it once, from `stop`, and as TERM, for INT may be ignored
  train "${names[i]}" "${commands[i]}" &
  set +m # but sleep is not: it would be the only one to get the Ctrl-C
done
while (($(jobs -rp | wc -l))); do sleep 1; done

failed=()
for i in "${!names[@]}"; do
  finished "${names[i]}" "${commands[i]}" || failed+=("${names[i]}")
done
if ((${#failed[@]} < ${#names[@]})); then
  $measurement
  python benchmark/report.py "$RUNS" "$RESULTS" "${names[@]}"
fi
if ((${#failed[@]})); then
  echo "error: ${#failed[@]} of ${#names[@]} runs failed; the end of their logs:" >&2
  for name in "${failed[@]}"; do echo "$RUNS/$name/log.txt: $(tail -n 1 "$RUNS/$name/log.txt")" >&2; done
  exit 1
fi
