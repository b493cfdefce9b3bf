"""Trainers: thin coats over the frameworks people use. The only modules that import a framework."""
