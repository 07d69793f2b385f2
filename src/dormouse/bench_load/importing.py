"""The weights as imported checkpoints, one stored raw and one coded, each in a data folder and a process of its own.

Chunks are known by their plain bytes, so one store would keep each only once: hence two. The process is this module:
`python -m dormouse.bench_load.importing raw|coded DATA_DIR FILE...`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from dormouse.bench_load.cache import files_below
from dormouse.bench_load.processes import Child, ChildError
from dormouse.checkpoint.importer import import_read
from dormouse.checkpoint.models import Description
from dormouse.checkpoint.safetensors_file import TensorInfo, read_header
from dormouse.checkpoint.tensors import NewTensor
from dormouse.data_dir import DataDir
from dormouse.transfer.memory import keep_freed_memory

MODEL = "weights"
COPIES = ("coded", "raw")
_PIECE = 16 << 20


class Imports:
    """Both imports, side by side."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._children: dict[str, Child] = {}
        self.failed: dict[str, str] = {}
        self.stored: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def data_dir(self, copy: str) -> Path:
        return self._scratch / copy

    def start(self, files: Sequence[Path], copies: Iterable[str]) -> None:
        for copy in copies:
            words = (copy, str(self.data_dir(copy)), *map(str, files))
            self._children[copy] = Child(__name__, *words)

    def finish(self, seconds: float) -> None:
        """Wait for both, `seconds` at most. What failed is in `failed`, with the reason."""
        deadline = time.monotonic() + seconds
        for copy, child in self._children.items():
            try:
                self.seconds[f"import {copy}"] = child.hear("seconds", max(0.0, deadline - time.monotonic()))
                packs = files_below(DataDir(self.data_dir(copy)).store / "packs")
                self.stored[copy] = sum(pack.stat().st_size for pack in packs)
            except ChildError as error:
                self.failed[copy] = f"the import failed: {error}"
        self.close()

    def close(self) -> None:
        for child in self._children.values():
            child.close()
        self._children.clear()


def _tensors(files: Sequence[Path]) -> list[NewTensor]:
    return [_tensor(file, tensor) for file in files for tensor in read_header(file).values()]


def _tensor(file: Path, tensor: TensorInfo) -> NewTensor:
    """A tensor of a file with its bytes as they are."""

    def chunks() -> Iterator[bytes | memoryview]:
        with file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset)
            left = tensor.length
            while left:
                data = stream.read(min(left, _PIECE))
                left -= len(data)
                yield data

    return NewTensor(tensor.name, tensor.dtype, tensor.shape, chunks)


def main() -> None:
    """Import, then tell how long it took."""
    copy, data_dir, *files = sys.argv[1:]
    keep_freed_memory()  # as `dormouse import` does
    begin = time.perf_counter()
    found = Description("bench", "transformers", "bfloat16", 0, _tensors([Path(file) for file in files]))
    import_read(
        lambda _folder: found, MODEL, DataDir(Path(data_dir)).create(), progress=lambda *_: None, coded=copy == "coded"
    )
    sys.stdout.buffer.write(msgspec.json.encode({"seconds": time.perf_counter() - begin}) + b"\n")


if __name__ == "__main__":
    main()
