"""Judging answers that need more than reading them: programs are run, in a sandbox, against their tests."""
