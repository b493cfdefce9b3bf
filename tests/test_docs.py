"""The documents say what the code does: the script runs, tables are result files, every metric has its line."""

import doctest
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import demo_seeds
import figures
import kernel_tables
import levels
import pytest
import results_page
import torch
import trainer_step

from entropy_polarity.controllers import CONTROLLERS
from entropy_polarity.methods import METHODS, make_transform
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import Monitor

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKDOWN = sorted(
    path for folder in (".", "docs", "docs/results", "benchmarks", "examples") for path in (ROOT / folder).glob("*.md")
)


def test_the_readmes_trl_script_learns_without_a_warning(tmp_path):
    (script,) = re.findall(r"```python\n(from datasets.*?)```", README, re.DOTALL)
    assert 8 <= len([line for line in script.splitlines() if line.strip()]) <= 14
    program = f"{script}\nimport json\nprint('LOGGED', json.dumps(trainer.state.log_history))\n"
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=tmp_path, env=quiet
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    rows = [row for row in json.loads(done.stdout.split("LOGGED ")[1]) if "reward" in row]
    assert len(rows) == 5
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.1
    assert max(row["polarity/lambda"] for row in rows) > 0.1
    assert all(row["polarity/positive_flow"] > 0 and row["polarity/negative_flow"] > 0 for row in rows)


def metrics_of(method) -> set[str]:
    """What a method logs of a batch, with each of its controllers."""
    rows = torch.rand(4, 3)
    tokens = Tokens.pack(
        rows > -1, rows - 0.5, logp=-rows, old_logp=-rows, entropy=rows, sensitivity=rows - 0.4,
        reward=torch.ones(4), group=torch.tensor([0, 0, 1, 1]), sample_id=torch.arange(4),
    )  # fmt: skip
    transforms = [make_transform(method.name, {"controller": name}) for name in method.controllers]
    names: set[str] = set()
    for transform in transforms or [make_transform(method.name, method.example)]:
        after, _, metrics = transform.update(tokens, transform.init())
        names |= metrics.keys() | Monitor().measure(tokens, after).keys()
    return names


def test_every_metric_of_a_run_has_one_line_and_no_line_is_idle(small_runs):
    documented = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    logged = {name for run in small_runs for row in run.metrics for name in row}
    logged |= {name for method in METHODS.values() for name in metrics_of(method)}
    assert len(documented) == len(set(documented))
    assert set(documented) == logged


def test_the_readmes_tables_are_the_result_files():
    results = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    assert demo_seeds.table(results["runs"]) in README
    elsewhere = json.loads((ROOT / "benchmarks/results/demo-elsewhere.json").read_text(encoding="utf-8"))
    assert demo_seeds.spread(results["runs"] + elsewhere["runs"]) in README
    step = json.loads((ROOT / "benchmarks/results/trainer_step.json").read_text(encoding="utf-8"))
    for figure in ("papo_to_grpo", "grpo_to_grpo"):
        assert trainer_step.shown(step[figure]) in README
    kernels = json.loads((ROOT / "benchmarks/results/kernels_cpu.json").read_text(encoding="utf-8"))
    for measured, _ in (kernel_tables.logits_budget(kernels), kernel_tables.head_budget(kernels)):
        assert measured in README


def test_the_page_on_performance_is_the_result_files():
    results = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))
    ]
    text = kernel_tables.PAGE.read_text(encoding="utf-8")
    assert kernel_tables.page(text, results) == text
    (cpu,) = (result for result in results if result.get("benchmark") == "kernels" and result["device"] == "cpu")
    assert kernel_tables.figure(cpu) == kernel_tables.FIGURE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", results_page.PAGES)
def test_a_page_of_results_is_the_result_files(name):
    assert results_page.page(name) == (results_page.DOCS / name).read_text(encoding="utf-8")


