"""Experiments: training from a recipe, and what is measured on it."""
