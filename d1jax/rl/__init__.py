"""Reinforcement learning: diffu-GRPO."""
