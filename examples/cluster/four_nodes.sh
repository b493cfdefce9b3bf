#!/usr/bin/env bash
# Four nodes of eight GPUs. The package has to be installed on all of them, beside verl. On the first node:
#   ray start --head --port 6379
# on the other three:
#   ray start --address FIRST_NODE:6379
# then on the first:
#   DATA=/shared/data MODEL=/shared/Qwen3-8B-Base CHECKPOINTS=/shared/runs/1 ./four_nodes.sh [recipe] [key=value ...]
# All of these, and this folder, have to be the same on every node: each writes its own part of a checkpoint.
set -euo pipefail
recipe=${1:-dapo_math}
shift || true
exec "$(dirname "$0")/one_node.sh" "$recipe" trainer.nnodes=4 data.train_batch_size=1024 \
  actor_rollout_ref.actor.ppo_mini_batch_size=256 trainer.default_local_dir="$CHECKPOINTS" "$@"
