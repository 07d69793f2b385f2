"""Tests that measure a GPU's memory run alone, the others together, and nobody waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_turns import turn


def test_who_measures_is_alone(tmp_path: Path) -> None:
    with turn(alone=False, folder=tmp_path), turn(alone=False, folder=tmp_path, patience=1):
        with pytest.raises(TimeoutError, match="no turn"), turn(alone=True, folder=tmp_path, patience=0.1):
            pass
    with turn(alone=True, folder=tmp_path, patience=1):
        with pytest.raises(TimeoutError), turn(alone=False, folder=tmp_path, patience=0.1):
            pass
    with turn(alone=False, folder=tmp_path, patience=1):
        pass
