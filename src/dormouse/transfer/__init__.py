"""Bytes in motion: bounded pipelines between pipes or memory and the store."""
