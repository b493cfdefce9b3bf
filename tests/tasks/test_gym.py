"""Procedural tasks: every reasoning-gym data set makes problems, accepts its own answers and survives any other."""

import pytest

from entropy_polarity.tasks import distinct_problems, make_task
from entropy_polarity.tasks.gym import GymTask, _workers, extracted

pytest.importorskip("reasoning_gym", reason="needs the extra [gym]")
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


@pytest.fixture(scope="module")
def task():
    return GymTask("chain_sum", SUMS)


def test_its_own_answers_are_right_and_others_are_not(task):
    problem = task.problem(0, 0)
    answer = problem.metadata["answer"]
    answers = [answer, f"I think\n<answer> {answer} </answer>", f"<answer>0.5</answer> no <answer>{answer}</answer>"]
    scores = task.scores([(problem, text) for text in [*answers, "<answer>x</answer>", "", " ", "9" * 30_000]])
    assert [score.reason for score in scores[:3]] == ["correct"] * 3
    assert [score.reason for score in scores[3:]] in (
        ["wrong", "no answer", "no answer", "too long"],
        ["partly", "no answer", "no answer", "too long"],
    )
    assert all(score.reward >= 1 for score in scores[:3])
    assert all(score.reward < 1 for score in scores[3:])


def test_problems_are_of_seed_index_and_split(task):
    again = GymTask("chain_sum", SUMS)
    train = [task.problem(3, i) for i in range(100)]
    assert train == [again.problem(3, i) for i in range(100)]
    assert train != [task.problem(4, i) for i in range(100)]
    test = distinct_problems(task, 3, "test", 30)
    assert {p.key for p in test}.isdisjoint({p.key for p in train})
    assert len({p.key for p in test}) == 30
    assert train[0].messages == [
        {"role": "system", "content": task.system},
        {"role": "user", "content": train[0].prompt},
    ]


def test_a_composite_mixes_by_weight():
    parts = [{"name": "chain_sum", "weight": 3, "config": SUMS}, {"name": "leg_counting"}]
    mixed = make_task("gym:composite", config={"datasets": parts})
    problems = [mixed.problem(0, i) for i in range(60)]
    legs = sum("legs" in p.prompt for p in problems)
    assert 3 <= legs <= 30
    assert all(score.reward == 1 for score in mixed.scores([(p, p.metadata["answer"]) for p in problems]))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gym:chain_sums", {}, "unknown reasoning-gym data set 'chain_sums': did you mean 'chain_sum'"),
        ("gym:chain_sum", {"config": {"min_termz": 2}}, "min_termz"),
        ("gym:chain_sum", {"config": {"min_terms": -1}}, "AssertionError: min_terms must be positive"),
        ("gym:chain_sum", {"seconds": -1.0}, "seconds is -1.0; expected a positive number"),
        ("gym:composite", {}, "KeyError: 'datasets'"),
        ("gym", {}, "say which data set"),
        ("gin:chain_sum", {}, "unknown task 'gin:chain_sum'"),
        ("countdown:4", {}, "unknown task 'countdown:4'"),
        ("gym:chain_sum", {"sistem": ""}, "did you mean 'system'"),
    ],
)
def test_bad_settings_are_one_clear_line(name, settings, message):
    with pytest.raises(ValueError, match=message) as failure:
        make_task(name, **settings)
    assert "\n" not in str(failure.value)


def test_extracted():
    assert extracted("<answer>\n1\n2 </answer> trailing") == "1\n2"
    assert extracted(" 12 ") == "12"
    # What was cut off is no answer; neither is what it withdrew, nor all of the text.
    assert extracted("<answer>1") == ""
    assert extracted("<answer>1</answer> or rather <answer>2") == ""
    assert extracted("1 goes between <answer> and </answer>: <answer>1</answer>") == "1"
    assert extracted("It goes into <answer> tags: <answer>1</answer>") == "1"


# Those whose scorer evaluates or parses expressions, and those whose items depend on the order of sets.
DELICATE = [
    "basic_arithmetic",
    "bitwise_arithmetic",
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "number_sorting",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
    "word_ladder",
]
HOSTILE = [
    "__import__('pathlib').Path({marker!r}).touch()",
    "[__import__('pathlib').Path({marker!r}).touch()]",
    "9**9**9**9",
    "(" * 5000,
    "[" * 300 + "]" * 300,
    "\x00\u202e\U0001f600",
    "1e999999",
    "{{}}[0].__class__",
    "1/0",
]


@pytest.mark.parametrize("name", DELICATE)
def test_answers_are_not_evaluated(name, tmp_path):
    made, marker = GymTask(name, seconds=2.0), str(tmp_path / "pwned")
    problem = made.problem(0, 0)
    texts = [text.format(marker=marker) for text in HOSTILE]
    right, *scores = made.scores([(problem, problem.metadata["answer"]), *((problem, text) for text in texts)])
    assert right.reward == 1, right
    assert all(score.reward < 1 for score in scores)
    assert not (tmp_path / "pwned").exists(), "code in an answer ran"
    _workers("judged", 2.0).close()


@pytest.mark.slow
def test_every_data_set_makes_problems_that_its_own_scorer_accepts():
    from reasoning_gym.factory import DATASETS

    unscored = []
    for name in sorted(set(DATASETS) - {"composite"}):
        made = GymTask(name, seconds=20.0)
        problem = made.problem(0, 0)
        assert problem == made.problem(0, 0), name
        (score,) = made.scores([(problem, problem.metadata["answer"])])
        if score.reward < 1:
            unscored.append((name, score))
    assert {name for name, _ in unscored} == NO_ORACLE, "\n".join(map(str, unscored))


# Many answers are right; the entry holds none, or one that its scorer does not read.
NO_ORACLE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


def test_final_answers_are_what_is_judged(task):
    problem = task.problem(0, 0)
    texts = ["<answer> 4 </answer>", "4", "<answer></answer>", " ", "9" * 30_000]
    assert task.final_answers([(problem, text) for text in texts]) == ["4", "4", None, None, None]
