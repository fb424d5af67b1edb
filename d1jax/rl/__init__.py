"""Reinforcement learning: one engine, a method is a row of names."""
