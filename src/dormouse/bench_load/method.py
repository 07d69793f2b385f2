"""A way to load weights, and what a child is told about a load.

A method runs in a child process (child.py): `prepare` imports what it needs before the clock starts and tells the
version; `before` may do what belongs to no load, such as filling a tier; `load` is what is timed. It returns all
tensors by name, and the child keeps them all until the clock has stopped, as whoever loads a model does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import msgspec

Tensors = dict[str, Any]
WHOLE = ("plain", "raw", "coded")
"""The sources that have all tensors."""


class Job(msgspec.Struct, frozen=True):
    """What a child is told to load. `files` are plain safetensors files; `data_dir` holds an imported model `model`;
    `scratch` is a folder for what a method must make first. `again`: load once more afterwards."""

    files: list[str]
    scratch: str
    data_dir: str
    model: str
    device: str
    condition: str
    reference: str
    again: bool


class MissingError(Exception):
    """The package of a method is not installed, or can't work on this machine."""


def _nothing(job: Job) -> None:
    return None


@dataclass(frozen=True)
class Method:
    """`place` is where a child finds this very object, as MODULE:NAME. `source` tells what is read: the `plain` files,
    the imported model, `raw` or `coded`, or a file that `before` makes in the scratch folder, with some of the tensors.
    `extra`: only measured when named."""

    place: str
    name: str
    how: str
    source: str
    prepare: Callable[[str], str]
    load: Callable[[Job, Any], Tensors]
    before: Callable[[Job], Any] = _nothing
    conditions: tuple[str, ...] = ("warm", "cold")
    ours: bool = False
    extra: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def find(place: str) -> Method:
    """The method of that place."""
    module, _, name = place.partition(":")
    method = getattr(importlib.import_module(module), name)
    assert isinstance(method, Method)
    return method


def version_of(module: str, package: str) -> str:
    """Import it; the version of its package. Raises MissingError."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"{package} can't be imported: {error}") from error
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package  # run from its sources


def prepares(module: str, package: str) -> Callable[[str], str]:
    """What prepares a method that needs no more than an import."""
    return lambda device: version_of(module, package)


kept: list[Any] = []
"""What tensors are views of, where the peer does not keep it itself."""
