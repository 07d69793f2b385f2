"""Runs one target under atheris: `python tests/fuzz/fuzz_snapshot.py TARGET [FOLDER] [libFuzzer's options]`.

The folder keeps the inputs found so far. A failing input is written to the current folder and printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["dormouse.snapshot", "dormouse.engine.frames", "snapshot_targets"]):
    import snapshot_targets


def main() -> None:
    """Fuzz until libFuzzer's options say stop."""
    name, *rest = sys.argv[1:]
    if rest and not rest[0].startswith("-"):
        for number, data in enumerate(snapshot_targets.corpus(name)):
            (Path(rest[0]) / f"good-{number}").write_bytes(data)
    atheris.Setup([sys.argv[0], *rest], snapshot_targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
