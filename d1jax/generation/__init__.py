"""Samples of a policy that are graded, filtered and written down, for stages that learn from rows."""
