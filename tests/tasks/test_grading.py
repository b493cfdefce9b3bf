"""What is a right answer: golds against completions, by kind, and real golds against their own solutions."""

import json
import os
import random
from pathlib import Path

import pytest

from entropy_polarity.tasks import make_task
from entropy_polarity.tasks.tables import golds
from entropy_polarity.tasks.workers import Workers

pytest.importorskip("math_verify", reason="needs the extra [math]")


def box(*answers):
    return [rf"So it is $\boxed{{{answer}}}$." for answer in answers]


# kind: gold, completions that are right, completions that are wrong.
CASES = {
    "number words": [
        ("1500000", box(r"1.5\text{ million}", "1.5 million", r"\$1.5\text{ million dollars}"), box("1.5")),
        ("1.5", box("1½", r"1\frac{1}{2}"), box(r"1.5\text{ million}", r"1.5\text{ billion}")),
        ("36", box(r"3\text{ dozen}"), box("3")),
        ("2000", box(r"2\text{ thousand}", "2 thousand"), box("2")),
        ("5", box(r"5\text{ months}", r"5\text{ cm}", "５", "=5", "x=5"), box(
            r"5\text{ thousandths}", r"5\text{ squared}", r"5\text{ factorial}", r"5\text{ or less}",
            r"5\text{ is wrong}")),
        (r"\frac{1}{2}", box("½"), box("⅓")),
    ],
    "equations of numbers": [
        ("7", box("3+4=7", "7=7"), box("3+5=7", "2=7", "7=2")),
        ("8", box("3+5=8"), box("3+5=7")),
    ],
    "money": [
        (r"\$36", [*box(r"\$36", "36", "36.00", "€36"), "It costs $36.", r"It costs \$36."], box(r"\$35", "3.6")),
        (r"\$32,\!348", [*box(r"\$32,\!348", "32348", r"\$32,348"), r"The sum is $\$32,348$."], box("32", "348",
         "32,34")),
        (r"\$18.90", [*box(r"\$18.90", "18.9", r"18.90 \text{ dollars}"), "It costs $18.90 in all."],
         box(r"\$19.80", "18")),
        ("36", box(r"\$36", r"36 \text{ USD}"), box(r"\$63")),
    ],
    "boxes": [
        ("9", [
            r"First \boxed{4}. That is wrong; corrected: \boxed{9}.", r"\boxed{4}, no wait, \boxed{9}",
         r"\boxed 9", r"\boxed9.",
            r"\boxed{9}, \boxed{9}", r"\boxed{9}, as asked in \boxed{}.", r"\fbox{9}. Done, with 8.",
         r"$\boxed{9}$ of 10",
        ], [r"First \boxed{9}. That is wrong; corrected: \boxed{4}.", r"\boxed{}", r"\boxed{4} or \boxed{9}",
         r"\boxed{9}. \boxed{4}"]),
        ("4", [], [r"First \boxed{4}. That is wrong; corrected: \boxed{9}."]),
        ("3, 7", [
            r"\boxed{3} and \boxed{7}", r"\boxed{7}, \boxed{3}", r"\boxed{3} or \boxed{7}", r"\boxed{3, 7}",
            r"$x=\boxed{3}$ and $y = \boxed{7}$", r"\boxed{3}\quad\boxed{7}",
        ], [r"\boxed{7}", r"\boxed{3} and \boxed{8}", r"\boxed{3}. No: \boxed{7}"]),
        ("7", [], [r"\boxed{3} and \boxed{7}"]),
        (r"\frac{639}{40}", [r"$d = \boxed{15\frac{39}{40}},$ or $\boxed{\frac{639}{40}}$ inches"], []),
    ],
    "cut off": [
        ("9", [], [
            r"An early \boxed{9}. In the end: \boxed{4", r"An early \boxed{9}. In the end: \boxed{",
         r"\boxed{9}. So: \boxed",
            r"\boxed{9", r"$\boxed{\frac{9}{1}$", r"9 \boxed{\text{nine", r"\fbox{9} and \fbox{4",
        ]),
        ("4", [], [r"An early \boxed{9}. In the end: \boxed{4"]),
    ],
    "E-notation": [
        ("4.5e33", box(r"4.5 \times 10^{33}", "4.5e33", "4.5E33", r"4.5\cdot10^{33}", "45e32"), box("148.5e",
         "4.5e32", "4.5")),
        (r"4.5 \times 10^{33}", [*box("4.5e33"), "The answer is 4.5e33."], box("4.5e34", "148.5e")),
        ("300000", [*box("3e5", "3E5", "3e+5", "300,000"), "The answer is 3e5."], [*box("3e6", "15e"),
         "The answer is 3e6."]),
        ("3e5", box("300000", r"3 \cdot 10^5"), box("3", "30000")),
        ("1.5e-3", box("0.0015", r"\frac{3}{2000}"), box("0.0016", "1.5e3")),
        ("2e-1", box("2e-1", r"2\mathrm{e}-1", "-1+2e", "0.2"), box("2", "2e")),
    ],
    "letters and units": [
        (r"\frac{1}{m} t", box(r"\frac{t}{m}", r"t/m"), box(r"\frac{1}{m}", "t", r"\frac{t}{n}")),
        ("k", box("k"), box("k m", "km", "2k")),
        ("k m", box("m k", r"k \cdot m"), box("k", "m")),
        ("2m", box("2m", "2 m", "m+m"), box("2", "2k", r"2 \text{ cm}")),
        ("2", box(r"2\text{ m}", "2 m", r"2\,\mathrm{m}"), box("2m", "2x", "k m")),
        ("5 m", box(r"5 \text{ m}", "5m"), box("5", "6 m")),
        ("5", box(r"5 \text{ cm}", "5 cm", "5cm", r"5\,\text{m}^2", "5 apples", r"5^\circ"), box("5abc", "5t", "5 x")),
        (r"5\text{ cm}", box("5", "5 cm", r"5\mathrm{cm}"), box("6", "5 x")),
        ("30", box("30 mph", "30 km/h", r"30 \text{ miles per hour}"), box("30 h k")),
        (r"5 \text{ cm}, 7 \text{ cm}", box("5, 7"), box("5", "7, 9")),
        (r"864 \mbox{ inches}^2", box("864", r"864\text{ in}^2", "864 square inches"), box("846")),
    ],
    "a programmer's notation": [
        ("np.arcsin(10/13)", box(r"\arcsin(10/13)", r"\arcsin\frac{10}{13}", "arcsin(10/13)", "math.asin(10/13)"),
         box(r"\arccos(10/13)", r"\sin(10/13)", "10/13")),
        ("np.sqrt(2)/2", box(r"\frac{1}{\sqrt2}", "2**(-1/2)"), box(r"\sqrt2", "2")),
        ("2**10", box("1024", "2^{10}"), box("20", "2^1 0")),
        ("np.log(2)", box(r"\ln 2"), box(r"\log_{10} 2")),
        ("2pi", box(r"2\pi", "6.28319"), box("2", "2p i")),
        ("x^(n+1)", box("x^{n+1}"), box("x^n+1")),
        (r"6\sqrt{5}", [*box(r"6\sqrt(5)", "6sqrt(5)", "6√5"), r"$6\sqrt(5)$"], box("6", "30")),
    ],
    "close is not equal": [
        (r"1.2 \times 10^{-7}", box("0.00000012", "1.2e-7"), box("0.00000034", "0", "0.0000001")),
        ("0.0000001", box("1e-7"), box("0.0000002", "0")),
        (r"\frac{1}{2^{80}}", box("2^{-80}", r"\frac{1}{4^{40}}"), box(r"\frac{1}{2^{79}}", "0")),
        (r"x/2^{80}", box("2^{-80}x"), box("x/2^{79}", "0")),
        ("(1, 2^{-80})", box(r"(1, \frac{1}{2^{80}})"), box("(1, 2^{-79})")),
        (r"\begin{pmatrix} 10^{-20} \\ 1 \end{pmatrix}", box(r"\begin{pmatrix} 10^{-20} \\ 1 \end{pmatrix}"),
         box(r"\begin{pmatrix} 10^{-21} \\ 1 \end{pmatrix}")),
        (r"\{10^{-20}, 1\}", box(r"\{1, 10^{-20}\}"), box(r"\{10^{-21}, 1\}")),
        ("[0, 10^{-20}]", box(r"0 \le x \le 10^{-20}"), box("[0, 10^{-21}]")),
        ("x = 10^{-20}", box("10^{-20}"), box("x = 10^{-21}", "10^{-21}")),
        ("1", box("1.000", r"0.\overline{9}"), box("0.99999999", "1.0000000001")),
        ("640320^3+744", [], box(r"e^{\pi\sqrt{163}}")),
        (r"\sqrt{3+2\sqrt{2}}", box(r"1+\sqrt2"), box("2.41421356237309504", "2.414")[1:]),
        ("0", box("0.00", r"\sqrt{3+2\sqrt{2}}-1-\sqrt{2}"), box("1e-9", r"\frac{1}{10^{40}}")),
    ],
    "a decimal for a number that is none": [
        ("1/3", box("0.333333", r"0.\overline{3}", r"33.3333\%"), box("0.33333", "0.333334", "0.333332")),
        (r"\pi", box("3.14159", "3.141593"), box("3.1416", "3.14", "3.14160", r"\frac{22}{7}")),
        ("0.67", box(r"\frac{67}{100}"), box("2/3")),
        ("1/2", box("0.5", r"50\%", "0.500000"), box("0.4999999", "0.5000001")),
        ("0.1", box("1/10", r"10\%"), box(r"0.1\%", "0.10001")),
        (r"12.5\%", box("12.5", "0.125", r"\frac18", r"12.5\%"), box("1.25", "12")),
    ],
    "bases": [
        ("4210_{5}", box("4210_5", "4210", r"4210_{\text{five}}", r"4210_{\mathrm{five}}"), box("4210_{7}", "555",
         "4211_5")),
        ("4210", box("4210_5"), box("4211_5")),
    ],
    "huge": [
        ("2^{1000000000}", box("2^{1000000000}", "4^{500000000}"), box("2^{1000000001}", "2^{1000000000}+1", "2")),
        ("2^{1000000000}-1", box("4^{500000000}-1"), box("2^{1000000000}")),
        ("9^{9^{9}}", box("9^{387420489}", "3^{2 * 9^9}"), box("9^{387420488}")),
        ("9^{9^{9^9}}", box("9^{9^{9^{9}}}"), box("9^{9^{9^{8}}}")),
        ("x^{1000000000}", box(r"x \cdot x^{999999999}"), box("x^{999999999}")),
        ("100!", box("100!", r"100 \cdot 99!"), box("99!")),
        ("2", box("2"), box("9^{9^{9^{9}}}", "100000000!", "10^{10^{10}}")),
    ],
    "notation": [
        ("(1,2)", box("1<x<2", r"x \in (1,2)", r"\left(1,2\right)"), box(r"1 \le x < 2", "1<x<3", "(2,1)")),
        ("1<x<2", box("(1,2)"), box("[1,2]")),
        (r"[2,\infty)", box("x≥2", r"x \ge 2"), box("x>2")),
        ("1, -2", box("-2, 1", r"x=1 \text{ or } x=-2", r"\{1,-2\}"), box("(-2,1)", "1, 2")),
        (r"\mathrm{e}", box("e", r"\text{e}"), box("2", "x")),
        ("e^2", box(r"\mathrm{e}^2", r"\mathrm{e}^{2}", "np.exp(2)"), box("e", "2e")),
        ("2e", box(r"2\mathrm{e}"), box("2")),
        ("1234567", box(r"1\,234\,567", "1{,}234{,}567", "1 234 567", "1,234,567"), box("1234", "1, 234, 567", "1802")),
        (r"1\,234\,567", box("1234567"), box("1802")),
        ("12:30", box("12{:}30", r"12:30 \text{ p.m.}", "12:30"), box("12:31", "14:35", "1230")),
        ("12{:}30", box("12:30"), box("12:03")),
        ("1:2", box("2:4", "1/2"), box("2:1")),
        ("7", [r"\fbox{7}"], [r"\fbox{8}, not 7"]),
        (r"\log_2 8", box("3"), box("2, 8")),
        (r"\frac{3}{4}", [r"\[\frac{3}{4}\]", r"It is \(\frac{3}{4}\).", r"The answer is \frac{3}{4}"],
         [r"\[\frac{3}{5}\]"]),
        (r"\text{east}", box("east", r"\text{East}"), box("seat", r"\text{seat}")),
        ("east", box(r"\text{east}"), box("seat")),
        ("f'(x) = 2", box("f'(x)=2"), box("f(x)=2")),
        ("2x", box(r"2\text{x}"), box("2")),
        (r"x \in [-2,7]", box(r"-2 \le x \le 7", "[-2,7]"), box("(-2,7)")),
        ("6 - 5i", box(r"-5\mathrm{i}+6"), box("6+5i")),
        ("3.5", box(r"3\frac{1}{2}", r"3 \frac12"), box("3,5")),
        (r"\text{(C)}", box("C", r"\text{C}"), box("D")),
        (r"\text{Evelyn}", box("Evelyn"), box("Carla")),
        (r"\frac{x^2-1}{x-1}", box("x+1"), box("x-1")),
        ("|x|", box(r"\sqrt{x^2}"), box("x")),
        ("x", box(r"\frac{2x}{2}"), box("y", "2x")),
        ("y = 2x + 3", box("2x - y + 3 = 0", "2x+3"), box("2x - y + 4 = 0")),
    ],
    "not read in part": [
        ("6", [r"$6$"], [*box(r"6\oops{5}", r"6\sqrt(5)"), r"$6\sqrt(5)$", r"$6\oops 5$",
         r"The answer is $6 \oops 5$."]),
        ("g(x)=0", box("g(x)=0"), [r"\forall x>0, g(x)=0", r"$\forall x>0, g(x)=0$", *box(r"\forall x>0, g(x)=0")]),
        ("5", [r"The answer is 5, as $\sqrt{25}=5$ says.", r"We get $\sqrt{25}=5$"], box("2 3")),
        ("235", [], box(r"1\,234")),
        ("13", [], box(r"6 \quad 7")),
        ("5000", [r"The answer is 5 \times 10^3."], [r"The answer is 5 \times 10^2."]),
        (r"x^2+1=0", box("x^2=-1"), box("x^2+2=0")),
        ("6", [r"Therefore, \sqrt{36} = 6"], []),
        ("0", box("x=0", "f(x)=0"), box("5x - 7y + 4 = 0")),
        (r"3\sqrt{13}", [r"The answer is 3\sqrt{13}."], []),
        ("3", [], [r"The answer is 3\sqrt{13}."]),
        ("x^{1000}+1", box("1+x^{1000}"), box("x^{1000}")),
    ],
    "GSM8K's mark": [
        ("64", ["The answer was 16.\nA total of 48 + 16 = 64 points.\n#### 64", "#### $64.00"], ["64\n#### 16",
         "#### 64\n#### 16"]),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def workers():
    with Workers("entropy_polarity.tasks.grading:work", clock="processor", preload="math_verify") as them:
        yield them


def verdicts(workers, pairs):
    outcomes = workers.map([("grade", [gold], completion) for gold, completion in pairs])
    return [outcome.value or outcome.failure for outcome in outcomes]


@pytest.mark.parametrize("kind", CASES)
def test_a_right_answer_is_correct_and_a_wrong_one_is_not(kind, workers):
    wanted = {(gold, text): True for gold, right, _ in CASES[kind] for text in right}
    wanted |= {(gold, text): False for gold, _, wrong in CASES[kind] for text in wrong}
    found = dict(zip(wanted, verdicts(workers, wanted), strict=True))
    assert not {pair: verdict for pair, verdict in found.items() if (verdict == "correct") != wanted[pair]}
    assert set(found.values()) <= {"correct", "wrong", "not parsed"}, "and none of them takes long"


def test_what_was_cut_off_is_no_answer(workers):
    """Neither an earlier box nor the rest of the text is judged."""
    completions = [completion for _, _, wrong in CASES["cut off"] for completion in wrong]
    assert set(verdicts(workers, [("9", completion) for completion in completions])) == {"not parsed"}
    assert golds(r"An early \boxed{9}. In the end: \boxed{4") == []
    assert golds(r"First \boxed{4}, then \fbox{9}.") == ["9"]


def test_voting_counts_the_answers_that_are_graded(workers):
    texts = [r"First \boxed{4}. No: \boxed{9}.", r"\boxed{9}. So \boxed{4", r"\boxed{3} and \boxed{7}", r"\fbox{9}"]
    found = [outcome.value for outcome in workers.map([("find", text) for text in texts])]
    assert found == ["9", None, "3, 7", "9"]
    pairs = [(r"\boxed{3e5}", r"\boxed{300000}"), (r"\boxed{2^{-80}}", r"\boxed{2^{-79}}"), (r"\boxed{1}", r"\boxed{1")]
    assert [outcome.value for outcome in workers.map([("compare", *pair) for pair in pairs])] == [True, False, False]


SCRAPS = r"""
    \frac{ \sqrt{ \sqrt( ^( ^{ ( ) } { } \left( \right) \boxed{ \fbox{ $ $$ \$ \( \) \[ \] \text{ \mathrm{ \overline{
    \forall \infty \quad \, \! , ; : = < > \le + - * ** / ! | _ _{5} 1 23 4.5 e 3e5 1e999999999 9^9^9 10^{10^{ \% \\ &
    x m cm np. np.sqrt sin arcsin pi and or answer is #### 0x10 1_000 __import__ lambda [i] 𝟙 √ ²
    \begin{pmatrix} \end{pmatrix} \sum_{i=1}^{10^9} \int_0^1 \lim_{x\to0} \binom{10^6}{
"""
PIECES = [*SCRAPS.split(), "\n", "\0", " ", "\ud7ff", "\u202f", "9" * 400]


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_scraps_of_notation_have_a_verdict_in_time(count):
    """Whatever pieces are put together, as a completion or as a gold: no exception, no worker that dies."""
    rng = random.Random(count)

    def scraps():
        return "".join(rng.choice(PIECES) for _ in range(rng.choice([3, 12, 60, 400])))[:4000]

    pairs = [
        (rng.choice([scraps(), "9"]), rng.choice(["{}", r"\boxed{{{}}}", "${}$"]).format(scraps()))
        for _ in range(count)
    ]
    with Workers("entropy_polarity.tasks.grading:work", seconds=1.0, clock="processor", preload="math_verify") as them:
        found = verdicts(them, pairs)
    strange = {pair: verdict for pair, verdict in zip(pairs, found, strict=True) if verdict not in VERDICTS}
    assert not strange


VERDICTS = {"correct", "wrong", "not parsed", "timed out", "out of memory"}


def real_file(name):
    """A file of real data; not part of the project, and the test is skipped where it is not there."""
    folder = Path(os.environ.get("ENTROPY_POLARITY_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"no {name} in {folder}: set ENTROPY_POLARITY_DATA to a folder that has it")
    return folder / name


def real(name):
    return [json.loads(line) for line in real_file(name).read_text(encoding="utf-8").splitlines()]


def not_correct(pairs, found):
    return [pair for pair, verdict in zip(pairs, found, strict=True) if verdict != "correct"]


@pytest.mark.parametrize(
    "form", ["solution", r"\boxed{{{}}}", pytest.param("The answer is ${}$.", marks=pytest.mark.slow)]
)
def test_every_gold_of_math_500_is_its_own_answer(form, workers):
    rows = real("math500.jsonl")
    pairs = [(row["answer"], row[form] if form in row else form.format(row["answer"])) for row in rows]
    assert len(pairs) == 500
    assert not not_correct(pairs, verdicts(workers, pairs))


# Golds of MATH-500 of which one is accepted for another: all pairs were tried, and these looked at. Parentheses, a
# unit, a currency or a base may be left out, and the name of an unknown.
EQUAL = [
    {"5", "x=5"}, {r"2\sqrt{5}", r"2 \sqrt{5}"}, {r"10,\!080", "10080"}, {r"\frac14", r"\frac{1}{4}"},
    {"1,-2", "-2,1", "(-2,1)"}, {"36", r"\$36", r"36^\circ"}, {"30", r"30^\circ"}, {"90", r"90^\circ"},
    {"120", r"120^\circ"}, {"15", r"15\mbox{ cm}^2"}, {"40", "40_9"},
]  # fmt: skip


def test_no_gold_of_math_500_is_another_ones_answer(workers):
    answers = sorted({row["answer"] for row in real("math500.jsonl")})
    rng = random.Random(0)
    pairs = [(gold, rng.choice(answers)) for gold in answers]
    found = verdicts(workers, [(gold, rf"\boxed{{{other}}}") for gold, other in pairs])
    accepted = [{*pair} for pair, verdict in zip(pairs, found, strict=True) if verdict == "correct"]
    assert all(len(pair) == 1 or any(pair <= equal for equal in EQUAL) for pair in accepted)


@pytest.mark.parametrize("count", [300, pytest.param(None, marks=pytest.mark.slow)])
def test_solutions_of_gsm8k_are_graded_as_their_authors_labelled_them(count, workers):
    rows = [*real("gsm8k_test.jsonl"), *real("gsm8k_train.jsonl")][:count]
    pairs = [(golds(row["answer"])[0], row["answer"]) for row in rows]
    assert not not_correct(pairs, verdicts(workers, pairs))
    spoilt = [(gold, text.replace(f"#### {text.rsplit('#### ')[-1]}", f"#### {gold}7")) for gold, text in pairs]
    assert "correct" not in verdicts(workers, spoilt)


@pytest.mark.parametrize(
    ("preset", "name", "problem", "count"),
    [("gsm8k", "gsm8k_test.jsonl", "question", 1319), ("math-500", "math500.jsonl", "problem", 500)],
)
def test_presets_read_the_real_files(preset, name, problem, count):
    """Their columns have the names that the presets look for."""
    rows, file = real(name), str(real_file(name))
    task = make_task(f"math:{preset}", data=file, test_split=file)
    found = {
        p.messages[-1]["content"]: p.metadata["answers"] for p in (task.problem(0, n, "test") for n in range(count))
    }
    assert found == {row[problem]: golds(row["answer"]) for row in rows}
