"""`import_model`: from whatever holds a model to the folder of an imported model, atomically.

    SOURCE --find--> a reader (folder, safetensors files, GGUF, a known name) --> staging folder, locked
           --> files fsynced --> dormouse.json --> one rename --> MODELS_DIR/NAME

Until the rename nothing is visible under the name. What an interrupted import leaves is a staging folder that nobody
holds locked; the next import deletes it. No code of the source is ever run: no pickles, no remote code.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from dormouse.checkpoint import models, smollm2
from dormouse.checkpoint.models import RECORD, STAGING_PREFIX, ImportedModel, Progress, Record
from dormouse.checkpoint.null_source import read_null
from dormouse.checkpoint.transformers_source import PICKLES, pickles_refused
from dormouse.errors import ConfigError, DiskFullError, DormouseError, NotFoundError, StoreError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def import_model(
    source: str, name: str, models_dir: Path, *, progress: Progress, replace: bool = False
) -> ImportedModel:
    """Import `source` as `name`.

    Raises ConfigError (the source or the name is wrong), NotFoundError (no such source), HostError (a package is
    missing), DiskFullError or StoreError. After an error nothing has changed.
    """
    models.check_name(name)
    target = models_dir / name
    if target.exists() and not replace:
        raise ConfigError(f"there is a model named {name} already", remedy="Choose another name or use --replace")
    with _storage_errors(models_dir):
        models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(models_dir)
        with _staging(models_dir) as folder:
            record = _read_source(source, folder, progress)
            (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
            _settle(folder)
            _publish(folder, target)
    return models.open_model(models_dir, name)


def _read_source(source: str, folder: Path, progress: Progress) -> Record:
    if source == smollm2.NAME:
        with smollm2.fetched(folder.parent, progress) as gguf:
            return _read_path(gguf, source, folder, progress)
    path = Path(source).expanduser()
    if not path.exists():
        raise NotFoundError(
            f"there is no {source}",
            remedy=f"SOURCE is a folder, a .safetensors file, a .gguf file or the name {smollm2.NAME}",
        )
    return _read_path(path, str(path.resolve()), folder, progress)


def _read_path(path: Path, source: str, folder: Path, progress: Progress) -> Record:
    if path.suffix.lower() in PICKLES:
        raise pickles_refused(path)
    if path.is_dir() and _model_type(path) == "dormouse-null":
        return read_null(path, source, folder)
    if path.suffix.lower() == ".gguf":
        from dormouse.checkpoint.gguf_source import read_gguf

        return read_gguf(path, source, folder, progress)
    if path.is_dir() or path.suffix.lower() == ".safetensors":
        from dormouse.checkpoint.hf_source import read_folder

        return read_folder(path, source, folder, progress)
    raise ConfigError(
        f"{path} is not a model that can be imported", remedy="Give a folder, a .safetensors file or a .gguf file"
    )


class _ModelType(msgspec.Struct):
    model_type: str = ""


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_ModelType).model_type
    except FileNotFoundError as error:
        pickled = next((p for p in sorted(folder.iterdir()) if p.suffix in PICKLES), None)
        if pickled is not None:
            raise pickles_refused(pickled) from error
        raise ConfigError(
            f"{folder} has no config.json", remedy="Give the folder that has config.json, tokenizer and weights"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid: {error}", remedy="Download or copy it again") from error


@contextmanager
def _staging(models_dir: Path) -> Iterator[Path]:
    """A private folder beside the models, locked while this process lives, deleted if it is still there at the end."""
    folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=models_dir))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after a plain rename it is gone already
        os.close(lock)


def _sweep(models_dir: Path) -> None:
    """Delete the staging folders of imports that died."""
    for folder in models_dir.glob(f"{STAGING_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # another import's sweep was faster
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # its import is running
        finally:
            os.close(lock)


def _settle(folder: Path) -> None:
    """Make every file private and durable."""
    for path in [*folder.iterdir(), folder]:
        path.chmod(0o700 if path.is_dir() else 0o600)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(folder: Path, target: Path) -> None:
    """Give the folder its name; an old model of that name is exchanged with it in the same instant."""
    if target.exists():
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.renameat2(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
        if failed:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(target))
    else:
        folder.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(models_dir: Path) -> Iterator[None]:
    try:
        yield
    except DormouseError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(models_dir).free
            raise DiskFullError(
                f"{models_dir} has no room for the model ({free >> 20} MiB free)",
                remedy="Free some space or choose another data folder",
            ) from error
        raise StoreError(
            f"the import failed: {error}", remedy=f"Check the permissions of {models_dir} and of the source"
        ) from error
