r"""Grading by math-verify, between our own finder of answers (tasks/answers.py) and comparison (tasks/equality.py).

math-verify finds an answer in prose, parses LaTeX and compares what has structure: sets, intervals, tuples, relations.
What it is given is in one notation, and it compares numbers and expressions as we do. This runs in workers.
"""

import functools
import logging
import re
from decimal import Decimal
from itertools import pairwise, product
from typing import Any, NamedTuple

from entropy_polarity.tasks.answers import bases, boxed, clock, has_letters, normalised, without_unit, word

GRADE, FIND, COMPARE = "grade", "find", "compare"  # what workers do
CORRECT, WRONG, NOT_PARSED = "correct", "wrong", "not parsed"
# What is one expression and no prose: between signs of mathematics, or a line with LaTeX's commands.
_SEGMENT = re.compile(r"\$\$.+?\$\$|(?<!\\)\$[^$\n]+\$|\\\[.+?\\\]|\\\(.+?\\\)", re.DOTALL)
_MARK = re.compile(r"####[ \t]*([^\n#]*)\s*$")  # GSM8K's, of the last line
_SIGNS = re.compile(r"^(?:\$\$?|\\\[|\\\()|(?:\$\$?|\\\]|\\\))$")
_COMMAND = re.compile(r"\\[a-zA-Z]{2,}")
_LEAD = re.compile(r"(?:.*(?:\bis|\bare|:|=>|\\implies)\s)?(?:[a-zA-Z]{2,},? +)*", re.DOTALL)  # up to the answer
_E_NOTATION = re.compile(r"(?<![\w.\\])(?:\d+(?:\.\d*)?|\.\d+)[eE][+-]?\d{1,3}(?!\w|\.\d)")
# 2e-1 is 0.2 to a programmer and 2 e - 1 to a mathematician.
_AMBIGUOUS = re.compile(r"(?<![\w.])(\d+)e([+-]\d)(?![\d.])")


class Answer(NamedTuple):
    """An answer in its own words, and what math-verify reads in it: an expression where it is one, and a text."""

    words: str
    readings: list[Any]


def work(what: str, *arguments: Any) -> Any:
    """`grade`, `find` or `compare`: one function, so that one pool of workers does all three."""
    return {GRADE: grade, FIND: find, COMPARE: compare}[what](*arguments)


def grade(golds: list[str], completion: str) -> str:
    """The verdict on a completion, which may be any of the accepted answers."""
    found = final(completion)
    if not found:
        return NOT_PARSED
    return CORRECT if any(same(in_gold(gold), found) for gold in golds) else WRONG


def find(completion: str) -> str | None:
    """The answer in a completion, in its own words; None where there is none."""
    found = final(completion)
    return found.words if found else None


def compare(completion: str, other: str) -> bool:
    """Whether the answers of two completions are equal."""
    one, two = final(completion), final(other)
    return one is not None and two is not None and (same(one, two) or same(two, one))


def in_gold(gold: str) -> Answer:
    """What a data set gives for an answer: alone, in a box, or as prose with mathematics in it."""
    plain = gold.replace("\\$", "")
    found = final(gold) if "$" in plain or boxed(gold) is not None else None
    return found or read(plain)


def final(completion: str) -> Answer | None:
    """The final answer of a completion: what is boxed, else what math-verify finds in the prose."""
    held = boxed(completion)
    if held is not None:
        return read(held) if held else None
    text = completion.replace("\\$", "")
    if (mark := _MARK.search(text)) and (marked := read(mark[1].strip(" $."))).words:
        return marked
    segments = list(_SEGMENT.finditer(text))
    last_line = (text.strip().splitlines() or [""])[-1]
    if not segments and _COMMAND.search(last_line):
        return read(_LEAD.sub("", last_line, count=1))
    # What cannot be read is not read in part.
    if segments and _COMMAND.search(segments[-1][0]):
        answer, rest = read(_SIGNS.sub("", segments[-1][0])), text[segments[-1].end() :]
        if len(answer.readings) < 2:
            if not any(character.isdigit() for character in rest):
                return answer
            text = rest
    # In prose a number is found in digits.
    readings = _math_verify().parse(_E_NOTATION.sub(lambda number: format(Decimal(number[0]), "f"), text))
    return Answer(str(readings[-1]), readings) if readings else None


