"""Dormouse: serve large models that sleep when nobody asks for them and wake in about a second."""

__version__ = "0.1.0"
