"""Countdown: problems are a function of their index, and no text fools, stops or crashes the verifier."""

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_polarity.tasks import Problem, Score, countdown, distinct_problems, make_task
from entropy_polarity.tasks.countdown import OPERATORS, Countdown, Expression

SIZES = [(2,), (3,), (4,), (5,), (3, 5)]


def problem(numbers: list[int], target: int) -> Problem:
    key = f"{sorted(numbers)}={target}"
    return Problem(f"{' '.join(map(str, numbers))}={target}:", {"numbers": numbers, "target": target}, key)


def evaluated(text: str) -> tuple[int, list[int]] | None:
    """Value and numbers of an answer by recursive descent, None if it is none: shares no code with the verifier.

    sum = product (("+" | "-") product)*    product = atom ("*" atom)*    atom = number | "(" sum ")"
    """
    tokens = [*re.findall(r"[0-9]+|[^ ]", text), "end"]
    used: list[int] = []

    def atom() -> int:
        token = tokens.pop(0)
        if token == "(":
            value = sum_()
            if tokens.pop(0) != ")":
                raise ValueError
            return value
        if not token.isdigit() or (token[0] == "0" and token.strip("0")):  # Python refuses 05, allows 00
            raise ValueError
        used.append(int(token))
        return used[-1]

    def product_() -> int:
        value = atom()
        while tokens[0] == "*":
            tokens.pop(0)
            value *= atom()
        return value

    def sum_() -> int:
        value = product_()
        while tokens[0] in ("+", "-"):
            value = value + product_() if tokens.pop(0) == "+" else value - product_()
        return value

    try:
        value = sum_()
    except (ValueError, IndexError):
        return None
    return (value, used) if tokens == ["end"] else None


def verdict(task_problem: Problem, text: str) -> Score:
    """What the verifier must say, by the evaluator above."""
    if len(text) > 128:
        return Score(0.0, "too long")
    found = evaluated(text) if set(text) <= set("0123456789+-*() ") else None
    if found is None:
        return Score(0.0, "not an expression")
    value, used = found
    if sorted(used) != sorted(task_problem.metadata["numbers"]):
        return Score(0.0, "wrong numbers")
    return Score(1.0, "correct") if value == task_problem.metadata["target"] else Score(0.0, "wrong value")


def test_a_problem_is_a_pure_function_of_seed_index_and_split():
    keys = [(seed, index, split) for seed in (0, 1) for index in range(20) for split in ("train", "test")]
    drawn = {key: Countdown().solved_problem(*key) for key in keys}
    task = Countdown()
    assert {key: task.solved_problem(*key) for key in reversed(keys)} == drawn
    assert len({made.prompt for made, _ in drawn.values()}) > 75  # of 80: seed, index and split all matter


def test_the_stream_of_problems_is_the_one_that_published_results_were_made_with():
    # Drawn once: a change here makes every earlier evaluation incomparable.
    assert [Countdown().problem(0, index, "test").prompt for index in range(3)] == [
        "6 9 5 8=43:",
        "3 9 6 1=18:",
        "6 5 3 3=11:",
    ]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_generated_solution_is_judged_correct(sizes, split):
    task = Countdown(numbers=sizes)
    for index in range(100):
        made, solution = task.solved_problem(3, index, split)
        numbers, target = made.metadata["numbers"], made.metadata["target"]
        assert task.score(made, solution) == Score(1.0, "correct"), (made, solution)
        assert len(numbers) in sizes
        assert all(1 <= n <= 9 for n in numbers)
        assert 1 <= target <= 99
        assert made.prompt == f"{' '.join(map(str, numbers))}={target}:"


@pytest.mark.parametrize("size", range(2, 6))
def test_a_solution_fits_the_completion_length(size):
    task = Countdown(numbers=(size,))
    longest = max((task.solved_problem(0, index)[1] for index in range(1500)), key=len)
    assert len(longest) < task.max_completion_tokens, longest  # a character a token, and the end token


