"""Devices, optimizer, checkpoints and signals: what every run needs and no algorithm is about."""
