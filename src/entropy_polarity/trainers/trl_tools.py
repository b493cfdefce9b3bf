"""What TRL needs of a tokenizer so that a policy can call tools: asked before a run, answered in one line."""

from typing import Any

from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    supports_tool_calling,
)

_INSTEAD = "take a model that was trained to call tools, such as Qwen3, or leave task.tools out"


def check_tool_support(tokenizer: Any) -> None:
    """Raise ValueError unless TRL can show this tokenizer's policy what tools said, and read its calls.

    Where the tokenizer does not say how its calls are read, TRL's knowledge of its template is put in.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"task.tools needs a tokenizer with a chat template, and this one has none: {_INSTEAD}")
    if not supports_tool_calling(tokenizer):
        raise ValueError(f"the tokenizer's chat template leaves out tool calls or what tools said: {_INSTEAD}")
    if getattr(tokenizer, "response_template", None) is None and getattr(tokenizer, "response_schema", None) is None:
        try:
            add_response_schema(tokenizer)
        except ValueError:
            raise ValueError(
                "TRL does not know how this chat template writes tool calls: put a response_template into "
                f"tokenizer_config.json, or {_INSTEAD}"
            ) from None
    if not is_chat_template_prefix_preserving(tokenizer):
        try:
            get_training_chat_template(tokenizer)
        except ValueError:
            raise ValueError(
                "the tokenizer's chat template writes earlier messages anew when a tool has answered, and TRL has no "
                f"other form of it: change the template, or {_INSTEAD}"
            ) from None