def read(words: str) -> Answer:
    """The answer that some words are, as a whole."""
    return Answer(words, _math_verify().read(words))


def same(gold: Answer, found: Answer) -> bool:
    """Whether an answer is the accepted one. It may leave out a base or a unit, and must not name another base."""
    ours, theirs = bases(gold.words), bases(found.words)
    if ours and theirs and ours != theirs:
        return False
    if _contradicts_itself(found):
        return False
    times = clock(gold.words), clock(found.words)
    if all(times):
        return times[0] == times[1]
    words = word(gold.words), word(found.words)
    if all(words):
        return words[0] == words[1]
    wanted, given = ([a, *_other(a, _AMBIGUOUS.sub(r"\1 e \2", a.words))] for a in (gold, found))
    # A letter that may be a unit is one where the other answer has none, or names its unit too.
    if has_letters(found.words):
        wanted += _other(gold, without_unit(gold.words))
    if not has_letters(gold.words):
        given += _other(found, without_unit(found.words))
    return any(_math_verify().verify(a.readings, b.readings) for a, b in product(wanted, given))


def _contradicts_itself(answer: Answer) -> bool:
    """Whether it is an equation of numbers that does not hold, such as 3 + 5 = 7: its right side alone is no answer."""
    sides, other = answer.words.split("="), has_letters(answer.words) or re.search("[<>!:]", answer.words)
    if other or len(sides) < 2 or not all(map(str.strip, sides)):
        return False
    readings = [read(side).readings for side in sides]
    return not all(_math_verify().verify(a, b) for a, b in pairwise(readings))


def _other(answer: Answer, words: str) -> list[Answer]:
    """The answer in other words; none where they are the same."""
    return [] if words == answer.words else [read(words)]


class _MathVerify(NamedTuple):
    parse: Any
    verify: Any
    read: Any


@functools.cache
def _math_verify() -> _MathVerify:
    """Its functions, with our notation and comparison, without Python's eval and without its own time limits, which
    the worker has."""
    import math_verify
    from math_verify import grader, parser

    from entropy_polarity.tasks import equality
    from entropy_polarity.tasks.safe_evaluation import shield

    for package in ("sympy", "latex2sympy2_extended", "math_verify"):
        shield(package)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off
    written, symbols = parser.normalize_latex, grader.sympy_compare_symbols
    rules = parser.NormalizationConfig(malformed_operators=True, nits=True, boxed="none")

    def normalize(latex: str, config: Any = rules) -> str:
        return written(normalised(latex), rules)

    def read(words: str) -> list[Any]:
        latex = normalize(words)
        try:
            return [parser.parse_latex_cached(latex), latex]
        except Exception:  # of ANTLR, of sympy, or a plain Exception: it is no expression
            return [latex]

    def only_where(comparable: Any, compare: Any) -> Any:
        return lambda gold, found, *rest: comparable(gold, found) and compare(gold, found, *rest)

    parser.normalize_latex = normalize
    grader.sympy_numeric_eq = equality.equal
    grader.sympy_symbolic_eq = lambda gold, found: False  # equal has decided that
    grader.sympy_expr_eq = only_where(equality.is_no_equation_for_value, grader.sympy_expr_eq)
    grader.sympy_solve_and_compare = only_where(equality.may_be_solved, grader.sympy_solve_and_compare)
    grader.sympy_compare_sets = only_where(equality.is_no_pair_for_list, grader.sympy_compare_sets)
    grader.sympy_compare_symbols = lambda gold, found: symbols(gold, found) or equality.equal(gold, found)
    targets = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
    parse = functools.partial(math_verify.parse, extraction_config=targets, parsing_timeout=0)
    verify = functools.partial(math_verify.verify, timeout_seconds=0, allow_set_relation_comp=True)
    return _MathVerify(parse, verify, read)
