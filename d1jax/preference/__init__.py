"""Preference learning: the better of two completions is made likelier than the worse one (DPO, VRPO)."""
