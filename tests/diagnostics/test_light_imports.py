"""The diagnostics that pages use load no torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["diagnostics", "diagnostics.asymmetry"])
def test_what_the_pages_use_loads_no_torch(module):
    code = f"import sys, entropy_polarity.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    assert output.strip() == "[]"
