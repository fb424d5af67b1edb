"""Batches of graded completions: what RL, preference learning and generate stages work with."""
