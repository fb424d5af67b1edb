"""The version, where nothing else is: what only wants to name it imports no more."""

__version__ = "0.1.0"
