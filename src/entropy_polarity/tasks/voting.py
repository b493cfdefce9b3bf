"""Equal answers under one name, so that they can be counted."""

from collections.abc import Callable, Sequence
from itertools import combinations

Pair = tuple[str, str]


def merged(
    problems: Sequence[str],
    answers: Sequence[str | None],
    completions: Sequence[str],
    equal: Callable[[list[Pair]], list[bool]],
) -> list[str | None]:
    """The `answers` with each one that is equal to an earlier one of the same problem in that one's words.

    `equal` judges pairs of completions, of which only those with different answers are asked about. Equality need not
    be transitive: an answer joins the first of those that joined none.

    >>> same = lambda pairs: [float(a) == float(b) for a, b in pairs]
    >>> merged(["p"] * 4, ["1", None, "1.0", "2"], ["1", "?", "1.0", "2"], same)
    ['1', None, '1', '2']
    """
    distinct: dict[str, dict[str, str]] = {}
    for problem, answer, completion in zip(problems, answers, completions, strict=True):
        if answer is not None:
            distinct.setdefault(problem, {}).setdefault(answer, completion)
    asked = [(problem, a, b) for problem, known in distinct.items() for a, b in combinations(known, 2)]
    verdicts = equal([(distinct[problem][a], distinct[problem][b]) for problem, a, b in asked])
    same = {question for question, verdict in zip(asked, verdicts, strict=True) if verdict}
    names: dict[tuple[str, str], str] = {}
    for problem, known in distinct.items():
        first: list[str] = []
        for answer in known:
            name = next((earlier for earlier in first if (problem, earlier, answer) in same), answer)
            names[problem, answer] = name
            if name == answer:
                first.append(answer)
    return [None if a is None else names[problem, a] for problem, a in zip(problems, answers, strict=True)]
