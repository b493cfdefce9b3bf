#!/usr/bin/env bash
# One node of eight GPUs:  DATA=/data MODEL=/models/Qwen3-8B-Base ./one_node.sh [dapo_math|dapo_math_megatron|agent] [key=value ...]
# DATA has dapo-math-17k.parquet (BytedTsinghua-SIA/DAPO-Math-17k) and aime-2024.parquet (BytedTsinghua-SIA/AIME-2024), both
# in verl's columns. Another method of `papo methods`: papo.method=grpo '~papo.controller' '~papo.path' '~papo.level', and its own
# settings as +papo.NAME=VALUE. The recipes clip at 0.2 / 0.28; a method with a clip of its own (clip_cov, kl_cov) wants verl's default
# there, and then sets its own: actor_rollout_ref.actor.clip_ratio_high=0.2.
set -euo pipefail
cd "$(dirname "$0")"
recipe=${1:-dapo_math}
shift || true
more=()
# Agents run on every node, each where Ray started it: they find their tools by the whole path alone.
[ "$recipe" = agent ] && more+=(actor_rollout_ref.rollout.multi_turn.function_tool_path="$PWD/tools.py")
exec python -m verl.trainer.main_ppo --config-path "$PWD" --config-name "$recipe" \
  data.train_files="$DATA/dapo-math-17k.parquet" data.val_files="$DATA/aime-2024.parquet" \
  actor_rollout_ref.model.path="$MODEL" "${more[@]}" "$@"
