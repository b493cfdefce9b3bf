"""What an update does to the entropy of the policy.

entropy.py     the mean entropy of whole sequences, and its gradient
exact.py       the exact sensitivity of that mean to each token (experimental)
forecast.py    a forecast of each update's change, cheap enough for every update
audit.py       every account of an update against its realised change
asymmetry.py   which tokens contract the entropy, in plain arrays, without torch
"""
