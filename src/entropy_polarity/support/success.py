"""When a reward is a success: one threshold for what is counted, and for the colour of every verdict."""

from typing import Literal

SUCCESS = 1.0


def degree(reward: float | None) -> Literal["right", "partly", "wrong"]:
    """How far a reward is a success: it is from 1 up, above 0 a part of one, else none, nor where nothing could judge.

    >>> degree(1.0), degree(0.5), degree(0.0), degree(-1.0), degree(None)
    ('right', 'partly', 'wrong', 'wrong', 'wrong')
    """
    if reward is None or not reward > 0:
        return "wrong"
    return "right" if reward >= SUCCESS else "partly"
