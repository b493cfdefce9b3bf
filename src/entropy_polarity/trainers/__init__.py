"""Trainers: thin coats over the frameworks people use. The only rooms that import a framework."""
