"""Text of other people, wherever it comes out: a terminal, a page, a file in any locale."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from small import SMALL
from test_cli import papo
from test_tasks_training import few_steps, policy

from entropy_polarity.experiments.auditing import audited_before
from entropy_polarity.experiments.compare.experiment import read_comparison
from entropy_polarity.experiments.evaluate import Settings, evaluate_models
from entropy_polarity.report.audit import render_audit
from entropy_polarity.report.comparison import render_comparison
from entropy_polarity.report.evaluation import render_evaluation
from entropy_polarity.report.heatmap import MAX_TOKENS
from entropy_polarity.report.html import MAX_TEXT, thinned
from entropy_polarity.report.lines import LiveOrLines
from entropy_polarity.report.live import LiveView
from entropy_polarity.report.page import render_page
from entropy_polarity.report.progress import ComparisonView, RunState
from entropy_polarity.report.terminal import print_audit, print_comparison, print_estimates, print_evaluation
from entropy_polarity.runs.record import Run

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\u2066\u2028\0\ud800\x7f[bold red]b[/] "
    "</script><script>document.documentElement.dataset.owned=1</script><img src=x onerror=alert(1)>{{ 7*7 }}{% x %}\"'`"
)
RAW = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def with_hostile(document, *words):
    """The document with HOSTILE for these words, be they keys or values."""
    text = json.dumps(document)
    for word in words:
        text = text.replace(json.dumps(word), json.dumps(HOSTILE + word))
    return json.loads(text)


@pytest.fixture(scope="module")
def comparison():
    return with_hostile(read_comparison(RESULTS / "keydoor.json"), "papo", "grpo")


@pytest.fixture(scope="module")
def audit():
    document = audited_before(RESULTS / "audit-small.json")
    return with_hostile(document, document["recipe"]["task"]["name"], document["recipe"]["method"]["name"])


@pytest.fixture(scope="module")
def evaluation():
    document = evaluate_models(["a=embedded", "b=embedded"], Settings(2, 3))
    said = {"completion": HOSTILE, "answer": HOSTILE, "verdict": HOSTILE, "reward": 1.0}
    models = {HOSTILE + label: {"successes": 1, "samples": 3, "attempts": [said]} for label in "ab"}
    example = {"number": 0, "prompt": HOSTILE, "facts": {HOSTILE: HOSTILE}, "models": models}
    return with_hostile(document, "a", "b", "countdown", "correct"), [example]


@pytest.fixture
def hostile_run(small_runs, monkeypatch):
    run = small_runs[0]
    rows = [row | {"completion": HOSTILE, "prompt": HOSTILE, "verdict": HOSTILE} for row in run.rollouts]
    config = run.config | {"title": HOSTILE, "method": run.config["method"] | {HOSTILE: HOSTILE}}
    environment = run.environment | {"commit": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    tokens = Run.tokens
    monkeypatch.setattr(Run, "tokens", lambda self, step: [t | {"token": HOSTILE} for t in tokens(self, step)])
    before = run.summary["before"] | {"facts": {HOSTILE: {"value": 1.0, "low": 0.0, "high": 2.0}}}
    summary = run.summary | {"before": before, "after": before, "status": HOSTILE}
    return replace(run, rollouts=rows, config=config, environment=environment, summary=summary)


def test_nothing_that_is_printed_moves_the_cursor(comparison, audit, evaluation, hostile_run, capsys):
    print_comparison(comparison | {"failed": {HOSTILE: HOSTILE}})
    print_evaluation(evaluation[0])
    print_audit(audit)
    print_estimates({HOSTILE: hostile_run.summary["before"]})
    stream = StringIO()
    with LiveView(HOSTILE, 3, stream) as view:
        view.say(HOSTILE)
        view.watch({"step": 1, "reward": 0.5})
    with ComparisonView(HOSTILE, stream) as view:
        states = [RunState(HOSTILE, 0, "failed", 1, 3, HOSTILE)]
        view.watch(states)
    with LiveOrLines(stream) as view:
        view.line(HOSTILE)
    live = LiveView(HOSTILE, 3, stream)
    live.stage = ""
    live.say(HOSTILE)
    panel = Console(file=stream, width=200)
    panel.print(live._panel())
    panel.print(ComparisonView(HOSTILE, stream)._table(states))
    printed = capsys.readouterr().out + stream.getvalue()
    assert RAW.findall(printed) == []
    assert printed.count("\\x1b[2J") > 20, "it is shown"
    assert "[bold red]b[/]" in printed, "as it stands"


def test_an_error_is_one_line_of_printable_text(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("train", f"x/{HOSTILE.replace(chr(0), '')}"),
        ("eval", "--task", HOSTILE.replace("\0", "")),
        ("eval", "--model", f"/none/{HOSTILE.replace(chr(0), '')}"),
        ("report", "\x1b[2J\nsecond line"),
    ):
        code, out, err = papo(monkeypatch, capfd, *arguments)
        assert (code, out) == (2, "")
        assert RAW.findall(err) == []
        assert len(err.splitlines()) == 1, err


def pages(comparison, audit, evaluation, run):
    return [render_page(run), render_comparison(comparison), render_evaluation(*evaluation), render_audit(audit)]


def test_pages_show_text_and_run_nothing_of_it(comparison, audit, evaluation, hostile_run):
    for page in pages(comparison, audit, evaluation, hostile_run):
        ours = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)  # plotly itself
        ours.encode()
        assert RAW.findall(ours) == []
        assert html.escape("</script><script>document") in ours or "\\u003c" in ours
        assert ours.count("<script>") == 1, "plotly's is out, ours is left"
        assert "<img" not in ours
        assert "{{ 7*7 }}" in html.unescape(ours)
        (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html.unescape(ours))
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe-eval" not in policy
        assert re.search(r"script-src [^;]*unsafe", policy) is None


def test_a_page_has_a_bound(small_runs, evaluation, monkeypatch):
    """Texts of a million characters, a rollout of 20,000 tokens, a run of as many steps."""
    run, long = small_runs[0], "long " * 200_000
    tokens = run.tokens(1)[:1]
    monkeypatch.setattr(Run, "tokens", lambda self, step: [tokens[0] | {"token": long[:9999]}] * 20_000)
    rows = [row | {"prompt": long, "completion": long, "verdict": long} for row in run.rollouts]
    metrics = [run.metrics[-1] | {"step": step} for step in range(20_000)]
    config = run.config | {"title": long, "method": {"name": long} | dict.fromkeys(map(str, range(99_999)), 1)}
    page = render_page(replace(run, rollouts=rows, config=config, metrics=metrics))
    library = max(map(len, re.findall(r"<script>.*?</script>", page, flags=re.DOTALL)))
    assert len(page) - library < 6_000_000
    assert f"{20_000 - MAX_TOKENS:,} tokens left out" in page
    assert f"({len(long) - MAX_TEXT:,} more characters)" in page
    document, (example,) = evaluation
    said = [{"completion": long, "answer": long, "verdict": long, "reward": 0.0}] * 4
    models = {label: found | {"attempts": said} for label, found in example["models"].items()}
    example = example | {"prompt": long, "facts": {"answer": long}, "models": models}
    page = render_evaluation(document, [example] * 12)
    assert len(page) - library < 2_000_000


def test_thinned_keeps_the_first_and_the_last():
    assert thinned([]) == []
    assert thinned([1, 2, 3]) == [1, 2, 3]
    many = thinned(range(100_000))
    assert (many[0], many[-1]) == (0, 99_999)
    assert 1000 <= len(many) <= 2001


@pytest.mark.browser
def test_a_browser_runs_the_scripts_of_a_page_and_no_other(hostile_run, chromium, tmp_path):
    """Charts are drawn within the policy, which nothing of ours violates; a script that got in would not run."""
    page = render_page(hostile_run)
    intruder = "<script>document.documentElement.dataset.owned=2</script><img src=x onerror=owned()>"
    for said, text in (("clean", page), ("intruded", page.replace("<main>", f"<main>{intruder}"))):
        (tmp_path / said).with_suffix(".html").write_text(text, encoding="utf-8")
        command = [*chromium, "--enable-logging=stderr", "--v=0", "--dump-dom", (tmp_path / f"{said}.html").as_uri()]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=240)
        assert len(re.findall(r'id="chart-\d"[^>]*js-plotly-plot', done.stdout)) == page.count('class="chart"') > 1
        assert "data-owned" not in done.stdout.partition("<html")[2].partition(">")[0]
        violations = [line for line in done.stderr.splitlines() if "Content Security Policy" in line]
        assert bool(violations) == (said == "intruded"), violations


def test_an_environment_may_say_what_no_file_takes(tmp_path):
    model = policy(tmp_path / "model", "llama", chat=True)
    task = "{name='env', factory='misbehaving:Babel', max_turns=2, max_action_tokens=100, processes=1}"
    summary = few_steps(model, task, tmp_path / "run", "trainer.max_steps=1", "trainer.num_iterations=1")
    assert summary["status"] == "finished"
    assert "half \ufffd" in summary["after"]["facts"]
    run = Run.read(tmp_path / "run")
    assert run.rollouts[0]["prompt"].endswith(" \ufffd\ufffd\x1b[2J\u202e")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert RAW.findall(re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)) == []


LOCALES = {
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin": {"LC_ALL": "de_DE.iso88591", "PYTHONUTF8": "0"},
}
TITLE = "Übung → λ 🙂"


def in_locale(locale, *commands):
    """What the commands print, one after the other, in a process of that locale."""
    environment = os.environ | LOCALES[locale]
    there = [sys.executable, "-c", "import locale; locale.setlocale(locale.LC_ALL, '')"]
    if subprocess.run(there, env=environment, capture_output=True).returncode:
        pytest.skip("the locale is not installed here")
    code = (
        "import json, sys\nfrom entropy_polarity.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n    sys.argv = ['papo', *arguments]\n    main()"
    )
    call = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(call, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("locale", LOCALES)
def test_a_run_is_read_and_shown_in_any_locale(locale, small_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_runs[0].directory, run)
    config = (run / "config.toml").read_text(encoding="utf-8")
    (run / "config.toml").write_text(re.sub('title = ".*"', f'title = "{TITLE}"', config), encoding="utf-8")
    shown = in_locale(locale, ["report", str(run)], ["compare", "--from", str(RESULTS / "keydoor.json")])
    assert f"<h1>{TITLE}</h1>" in (run / "report.html").read_text(encoding="utf-8")
    assert b"\\u0394 pass@1" in shown, "Δ has no place there"


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES)
def test_a_training_in_a_locale_that_is_not_utf_8(locale, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'title = "{TITLE}"\ntask = {{name = "countdown", numbers = [3]}}\n', encoding="utf-8")
    flags = [f"--set={o}" for o in (*SMALL, "trainer.max_steps=1", "evaluation.problems=2")]
    in_locale(locale, ["train", str(recipe), "--output", str(tmp_path / "run"), *flags])
    assert f"<h1>{TITLE}</h1>" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert Run.read(tmp_path / "run").config["title"] == TITLE
