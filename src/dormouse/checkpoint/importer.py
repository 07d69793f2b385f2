"""`import_model`: from whatever holds a model to the folder of an imported model, atomically.

    SOURCE --find--> a reader (folder, safetensors files, GGUF, PEFT, a known name) --> staging folder, locked
           --> tensors to chunks in one transaction --> weights.json, dormouse.json, all fsynced
           --> commit of the checkpoint's manifest --> one rename --> MODELS_DIR/NAME --> sweep

Until the rename nothing is visible under the name. What an interrupted import leaves is a staging folder that nobody
holds locked, and, if it died right before the rename, a checkpoint that no model names; the next import deletes both.
A model that was replaced leaves its checkpoint in the same way. No code of the source is ever run: no pickles, no
remote code.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from blake3 import blake3

from dormouse.checkpoint import models, peft_source, smollm2
from dormouse.checkpoint.models import RECORD, STAGING_PREFIX, TABLE, Description, ImportedModel, Progress, Record
from dormouse.checkpoint.null_source import read_null
from dormouse.checkpoint.tensors import encode_table
from dormouse.checkpoint.transformers_source import PICKLES, pickles_refused
from dormouse.checkpoint.writer import Written, float_bytes, publishing, sweep, write_tensors
from dormouse.data_dir import DataDir
from dormouse.errors import BusyError, ConfigError, DiskFullError, DormouseError, NotFoundError, StoreError
from dormouse.store.store import Store
from dormouse.transfer.coder import find_coder

log = logging.getLogger(__name__)

_GARBAGE_WAIT = 5.0
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def import_model(
    source: str, name: str, folders: DataDir, *, progress: Progress, replace: bool = False, base: str | None = None
) -> ImportedModel:
    """Import `source` as `name`; of an adapter, `base` is the imported model it is for (None: as its configuration
    says).

    Raises ConfigError (the source or the name is wrong), NotFoundError (no such source), HostError (a package is
    missing), DiskFullError or StoreError. After an error nothing has changed.
    """
    return import_read(
        lambda folder: _read_source(source, folder, progress, base), name, folders, progress=progress, replace=replace
    )


def import_read(
    read: Callable[[Path], Description],
    name: str,
    folders: DataDir,
    *,
    progress: Progress,
    replace: bool = False,
    coded: bool = True,
) -> ImportedModel:
    """Import what `read` finds, which may leave files of the model in the folder it is given. Tensors are stored as
    they are if not `coded`. Raises what `import_model` does."""
    models.check_name(name)
    target = folders.models / name
    if target.exists() and not replace:
        raise ConfigError(f"there is a model named {name} already", remedy="Choose another name or use --replace")
    with _storage_errors(folders.models):
        folders.models.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep_folders(folders.models)
        with _staging(folders.models) as folder:
            found = read(folder)
            if found.base == name:
                raise ConfigError(
                    f"{found.source} is an adapter of {name}, whose place it can't take",
                    remedy="Give it a name of its own with --name",
                )
            with Store.open(folders.store) as store:
                _import(found, folder, target, store, progress, coded=coded)
                _tidy(store, folders.models)
    return models.open_model(folders.models, name)


def _import(found: Description, folder: Path, target: Path, store: Store, progress: Progress, *, coded: bool) -> None:
    """Everything of the model into the store and its folder, then the two moments that make it visible."""
    with store.begin() as transaction:
        written = None
        if found.tensors:
            coder = find_coder(float_bytes(found.tensors)) if coded else None
            told = functools.partial(progress, "write" if coder is None else f"write, coded on {coder.name}")
            written = write_tensors(transaction, found.tensors, told, coded=coded, coder=coder)
            (folder / TABLE).write_bytes(encode_table(written.body))
        record = _record(found, folder, written)
        (folder / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
        _settle(folder)
        with publishing(target.parent):
            if written is not None:
                transaction.commit(written.manifest(target.name, time.time()))
            _publish(folder, target)


def _record(found: Description, folder: Path, written: Written | None) -> Record:
    return Record(
        format=models.FORMAT,
        source=found.source,
        engine=found.engine,
        dtype=found.dtype,
        parameters=sum(math.prod(tensor.shape) for tensor in found.tensors) if found.engine != "null" else 0,
        weight_bytes=written.body.size if written is not None else 0,
        digest=_digest(folder, written),
        context=found.context,
        checkpoint=written.id if written is not None else None,
        base=found.base,
        base_digest=found.base_digest,
    )


def _digest(folder: Path, written: Written | None) -> str:
    """The BLAKE3 of everything that decides what the model answers: each file of its folder, and its weights."""
    digest = blake3()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + blake3(path.read_bytes()).digest())
    digest.update(written.digest().encode() if written is not None else b"")
    return digest.hexdigest()


def _tidy(store: Store, models_dir: Path) -> None:
    """Free what no model uses any more. The import is done: nothing of this can undo it."""
    if sweep(store, models_dir):
        try:
            store.collect_garbage(wait=_GARBAGE_WAIT)
        except BusyError as error:
            log.info("the space of weights that were replaced is freed later: %s", error)


def _read_source(source: str, folder: Path, progress: Progress, base: str | None) -> Description:
    if source == smollm2.NAME:
        _refuse_base(source, base)
        with smollm2.fetched(folder.parent, progress) as gguf:
            return _read_path(gguf, source, folder, progress)
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # a home folder of nobody
        path = Path(source)
    if not path.exists():
        raise NotFoundError(
            f"there is no {source}",
            remedy=f"SOURCE is a folder, a .safetensors file, a .gguf file or the name {smollm2.NAME}",
        )
    if (path / peft_source.CONFIG).exists():
        return peft_source.read_adapter(path, str(path.resolve()), folder, base)
    _refuse_base(source, base)
    return _read_path(path, str(path.resolve()), folder, progress)


def _refuse_base(source: str, base: str | None) -> None:
    if base is not None:
        raise ConfigError(f"{source} is no adapter, so it has no base model", remedy="Leave --base out")


def _read_path(path: Path, source: str, folder: Path, progress: Progress) -> Description:
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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
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


def _sweep_folders(models_dir: Path) -> None:
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
