"""Learning from plain text: an autoregressive model becomes a masked diffusion model."""