def test_the_numbers_are_shown_in_an_order_that_does_not_give_the_solution_away():
    task = Countdown()
    in_order = sum(
        [int(c) for c in solution if c.isdigit()] == made.metadata["numbers"]
        for made, solution in (task.solved_problem(0, i) for i in range(500))
    )
    assert in_order < 100  # 4! orders, some of them equal


@pytest.mark.parametrize("numbers", [(3,), (2, 4)])
def test_the_splits_share_no_problem(numbers):
    task = Countdown(numbers=numbers)

    def drawn(split: str) -> set[tuple]:
        problems = (task.problem(0, index, split).metadata for index in range(10_000))
        return {(*sorted(made["numbers"]), "=", made["target"]) for made in problems}

    train, test = drawn("train"), drawn("test")
    assert train & test == set()
    assert min(len(train), len(test)) > 10


HAND = problem([2, 3, 3, 4], 14)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("2+3*4*1", (0, "wrong numbers")),
        ("2*(3+4)", (0, "wrong numbers")),  # a 3 is left
        ("3*3*2-4", (1, "correct")),
        (" ( 3*3 )*2 -4 ", (1, "correct")),
        ("((((3))))*3*2-4", (1, "correct")),
        ("3*(3*2)-4", (1, "correct")),
        ("2+3+4+3", (0, "wrong value")),
        ("3*3*2-4*1", (0, "wrong numbers")),
        ("33-2*4", (0, "wrong numbers")),
        ("3*3*2-04", (0, "not an expression")),  # leading zero
        ("3*3*2+-4", (0, "not an expression")),  # unary minus
        ("-4+3*3*2", (0, "not an expression")),
        ("3**3*2-4", (0, "not an expression")),
        ("3 3*2-4", (0, "not an expression")),
        ("3(3)*2-4", (0, "not an expression")),  # a call, to Python
        ("(3*3*2-4", (0, "not an expression")),
        ("()", (0, "not an expression")),
        ("14", (0, "wrong numbers")),
        ("", (0, "not an expression")),
        ("   ", (0, "not an expression")),
        ("3*3*2-4=14", (0, "not an expression")),
        ("3*3*2-4\n", (0, "not an expression")),
        ("3*3\t*2-4", (0, "not an expression")),
        ("3*3*2-4#", (0, "not an expression")),
        ("3*3*2-4.0", (0, "not an expression")),
        ("3*3*2-4" + " " * 121, (1, "correct")),  # 128 characters
        ("3*3*2-4" + " " * 122, (0, "too long")),
    ],
)
def test_verdicts(completion, score):
    assert Countdown().score(HAND, completion) == score
    assert verdict(HAND, completion) == score  # the evaluator of the search below agrees


