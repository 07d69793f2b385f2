"""A node made of the product's own parts: the imported models, the store, the host checkpoint service."""

from __future__ import annotations

import asyncio

from dormouse.checkpoint.adapters import open_adapter
from dormouse.checkpoint.models import ImportedModel, open_model
from dormouse.config import ModelConfig, ServeConfig, gpus_of
from dormouse.data_dir import DataDir
from dormouse.engine.identity import PACKAGES, worker_identity
from dormouse.errors import ConfigError
from dormouse.node.catalog import StoreCatalog
from dormouse.node.memory import allotted, budget, dram_tier
from dormouse.node.node import Node
from dormouse.node.parts import Model
from dormouse.node.templates import TemplateSpec
from dormouse.snapshot.compatibility import host_key
from dormouse.snapshot.service import HostService


async def assemble_node(config: ServeConfig) -> Node:
    """A node that `async with` starts and ends. Raises ConfigError, NotFoundError or StoreError."""
    if not config.models:
        raise ConfigError("there is no model to serve", remedy="Name one under models, or `dormouse serve NAME`")
    folders = DataDir(config.data_dir).create()
    models = {name: await asyncio.to_thread(_open_model, folders, name) for name in config.models}
    return Node(
        config,
        lambda: HostService.start(
            folders.root,
            keep_bytes=allotted(config.kept_weights, budget(config)),
            dram_tier=dram_tier(config),
            devices=gpus_of(config),
        ),
        models,
        StoreCatalog(folders.store),
        _key,
        _template_key,
        open_adapter=lambda name: open_adapter(folders.models, name),
    )


def _open_model(folders: DataDir, name: str) -> ImportedModel:
    model = open_model(folders.models, name)
    if model.base is not None:
        raise ConfigError(
            f"{name} is an adapter of {model.base}, not a model",
            remedy=f"Serve {model.base}, and name the adapter under models.{model.base}.adapters",
        )
    return model


def _key(model: Model, settings: ModelConfig) -> dict[str, str]:
    """What must be the same for a snapshot of this model to be used."""
    assert isinstance(model, ImportedModel)
    engine = settings.engine or model.engine
    return host_key(
        engine=engine,
        worker=worker_identity(),
        packages=PACKAGES[engine],
        model_digest=model.digest,
        options={
            "context": settings.context,
            "device": _kind(settings.device),
            "kv_share": settings.kv_share,
            "kv_tokens": settings.kv_tokens,
            "path": model.path,
            "threads": settings.threads,
        },
        device=settings.device,
    )


def _kind(device: str) -> str:
    """On which GPU it is does not matter: a snapshot wakes on another one of the same model."""
    return device.partition(":")[0]


def _template_key(spec: TemplateSpec) -> dict[str, str]:
    """What must be the same for a template to be used: all of a model's key that does not come from the model."""
    return host_key(
        engine=spec.engine,
        worker=worker_identity(),
        packages=PACKAGES[spec.engine],
        model_digest=None,
        options={"device": spec.device, "threads": spec.threads},
        device=spec.device,
    )
