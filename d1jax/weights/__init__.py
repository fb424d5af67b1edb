"""Names and layouts of published checkpoints."""
