"""Judging answers: where a text states one, when two are worth the same, and programs run in a sandbox against their tests."""
