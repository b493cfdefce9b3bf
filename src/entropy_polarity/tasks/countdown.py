"""Countdown: reach a target with all the given numbers, each used once, with + - * and brackets.

    prompt      "8 4 8 1=3:"
    completion  "8+4-(1+8)"

Training and pretraining can never draw a problem of the test split. The verifier never evaluates code: it checks the
characters, parses with `ast` and walks a whitelist of nodes.
"""

import ast
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, mul, sub

from entropy_polarity.tasks.protocol import OneTurn, Problem, Score, Split, is_held_out

OPERATORS = "+-*"
_APPLY = {"+": add, "-": sub, "*": mul}
MAX_ANSWER_CHARACTERS = 128  # no honest answer is near this long
_ANSWER = re.compile(r"[0-9+\-*() ]+")
_MAX_DRAWS = 20_000  # far beyond what any usable setting needs to hit its split


@dataclass(frozen=True)
class Expression:
    """A binary expression: a number, or two expressions joined by an operator."""

    value: int
    operator: str = ""
    left: "Expression | None" = None
    right: "Expression | None" = None

    def __str__(self) -> str:
        if self.left is None or self.right is None:
            return str(self.value)
        left, right = str(self.left), str(self.right)
        if self.operator == "*" and self.left.operator in ("+", "-"):
            left = f"({left})"
        if self.right.operator in ("+", "-") and self.operator in ("*", "-"):
            right = f"({right})"
        return f"{left}{self.operator}{right}"


@dataclass(frozen=True)
class Countdown(OneTurn):
    """Countdown with `numbers` operands (one size, or several drawn evenly), digits 1-9, targets 1-`max_target`.

    >>> task = Countdown(numbers=(3,))
    >>> problem = Problem("2 3 4=10:", {"numbers": [2, 3, 4], "target": 10}, "[2, 3, 4]=10")
    >>> task.score(problem, "2*3+4")
    Score(reward=1.0, reason='correct')
    >>> task.score(problem, "2*5").reason
    'wrong numbers'
    """

    numbers: tuple[int, ...] = (4,)
    max_target: int = 99

    name = "countdown"
    max_completion_tokens = 16
    reasons = ("correct", "wrong value", "wrong numbers", "not an expression", "too long")

    def __post_init__(self) -> None:
        sizes = tuple(self.numbers) if isinstance(self.numbers, tuple | list) else ()
        if not sizes or not all(isinstance(n, int) and 2 <= n <= 5 for n in sizes):
            raise ValueError(f"countdown: numbers must be a list of sizes from 2 to 5, got {self.numbers!r}")
        if not (isinstance(self.max_target, int) and self.max_target >= 1):
            raise ValueError(f"countdown: max_target must be at least 1, got {self.max_target!r}")
        object.__setattr__(self, "numbers", sizes)

    def problem(self, seed: int, index: int, split: Split = "train") -> Problem:
        return self.solved_problem(seed, index, split)[0]

    def solved_problem(self, seed: int, index: int, split: Split = "train") -> tuple[Problem, str]:
        """A problem with the expression it was made from: one of its solutions."""
        rng = random.Random(f"countdown:{split}:{seed}:{index}")
        for _ in range(_MAX_DRAWS):
            numbers = [rng.randint(1, 9) for _ in range(rng.choice(self.numbers))]
            solution = _random_expression(rng, numbers)
            target = solution.value
            key = f"{sorted(numbers)}={target}"
            if 1 <= target <= self.max_target and is_held_out(key) == (split == "test"):
                break
        else:
            raise ValueError(f"{self} has no problem in the {split} split: allow more numbers or larger targets")
        rng.shuffle(numbers)
        prompt = f"{' '.join(map(str, numbers))}={target}:"
        return Problem(prompt, {"numbers": numbers, "target": target}, key), str(solution)

    def scores(self, answers: Sequence[tuple[Problem, str]]) -> list[Score]:
        return [self.score(problem, completion) for problem, completion in answers]

    def score(self, problem: Problem, completion: str) -> Score:
        parsed = _parsed(completion)
        if parsed is None:
            return Score(0.0, "too long" if len(completion) > MAX_ANSWER_CHARACTERS else "not an expression")
        _, value, used = parsed
        if sorted(used) != sorted(problem.metadata["numbers"]):
            return Score(0.0, "wrong numbers")
        return Score(1.0, "correct") if value == problem.metadata["target"] else Score(0.0, "wrong value")

    def final_answers(self, answers: Sequence[tuple[Problem, str]]) -> list[str | None]:
        """The expression, whatever the order of its sums and products.

        Not its value: the target is in the problem, and a vote for it would be the verifier's.

        >>> task = Countdown()
        >>> task.final_answers([(task.problem(0, 0), text) for text in ("2*3-(1-4)", "4+3*2-1", "2*3+", "7")])
        ['2*3+4-1', '2*3+4-1', None, '7']
        """
        parsed = [_parsed(text) for _, text in answers]
        return [None if found is None else _canonical(found[0]) for found in parsed]


def _random_expression(rng: random.Random, numbers: list[int]) -> Expression:
    """Join two random parts with a random operator until one is left: every tree shape can occur."""
    parts = [Expression(n) for n in numbers]
    while len(parts) > 1:
        left = parts.pop(rng.randrange(len(parts)))
        right = parts.pop(rng.randrange(len(parts)))
        operator = rng.choice(OPERATORS)
        parts.append(Expression(_APPLY[operator](left.value, right.value), operator, left, right))
    return parts[0]


_NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


def _parsed(completion: str) -> tuple[ast.expr, int, list[int]] | None:
    """Syntax tree, value and numbers of an answer; None where it is too long or no whitelisted expression."""
    if len(completion) > MAX_ANSWER_CHARACTERS or not _ANSWER.fullmatch(completion):
        return None
    try:
        tree = ast.parse(completion.strip(), mode="eval").body
        used: list[int] = []
        return tree, _evaluate(tree, used), used
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.AST, used: list[int]) -> int:
    """The value of a whitelisted expression; numbers met on the way are appended to `used`."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _NODES:
        return _APPLY[_NODES[type(node.op)]](_evaluate(node.left, used), _evaluate(node.right, used))
    raise ValueError("not allowed in an answer")


def _canonical(node: ast.expr) -> str:
    """A checked expression as a sum of signed products, both sorted."""
    return "".join(sorted(_terms(node, "+"))).removeprefix("+")


def _terms(node: ast.expr, sign: str) -> list[str]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        turned = sign if isinstance(node.op, ast.Add) else "-" if sign == "+" else "+"
        return _terms(node.left, sign) + _terms(node.right, turned)
    return [sign + "*".join(sorted(_factors(node)))]


def _factors(node: ast.expr) -> list[str]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _factors(node.left) + _factors(node.right)
    return [f"({_canonical(node)})"] if isinstance(node, ast.BinOp) else [ast.unparse(node)]
