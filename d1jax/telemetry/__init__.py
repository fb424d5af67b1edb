"""What a run tells people: metrics on disk, a progress line, a report, a denoising player. No JAX in here."""
