"""Vocabulary-parallel statistics: any number of gloo processes has what one would have."""

import pytest
import torch
from gloo import spawned, vocabulary_part

from entropy_polarity.kernels.reference import reference_token_stats


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_rank_has_the_statistics_of_the_whole_vocabulary(tmp_path, ranks, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 6, 64, generator=generator)).to(dtype)
    logits[0, 0, :16] = -torch.inf  # all of a rank's columns
    logits[0, 1, 1:] = -40.0  # a policy that is sure, in the first rank
    logits[0, 2] = 0.0  # and one that knows nothing: every rank has a mode
    tokens = torch.randint(64, (3, 6), generator=generator)
    tokens[0, :2] = torch.tensor([63, 0])
    torch.save({"logits": logits, "tokens": tokens, "temperature": 0.7}, tmp_path / "case.pt")
    spawned(vocabulary_part, ranks, ranks, str(tmp_path))
    expected = reference_token_stats(logits.double() / 0.7, tokens)._asdict()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for rank in range(ranks):
        stats = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, column in expected.items():
            assert stats[name].shape == (3, 6)
            torch.testing.assert_close(stats[name].double(), column, rtol=tolerance, atol=tolerance, msg=name)
