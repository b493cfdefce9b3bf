"""Comparing methods on paired seeds."""
