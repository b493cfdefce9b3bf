"""PAPO in a plain torch loop: GRPO with token weights, no trainer and no framework.

    python examples/loop.py --steps 20

The seven numbered steps are those of the README. The trainer in `entropy_polarity.trainers.trl` must agree with
this file on the loss and the gradient of a batch; a test says so.
"""

import argparse
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_polarity import Monitor, Tokens, make_transform, token_stats
from entropy_polarity.policy import resolve_model
from entropy_polarity.tasks import make_task


def rollout(model, tokenizer, task, step: int, prompts: int, group: int) -> dict[str, torch.Tensor]:
    """Sample `group` completions of each prompt and judge them."""
    problems = [task.problem(seed=0, index=step * prompts + i, split="train") for i in range(prompts)]
    repeated = [problem for problem in problems for _ in range(group)]
    batch = tokenizer([p.prompt for p in repeated], return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        ids = model.generate(
            **batch, do_sample=True, top_k=0, max_new_tokens=task.max_completion_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    width = batch["input_ids"].shape[1]
    completions = ids[:, width:]
    ended = (completions == tokenizer.eos_token_id).long().cumsum(1)
    mask = (ended - (completions == tokenizer.eos_token_id).long()) == 0  # up to and with the first <eos>
    texts = tokenizer.batch_decode(completions.masked_fill(~mask, tokenizer.pad_token_id), skip_special_tokens=True)
    rewards = torch.tensor([task.score(p, text).reward for p, text in zip(repeated, texts, strict=True)])
    return {"ids": ids, "prompt_mask": batch["attention_mask"], "mask": mask, "rewards": rewards}


def group_advantages(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """A = (R - mean) / (std + 1e-4) within each group (GRPO, arXiv 2402.03300)."""
    grouped = rewards.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def tokens_of(model, batch: dict[str, torch.Tensor], advantages: torch.Tensor, old_logp=None) -> Tokens:
    """One forward pass: log-probs with gradient, and beside them the statistics of polarity."""
    ids, mask = batch["ids"], batch["mask"]
    attention = torch.cat([batch["prompt_mask"], mask.long()], dim=1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -mask.shape[1] - 1 : -1]
    stats = token_stats(logits, ids[:, -mask.shape[1] :])
    logp = stats.logp
    return Tokens.pack(
        mask,
        advantages,
        logp=logp,
        old_logp=logp.detach() if old_logp is None else old_logp,
        entropy=stats.entropy,
        sensitivity=stats.sensitivity,
    )


def policy_loss(tokens: Tokens, clip: tuple[float, float] = (0.2, 0.2)) -> torch.Tensor:
    """The clipped surrogate, averaged over all tokens of the batch (DAPO, arXiv 2503.14476)."""
    ratio = (tokens.require("logp") - tokens.require("old_logp")).exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    surrogate = torch.min(ratio * tokens.advantages, clipped * tokens.advantages)
    return -surrogate.mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=16)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))
    task = make_task("countdown", numbers=[4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    transform, monitor = make_transform("papo"), Monitor()
    state = transform.init()

    for step in range(arguments.steps):
        batch = rollout(model, tokenizer, task, step, arguments.prompts, arguments.group)  # 1, 2
        advantages = group_advantages(batch["rewards"], arguments.group)  # 3
        tokens = tokens_of(model, batch, advantages)  # 4
        seen = tokens.detach()
        weighted, state, metrics = transform.update(seen, state)  # 5, 6
        metrics = monitor.measure(seen, weighted) | metrics
        loss = policy_loss(replace(tokens, advantages=weighted.advantages))  # 7
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(
            f"step {step + 1:3d}  reward {batch['rewards'].mean():.3f}  "
            f"entropy {metrics['polarity/entropy']:.3f}  lambda {metrics['polarity/lambda']:+.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
