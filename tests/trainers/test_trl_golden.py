"""What every method decides inside TRL's trainer is what it decided in version 0.1, whose tokens were padded."""

import json
from pathlib import Path

import pytest
import torch
from golden.make_trl import METHODS, decision

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/trl.json").read_text(encoding="utf-8"))


def test_every_method_of_the_table_is_there():
    assert {name: [*method] for name, method in METHODS.items()} == {
        name: entry["method"] for name, entry in GOLDEN["methods"].items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_decisions_are_those_of_version_0_1(name):
    """On the same rollout: the same tokens are kept, and columns are equal to 1e-6 of their largest value."""
    expected = {
        part: {column: torch.tensor(rows).double() for column, rows in columns.items()}
        for part, columns in (("seen", GOLDEN["batch"]), ("made", GOLDEN["methods"][name]["made"]))
    }
    for part, found in zip(("seen", "made"), decision(METHODS[name]), strict=True):
        assert found.keys() == expected[part].keys()
        kept = expected[part].pop("mask").bool()
        assert torch.equal(found["mask"].bool(), kept)
        for column, values in expected[part].items():
            where = slice(None) if column == "reward" else kept
            largest = values[where].abs().max().item()
            torch.testing.assert_close(
                found[column][where].double(), values[where], rtol=1e-6, atol=1e-6 * largest, msg=f"{name} {column}"
            )
