"""Triton's interpreter, made faster without changing what it computes: it is most of what tests of kernels wait for."""

from __future__ import annotations

import dataclasses
from types import FunctionType

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_patched: set[tuple[bool, ...]] = set()


class _NothingToRestore:
    def restore(self) -> None:
        pass


def hasten() -> None:
    """The interpreter looks through the whole language for what is to be patched at every call of a function within a
    kernel, though nothing is left to patch after the first; and it computes of every sum and product whether it
    overflows, to look at that only when debugging."""
    interpreter._patch_lang = _patch_once
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_once(function: FunctionType) -> object:
    """Patch what this function sees of the language, unless that is done, and leave it patched."""
    seen = list(function.__globals__.values())
    which = tuple(any(value is module for value in seen) for module in (tl, tl.core))
    if which not in _patched:
        _patch(function)
        _patched.add(which)
    return _NothingToRestore()
