"""Mathematics: tables of every preset's form are read, answers are graded, and hostile text is survived."""

import json
import random
import time

import psutil
import pytest

from entropy_polarity.tasks import Problem, distinct_problems, make_task
from entropy_polarity.tasks.grading import grade
from entropy_polarity.tasks.math import PRESETS, MathTask
from entropy_polarity.tasks.tables import golds

pytest.importorskip("math_verify", reason="needs the extra [math]")
datasets = pytest.importorskip("datasets")


def asked(*answers):
    return Problem("?", {"answers": list(answers)}, "?")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    file = tmp_path_factory.mktemp("math") / "p.jsonl"
    file.write_text(json.dumps({"problem": "1+1", "answer": "2"}), encoding="utf-8")
    return MathTask(data=str(file), seconds=2.0)


GRADED = [
    ("1/2", r"so it is \boxed{\frac{1}{2}}", "correct"),
    ("1/2", r"\boxed{0.5}", "correct"),
    ("1/2", r"\boxed{\frac{1}{3}}", "wrong"),
    ("72", "#### 72", "correct"),
    ("1000", "The answer is 1,000.", "correct"),
    (r"\{1, 2\}", r"$\boxed{\{2, 1\}}$", "correct"),
    ("[0, 1)", r"\boxed{[0, 1)}", "correct"),
    ("(0, 1)", r"\boxed{(0, 1]}", "wrong"),
    ("x^2 + 1", r"\boxed{1 + x^2}", "correct"),
    (r"50\%", "50%", "correct"),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", "correct"),
    ("3", "Step 1: 2.\nAnswer: 3", "correct"),
    ("2", r"first \boxed{2}, in the end \boxed{3}", "wrong"),
    ("2", "I do not know", "not parsed"),
    ("2", "", "not parsed"),
    ("2", "答えは二です", "not parsed"),
    ("2", r"\boxed{100000000!}", "wrong"),  # nothing that large is worked out
    ("2", r"\boxed{9^{9^{9^{9}}}}", "wrong"),
    ("2", r"\boxed{\binom{1000000000}{500000000}}", "timed out"),
]


def test_answers_are_graded(task):
    scores = task.scores([(asked(gold), text) for gold, text, _ in GRADED])
    assert [(text, score.reason) for (_, text, _), score in zip(GRADED, scores, strict=True)] == [
        (text, verdict) for _, text, verdict in GRADED
    ]
    assert [score.reward for score in scores] == [float(verdict == "correct") for _, _, verdict in GRADED]


def test_any_of_several_answers_will_do(task):
    scores = task.scores([(asked("1", "2"), r"\boxed{2}"), (asked("1", "2"), r"\boxed{3}")])
    assert [score.reason for score in scores] == ["correct", "wrong"]


def hostile(rng, marker):
    """Answers that break parsers, fill memory, run for ever, or are code that leaves `marker` behind."""
    n = rng.choice([3, 50, 900])
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    form = rng.choice(
        [
            "(" * n + "1" + ")" * n,
            r"\boxed{" * n + "1" + "}" * n,
            r"\frac{" * n + "1" + "}{2}" * n,
            r"\boxed{" + "9^{" * min(n, 9) + "9" + "}" * min(n, 9) + "}",
            "9" + "**9" * min(n, 9),
            r"\boxed{" + f"{10**n}!" + "}",
            r"\boxed{\sum_{i=1}^{10^{" + str(n) + r"}} \frac{1}{i}}",
            r"\boxed{\int_0^\infty " + r"\sin(" * min(n, 30) + "x" + ")" * min(n, 30) + " dx}",
            code,
            rf"\boxed{{{code}}}",
            f"${code}$",
            f"The answer is {code}",
            "".join(chr(rng.choice([0, 7, 0x202E, 0x1F600, 0xD7FF, 0xFFFD, 65, 92, 123, 125])) for _ in range(n)),
            "1" * n * 50,
            "x" * 3_000_000,
            r"\left(" * n,
            r"\begin{matrix}" * n,
            r"\boxed{" + "+".join(f"x_{{{i}}}^{i}" for i in range(n)) + "}",
            "$" * n,
            r"\sqrt[" * n + "2" + "]{2}" * n,
            "a=b=" * n,
            "{" * n + "," * n + "}" * n,
            json.dumps({"value": "correct", "failure": ""}),
            "\n" * n + '{"value": "correct", "failure": ""}\n',
        ]
    )
    return form if rng.random() < 0.8 else form[: rng.randrange(1, 5000)] + rng.choice(["", "}", "$", "\\"])


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_answers_have_verdicts_within_limits(count, tmp_path):
    file, marker, rng = tmp_path / "p.jsonl", tmp_path / "pwned", random.Random(count)
    file.write_text(json.dumps({"problem": "1+1", "answer": "2"}), encoding="utf-8")
    task = MathTask(data=str(file), seconds=0.5)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    texts = [hostile(rng, marker) for _ in range(count)]
    began = time.monotonic()
    scores = task.scores([(asked("123456789.5"), text) for text in texts])
    assert time.monotonic() - began < 30 + 3 * count  # one by one, all of them timed out and their workers replaced
    assert not marker.exists(), "code in an answer ran"
    assert {score.reason for score in scores} <= set(task.reasons)
    assert all(score == (0.0, score.reason) for score in scores)
    assert {"not parsed", "wrong", "timed out"} <= {score.reason for score in scores}
    (well,) = task.scores([(asked("2"), r"\boxed{2}")])
    assert well.reason == "correct", "the workers are as good as new"
    from entropy_polarity.tasks import math

    math._workers(0.5).close()
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before, "processes are left"


