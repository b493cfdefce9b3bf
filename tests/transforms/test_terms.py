"""The terms beside the policy's own loss, their values and gradients by hand."""

import math
from dataclasses import replace

import pytest
import torch
from batches import literal, run, sampled_batch
from cases import close, method

from entropy_polarity.transforms import loss_terms

nan = math.nan


def test_the_entropy_bonus_is_one_coefficient():
    batch = sampled_batch(0)
    result, _, metrics = run(method("entropy_bonus", coefficient=-0.02), batch)
    assert (result.entropy_bonus == torch.tensor(-0.02)).all()
    assert result.advantages.equal(batch.advantages)
    assert metrics == {"polarity/entropy_coefficient": -0.02}
    assert method("entropy_bonus", coefficient=-0.02).entropy_gradient


def test_the_adaptive_coefficient_by_hand():
    transform = method("adaptive_coefficient", target=0.2, step=1e-3, maximum=2.5e-3)
    state, applied = transform.init(), []
    for entropy in (0.1, 0.1, 0.1, 0.1, 0.3, nan, 0.1, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1):
        batch = literal(advantages=[[1.0]], entropy=[[entropy]])
        assert transform.local(batch, state).entropy_bonus.equal(transform.update(batch, state)[0].entropy_bonus)
        result, state, metrics = run(transform, batch, state=state)
        assert result.entropy_bonus.item() == pytest.approx(metrics["polarity/entropy_coefficient"])
        applied.append(1e3 * result.entropy_bonus.item())
    # c in thousandths: 0, 1, 2, 2.5 (the maximum), 2.5 | 0.3: 1.5, off | NaN: as it was | 0.1: 2.5 | 0.2 is not below:
    # 1.5, 0.5, 0, 0 (the minimum), off | 0.1: 1
    assert applied == close([0, 1, 2, 2.5, 2.5, 0, 0, 2.5, 0, 0, 0, 0, 1])


def test_loss_terms_and_their_gradient():
    # d(-β H)/dH = -β;  d(κ |log r|)/d log p = κ sign(log r), 0 at r = 1
    logp, entropy = (torch.tensor([-1.0, -2.0, -3.0], requires_grad=True) for _ in range(2))
    batch = literal(
        advantages=[[1.0] * 3],
        old_logp=[[-1.5, -2.0, -2.0]],
        entropy_bonus=[[0.1, 0.2, 0.0]],
        ratio_penalty=[[0.5, 0.5, 0.7]],
    )
    assert loss_terms(replace(batch, entropy_bonus=None, ratio_penalty=None)) is None
    live = replace(batch, logp=logp, entropy=entropy)
    terms = loss_terms(live)
    assert terms.tolist() == close([0.1 + 0.25, 0.4 + 0.0, 0.7])
    terms.sum().backward()
    assert logp.grad.tolist() == close([0.5, 0.0, -0.7])
    assert entropy.grad.tolist() == close([-0.1, -0.2, 0.0])
    assert loss_terms(replace(live, ratio_penalty=None)).tolist() == close([0.1, 0.4, 0.0])
    assert loss_terms(replace(live, entropy_bonus=None)).tolist() == close([0.25, 0.0, 0.7])
    with pytest.raises(ValueError, match="column 'old_logp' is needed but was not computed"):
        loss_terms(replace(live, old_logp=None))
