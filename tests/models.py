"""Imported models for tests."""

from __future__ import annotations

from dormouse.checkpoint.models import ImportedModel
from dormouse.checkpoint.writer import copy_checkpoint
from dormouse.data_dir import DataDir
from dormouse.store.store import Store


def quiet(step: str, done: int, total: int) -> None:
    """An import's progress that nobody watches; the figures must make sense all the same."""
    assert 0 <= done <= total


def home_of(model: ImportedModel) -> DataDir:
    """The data folder a model was imported into."""
    return DataDir(model.path.parent.parent)


def lend(model: ImportedModel, folder: DataDir) -> None:
    """Have a model in another data folder, without importing it again."""
    (folder.models / model.name).symlink_to(model.path)
    if model.checkpoint is not None:
        with Store.open(home_of(model).store) as source, Store.open(folder.store) as target:
            copy_checkpoint(model.checkpoint, source, target)
