"""Per-token statistics of a policy: the one entry point that picks an implementation."""

from entropy_polarity.kernels.chunked import linear_token_stats, token_stats

__all__ = ["linear_token_stats", "token_stats"]
