"""Who may import whom inside the package (design, section 4), and what a light import must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import entropy_polarity

SOURCE = Path(entropy_polarity.__file__).parent
ROOMS = {p.stem for p in SOURCE.glob("*.py")} | {p.parent.name for p in SOURCE.glob("*/__init__.py")}
TRAINERS = {
    "methods",
    "transforms",
    "phase",
    "kernels",
    "tokens",
    "polarity",
    "exact",
    "audit",
    "forecast",
    "episodes",
    "policy",
    "tasks",
    "record",
    "checkpoints",
    "method_state",
}
ALLOWED = {
    "__init__": ROOMS,  # lazily
    "cli": ROOMS,
    "experiments": ROOMS - {"cli"},
    "doctor": {"kernels", "tasks", "trainers"},
    "trainers": TRAINERS,
    "methods": {"transforms", "phase", "polarity"},
    "transforms": {"phase", "polarity", "tokens"},
    "exact": {"kernels", "polarity", "tokens"},
    "audit": {"exact", "forecast"},
    "forecast": {"exact"},
    "agreement": {"statistics"},
    "asymmetry": set(),
    "kernels": {"polarity", "tokens"},
    "polarity": {"tokens"},
    "evaluate": {"episodes", "generation", "statistics", "tasks"},
    "generation": {"tasks"},
    "statistics": set(),
    "episodes": {"tasks"},
    "policy": {"tasks"},
    "report": {"record", "asymmetry"},
    "tokens": set(),
    "phase": set(),
    "tasks": set(),
    "recipe": {"methods"},
    "record": {"checkpoints", "resuming"},
    "resuming": {"checkpoints"},
    "checkpoints": {"method_state"},
    "consent": {"recipe"},
    "method_state": {"phase"},
}
SHARED = {room for room in ROOMS if room.startswith("_")} - {"__init__"}  # small helpers, open to every room
ALLOWED |= {room: set() for room in SHARED}


def imported_rooms(tree: ast.AST) -> set[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {parts[1] for name in names if (parts := name.split("."))[0] == "entropy_polarity" and len(parts) > 1}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_the_design_allows(room):
    files = [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").exists() else (SOURCE / room).rglob("*.py")
    for file in files:
        forbidden = imported_rooms(ast.parse(file.read_text(encoding="utf-8"))) & ROOMS - ALLOWED[room] - SHARED - {
            room
        }
        assert not forbidden, f"{file.relative_to(SOURCE)} imports {', '.join(sorted(forbidden))}"


@pytest.mark.parametrize("module", ["", ".record", ".report", ".recipe", ".methods", ".tasks.countdown"])
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
