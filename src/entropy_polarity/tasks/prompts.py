"""How a problem is put to a policy: as messages where its tokenizer has a chat template, as plain text where not."""

from collections.abc import Sequence
from typing import Any

from entropy_polarity.tasks import Messages, Problem


def for_tokenizer(problem: Problem, tokenizer: Any) -> str | Messages:
    """What the policy of this tokenizer is asked."""
    if problem.messages is None or getattr(tokenizer, "chat_template", None) is None:
        return problem.prompt
    return problem.messages


def encoded(prompt: str | Messages, tokenizer: Any) -> list[int]:
    """The token ids that the policy continues. After messages stands the template's start of an answer."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


def plain(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: of messages, all that the policy said.

    >>> plain([{"role": "assistant", "content": "4"}]), plain("5")
    ('4', '5')
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion if message["role"] == "assistant")
