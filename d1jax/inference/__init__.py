"""A policy in memory, and what it writes: completions, texts with holes, a chat."""
