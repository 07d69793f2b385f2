"""Where everything lies that Dormouse keeps: one folder, private to its user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from dormouse.errors import ConfigError

HOME_VARIABLE = "DORMOUSE_HOME"


@dataclass(frozen=True)
class DataDir:
    """The folders below data_dir. `create` makes the private ones (0700)."""

    root: Path
    models: Path = field(init=False)
    store: Path = field(init=False)
    logs: Path = field(init=False)
    run: Path = field(init=False)
    criu: Path = field(init=False)
    key: Path = field(init=False)

    def __post_init__(self) -> None:
        for name in ("models", "store", "logs", "run", "criu", "key"):
            object.__setattr__(self, name, self.root / name)

    def create(self) -> Self:
        """Make the folders the node writes to. Raises ConfigError where that is not allowed."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.models, self.logs, self.run):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the data folder {self.root} cannot be used: {error.strerror}",
                remedy=f"Set data_dir, or {HOME_VARIABLE}, to a folder you may write to",
            ) from error
        return self


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """$DORMOUSE_HOME, else `dormouse` in the XDG data home."""
    if home := environ.get(HOME_VARIABLE):
        return Path(home)
    data_home = environ.get("XDG_DATA_HOME") or Path(environ.get("HOME") or Path.home()) / ".local" / "share"
    return Path(data_home) / "dormouse"
