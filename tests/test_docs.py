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

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert trainer_step.shown(step["forecast_to_papo"]) in results_page.THEORY.read_text(encoding="utf-8")
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


def test_the_page_of_results_is_the_result_files():
    pages = {
        results_page.PAGE: results_page.page,
        results_page.THEORY: results_page.theory,
        results_page.SCALE: results_page.scale,
        results_page.RELIABILITY: results_page.reliability,
    }
    for path, made in pages.items():
        assert made(path.read_text(encoding="utf-8")) == path.read_text(encoding="utf-8")


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
        assert any(
            f"figures/{name}.svg" in page.read_text(encoding="utf-8")
            for page in (results_page.PAGE, results_page.THEORY)
        )


def test_every_formula_of_the_theory_holds():
    found = doctest.testfile(str(ROOT / "docs/theory.md"), module_relative=False)
    assert found.attempted > 50
    assert found.failed == 0


def test_the_readmes_tree_names_what_is_there():
    (tree,) = re.findall(r"```text\n(src/entropy_polarity/.*?)```", README, re.DOTALL)
    folder = "src/entropy_polarity/"
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name in ("src/entropy_polarity/", ""):
            continue
        path = ROOT / (folder + name if line.startswith("  ") else name)
        assert path.exists() or list(path.parent.glob(path.name)), f"{name} is in the README's tree but not there"


def test_the_worked_example_is_the_code_and_the_readme_names_every_method():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,), (row,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL), re.findall(r"`(Method\(.*),`", text)
    source = (ROOT / "src/entropy_polarity/transforms/shaping.py").read_text(encoding="utf-8")
    without_blank_lines = re.sub(r"\n\n+", "\n", source), re.sub(r"\n\n+", "\n", code)
    assert textwrap.indent(without_blank_lines[1], "    ") in without_blank_lines[0]
    assert row in (ROOT / "src/entropy_polarity/methods.py").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| family \| methods \|\n(.*?)\n\n", README, re.DOTALL)
    assert METHODS.keys() | CONTROLLERS.keys() == set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "docs/evaluation.md", "docs/performance.md", "docs/results.md", "docs/theory.md"],
)
def test_links_to_files_of_the_repository_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text(encoding="utf-8")):
        assert (ROOT / document).parent.joinpath(target).exists(), target
