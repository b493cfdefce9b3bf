"""A recipe in several processes: the trainer of `papo train`, with TRL's logging in place of the run directory.

    accelerate launch --num_processes 8 --mixed_precision bf16 --use_deepspeed --zero_stage 2 \
        examples/distributed.py dapo-math-qwen3-8b --output runs/dapo-math
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 ... the same, sharded by FSDP

Methods that look at the whole rollout batch see that of all processes. The same command goes on after a stop.
"""

import argparse
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from entropy_polarity.experiments.setup import TrainingRun, quiet
from entropy_polarity.runs.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a recipe that comes with the package, or path of a .toml file")
    parser.add_argument("--output", type=Path, required=True, help="where checkpoints and the final policy go")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe")
    arguments = parser.parse_args()

    quiet()
    recipe = load_recipe(arguments.recipe, arguments.set)
    checkpoints = arguments.output / "checkpoints"
    trainer = TrainingRun.from_recipe(recipe, checkpoints).trainer
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    trainer.save_model(str(arguments.output / "policy"))


if __name__ == "__main__":
    main()
