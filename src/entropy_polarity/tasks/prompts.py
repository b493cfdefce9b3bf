"""How a problem is put to a policy: as messages where its tokenizer has a chat template, as plain text where not."""

from collections.abc import Sequence
from typing import Any

from entropy_polarity.tasks.protocol import Messages, Problem


def for_tokenizer(problem: Problem, tokenizer: Any) -> str | Messages:
    """What the policy of this tokenizer is asked."""
    if problem.messages is None or getattr(tokenizer, "chat_template", None) is None:
        return problem.prompt
    return problem.messages


def encoded(prompt: str | Messages, tokenizer: Any) -> list[int]:
    """The token ids that the policy continues; after messages they end with the template's start of an answer."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


def plain(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: where it is a list of messages, all that the policy said in them.

    >>> plain([{"role": "assistant", "content": "4"}]), plain("5")
    ('4', '5')
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion if message["role"] == "assistant")


def why_unreadable(prompts: Sequence[list[int]], tokenizer: Any, answer: int, context: int | None) -> str | None:
    """Why a policy cannot read a task, in one line; None where it can.

    It cannot where more than one in a hundred tokens of the prompts stand for what its tokenizer does not know, or
    where one prompt in ten, with an answer of up to `answer` tokens, is longer than its `context`.
    """
    unknown, written = getattr(tokenizer, "unk_token_id", None), sum(map(len, prompts))
    strange = 0 if unknown is None else sum(row.count(unknown) for row in prompts)
    if strange > 0.01 * written:
        return f"{strange / written:.0%} of the prompts' tokens are unknown to its tokenizer: it cannot read this task"
    long = sum(context is not None and len(row) + answer > context for row in prompts)
    if long > 0.1 * len(prompts):
        return (
            f"{long} of {len(prompts)} prompts, with an answer of {answer} tokens, are longer than the {context} "
            "tokens that it can read"
        )
    return None
