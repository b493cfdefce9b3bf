"""A policy that calls tools is trained by TRL's own loop, and what tools and environments said is never learnt."""

import json
import re

import pytest
import torch
from datasets import Dataset
from heard import assert_only_the_policy_is_learnt, train_watched, written
from test_tasks_training import SHAPE, few_steps, policy, printable_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from trl.chat_template_utils import llama3_chat_template, qwen3_chat_template

from entropy_polarity.experiments import setup
from entropy_polarity.experiments.setup import prompts_of, quiet_trainer, trainer_config
from entropy_polarity.generation import Sampling
from entropy_polarity.generation.sampling import TransformersGenerator
from entropy_polarity.generation.tools import check_tool_support, converse
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.runs.record import Run
from entropy_polarity.tasks import make_task
from entropy_polarity.tasks.tools import calculator, tools_of
from entropy_polarity.trainers.trl import PolarityConfig, PolarityTrainer

pytestmark = pytest.mark.usefixtures("python_runs")
END = "<|im_end|>"


def qwen_like():
    """A tokenizer of characters with the chat template of Qwen3, which TRL knows how to read and to train with."""
    tokenizer = printable_tokenizer(chat=True)
    tokenizer.add_special_tokens({"eos_token": END, "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = qwen3_chat_template
    return tokenizer


def scripted(tokenizer, speak):
    """An untrained policy that says `speak(row, what it has read)`; its log-probs are its own."""
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 8192}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE | ids))

    def generate(input_ids, attention_mask, **_):
        said = [speak(row, tokenizer.decode(ids[mask.bool()])) for row, (ids, mask) in
                enumerate(zip(input_ids, attention_mask, strict=True))]  # fmt: skip
        spoken = tokenizer(said, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        return torch.cat([input_ids, spoken["input_ids"]], dim=1)

    model.generate = generate
    return model


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>{END}"


def with_tools(row, read):
    """Of four rows one asks the calculator, one asks it and errs, one asks Python, one asks for a tool there is not."""
    (sum_,) = re.findall(r"What is ([0-9+*]+)\?", read)
    heard = re.findall(r"<tool_response>\n(.*)\n</tool_response>", read)
    kind = row % 4 if not heard else None
    if "# Tools" not in read:
        return "I have no tools." + END
    if kind is None:
        return f"\\boxed{{{heard[0]}}}{END}"
    if kind == 3:
        return call("search", query=sum_)
    if kind == 2:
        return call("python", code=f"print({sum_})")
    return call("calculator", expression=sum_ if kind == 0 else sum_ + "+1")


def sums(tmp_path):
    pytest.importorskip("math_verify", reason="needs the extra [math]")
    rows = ({"question": f"What is {i}*7+{i}?", "answer": 8 * i} for i in range(60))
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(tmp_path / "sums.jsonl")


SMALL = ["trainer.max_steps=2", "trainer.per_device_train_batch_size=4", "trainer.num_generations=4",
         "trainer.num_iterations=2", "trainer.use_cpu=true", "trainer.bf16=false",
         "trainer.max_completion_length=400"]  # fmt: skip


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "top_entropy", "clip_cov", "steer")]


@pytest.mark.parametrize("method", ["papo", *OTHERS])
def test_what_a_tool_said_enters_no_statistic_and_no_gradient(method, tmp_path):
    tokenizer = qwen_like()
    task = make_task("math", data=sums(tmp_path), tools=["calculator", "python"])
    config = trainer_config(load_recipe("countdown", [*SMALL, "task={name='math'}"], method), tmp_path / "run", task)
    dataset, reward = prompts_of(task, tokenizer, config, 0)
    trainer = quiet_trainer(scripted(tokenizer, with_tools), tokenizer, config, dataset, reward)
    watched = train_watched(trainer)
    assert_only_the_policy_is_learnt(trainer, watched)

    inputs, mask = watched.rollouts[0].inputs, written(watched.rollouts[0])
    heard = inputs["completion_mask"].bool() & ~inputs["tool_mask"].bool()
    for row, judged in enumerate(reward.judged):
        (a, b) = re.findall(r"What is (\d+)\*7\+(\d+)\?", judged.prompt)[0]
        value = int(a) * 7 + int(b)
        said = {0: value, 1: value + 1, 2: value, 3: "{'error': 'Tool search not found.'}"}[row % 4]
        expected = f"<|im_start|>user\n<tool_response>\n{said}\n</tool_response>{END}\n<|im_start|>assistant\n"
        assert tokenizer.decode(inputs["completion_ids"][row][heard[row]]).strip("\n") == expected.strip("\n")
        text = tokenizer.decode(inputs["completion_ids"][row][mask[row]])
        assert text.count(END) == 2
        assert text.endswith(f"\\boxed{{{said}}}{END}")
        assert judged.verdict == ("correct" if row % 2 == 0 else judged.verdict)
        assert judged.completion.strip() == f"\\boxed{{{said}}}", "what a tool said is not judged"
    assert watched.rollouts[0].tokens.reward.tolist() == [1, 0, 1, 0]
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    assert logged["tools/call_frequency"] == 1
    assert logged["tools/failure_frequency"] == 0.25
    assert logged["verdict/correct"] == 0.5

    # An evaluation converses as training does: the same policy, asked the same, says and hears the same, id by id.
    model = scripted(tokenizer, with_tools)
    prompts = [row["prompt"] for row in dataset.select(range(1)) for _ in range(4)]
    made = converse(TransformersGenerator(model, tokenizer), tools_of(task), prompts, 1, 400, Sampling(), 0)
    for row, (conversation,) in enumerate(made):
        trained = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
        assert conversation.written == trained
        assert conversation.calls == 1
        assert conversation.failures == (row % 4 == 3)


