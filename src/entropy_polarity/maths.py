"""The maths of entropy polarity: pure functions, in nats.

At a state with tempered logits z, p = softmax(z) and entropy H, a policy-gradient step on the sampled token a with
advantage A moves the logits by dz = η A (e_a - p). Since dH/dz_v = -p_v (log p_v + H),

    dH = η A T + O(η²),    T = C - S_a,    S_a = p_a (log p_a + H),    C = Σ_v p_v² (log p_v + H)

T is the sensitivity, and P = w A T the entropy polarity of the token: P > 0 expands entropy, P < 0 contracts it.
Source: "Entropy Polarity in Reinforcement Fine-Tuning", arXiv 2605.11775 (its abstract; the closed form of T and the
factor w are our derivation).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entropy_polarity.tokens import TokenStats, finite

# exp(-10000) is 0 in every float format, so clamping there changes no sum; it turns 0 * (-inf) into 0.
LOWEST = -1e4


def stats_from_sums(
    d_a: Float[Tensor, "*N"],
    r: Float[Tensor, "*N"],
    rd: Float[Tensor, "*N"],
    q: Float[Tensor, "*N"],
    qd: Float[Tensor, "*N"],
) -> TokenStats:
    """All statistics of a state from four sums over its logits, which one pass gives.

    With d = z - max z and m one mode (an argmax), the sums leave m out, so that the small tail of a confident
    distribution is never added to 1 and rounded away:

        r = Σ_{v≠m} e^{d_v}    rd = Σ_{v≠m} e^{d_v} d_v    q = Σ_{v≠m} e^{2 d_v}    qd = Σ_{v≠m} e^{2 d_v} d_v

    `d_a` is the sampled token's d, maybe -inf (log p_a = -inf, T = C). Where it is 0, a is taken for m itself: equal
    modes can change places. With s = 1 + r and the mean d̄ = rd / s, log p_v + H = d_v - d̄, and

        T = -p_a (1 - p_a) (d_a - d̄) + Σ_{v≠a} p_v² (d_v - d̄)

    which has no logarithm and no cancellation of the normaliser. Source: ours.
    """
    is_mode = d_a == 0
    s = 1 + r
    log_s = torch.log1p(r)
    mean_d = rd / s
    d = d_a.clamp(min=LOWEST)
    e = d.exp()
    p = e / s
    sum_p2 = (1 + q) / s**2
    # Σ e^{2d} and Σ e^{2d} d over v ≠ a; for a = m they are q and qd themselves, with nothing to cancel.
    other_q = torch.where(is_mode, q, 1 + q - e**2)
    other_qd = torch.where(is_mode, qd, qd - e**2 * d)
    not_p = torch.where(is_mode, r, s - e) / s
    return TokenStats(
        logp=d_a - log_s,
        entropy=log_s - mean_d,
        sum_p2=sum_p2,
        sum_p2_logp=qd / s**2 - log_s * sum_p2,
        sensitivity=-p * not_p * (d - mean_d) + (other_qd - mean_d * other_q) / s**2,
        sampled=p * (d - mean_d),
        correction=(qd - mean_d * (1 + q)) / s**2,
    )


def surviving_ratio(
    ratio: Float[Tensor, "*N"], advantages: Float[Tensor, "*N"], clip: tuple[float, float]
) -> Float[Tensor, "*N"]:
    """w = r while the PPO clip leaves the gradient alive, else 0.

    `clip` is (low, high): the gradient is dead where A > 0 and r > 1 + high, or A < 0 and r < 1 - low.

    >>> surviving_ratio(torch.tensor([0.7, 1.0, 1.3]), torch.tensor([1.0, 1.0, 1.0]), (0.2, 0.2))
    tensor([0.7000, 1.0000, 0.0000])
    """
    low, high = clip
    dead = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return torch.where(dead, 0.0, ratio)


def polarity(
    advantages: Float[Tensor, "*N"],
    sensitivity: Float[Tensor, "*N"],
    ratio: Float[Tensor, "*N"] | None = None,
    clip: tuple[float, float] | None = None,
) -> Float[Tensor, "*N"]:
    """The entropy polarity P = w A T of each token, in nats per unit of step size η.

    `advantages` A and `sensitivity` T have one shape. `ratio` is the importance ratio r (1 when left out) and `clip`
    the PPO clip (low, high): with it w = `surviving_ratio(r, A, clip)`, without it w = r. Raises ValueError for shapes
    that differ, and for a clip without a ratio. Source: arXiv 2605.11775 (sign and first order), ours (w).

    >>> polarity(torch.tensor([1.0, -1.0]), torch.tensor([-0.2, -0.2]))
    tensor([-0.2000,  0.2000])
    """
    shapes = [tuple(x.shape) for x in (advantages, sensitivity, ratio) if x is not None]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"polarity: advantages, sensitivity (and ratio) have shapes {', '.join(map(str, shapes))}; expected "
            "one value of each per token: repeat a response's advantage over its tokens"
        )
    if ratio is None:
        if clip is not None:
            raise ValueError("polarity: a clip was given without the ratio it clips: give both")
        return advantages * sensitivity
    weight = ratio if clip is None else surviving_ratio(ratio, advantages, clip)
    return weight * advantages * sensitivity


def branch_flows(
    polarity: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"] | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(D+, D-): expansion and contraction per model token, in nats per unit of step size.

        D+ = Σ_{P>0} P / N      D- = Σ_{P<0} |P| / N      N = number of model tokens

    Both are >= 0. `mask` is True at model tokens (default: everywhere); batches with padding need it. Tokens whose P is
    NaN or infinite count in N and add to neither. Raises ValueError for a mask of another shape. Source: ours (arXiv
    2605.11491 has the sums).

    >>> branch_flows(torch.tensor([[0.3, -0.1]]))
    (tensor(0.1500), tensor(0.0500))
    """
    flow, count = finite(polarity), max(1, polarity.numel())
    if mask is not None:
        if mask.shape != polarity.shape:
            raise ValueError(
                f"branch_flows: polarity has shape {tuple(polarity.shape)} and the mask {tuple(mask.shape)}; "
                "expected one value of each per token"
            )
        flow, count = torch.where(mask, flow, 0.0), mask.count_nonzero().clamp(min=1)
    return flow.clamp(min=0).sum() / count, flow.clamp(max=0).sum().abs() / count


def predicted_entropy_change(
    polarity: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"] | None = None
) -> Float[Tensor, ""]:
    """D+ - D- of `branch_flows`, the mean of P: the first-order change of the mean entropy, in nats per unit of step
    size. It leaves out the learning rate and the effect of shared parameters: compare its sign and its changes.

    >>> predicted_entropy_change(torch.tensor([[0.3, -0.1]]))
    tensor(0.1000)
    """
    positive, negative = branch_flows(polarity, mask)
    return positive - negative