HOSTILE = {
    "deep": "(" * 60 + "1" + ")" * 60,
    "unclosed": "(" * 128,
    "a million brackets": "(" * 10**6,
    "a million balanced": "(" * 10**6 + "1" + ")" * 10**6,
    "long number": "9" * 128,
    "huge number": "9" * 10**6,
    "huge product": "*".join(["9" * 11] * 10),
    "power tower": "9**9**9**9**9",
    "minus signs": "-" * 127 + "1",
    "import": "__import__('os').system('true')",
    "exponent": "1e3",
    "hexadecimal": "0x10",
    "underscore": "1_000",
    "true": "True",
    "lambda": "(lambda: 14)()",
    "walrus": "(x:=14)",
    "list": "[14]",
    "tuple": "(14,)",
    "string": "'14'",
    "f-string": "f'{14}'",
    "comparison": "14==14",
    "division": "28//2",
    "at": "7@2",
    "imaginary": "14j",
    "ellipsis": "...",
    "arabic-indic digits": "\u0663*\u0663*\u0662-\u0664",  # 3*3*2-4; int() and \d accept them
    "fullwidth digits": "\uff13*\uff13*\uff12-\uff14",
    "mathematical digits": "\U0001d7d1*\U0001d7d1*\U0001d7d0-\U0001d7d2",  # NFKC turns them into ASCII
    "superscript": "3\u00b2",
    "fullwidth asterisk": "3\uff0a3*2-4",
    "minus sign": "18\u22124",
    "no-break space": "3*3*2\u00a0-4",
    "null": "3*3*2-4\0",
    "surrogate": "3*3*2-4\ud800",
    "newline": "3*3\n*2-4",
    "carriage return": "3*3*2-4\r",
    "form feed": "3*3*2-4\f",
    "two statements": "1;1",
    "megabyte": "3*3*2-4 " * 2**17,
    "megabyte of words": "let me think " * 80_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_gets_nothing_in_bounded_time(text):
    start = time.perf_counter()
    score = Countdown().score(HAND, text)
    assert time.perf_counter() - start < 0.5
    assert score.reward == 0
    assert score.reason in ("too long", "not an expression", "wrong numbers")


@given(st.text(max_size=200))
def test_any_text_gets_a_verdict(text):
    score = Countdown().score(HAND, text)
    assert score.reason in Countdown.reasons
    assert score == verdict(HAND, text)


@settings(max_examples=300)
@given(st.text("0123456789+-*() ", max_size=12))
def test_any_text_of_the_right_characters_gets_the_verdict_of_an_independent_evaluator(text):
    assert Countdown().score(HAND, text) == verdict(HAND, text)


ANSWERS = st.recursive(
    st.integers(0, 12).map(str),
    lambda part: (
        st.tuples(part, st.sampled_from(["+", "-", "*", " - "]), part).map("".join)
        | part.map("({})".format)
        | part.map(" {} ".format)
    ),
    max_leaves=7,
)


@given(ANSWERS, st.integers(-1, 1), st.booleans())
def test_well_formed_answers_get_the_verdict_of_an_independent_evaluator(text, off, one_too_many):
    found = evaluated(text)
    assert found is not None
    value, used = found
    asked = problem(used + [1] * one_too_many, value + off)
    expected = "wrong numbers" if one_too_many else "wrong value" if off else "correct"
    assert Countdown().score(asked, text).reason == (expected if len(text) <= 128 else "too long")


@settings(max_examples=300)
@given(ANSWERS, st.data())
def test_answers_with_one_slip_get_the_verdict_of_an_independent_evaluator(text, data):
    place = data.draw(st.integers(0, len(text)))
    slip = data.draw(st.sampled_from([*"0123456789+-*() ", ""]))
    changed = text[:place] + slip + text[place + 1 :]
    found = evaluated(text)
    asked = problem(found[1], found[0])
    assert Countdown().score(asked, changed) == verdict(asked, changed)


def joined(operator: str, left: Expression, right: Expression) -> Expression:
    value = {"+": left.value + right.value, "-": left.value - right.value, "*": left.value * right.value}
    return Expression(value[operator], operator, left, right)


def leaves(expression: Expression) -> list[int]:
    if expression.left is None:
        return [expression.value]
    return leaves(expression.left) + leaves(expression.right)


EXPRESSIONS = st.recursive(
    st.integers(1, 9).map(Expression),
    lambda part: st.builds(joined, st.sampled_from(OPERATORS), part, part),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_a_printed_expression_means_what_it_was(expression):
    assert evaluated(str(expression)) == (expression.value, leaves(expression))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (joined("-", Expression(9), joined("-", Expression(5), Expression(3))), "9-(5-3)"),
        (joined("-", joined("-", Expression(9), Expression(5)), Expression(3)), "9-5-3"),
        (joined("*", joined("+", Expression(1), Expression(2)), Expression(3)), "(1+2)*3"),
        (joined("+", Expression(1), joined("*", Expression(2), Expression(3))), "1+2*3"),
    ],
)
def test_brackets_are_printed_where_they_are_needed(expression, text):
    assert str(expression) == text


@pytest.mark.parametrize(
    "refused",
    [
        {"numbers": ()},
        {"numbers": (1,)},
        {"numbers": (3, 7)},
        {"numbers": (3.0,)},
        {"numbers": "34"},
        {"numbers": 4},
        {"max_target": 0},
        {"max_target": -5},
    ],
)
def test_settings_that_make_no_task_are_refused(refused):
    with pytest.raises(ValueError, match=next(iter(refused))):
        Countdown(**refused)


