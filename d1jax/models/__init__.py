"""The transformer, its adapters, and the scoring of tokens under it."""
