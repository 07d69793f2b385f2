"""Imported adapters: what is kept of one beside its tensors, and whether it fits a model.

    MODELS_DIR/NAME/  dormouse.json  the record of a model (models.py), whose `base` names the model it is for
                      weights.json   the tensor table of its checkpoint: `MODULE.lora_A` and `MODULE.lora_B`
                      adapter.json   the scaling of each module

An adapter is a checkpoint like any other: chunks, a segment, a worker that maps it. The names of modules are those of
the runtime's model class, as in the base's own table; so both tables tell whether they fit, without any weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dormouse.checkpoint.models import ImportedModel, open_model, read_table
from dormouse.checkpoint.tensors import CheckpointBody
from dormouse.errors import ConfigError, DamagedError

SCALINGS = "adapter.json"
A = "lora_A"
B = "lora_B"
VERSION = 1
log = logging.getLogger(__name__)


class Scalings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """adapter.json: what is added to the output of a module is `scaling * x A^T B^T`."""

    version: int
    modules: dict[str, float]


@dataclass(frozen=True)
class ImportedAdapter:
    """An adapter that can be loaded into a worker of the model `base`."""

    name: str
    base: str
    checkpoint: str
    digest: str
    body: CheckpointBody
    scalings: Mapping[str, float]


def open_adapter(models_dir: Path, name: str) -> ImportedAdapter:
    """The adapter of that name, which fits its base; that the base is another than the adapter was imported for is
    only logged. Raises NotFoundError, ConfigError when it is a model or does not fit, DamagedError."""
    model = open_model(models_dir, name)
    if model.base is None or model.checkpoint is None:
        raise ConfigError(f"{name} is a model, not an adapter", remedy="Give the name of an imported adapter")
    adapter = ImportedAdapter(
        name=name,
        base=model.base,
        checkpoint=model.checkpoint,
        digest=model.digest,
        body=read_table(model.path, model.weight_bytes),
        scalings=_read_scalings(model),
    )
    if {f"{module}.{part}" for module in adapter.scalings for part in (A, B)} != shapes_of(adapter.body).keys():
        raise DamagedError(
            f"{model.path / SCALINGS} does not belong to the tensors of adapter {name}", remedy=_again(name)
        )
    base = open_model(models_dir, model.base)
    _check_base(adapter, base, replaced=model.base_digest != base.digest)
    return adapter


def _check_base(adapter: ImportedAdapter, base: ImportedModel, *, replaced: bool) -> None:
    """Whether it is the one that the adapter was imported for. One of the same shapes may have been trained further, or
    be as good as random to the adapter; nothing but their answers would tell."""
    said = f"{base.name} was replaced since adapter {adapter.name} was imported"
    try:
        check_fit(shapes_of(adapter.body), read_table(base.path, base.weight_bytes), adapter.name, base.name)
    except ConfigError as error:
        if not replaced:
            raise
        raise ConfigError(f"{said}: {error.message}", remedy="Import an adapter that was trained on it") from error
    if replaced:
        log.warning("%s: it fits, but was perhaps trained on other weights. To end this, import it again", said)


def shapes_of(body: CheckpointBody) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a table."""
    return {tensor.name: tensor.shape for tensor in body.tensors}


def check_fit(adapter: Mapping[str, tuple[int, ...]], base: CheckpointBody, name: str, base_name: str) -> None:
    """Raise ConfigError, which names module and shapes, when the factors can't be added to modules of the base."""
    weights = shapes_of(base)
    for module in modules_of(adapter):
        weight = weights.get(f"{module}.weight")
        remedy = "Check that it was trained on this model; `--base NAME` names another"
        if weight is None or len(weight) != 2:
            raise ConfigError(
                f"adapter {name} is for a module {module}, which {base_name} does not have as a linear layer",
                remedy=remedy,
            )
        a, b = adapter[f"{module}.{A}"], adapter[f"{module}.{B}"]
        if (wanted := ((a[0], weight[1]), (weight[0], a[0]))) != (a, b):
            raise ConfigError(
                f"adapter {name} does not fit module {module} of {base_name}: A {a} and B {b} where the base's weight "
                f"of shape {weight} needs {wanted[0]} and {wanted[1]}",
                remedy=remedy,
            )


def modules_of(names: Mapping[str, object]) -> list[str]:
    """The modules that tensors of these names belong to."""
    return [name.removesuffix(f".{A}") for name in names if name.endswith(f".{A}")]


def encode_scalings(modules: Mapping[str, float]) -> bytes:
    """What to write into adapter.json."""
    return msgspec.json.encode(Scalings(version=VERSION, modules=dict(modules)))


def _read_scalings(model: ImportedModel) -> Mapping[str, float]:
    path = model.path / SCALINGS
    remedy = _again(model.name)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Scalings)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(f"{path} can't be read: {error}", remedy=remedy) from error
    if found.version > VERSION:
        raise DamagedError(f"{path} has version {found.version}, newer than {VERSION}", remedy="Update Dormouse")
    if not all(math.isfinite(scaling) for scaling in found.modules.values()):
        raise DamagedError(f"{path} has a scaling that is not finite", remedy=remedy)
    return found.modules


def _again(name: str) -> str:
    return f"Import it again: dormouse import SOURCE --name {name} --replace"
