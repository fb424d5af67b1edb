"""Masked diffusion itself: layout, corruption, likelihood, decoding."""
