"""Run by torch.distributed.run: every method on fixed completions; rank 0 saves what came of it.

Gloo, on CPU. The completions are a function of prompt and place in the group, so that any number of processes trains on
the same rollout; their lengths differ, between the ranks too. In the runs called "silent" a quarter of the rollout has
no token of the model, which with four ranks is all that one of them has.
"""

import json
import random
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent / "trainers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from test_trl import make_trainer
from test_trl_methods import EXAMPLES, REUSED, STATEFUL, uneven

from entropy_polarity.runs.method_state import read_state
from entropy_polarity.trainers.trl import PolarityTrainer

GROUP, ROWS = 4, 16
SILENT = ("grpo", "clip_cov", "thermostat")


def fixed(prompts, trainer):
    """Completions with the schema of TRL's `rollout_func`: one to twelve characters and the end."""
    tokenizer = trainer.processing_class
    rows = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
    for place, prompt in enumerate(prompts):
        draw = random.Random(f"{prompt} {place % GROUP}")
        text = "".join(draw.choice("0123456789+-*()") for _ in range(draw.randint(1, 12)))
        rows["prompt_ids"].append(tokenizer(prompt)["input_ids"])
        rows["completion_ids"].append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    return rows


def partly_silent(prompts, trainer):
    """The same; of every fourth prompt's completions the environment wrote all."""
    rows = fixed(prompts, trainer)
    first = ROWS // dist.get_world_size() * dist.get_rank()
    rows["env_mask"] = [
        [int((first + place) // GROUP % 4 != 1)] * len(ids) for place, ids in enumerate(rows["completion_ids"])
    ]
    return rows


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, results = dist.get_world_size(), {}
    runs = {name: (method, fixed) for name, method in {**EXAMPLES, **STATEFUL}.items()}
    runs |= {f"silent {name}": ({**EXAMPLES, **STATEFUL}[name], partly_silent) for name in SILENT}
    for name, (method, rollouts) in runs.items():
        # All ranks write into one folder, as on a shared disk.
        folder = Path(sys.argv[1]).with_suffix("") / name.replace(" ", "-")
        trainer = make_trainer(
            PolarityTrainer, folder, method=method, per_device_train_batch_size=ROWS // ranks, ddp_backend="gloo",
            **REUSED | {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "save_only_model": True},
        )  # fmt: skip
        trainer.rollout_func, trainer.reward_funcs = rollouts, [uneven]
        start = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        way = [(p.detach() - q).flatten() for p, q in zip(trainer.model.parameters(), start, strict=True)]
        logged = [
            {key: value for key, value in row.items() if key.startswith("polarity/") or key == "reward"}
            for row in trainer.state.log_history
        ]
        results[name] = {
            "way": torch.cat(way),
            "state": json.dumps(trainer.checkpoint_state),
            "metrics": json.dumps([row for row in logged if row]),
            "checkpoint": json.dumps(read_state(folder / "checkpoint-4")["state"]),
        }
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
