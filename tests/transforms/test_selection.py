"""Methods that select tokens, by hand and against verl's and TRL's own functions."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import loop
import pytest
import torch
from batches import literal, run, sampled_batch
from cases import COVARYING, advantages, close, method
from trl import GRPOTrainer

from entropy_polarity.tokens import Tokens
from entropy_polarity.transforms import LossOverrides, loss_terms
from entropy_polarity.transforms.selection import clip_cov_choice

inf = math.inf

VERL = json.loads((Path(__file__).parents[1] / "golden" / "verl.json").read_text(encoding="utf-8"))


def test_top_entropy_with_both_denominators():
    # The 0.6-quantile of 1..5 is 3.4 (of four distances 2.4 are passed): 4 and 5 are kept, 2 of 5.
    batch = literal(mask=[[1] * 5 + [0]], advantages=[[2.0] * 6], entropy=[[1.0, 5.0, 3.0, 2.0, 4.0, 99.0]])
    of_all = advantages(method("top_entropy", fraction=0.4, denominator="all"), batch)
    assert of_all == [[0, 2, 0, 0, 2]]
    assert advantages(method("top_entropy", fraction=0.4), batch) == [[0, 5, 0, 0, 5]]
    # The 0.5-quantile is 3 itself, which is kept: "at or above".
    assert advantages(method("top_entropy", fraction=0.5, denominator="all"), batch) == [[0, 2, 2, 0, 2]]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 1.0])
def test_top_entropy_keeps_what_trl_keeps(fraction):
    same = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    for seed in range(20):
        width = 5 + seed % 7
        batch = sampled_batch(seed, width=width)
        shape = batch.responses, width
        mask = batch.unpack(torch.ones_like(batch.response, dtype=torch.bool), shape)
        entropy = batch.unpack(batch.entropy, shape)
        theirs = GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=same), entropy, mask, 1 - fraction)
        ours = run(method("top_entropy", fraction=fraction, denominator="all"), batch)[0]
        assert ours.advantages.equal(batch.advantages * theirs[mask])


@pytest.mark.parametrize(
    ("low", "high", "chosen"),
    [
        (1.0, 5.0, {0, 1}),
        (2.0, 5.0, {0}),  # both bounds are strict
        (1.0, 4.0, {1}),
        (1.0, 6.5, {0, 1, 3}),
        (-1.0, 1.0, {2}),
        (7.0, 9.0, set()),
    ],
)
def test_clip_cov_silences_tokens_between_its_bounds(low, high, chosen):
    found = advantages(method("clip_cov", fraction=1.0, low=low, high=high), literal(**COVARYING))[0]
    assert found == [0 if i in chosen else a for i, a in enumerate(COVARYING["advantages"][0][:4])]
    assert method("clip_cov", clip=0.3).loss == LossOverrides(0.3, 0.3)


def test_clip_cov_leaves_tokens_alone_that_ppo_has_clipped():
    # c = 4, 2 with A > 0 and c = 6 with A < 0; ratios e^0.7 = 2.01, e^0.6 = 1.82, 1, e^-0.9 = 0.41.
    old = [[-0.7, -1.6, -2.0, -4.1, 50.0]]
    batch = literal(**COVARYING | {"old_logp": old})
    for clip, chosen in ((1.1, {0, 1, 3}), (1.0, {1, 3}), (0.7, {3}), (0.5, set())):
        found = advantages(method("clip_cov", fraction=1.0, high=9.0, clip=clip), batch)[0]
        assert {i for i, a in enumerate(found) if a == 0} == chosen


@pytest.mark.parametrize(("fraction", "count"), [(1e-9, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 3)])
def test_clip_cov_silences_a_share_of_all_tokens_and_one_at_least(fraction, count):
    found = advantages(method("clip_cov", fraction=fraction, high=9.0), literal(**COVARYING))[0]
    assert found.count(0) == count  # of N = 4, three are eligible


def test_clip_cov_draws_at_random_and_says_how():
    # log p = -1 where A = 1 and -5 where A = -1, mean -3: c = 2 everywhere. Three of 20 tokens in each rollout.
    logp = [[-1.0] * 10 + [-5.0] * 10]
    batch = literal(advantages=[[1.0] * 10 + [-1.0] * 10], logp=logp, old_logp=logp, sample_id=[5])
    transform, counts, seen = method("clip_cov", fraction=0.15, seed=1), torch.zeros(20), set()
    state, rollouts = transform.init(), 250
    for _ in range(rollouts):
        result, state, _ = transform.update(batch, state)
        silent = result.advantages == 0
        assert silent.sum() == 3
        counts += silent
        seen.add(tuple(silent.nonzero().flatten().tolist()))
    expected = rollouts * 3 / 20
    # Drawn without replacement: 19 / 17 times this has 19 degrees of freedom, above 43.8 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() * 19 / 17 < 43.8
    assert len(seen) > 190  # of 1140 triples, 224 expected
    again = method("clip_cov", fraction=0.15, seed=1)
    assert run(again, batch, batch)[0].advantages.equal(run(transform, batch, batch)[0].advantages)
    others = [run(method("clip_cov", fraction=0.15, seed=seed), batch)[0].advantages for seed in range(20)]
    assert len({tuple(other.flatten().tolist()) for other in others}) > 15


def test_kl_cov_holds_the_tokens_with_the_largest_covariance():
    batch = literal(**COVARYING)  # c = 4, 2, 0, 6
    for fraction, held in ((1e-9, [0, 0, 0, 1]), (0.5, [1, 0, 0, 1]), (0.99, [1, 1, 0, 1]), (1.0, [1, 1, 1, 1])):
        result, _, _ = run(method("kl_cov", fraction=fraction, coefficient=0.3), batch)
        assert result.ratio_penalty.tolist() == close([0.3 * x for x in held])
        assert result.advantages.equal(batch.advantages)
    assert method("kl_cov").loss == LossOverrides(inf, inf)
    assert method("kl_cov").several_updates


def test_kl_cov_does_not_hold_a_token_at_an_infinite_distance():
    # A below the mean and log p = -inf: c = +inf. The penalty κ |log r| would make the whole loss infinite.
    batch = literal(**COVARYING | {"logp": [[0.0, -1.0, -2.0, -inf, 50.0]]})
    assert run(method("kl_cov", fraction=0.25), batch)[0].ratio_penalty[3] == 0


def test_clip_b_by_hand():
    # S = p (log p + H) with p = 1/e: 0 where H = 1, -1/e where H = 0. Of five: mean -0.2/e, sd 0.4/e, so that the one
    # stands 2 sd below the mean.
    batch = literal(
        mask=[[1, 1, 1, 1, 1, 0]],
        advantages=[[1.0, -1.0, -1.0, -1.0, -1.0, -1.0]],
        logp=[[-1.0] * 6],
        entropy=[[1.0, 1.0, 0.0, 1.0, 1.0, -80.0]],
    )
    assert advantages(method("clip_b", deviations=1.9, denominator="all"), batch) == [[1, -1, 0, -1, -1]]
    assert advantages(method("clip_b", deviations=1.9), batch) == close([[1.25, -1.25, 0, -1.25, -1.25]])
    assert advantages(method("clip_b", deviations=2.1), batch) == [batch.advantages.tolist()]
    praised = replace(batch, advantages=-batch.advantages)
    assert advantages(method("clip_b", deviations=1.9), praised) == [praised.advantages.tolist()]
    # It is p (log p + H): -1/e = -0.368 for p = 1/e, -2/e² = -0.271 for p = 1/e², three of 0. Mean -0.128, sd 0.159:
    # 1.51 and 0.90 sd below.
    two = literal(advantages=[[-1.0] * 5], logp=[[-1.0, -2.0, -1.0, -2.0, -3.0]], entropy=[[0.0, 0.0, 1.0, 2.0, 3.0]])
    for deviations, found in ((1.55, [-1, -1]), (1.45, [0, -1]), (0.92, [0, -1]), (0.88, [0, 0])):
        assert advantages(method("clip_b", deviations=deviations, denominator="all"), two) == [[*found, -1, -1, -1]]


def test_clip_v_by_hand():
    # Of N = 10: mean T 0.15, variance 1.25 / 10 - 0.0225, sd 0.320156; 1.5 sd = 0.48, 1.6 sd = 0.512.
    batch = literal(
        mask=[[1] * 10 + [0]],
        advantages=[[-1.0] * 9 + [1.0, -1.0]],
        sensitivity=[[0.5, 0.0, 1.0] + [0.0] * 7 + [70.0]],
    )

    def silenced(batch: Tokens, **settings) -> list[int]:
        found = advantages(method("clip_v", denominator="all", **settings), batch)[0]
        return [i for i, a in enumerate(found) if a == 0]

    assert silenced(batch, deviations=1.5, fraction=0.2) == [0, 2]
    assert silenced(batch, deviations=1.5, fraction=0.19) == [2]
    assert silenced(batch, deviations=1.5, fraction=1e-9) == [2]
    assert silenced(batch, deviations=1.6, fraction=0.2) == [2]
    assert silenced(batch, deviations=3.2, fraction=0.2) == []
    assert silenced(replace(batch, advantages=-batch.advantages), deviations=1.5, fraction=0.2) == []
    kept = advantages(method("clip_v", deviations=1.5, fraction=0.2), batch)[0]
    assert kept == close([0, -1.25, 0] + [-1.25] * 6 + [1.25])


def verl_tokens(batch: dict) -> tuple[Tokens, torch.Tensor, torch.Tensor]:
    """The tokens of a batch of verl's, its padded log-probs, from which they have their gradient, and its mask."""
    columns = {name: torch.tensor(batch[name], dtype=getattr(torch, batch["dtype"])) for name in
               ("advantages", "log_prob", "old_log_prob")}  # fmt: skip
    padded, mask = columns["log_prob"].requires_grad_(), torch.tensor(batch["mask"]).bool()
    return Tokens.pack(mask, columns["advantages"], logp=padded, old_logp=columns["old_log_prob"]), padded, mask


