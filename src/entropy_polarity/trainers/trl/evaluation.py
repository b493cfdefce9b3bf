"""What `trainer.evaluate()` tells of entropy, from the rollouts that it samples. Nothing is updated."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from entropy_polarity.controllers import Metrics
from entropy_polarity.tokens import Tokens, is_finite
from entropy_polarity.transforms import token_polarity
from entropy_polarity.transforms.batch import precise


class EvaluatedTokens:
    """Means over the model tokens of all batches of an evaluation, however these were cut.

    entropy, sensitivity                the mean H and the mean T of a token, in nats
    contracting_fraction                the share of tokens with T < 0: reinforcing them takes entropy away
    positive_flow, negative_flow        D+ and D- of P = w A T, with the advantages within the groups of the evaluation:
                                        what a plain update on these rollouts would do, before any method
    positive_fraction                   the share of tokens with P > 0
    predicted_entropy_change            D+ - D-
    nonfinite_tokens                    tokens whose T is NaN or infinite; they are in no mean

    Under "polarity/". Groups of one have no advantage: what is made of P is left out then. Source: ours.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)

    def add(self, tokens: Tokens, over_processes: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """The model tokens of one batch of this process; `over_processes` adds up what every process has of it."""
        entropy, t, p = tokens.require("entropy"), tokens.require("sensitivity"), token_polarity(tokens)
        known = is_finite(entropy) & is_finite(t) & is_finite(p)
        entropy, t, p = (precise(x[known]) for x in (entropy, t, p))
        sums = {
            "tokens": torch.ones_like(p),
            "entropy": entropy,
            "sensitivity": t,
            "contracting_fraction": precise(t < 0),
            "positive_flow": p.clamp(min=0),
            "negative_flow": (-p).clamp(min=0),
            "positive_fraction": precise(p > 0),
            "nonfinite_tokens": precise(~known),
        }
        totals = over_processes(torch.stack([values.sum() for values in sums.values()])).tolist()
        for name, total in zip(sums, totals, strict=True):
            self._sums[name] += total

    def take(self, flows: bool) -> Metrics:
        """The metrics of all that was added since the last call; without tokens there are no means."""
        sums, self._sums = self._sums, defaultdict(float)
        tokens, broken = sums.pop("tokens", 0.0), sums.pop("nonfinite_tokens", 0.0)
        if tokens + broken == 0:
            return {}
        means = {name: total / tokens for name, total in sums.items()} if tokens else {}
        if tokens and flows:
            means["predicted_entropy_change"] = means["positive_flow"] - means["negative_flow"]
        elif tokens:
            means = {name: means[name] for name in ("entropy", "sensitivity", "contracting_fraction")}
        return {f"polarity/{name}": value for name, value in (means | {"nonfinite_tokens": broken}).items()}
