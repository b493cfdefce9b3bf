"""What `trainer.evaluate()` tells of entropy: facts of the rollouts that it samples. Nothing is updated."""

from collections import defaultdict

from torch import Tensor

from entropy_polarity.controllers import Metrics
from entropy_polarity.tokens import Tokens, is_finite
from entropy_polarity.transforms import token_polarity


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

    def add(self, tokens: Tokens) -> None:
        """The model tokens of one batch of all processes."""
        entropy, t, p = tokens.require("entropy"), tokens.require("sensitivity"), token_polarity(tokens)
        known = tokens.mask & is_finite(entropy) & is_finite(t) & is_finite(p)

        def total(values: Tensor) -> float:
            return values[known].sum().item()

        self._sums["tokens"] += known.count_nonzero().item()
        self._sums["nonfinite_tokens"] += (tokens.mask & ~known).count_nonzero().item()
        self._sums["entropy"] += total(entropy)
        self._sums["sensitivity"] += total(t)
        self._sums["contracting_fraction"] += total((t < 0).float())
        self._sums["positive_flow"] += total(p.clamp(min=0))
        self._sums["negative_flow"] += total((-p).clamp(min=0))
        self._sums["positive_fraction"] += total((p > 0).float())

    def take(self, flows: bool) -> Metrics:
        """The metrics of all that was added since the last call; none of a mean over nothing."""
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
