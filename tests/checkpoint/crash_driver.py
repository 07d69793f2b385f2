"""Imports a model again and again, and kills the import at every step that changes a file, one step later each time.

    python crash_driver.py FOLDER          FOLDER has the sources `old` and `new` of two null models with weights

After each death the model must be the old one or the new one, whole; and what was left over must go with the next
import. Prints how many steps there were. A program of its own, because it forks.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import list_models
from dormouse.data_dir import DataDir
from dormouse.store.store import Store
from tests.models import quiet

_CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "sqlite3.connect",
    "fcntl.flock",
)


def die_at(step: int) -> None:
    """kill -9 this process at its `step`-th change."""
    left = step

    def count(event: str, _arguments: object) -> None:
        nonlocal left
        if event in _CHANGES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def crashed(folder: Path, data: DataDir, step: int) -> bool:
    """Whether an import that replaces the model died at that step."""
    child = os.fork()
    if child == 0:
        die_at(step)
        import_model(str(folder / "new"), "a", data, progress=quiet, replace=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def digest_of_weights(data: DataDir, checkpoint: str) -> bytes:
    with Store.open(data.store) as store:
        return b"".join(bytes(store.read(digest)[:64]) for digest in store.manifest(checkpoint).refs)


def run(folder: Path) -> int:
    """The number of steps an import has."""
    known = {}
    for source in ("old", "new"):
        alone = DataDir(folder / f"{source}-alone").create()
        model = import_model(str(folder / source), "a", alone, progress=quiet)
        assert model.checkpoint is not None
        known[model.digest] = digest_of_weights(alone, model.checkpoint)
    for step in range(1000):
        data = DataDir(folder / "data").create()
        import_model(str(folder / "old"), "a", data, progress=quiet)
        dead = crashed(folder, data, step)
        (model,) = list_models(data.models)
        assert model.checkpoint is not None
        assert digest_of_weights(data, model.checkpoint) == known[model.digest], step
        other = import_model(str(folder / "old"), "b", data, progress=quiet)
        with Store.open(data.store) as store:
            assert store.verify().ok, step
            found = {row.id for row in store.manifests()}
        assert found == {model.checkpoint, other.checkpoint}, (step, found)
        assert sorted(path.name for path in data.models.iterdir()) == ["a", "b"], step
        shutil.rmtree(data.root)
        if not dead:
            return step
    raise AssertionError("the import never ends")


if __name__ == "__main__":
    print(run(Path(sys.argv[1])))
