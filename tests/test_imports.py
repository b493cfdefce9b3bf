"""Who may import whom inside the package (design, section 4), and what a light import must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import entropy_polarity

SOURCE = Path(entropy_polarity.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# A part is a folder, or a module beside the folders. `support` is open to all of them.
ALLOWED = {
    "tokens": set(),
    "maths": {"tokens"},
    "controllers": set(),
    "kernels": {"maths", "tokens"},
    "transforms": {"controllers", "maths", "tokens"},
    "methods": {"controllers", "transforms"},
    "diagnostics": {"kernels", "maths", "tokens"},
    "statistics": set(),
    "tasks": set(),
    "generation": {"tasks"},
    "policy": {"tasks"},
    "evaluation": {"generation", "statistics", "tasks"},
    "runs": {"controllers", "methods"},
    "report": {"diagnostics", "runs"},
    "trainers": {
        "controllers",
        "diagnostics",
        "generation",
        "kernels",
        "maths",
        "methods",
        "policy",
        "runs",
        "tasks",
        "tokens",
        "transforms",
    },
    "support": set(),
}
PARTS = {*ALLOWED, "cli", "experiments"}
ALLOWED |= {"experiments": PARTS - {"cli"}, "cli": PARTS}


def module_of(file: Path) -> str:
    """Its dotted name below the package; "" for the package itself."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it; the lazy package itself counts for none."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    below = {name.removeprefix("entropy_polarity.") for name in names if name.startswith("entropy_polarity.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in below} - {""}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The names along one circle of a graph; none where there is no circle."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        for other in sorted(graph.get(name, set()) - done):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_every_part_of_the_package_is_in_the_rule():
    assert {module.partition(".")[0] for module in MODULES if module} == PARTS


@pytest.mark.parametrize("part", sorted(PARTS))
def test_a_part_imports_only_what_the_design_allows(part):
    for module, file in MODULES.items():
        if module.partition(".")[0] == part:
            forbidden = {name.partition(".")[0] for name in imports_of(file)} - ALLOWED[part] - {part, "support"}
            assert not forbidden, f"{module} imports {', '.join(sorted(forbidden))}"


def test_no_file_imports_itself_in_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({module: imports_of(file) for module, file in MODULES.items() if module})


def test_no_part_imports_itself_in_a_circle():
    parts: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        if module:
            part = module.partition(".")[0]
            parts.setdefault(part, set()).update(name.partition(".")[0] for name in imports_of(file))
    assert not circle({part: others - {part} for part, others in parts.items()})


def test_no_module_has_the_name_of_what_it_defines():
    """Or the name in its package would be now the module, now the function."""
    for module, file in MODULES.items():
        own = {n.name for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)}
        assert module.rpartition(".")[2] not in own, module


@pytest.mark.parametrize("module", ["", ".runs.record", ".report", ".runs.recipe", ".methods", ".tasks.countdown"])
def test_the_parts_that_only_read_and_write_files_load_no_torch(module):
    code = f"import sys, entropy_polarity{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    assert output.strip() == "[]"


def test_every_public_name_is_the_one_of_its_home_whatever_was_imported_before():
    code = """
import entropy_polarity
names = lambda: {name: getattr(entropy_polarity, name) for name in entropy_polarity.__all__}
before = names()
import entropy_polarity.transforms, entropy_polarity.methods, entropy_polarity.kernels
assert names() == before
assert not [name for name, value in before.items() if type(value).__name__ == "module"]
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_the_kernels_need_neither_a_trainer_nor_a_model_library_nor_triton():
    code = """
import sys
sys.modules.update(dict.fromkeys(["trl", "transformers", "triton", "datasets", "accelerate"]))
import torch
from entropy_polarity.kernels import choose, linear_token_stats, token_stats
hidden, weight, tokens = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2), torch.tensor([0, 1, 2])
linear_token_stats(hidden, weight, tokens).logp.sum().backward()
assert token_stats(hidden @ weight.t(), tokens).entropy.isfinite().all()
print(choose(torch.device("cuda"), torch.bfloat16).name)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    assert output.strip() == "chunked"
