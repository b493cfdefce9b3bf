"""The page: self-contained, safe with any model text, and really drawn by a browser."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from entropy_polarity.report.heatmap import heatmap_of
from entropy_polarity.report.page import render_page

HOSTILE = '<script>alert("owned")</script><img src=x onerror=alert(1)>'


@pytest.fixture
def run(small_runs):
    return small_runs[1]


def test_the_page_asks_the_network_for_nothing(run):
    page = render_page(run)
    outside_plotly = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert len(outside_plotly) < len(page) / 4
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", outside_plotly)


def test_model_text_is_shown_not_run(run, monkeypatch):
    """A completion, a prompt, a token and a title made of markup appear as text."""
    rows = [row | {"completion": HOSTILE, "prompt": HOSTILE, "verdict": HOSTILE} for row in run.rollouts]
    hostile = replace(run, rollouts=rows, config=run.config | {"title": HOSTILE})
    tokens = type(run).tokens
    monkeypatch.setattr(type(run), "tokens", lambda self, step: [t | {"token": HOSTILE} for t in tokens(self, step)])
    page = render_page(hostile)
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert" in page


def test_colours_follow_the_polarity(run):
    for rollout in heatmap_of(run).rollouts:
        for token in (token for turn in rollout.turns for token in turn):
            polarity = float(dict(token.statistics)["P"])
            red, _, blue, strength = (float(x) for x in re.findall(r"[\d.]+", token.colour))
            if polarity > 0:
                assert blue > red
            elif polarity < 0:
                assert red > blue
            if rollout.advantage == 0:
                assert strength == 0


@pytest.mark.parametrize(
    ("reward", "colour", "shown"),
    [(1.0, "right", "1"), (0.96, "partly", "0.96"), (0.5, "partly", "0.5"), (0.0, "wrong", "0"), (None, "wrong", "-")],
)
def test_a_verdict_has_the_colour_of_its_reward(run, reward, colour, shown):
    """None is what a reward that nothing could give is in the file."""
    rows = [row | {"reward": reward, "verdict": "judged"} for row in run.rollouts]
    page = render_page(replace(run, rollouts=rows))
    assert set(re.findall(r'<span class="(\w+)">judged<br>', page)) == {colour}
    assert f"reward {shown}, A" in page


def test_a_run_without_rollouts_or_evaluation_still_has_a_page(run):
    bare = replace(run, rollouts=[], metrics=[], summary={"status": "running"})
    assert "No rollouts were recorded" in render_page(bare)


def test_a_run_without_a_title_is_called_by_its_task_and_model(run):
    policy = {"model": "/models/Qwen3-0.6B"}
    named = replace(run, config=run.config | {"title": "", "task": {"name": "math:gsm8k"}, "policy": policy})
    assert "<h1>math:gsm8k, Qwen3-0.6B</h1>" in render_page(named)


def test_a_game_has_a_success_rate(run):
    assert "pass@1, held out" in render_page(run)
    turns = {"value": 4.0, "low": 3.5, "high": 4.5}
    before = run.summary["before"] | {"facts": {"turns": turns}}
    page = render_page(replace(run, summary=run.summary | {"before": before, "after": before}))
    assert "success rate, held out" in page
    assert "one episode is a success" in page
    assert "pass@1, held out" not in page


@pytest.mark.browser
def test_a_browser_draws_charts_and_tokens(run, chromium, tmp_path):
    """After its scripts have run the page has five drawn charts and coloured tokens, and the picture has colours."""
    image = pytest.importorskip("PIL.Image", reason="pip install pillow")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(render_page(run), encoding="utf-8")
    dom = subprocess.run(
        [*chromium, "--dump-dom", page.as_uri()], capture_output=True, encoding="utf-8", timeout=120
    ).stdout
    assert len(re.findall(r'id="chart-\d"[^>]*js-plotly-plot', dom)) == 5
    lines = re.findall(r'<path class="js-line"[^>]* d="M([^"]+)"', dom)
    assert len(lines) >= 8
    assert any(line.count("L") >= 1 for line in lines)
    tokens = sum(len(turn) for rollout in heatmap_of(run).rollouts for turn in rollout.turns)
    assert tokens > 20
    assert dom.count('class="token"') == tokens
    subprocess.run([*chromium, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    colours = image.open(picture).convert("RGB").getcolors(2**24)
    reddish = sum(n for n, (r, g, b) in colours if r > 180 and g < 170 and b < 170)
    blueish = sum(n for n, (r, g, b) in colours if b > 180 and r < 150)
    assert reddish > 200
    assert blueish > 200


@pytest.mark.browser
def test_hostile_text_does_not_run_in_a_browser(run, chromium, tmp_path):
    page = tmp_path / "page.html"
    title = "<script>document.documentElement.dataset.owned = 1</script>"
    page.write_text(render_page(replace(run, config=run.config | {"title": title})), encoding="utf-8")
    dom = subprocess.run(
        [*chromium, "--dump-dom", page.as_uri()], capture_output=True, encoding="utf-8", timeout=120
    ).stdout
    assert "<html" in dom
    assert "data-owned" not in dom.partition(">")[0] + dom.partition("<html")[2].partition(">")[0]


def test_every_number_on_the_page_has_a_sentence(run):
    """Each card and each chart explains itself."""
    page = render_page(run)
    for block in re.findall(r'<div class="card">(.*?)</p>', page, re.DOTALL):
        sentence = re.sub(r"<[^>]+>", "", block.partition("<p>")[2]).strip()
        assert len(sentence) > 40
        assert sentence.endswith(".") or sentence.endswith(").")


def test_the_template_is_package_data():
    import entropy_polarity.report

    assert (Path(entropy_polarity.report.__file__).parent / "templates/page.html").is_file()


def test_each_file_of_tokens_is_read_once_for_a_page(run, monkeypatch):
    read, tokens = [], type(run).tokens
    monkeypatch.setattr(type(run), "tokens", lambda self, step: read.append(step) or tokens(self, step))
    render_page(run)
    assert read == [1, 3, 5]
