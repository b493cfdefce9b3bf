"""The columns in which a method's terms of the loss travel with a framework's batch, one value per token."""

# β of -β H and κ of κ |log r|: `entropy_bonus` and `ratio_penalty` of Tokens.
BONUS = "polarity_entropy_bonus"
PENALTY = "polarity_ratio_penalty"