def policy_loss(tokens: Tokens, low: float, high: float, dual_clip: float = inf) -> torch.Tensor:
    """The clipped surrogate, mean over the tokens; where A < 0 the ratio counts up to `dual_clip`."""
    ratio, a = (tokens.logp - tokens.old_logp).exp(), tokens.advantages
    surrogate = torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    surrogate = torch.where(a < 0, torch.max(surrogate, dual_clip * a), surrogate)
    return -surrogate.mean()


@pytest.mark.parametrize("index", range(len(VERL["cases"])))
def test_loss_and_gradient_are_verls(index):
    case = VERL["cases"][index]
    name, batch, settings = case["policy_loss"], VERL["batches"][case["batch"]], case["settings"]
    tokens, padded, mask = verl_tokens(batch)
    seen, chosen_by_verl = tokens.detach(), torch.zeros_like(mask)
    for row, column in case.get("selected", ()):
        chosen_by_verl[row, column] = True
    assert not chosen_by_verl[~mask].any()
    selected = chosen_by_verl[mask]
    low, high = settings.get("clip_ratio_low"), settings.get("clip_ratio_high")
    if name == "clip_cov":
        bounds = settings["clip_cov_lb"], settings["clip_cov_ub"], low
        keys = torch.tensor(batch["keys"])[mask]
        chosen = clip_cov_choice(seen, keys, settings["clip_cov_ratio"], *bounds)
        assert chosen.equal(selected)
        assert clip_cov_choice(seen, keys, 1.0, *bounds).sum() == case["eligible"]
        silenced = tokens.advantages.masked_fill(chosen, 0)
        loss = loop.policy_loss(replace(tokens, advantages=silenced), (low, high))
        torch.testing.assert_close(policy_loss(replace(tokens, advantages=silenced), low, high), loss)
    elif name == "kl_cov":
        transform = method("kl_cov", fraction=settings["kl_cov_ratio"], coefficient=settings["ppo_kl_coef"])
        decided = run(transform, seen)[0]
        assert (decided.ratio_penalty > 0).equal(selected)
        live = replace(tokens, ratio_penalty=decided.ratio_penalty)
        loss = loop.policy_loss(live, (transform.loss.clip_low, transform.loss.clip_high))
        loss = loss + loss_terms(live).mean()
    else:
        loss = policy_loss(tokens, low, high, settings["clip_ratio_c"])
    gradient = torch.tensor(case["gradient"], dtype=tokens.advantages.dtype)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    (found,) = torch.autograd.grad(loss, padded)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())


def test_the_cases_of_verl_are_not_idle():
    assert {case["policy_loss"] for case in VERL["cases"]} == {"clip_cov", "kl_cov", "vanilla"}
    for batch in VERL["batches"].values():
        assert not all(map(all, batch["mask"]))
    with_choice = [case for case in VERL["cases"] if case["policy_loss"] == "clip_cov" and case["selected"]]
    assert any(len(case["selected"]) < case["eligible"] for case in with_choice)