def test_a_conversation_ends_where_there_is_no_room_and_whatever_the_policy_calls(tmp_path):
    tokenizer = qwen_like()
    said = [
        call("calculator", expression="1+1"),  # and what the tool says does not fit any more
        call("calculator", wrong="1+1"),
        f'<tool_call>\n{{"name": 3, "arguments": [7]}}\n</tool_call>{END}',
        "<tool_call>\nnot json\n</tool_call>" + END,
        "no end in sight",
        "",
    ]
    model = scripted(tokenizer, lambda row, read: said[row] if "<tool_response>" not in read else "so be it" + END)
    prompts = [[{"role": "user", "content": "What is 1+1?"}] for _ in said]

    def converse_within(length, context):
        generator = TransformersGenerator(model, tokenizer)
        assert generator.context == 8192
        generator.context = context
        return [one for (one,) in converse(generator, [calculator], prompts, 1, length, Sampling(), 0)]

    for conversation in converse_within(len(tokenizer(said[0])["input_ids"]) + 20, None):
        assert [message["role"] for message in conversation.messages] == ["assistant"]
    roomy = converse_within(800, None)
    longest = len(roomy[1].prompt + roomy[1].written)
    last = len(tokenizer("so be it" + END)["input_ids"])
    assert [one.written for one in converse_within(800, longest - last + 1)] == [one.written for one in roomy]
    cut = converse_within(800, longest - last)
    assert [one.messages[-1]["content"] == "so be it" for one in roomy[:2]] == [True, True]
    assert [message["role"] for message in cut[1].messages] == ["assistant"], "no room to answer"
    assert [one.calls for one in roomy] == [1, 1, 0, 0, 0, 0], "what cannot be read is no call"
    assert [one.failures for one in roomy] == [0, 1, 0, 0, 0, 0]
    assert roomy[0].messages[1]["content"] == "2"
    assert "unexpected keyword argument" in roomy[1].messages[1]["content"]
    assert all(one.messages[-1]["role"] == "assistant" for one in roomy)


@pytest.mark.slow
def test_a_run_with_a_tool_from_its_recipe(tmp_path, monkeypatch):
    tokenizer = qwen_like()
    model = scripted(tokenizer, with_tools)
    monkeypatch.setattr(setup, "load_policy", lambda path: (model, tokenizer))
    folder = policy(tmp_path / "model", "llama", chat=True)
    task = f"{{name='math', data='{sums(tmp_path)}', tools=['calculator', 'python'], max_completion_tokens=400}}"
    summary = few_steps(folder, task, tmp_path / "run", "trainer.max_completion_length=400", "record.completions=4")
    assert summary["status"] == "finished"
    assert summary["before"]["verdicts"]["correct"] == 0.5, "it is evaluated with its tools"
    assert summary["before"]["facts"]["tool_calls"]["value"] == 1
    assert summary["before"]["facts"]["failed_tool_calls"]["value"] == 0.25
    run = Run.read(tmp_path / "run")
    assert run.config["task"]["tools"] == ["calculator", "python"]
    assert run.series("tools/call_frequency")[1] == [1, 1]
    assert any(not token["from_policy"] for token in run.tokens(1))


