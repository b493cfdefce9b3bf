"""Measure and control the entropy of a language model under reinforcement fine-tuning."""