def test_a_recipe_may_give_the_sizes_as_a_list():
    assert make_task("countdown", numbers=[3, 4]) == Countdown(numbers=(3, 4))


@pytest.mark.parametrize(
    ("name", "given_settings", "told"),
    [
        ("countdwn", {}, "unknown task 'countdwn': did you mean 'countdown'"),
        ("countdown", {"nubmers": [3]}, "did you mean 'numbers'"),
    ],
)
def test_an_unknown_task_or_setting_names_what_was_meant(name, given_settings, told):
    with pytest.raises(ValueError, match=told):
        make_task(name, **given_settings)


class StillSearchingError(Exception):
    pass


def test_a_task_with_an_empty_split_says_so_instead_of_searching_for_ever(monkeypatch):
    # Two numbers and target 1: 1*1 and n+1 - n. None of these nine problems hashes into the test split.
    draws, is_test = iter(range(5_000)), countdown.is_held_out

    def counted(*arguments) -> bool:
        if next(draws, None) is None:
            raise StillSearchingError
        return is_test(*arguments)

    monkeypatch.setattr(countdown, "is_held_out", counted)
    with pytest.raises(ValueError, match="test"):
        Countdown(numbers=(2,), max_target=1).problem(0, 0, "test")


def test_distinct_problems_are_the_first_of_the_stream_without_repeats_in_any_order():
    task = Countdown(numbers=(2,), max_target=9)
    stream = [task.problem(5, i, "train").metadata for i in range(200)]
    meaning = [(*sorted(made["numbers"]), made["target"]) for made in stream]
    found = [p.metadata for p in distinct_problems(task, 5, "train", 30)]
    assert len({(*made["numbers"], made["target"]) for made in stream}) > len(set(meaning))  # 1 2=3 and 2 1=3
    assert found == [stream[meaning.index(m)] for m in list(dict.fromkeys(meaning))[:30]]


def test_more_distinct_problems_than_there_are_is_an_error_with_their_number():
    task = Countdown(numbers=(2,), max_target=3)
    with pytest.raises(ValueError, match=r"'countdown' has about \d+ different train problems, 10000 were") as error:
        distinct_problems(task, 0, "train", 10_000)
    count = int(re.search(r"about (\d+)", str(error.value))[1])
    assert len(distinct_problems(task, 0, "train", count)) == count


def swapped(expression: Expression) -> Expression:
    """The same expression with the operands of every sum and product the other way round."""
    if expression.left is None or expression.right is None:
        return expression
    left, right = swapped(expression.left), swapped(expression.right)
    if expression.operator == "-":
        return Expression(expression.value, "-", left, right)
    return Expression(expression.value, expression.operator, right, left)


@given(st.integers(0, 10_000))
def test_a_final_answer_is_the_expression_in_any_order(index):
    task = Countdown(numbers=(3, 4, 5))
    made, solution = task.solved_problem(0, index)
    (answer,) = task.final_answers([(made, solution)])
    value, used = evaluated(answer)
    assert value == made.metadata["target"]
    assert sorted(used) == sorted(made.metadata["numbers"])
    rng = random.Random(index)
    expression = countdown._random_expression(rng, [rng.randint(1, 9) for _ in range(4)])
    first, second = task.final_answers([(made, str(expression)), (made, str(swapped(expression)))])
    assert first == second


def test_final_answers_by_hand():
    task, made = Countdown(), problem([1, 2, 3, 4], 10)
    texts = ["1+2+3+4", "4+(3+2)+1", "4-(3-2)", "4*(1-2)", "(1-2)*4", "4*(2-1)", "1+", "one", "", "1+" * 200 + "1"]
    assert task.final_answers([(made, text) for text in texts]) == [
        "1+2+3+4", "1+2+3+4", "2+4-3", "(1-2)*4", "(1-2)*4", "(2-1)*4", None, None, None, None,
    ]  # fmt: skip
