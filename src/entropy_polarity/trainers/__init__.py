"""Adapters for TRL and verl."""
