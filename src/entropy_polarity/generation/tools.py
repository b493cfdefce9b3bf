"""Completions of a policy that calls tools on its way to an answer.

While it is trained the loop is TRL's own. This is the same for an evaluation, with any `Generator`: what was written so
far is continued token by token, never written anew, and what a tool said counts towards the length of a completion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
    supports_tool_calling,
)

from entropy_polarity.generation import Generator, Sampling
from entropy_polarity.tasks import Messages

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
    try:
        _template(tokenizer)
    except ValueError:
        raise ValueError(
            "the tokenizer's chat template writes earlier messages anew when a tool has answered, and TRL has no "
            f"other form of it: change the template, or {_INSTEAD}"
        ) from None


def converse(
    generator: Generator,
    tools: Sequence[Callable[..., str]],
    prompts: Sequence[Messages],
    samples: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> "list[list[Conversation]]":
    """`samples` conversations about every prompt. One ends when the policy calls no tool, or where what the tool said
    does not fit: that is dropped then. Raises ValueError as `check_tool_support`.
    """
    check_tool_support(generator.tokenizer)
    form = _Form(generator.tokenizer, {tool.__name__: tool for tool in tools}, _template(generator.tokenizer))
    starts = [form.rendered(prompt, add_generation_prompt=True, tools=list(tools)) for prompt in prompts]
    made = [[Conversation(start) for _ in range(samples)] for start in starts]
    going, turn = [conversation for row in made for conversation in row], 0
    while going:
        left = [max_new_tokens - len(conversation.written) for conversation in going]
        context = [conversation.prompt + conversation.written for conversation in going]
        # A stream of its own for every turn: seeds of users are small.
        said = generator.complete(context, 1, max(left), sampling, seed + (turn << 32))
        for conversation, (ids,), longest in zip(going, said, left, strict=True):
            conversation.say(form, ids[:longest])
        going = [one for one in going if one.hear(form, max_new_tokens, generator.context)]
        turn += 1
    return made


@dataclass
class Conversation:
    """A prompt, and all that followed: `written` as token ids, `messages` as what they say.

    `calls` counts the tools that were asked, `failures` the calls that reached none.
    """

    prompt: list[int]
    written: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0
    failures: int = 0

    def say(self, form: "_Form", ids: list[int]) -> None:
        self.messages.append(form.read(ids, self.prompt + self.written))
        self.written = self.written + ids

    def hear(self, form: "_Form", longest: int, context: int | None) -> bool:
        """Whether the last message calls tools and what they answer fits, into the completion and into what the policy
        can read: then it is heard."""
        calls = self.messages[-1].get("tool_calls")
        if not calls:
            return False
        answers = [form.answer(call) for call in calls]
        self.calls += len(calls)
        self.failures += sum(failed for _, failed in answers)
        heard = [message for message, _ in answers]
        ids = form.after_a_call(heard)
        written = len(self.written) + len(ids)
        if written >= longest or (context is not None and len(self.prompt) + written >= context):
            return False
        self.written = self.written + ids
        self.messages += heard
        return True


@dataclass(frozen=True)
class _Form:
    """How a tokenizer writes and reads a conversation with `tools`; `template` as of `_template`."""

    tokenizer: Any
    tools: dict[str, Callable[..., str]]
    template: str | None

    def read(self, ids: list[int], context: list[int]) -> dict[str, Any]:
        return parse_response(self.tokenizer, ids, prefix=context, tools=list(self.tools.values()))

    def rendered(self, messages: Any, **settings: Any) -> list[int]:
        settings |= {"chat_template": self.template, "return_dict": False}
        return self.tokenizer.apply_chat_template(messages, **settings)

    def after_a_call(self, answers: list[dict[str, str]]) -> list[int]:
        """What stands between a call and the next message of the policy."""
        call = {"type": "function", "function": {"name": answers[0]["name"], "arguments": {}}}
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        prefix = self.rendered(before, add_generation_prompt=False)
        whole = self.rendered([*before, *answers], add_generation_prompt=True)
        if (end := self.tokenizer.eos_token_id) in prefix:  # the policy's own words end there, before a line feed
            prefix = prefix[: len(prefix) - prefix[::-1].index(end)]
        if whole[: len(prefix)] != prefix:
            raise ValueError("the tokenizer's chat template writes a call anew when a tool has answered: change it")
        return whole[len(prefix) :]

    def answer(self, call: dict[str, Any]) -> tuple[dict[str, str], bool]:
        """(message, whether no tool was reached): a call is the policy's word, and may be anything."""
        function = call.get("function") or {}
        name = str(function.get("name"))
        try:
            if name not in self.tools:
                raise ValueError(f"Tool {name} not found.")  # as TRL says it: what the policy was trained with
            content, failed = str(self.tools[name](**function["arguments"])), False
        except Exception as error:
            content, failed = str({"error": str(error)}), True
        return {"role": "tool", "name": name, "content": content}, failed


def _template(tokenizer: Any) -> str | None:
    """The template a policy is trained with: None for its own, another where that writes earlier messages anew."""
    return None if is_chat_template_prefix_preserving(tokenizer) else get_training_chat_template(tokenizer)
