"""Reward models: a scalar head on the policy's backbone, learnt from pairs of texts."""
