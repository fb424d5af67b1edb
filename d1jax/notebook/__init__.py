"""Training and evaluation of a policy from Python, without a run directory."""
