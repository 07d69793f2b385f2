"""Nothing that decodes forgets an error: msgspec raises its own, but also UnicodeDecodeError for broken text and
RecursionError for lists in lists in lists, even where it only skips them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dormouse.checkpoint.safetensors_file import read_header
from dormouse.errors import ConfigError

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))


def test_who_catches_one_error_of_a_decoder_catches_all() -> None:
    found = [
        (path.name, clause)
        for path in SOURCES
        for clause in re.findall(r"except [^:]*msgspec\.(?:DecodeError|MsgspecError)[^:]*:", path.read_text())
    ]
    assert len(found) > 10
    assert not [pair for pair in found if "UnicodeDecodeError" not in pair[1] or "RecursionError" not in pair[1]]


def test_a_header_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    header = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ConfigError, match="its header is wrong"):
        read_header(tmp_path / "x.safetensors")