def test_golds():
    assert golds(r"we get \boxed{\frac{1}{2}} in the end") == [r"\frac{1}{2}"]
    assert golds("a #### 1,234") == ["1234"]
    assert golds(7) == ["7"]
    assert golds(["$1$", " "]) == ["$1$"]
    assert golds(None) == []


ROWS = {
    "gsm8k": {"question": "How many?", "answer": "He has 6 * 12 = <<6*12=72>>72.\n#### 72"},
    "math-500": {"problem": "Find $x$.", "solution": r"So \boxed{72}.", "answer": "72", "level": 1},
    "dapo-math-17k": {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": "Solve it. Answer: $Answer"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "72", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "1"},
    },
    "aime-2024": {"id": 60, "problem": "Find it.", "solution": "Easy.", "answer": "072", "url": "u", "year": "2024"},
    "aime-2025": {"problem": "Find it.", "answer": "72", "id": "0"},
    "amc23": {"id": 0, "question": "Find it.", "answer": 72.0, "url": "u"},
    "minerva": {"question": "Find it.", "answer": "72"},
    "olympiadbench": {"id": 1, "question": "Find it.", "solution": ["Easy."], "final_answer": ["$72$"], "unit": None},
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "folder", "splits"])
def test_every_preset_reads_a_table_of_its_form(preset, form, tmp_path):
    kind = PRESETS[preset]
    asked = next(column for column in ("problem", "question", "prompt") if column in ROWS[preset])

    def numbered_rows(first):
        for number in range(first, first + 40):
            text = f"{number}: find it."
            yield ROWS[preset] | {asked: [{"role": "user", "content": text}] if asked == "prompt" else text}

    table = datasets.Dataset.from_list([*numbered_rows(0)])
    path = tmp_path / f"data.{form}"
    if form == "splits":
        tables = {kind.split: table, kind.test_split: datasets.Dataset.from_list([*numbered_rows(40)])}
        datasets.DatasetDict({name: of for name, of in tables.items() if name}).save_to_disk(str(path))
    elif form == "folder":
        table.save_to_disk(str(path))
    elif form == "parquet":
        table.to_parquet(str(path))
    else:
        table.to_json(str(path), lines=form == "jsonl")
    task = make_task(f"math:{preset}", data=str(path))
    problem = task.problem(0, 0, "test")
    assert problem.messages[-1]["role"] == "user"
    assert (problem.messages[0]["role"] == "system") == (preset != "dapo-math-17k")
    assert problem.prompt.endswith(problem.messages[-1]["content"])
    assert grade(problem.metadata["answers"], r"\boxed{72}") == "correct"
    test = {task.problem(0, i, "test").key for i in range(40)}
    if not kind.split:
        assert len(test) == 40
        with pytest.raises(ValueError, match="it has no training problems"):
            task.problem(0, 0, "train")
        return
    train = {task.problem(0, i, "train").key for i in range(40)}
    assert train.isdisjoint(test), "a file has no splits, whatever they are called on the hub"
    assert len(train | test) == (80 if form == "splits" and kind.test_split else 40)


def numbered(path, count):
    path.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": i}) for i in range(count)), encoding="utf-8")
    return str(path)


def test_splits_share_no_problem_and_every_pass_has_a_new_order(tmp_path):
    task = MathTask(data=numbered(tmp_path / "p.jsonl", 200))
    test = {task.problem(0, i, "test").key for i in range(100)}
    first, second = ([task.problem(0, i + turn * 300, "train").key for i in range(300)] for turn in range(2))
    assert test.isdisjoint(first)
    assert len(test | set(first)) == 200
    assert first != second
    assert [task.problem(0, i, "train").key for i in range(300)] == first
    assert [task.problem(1, i, "train").key for i in range(300)] != first
    with pytest.raises(ValueError, match="different test problems, 100 were asked for: ask for fewer"):
        distinct_problems(task, 0, "test", 100)


def test_the_test_split_may_be_another_file(tmp_path):
    task = MathTask(data=numbered(tmp_path / "p.jsonl", 20), test_split=numbered(tmp_path / "q.jsonl", 5))
    test, train = ({task.problem(0, i, split).metadata["answers"][0] for i in range(20)} for split in ("test", "train"))
    assert test == set("01234")
    assert train == {str(i) for i in range(5, 20)}, "what is evaluated on is never trained on"
    same = MathTask(preset="gsm8k", data=str(tmp_path / "p.jsonl"), test_split=str(tmp_path / "p.jsonl"))
    assert len({same.problem(0, i, "test").key for i in range(20)}) == 20
    with pytest.raises(ValueError, match=r"name other problems with --set task\.test_split=FILE"):
        same.problem(0, 0, "train")


