"""All ways to load that are compared."""

from __future__ import annotations

from dormouse.bench_load.ours import LOAD_CODED, LOAD_FILE, LOAD_RAW, LOAD_TIER
from dormouse.bench_load.peers import FASTSAFETENSORS, INSTANTTENSOR, RUNAI, SAFETENSORS, SLLM, TORCH

METHODS = (LOAD_TIER, LOAD_CODED, LOAD_FILE, SAFETENSORS, FASTSAFETENSORS, INSTANTTENSOR, RUNAI, LOAD_RAW, TORCH, SLLM)
"""In the order in which they are measured: should the time run out, the last are left out."""
