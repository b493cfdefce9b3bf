"""Run by torch.distributed.run: every method on fixed completions; rank 0 saves the way the weights went.

Gloo, on CPU. The completions are a function of prompt and place in the group, so that any number of processes trains on
the same rollout; their lengths differ, between the ranks too.
"""

import json
import random
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from test_trl import make_trainer
from test_trl_methods import EXAMPLES, REUSED, STATEFUL, uneven

from entropy_polarity.trainers.trl import PolarityTrainer

GROUP, ROWS = 4, 16


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


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, results = dist.get_world_size(), {}
    for name, method in {**EXAMPLES, **STATEFUL}.items():
        trainer = make_trainer(
            PolarityTrainer, Path(tempfile.mkdtemp()), method=method, per_device_train_batch_size=ROWS // ranks,
            ddp_backend="gloo", **REUSED | {"max_steps": 4},
        )  # fmt: skip
        trainer.rollout_func, trainer.reward_funcs = fixed, [uneven]
        start = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        way = [(p.detach() - q).flatten() for p, q in zip(trainer.model.parameters(), start, strict=True)]
        results[name] = {"way": torch.cat(way), "state": rounded(trainer.method_state)}
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.destroy_process_group()


def rounded(state) -> str:
    """JSON with four significant digits: sums of other orders differ in the last bits."""
    return json.dumps(json.loads(json.dumps(state), parse_float=lambda x: float(f"{float(x):.3g}")))


if __name__ == "__main__":
    main()