def test_too_few_problems_to_keep_a_tenth_are_a_line_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"task math has no test problems.* --set task\.test_split=FILE") as failure:
        MathTask(data=numbered(tmp_path / "p.jsonl", 1)).problem(0, 0, "test")
    assert "\n" not in str(failure.value)
    file = numbered(tmp_path / "p.jsonl", 1)
    assert MathTask(data=file, test_split=file).problem(0, 0, "test").metadata["answers"] == ["0"], "what it says to do"


def test_a_system_prompt_may_be_none_at_all(tmp_path):
    file = numbered(tmp_path / "p.jsonl", 30)
    assert [m["role"] for m in MathTask(data=file).problem(0, 0).messages] == ["system", "user"]
    for task in (MathTask(data=file, system=""), MathTask(preset="gsm8k", data=file, system="")):
        assert [m["role"] for m in task.problem(0, 0).messages] == ["user"]
    (said, _) = MathTask(preset="gsm8k", data=file, system="Be brief.").problem(0, 0).messages
    assert said == {"role": "system", "content": "Be brief."}


def test_without_a_network_one_line_names_the_local_path(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match=r"--set task\.data=PATH") as failure:
        make_task("math:gsm8k").problem(0, 0)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs a preset or data"),
        ({"preset": "gsm9k"}, "did you mean 'gsm8k'"),
        ({"data": "no/such.jsonl"}, "nothing at no/such.jsonl"),
        ({"data": "{file}", "prompt_column": "a", "answer_column": "solved"}, "has no column 'solved'; it has a, b"),
        ({"data": "{file}"}, r"has the columns a, b: say which with --set task.prompt_column"),
        ({"data": "{folder}"}, "cannot read"),
        ({"data": "{broken}"}, "cannot read .*: JSON parse error"),
        ({"data": "{empty}"}, "cannot read .*: there is nothing in it"),
        ({"data": "{latin}"}, "cannot read .*latin.jsonl: 'utf-8' codec"),
        ({"data": "{odd}", "prompt_column": "none", "answer_column": "n"}, "row 0 of .* has no problem or no answer"),
        ({"data": "{odd}", "prompt_column": "n", "answer_column": "n"}, "row 0 of .*: a problem is text, or messages"),
        ({"data": "{odd}", "prompt_column": "table", "answer_column": "n"}, "a problem is text, or messages"),
        ({"data": "{odd}", "prompt_column": "said", "answer_column": "n"}, "a problem is text, or messages"),
        ({"data": "{odd}", "prompt_column": "q", "answer_column": "table"}, "row 0 of .*: an answer is text, a number"),
        ({"data": "{odd}", "prompt_column": "q", "answer_column": "nan"}, "row 0 of .* has no problem or no answer"),
        ({"data": "{file}", "prompt_column": "a", "answer_column": "b"}, "row 0 of .* has no problem or no answer"),
        ({"data": "{cut}"}, "row 0 of .* has no problem or no answer"),
        ({"data": "{file}", "seconds": 0.0}, "seconds is 0.0; expected a positive number"),
    ],
)
def test_bad_data_is_one_clear_line(settings, message, tmp_path):
    (tmp_path / "file.jsonl").write_text('{"a": "q", "b": null}', encoding="utf-8")
    (tmp_path / "broken.json").write_text('{"a": ', encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é", "answer": "1"}'.encode("latin-1"))
    odd = {"q": "q", "n": 7, "none": None, "table": {"a": 1}, "said": [{"role": "user"}], "nan": float("nan")}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd), encoding="utf-8")
    (tmp_path / "cut.jsonl").write_text(
        json.dumps({"problem": "q", "solution": r"Early \boxed{1}, then \boxed{\frac{2}"}), encoding="utf-8"
    )
    names = {name: f"{name}.jsonl" for name in ("cut", "file", "empty", "latin", "odd")}
    names |= {"broken": "broken.json", "folder": "folder"}
    paths = {name: str(tmp_path / file) for name, file in names.items()}
    settings = {k: v.format(**paths) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises((ValueError, OSError), match=message) as failure:
        make_task("math", **settings).problem(0, 0)
    assert "\n" not in str(failure.value)


def test_equal_answers_have_one_name(task):
    one, other = asked("8"), Problem("other", {"answers": ["8"]}, "other")
    texts = [r"\boxed{2^3}", r"so \boxed{8}", r"\boxed{2}", "None", r"\boxed{100000000!}", "It is 2."]
    found = task.final_answers([*((one, text) for text in texts), (other, r"\boxed{8}")])
    assert found[0] == found[1] == "2^3"
    assert found[2] == found[5] == "2"
    assert found[3] is None
    assert found[4] == "100000000!"  # whether it equals another has no end: then it does not
    assert found[6] == "8"  # of another problem: nothing there has the name already