def test_every_marked_block_is_written_from_result_files():
    pages = {results_page.DOCS / name: blocks for name, blocks in results_page.PAGES.items()}
    assert sorted(block for blocks in pages.values() for block in blocks) == sorted(results_page.BLOCKS)
    for path in set(MARKDOWN) - {kernel_tables.PAGE}:
        marked = re.findall(r"^<!-- ([^/\s]+) -->$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert tuple(marked) == pages.get(path, ()), path


def test_the_levels_of_the_plans_are_measured():
    runs = json.loads((ROOT / "benchmarks/results/levels.json").read_text(encoding="utf-8"))["runs"]
    measured = {(run["task"], run["learning_rate"]): levels.level(run) for run in runs}
    gym, guess, keydoor, fast = ("gym:countdown", 1e-4), ("guess", 3e-4), ("keydoor", 3e-4), ("guess", 1e-3)
    plans = {"gym": gym, "guess": guess, "guess-collapse": guess, "guess-collapse-level": fast, "keydoor": keydoor}
    for plan, run in plans.items():
        methods = tomllib.loads((ROOT / f"benchmarks/comparisons/{plan}.toml").read_text(encoding="utf-8"))["methods"]
        assert methods["papo"]["level"] == measured[run]
    for recipe, run in {"gym-countdown": gym, "guess": guess, "keydoor": keydoor}.items():
        assert load_recipe(recipe).method["level"] == measured[run]


def test_the_pictures_are_of_the_result_files():
    assert json.loads((figures.FIGURES / figures.SOURCES).read_text(encoding="utf-8")) == figures.sources()
    for name in figures.PICTURES:
        assert (figures.FIGURES / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")
        assert (figures.FIGURES / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert any(f"figures/{name}.svg" in page.read_text(encoding="utf-8") for page in MARKDOWN)


def test_every_formula_of_the_theory_holds():
    found = doctest.testfile(str(ROOT / "docs/theory.md"), module_relative=False)
    assert found.attempted > 50
    assert found.failed == 0


def test_the_readmes_tree_names_every_folder_and_module():
    (tree,) = re.findall(r"```text\n(src/entropy_polarity/.*?)```", README, re.DOTALL)
    package = ROOT / "src/entropy_polarity"
    lines = [line for line in tree.splitlines() if line.startswith("  ")]
    assert 12 <= len(lines) <= 17
    assert lines[-1].split()[0] == "support/"
    named = {name for line in lines for name in re.split(r"\s{2,}", line.strip())[0].split(", ")}
    for name in named:
        assert (package / name).exists(), f"{name} is in the README's tree but not there"
    there = {path.name for path in package.glob("*.py")} | {path.parent.name + "/" for path in package.glob("*/*.py")}
    assert there - {"__init__.py"} <= named | {name.split("/")[0] + "/" for name in named}


def test_the_environment_of_the_documents_can_be_played():
    text = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# lift.py\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    env = names["Lift"](floors=20)
    assert env.reset(3) == "Floors 1 to 20. Which?"
    low, high, said = 1, 20, names["StepResult"]("")
    while not said.done:
        middle = (low + high) // 2
        said = env.step(str(middle))
        low, high = (middle + 1, high) if said.observation == "higher" else (low, middle - 1)
    assert said.reward == 1
    assert 1 <= env.counts()["moves"] <= 5


def test_the_worked_example_is_the_code_and_the_readme_names_every_method():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,), (row,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL), re.findall(r"`(Method\(.*),`", text)
    source = (ROOT / "src/entropy_polarity/transforms/shaping.py").read_text(encoding="utf-8")
    without_blank_lines = re.sub(r"\n\n+", "\n", source), re.sub(r"\n\n+", "\n", code)
    assert textwrap.indent(without_blank_lines[1], "    ") in without_blank_lines[0]
    assert row in (ROOT / "src/entropy_polarity/methods/table.py").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| family \| methods \| [^\n]*\n(.*?)\n\n", README, re.DOTALL)
    assert METHODS.keys() | CONTROLLERS.keys() == set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_to_a_file_and_its_heading(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link, as GitHub derives it: lower case, spaces as dashes, no other punctuation."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [name for name in results_page.PAGES if name.startswith("results/")])
def test_a_study_says_how_to_make_it_again_and_what_it_does_not_show(name):
    headings = re.findall(r"^## (.*)$", prose(results_page.DOCS / name), re.MULTILINE)
    assert headings[-2:] == ["Reproducing", "Limits"]


def test_the_index_of_the_documents_has_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#]+\.md)\)", index)}
    assert {path for path in MARKDOWN if path.is_relative_to(ROOT / "docs")} - linked == {ROOT / "docs/README.md"}