def test_a_tokenizer_that_cannot_call_tools_is_one_clear_line(tmp_path):
    task = f"{{name='math', data='{sums(tmp_path)}', tools=['calculator']}}"
    for chat, reason in ((False, "this one has none"), (True, "leaves out tool calls or what tools said")):
        model = policy(tmp_path / f"model{chat}", "llama", chat)
        with pytest.raises(ValueError, match=f"{reason}: take a model .* or leave task.tools out") as failure:
            few_steps(model, task, tmp_path / "run")
        assert "\n" not in str(failure.value)
        assert not (tmp_path / "run").exists()


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (llama3_chat_template, "leaves out tool calls"),
        (TURNS, "does not know how this chat template writes tool calls"),
        (qwen3_chat_template.replace("<|im_start|>user", "<|im_start|> user"), "does not know how"),
    ],
)
def test_what_is_missing_is_named(template, reason):
    tokenizer = printable_tokenizer(chat=True)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason):
        check_tool_support(tokenizer)


def test_a_template_that_rewrites_what_was_said_needs_one_for_training():
    tokenizer = printable_tokenizer(chat=True)
    tokenizer.chat_template, tokenizer.response_template = "{{ messages | length }}" + TURNS, RESPONSE
    with pytest.raises(ValueError, match="writes earlier messages anew"):
        check_tool_support(tokenizer)


@pytest.mark.parametrize(
    ("given", "message"),
    [(["calculater"], "unknown tool 'calculater': did you mean 'calculator'"), ("calculator", "expected tuple"),
     ([3], "unknown tool 3")],
)  # fmt: skip
def test_an_unknown_tool_is_one_clear_line(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_task("math", data=sums(tmp_path), tools=given)


# ---- environments whose methods are tools -----------------------------------------------------------------

RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>\s*|$", "content": "text"},
    },
}


class GuessEnvironment:
    """The number of a row is to be guessed; the environment owns the reward."""

    def reset(self, number: int, **row) -> str:
        self.number, self.won = number, False
        return " 1-9"

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: From 1 to 9.
        """
        self.won = self.won or number == self.number
        return "won" if number == self.number else "<" if self.number < number else ">"

    def get_reward(self) -> float:
        return float(self.won)


def bisecting(row, read):
    """Even rows halve what is left, odd rows stay at 5; three guesses each."""
    answers = re.findall(r"<tool>(won|<|>)<eos>", read)
    if len(answers) == 3 or answers[-1:] == ["won"]:
        return "done<eos>"
    low, high, guess = 1, 9, 5
    for answer in answers if row % 2 == 0 else []:
        low, high = (low, guess - 1) if answer == "<" else (guess + 1, high)
        guess = (low + high) // 2
    return f'<call>{{"name": "guess", "arguments": {{"number": {guess}}}}}</call><eos>'


def test_an_environment_whose_methods_are_tools(tmp_path):
    tokenizer = printable_tokenizer(chat=True)
    tokenizer.chat_template, tokenizer.response_template = TURNS, RESPONSE
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "guess"}], "number": n} for n in (3, 8, 7, 2)])
    config = PolarityConfig(
        output_dir=str(tmp_path), method="papo", max_steps=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=400, logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        shuffle_dataset=False,
    )  # fmt: skip
    trainer = PolarityTrainer(
        scripted(tokenizer, bisecting),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        environment_factory=GuessEnvironment,
    )
    watched = train_watched(trainer)
    assert_only_the_policy_is_learnt(trainer, watched)
    assert trainer.state.global_step == 2

    rollout = watched.rollouts[0]
    numbers, inputs = [3] * 4 + [8] * 4, rollout.inputs
    for row, number in enumerate(numbers):
        heard = inputs["completion_mask"][row].bool() & ~inputs["tool_mask"][row].bool()
        answers = {(3, 0): ["<", ">", "won"], (8, 0): [">", ">", "won"], (3, 1): ["<"] * 3, (8, 1): [">"] * 3}
        expected = "".join(f"<tool>{answer}<eos><assistant>" for answer in answers[number, row % 2])
        assert tokenizer.decode(inputs["completion_ids"][row][heard]) == expected
    assert rollout.tokens.reward.tolist() == [1, 0] * 4
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    assert logged["rewards/GuessEnvironment/mean"] == 0.5
    assert logged["tools/call_frequency"] == 2.5  # of 7 and 2, 7 is found in two guesses
    assert logged["tools/failure_frequency"] == 0
