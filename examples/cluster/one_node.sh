#!/usr/bin/env bash
# One node of eight GPUs:  DATA=/data MODEL=/models/Qwen3-8B-Base ./one_node.sh [dapo_math|dapo_math_megatron|agent] [key=value ...]
# DATA has dapo-math-17k.parquet (BytedTsinghua-SIA/DAPO-Math-17k) and aime-2024.parquet (BytedTsinghua-SIA/AIME-2024), both
# in verl's columns. Another method: papo.method=grpo '~papo.controller' '~papo.path' '~papo.level', or any of `papo methods`.
set -euo pipefail
cd "$(dirname "$0")"
recipe=${1:-dapo_math}
shift || true
exec python -m verl.trainer.main_ppo --config-path "$PWD" --config-name "$recipe" \
  data.train_files="$DATA/dapo-math-17k.parquet" data.val_files="$DATA/aime-2024.parquet" \
  actor_rollout_ref.model.path="$MODEL" "$@"
