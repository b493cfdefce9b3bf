"""Statistics of evaluations and of training curves: pure functions of numbers."""
