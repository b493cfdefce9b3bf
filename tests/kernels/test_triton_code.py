"""The Triton kernels as machine code, compiled ahead of time by benchmarks/kernel_code.py: no GPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/kernel_code.py"
TRITON = importlib.util.find_spec("triton")
pytestmark = [
    pytest.mark.skipif(TRITON is None, reason="triton is not installed"),
    pytest.mark.skipif(
        TRITON is not None and not Path(TRITON.origin).with_name("backends").joinpath("nvidia/bin/ptxas").exists(),
        reason="this triton comes without NVIDIA's assembler",
    ),
]


def python(*arguments: str) -> str:
    """Where kernels are compiled: this process may have imported them for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, encoding="utf-8", env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    return json.loads(python(str(SCRIPT), "--json"))


def test_every_pass_over_the_logits_is_compiled_for_both_architectures(kernels):
    seen = {(kernel["case"], kernel["dtype"], kernel["architecture"]) for kernel in kernels}
    for architecture in ("sm_80", "sm_90"):
        for dtype in ("bf16", "fp32"):
            assert {("whole rows", dtype, architecture), ("gradient", dtype, architecture)} <= seen
        assert ("middle tile", "bf16", architecture) in seen


def test_no_kernel_spills_and_five_blocks_of_a_bf16_fold_fit_a_multiprocessor(kernels):
    # 65,536 registers / (96 registers x 4 warps x 32 threads) = 5 blocks; of the others 4.
    for kernel in kernels:
        assert (kernel["stack_bytes"], kernel["spill_instructions"]) == (0, 0), kernel
        assert kernel["registers"] * kernel["warps"] <= (96 if kernel["dtype"] == "bf16" else 128) * 4, kernel


def test_the_loop_over_the_logits_has_few_instructions_for_each(kernels):
    # At the speed of memory an H200 has 13.8 for a bf16 logit, twice as many for float32 or a gradient.
    ceilings = {"bf16": 11.5, "fp32": 12.5}
    folds = [kernel for kernel in kernels if kernel["case"] != "gradient" and kernel["architecture"] == "sm_90"]
    assert folds
    for kernel in folds:
        assert kernel["per_element"] <= ceilings[kernel["dtype"]], kernel
        assert kernel["at_most"] <= 2 * ceilings[kernel["dtype"]], kernel


def test_a_gradient_has_few_instructions_for_each_logit_even_where_the_sampled_token_is(kernels):
    gradients = [kernel for kernel in kernels if kernel["case"] == "gradient" and kernel["architecture"] == "sm_90"]
    assert gradients
    for kernel in gradients:
        assert kernel["per_element"] <= 12, kernel
        assert kernel["at_most"] <= 16, kernel


@pytest.mark.slow
def test_no_kernel_of_any_kind_spills_or_takes_more_than_128_registers():
    kernels = json.loads(python(str(SCRIPT), "--all", "--json"))
    assert {kernel["softcap"] for kernel in kernels} == {kernel["mask"] for kernel in kernels} == {True, False}
    for kernel in kernels:
        assert (kernel["stack_bytes"], kernel["spill_instructions"]) == (0, 0), kernel
        assert kernel["registers"] <= 128, kernel


ODD_SHAPES = """
import functools, torch, kernel_code
import entropy_polarity.kernels.triton as module
from entropy_polarity.kernels.engine import Tile
from entropy_polarity.kernels.state import Head

launches = []
for name in [name for name in vars(module) if name.endswith("_kernel")]:
    setattr(module, name, kernel_code.Recorder(getattr(module, name), launches))
engine, empty = module.Triton(), functools.partial(torch.empty, device="meta")

def step(logits, rows, masked=False, softcap=None):
    tokens, state, stats = empty(rows, dtype=torch.int64), empty(6, rows), empty(7, rows)
    mask = empty(rows, dtype=torch.bool) if masked else None
    tile = Tile(logits, tokens, Head(softcap=softcap), mask=mask)
    engine.statistics(tile, state, stats)
    engine.gradient(tile, state[0], empty(3, rows), empty(rows, logits.shape[-1], dtype=logits.dtype))
    if logits.dim() == 2:
        engine.fold(tile._replace(start=1, mask=None), state, stats, keep=False)

step(empty(1, 1), 1)
step(empty(7, 1, dtype=torch.bfloat16), 7, masked=True, softcap=3.0)
step(empty(2, 4, 37, dtype=torch.float16)[:, 1:], 6, masked=True)
assert len(launches) == 8
for launch in launches:
    kernel_code.compiled(launch, 90)
print(len(launches))
"""


@pytest.mark.slow
def test_kernels_compile_for_sizes_of_one_which_the_compiler_takes_for_constants():
    assert python("-c", ODD_SHAPES).strip() == "8"
