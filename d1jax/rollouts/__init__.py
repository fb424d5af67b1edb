"""Batches of graded completions: what RL, preference learning and rejection sampling learn from."""
