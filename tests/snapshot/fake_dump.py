"""Folders that look like dumps of CRIU, made without it."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dormouse.snapshot.criu_images import PAGE, Run, encode_pagemap

MACHINE = os.uname().machine
PID = 7

_COMMON = struct.pack("<I", 0x54564319)
_SELF_MADE = {"x86_64": 1, "aarch64": 3}


class Vma(NamedTuple):
    """A mapping as CRIU notes it; by default private anonymous memory."""

    start: int
    end: int
    flags: int = 0x22
    status: int = 1 | 1 << 9
    file: int = 0
    offset: int = 0
    protection: int = 3


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def message(*given: int | bytes) -> bytes:
    """A protobuf message of the alternating field numbers and values."""
    data = b""
    for number, value in zip(given[::2], given[1::2], strict=True):
        assert isinstance(number, int)
        if isinstance(value, bytes):
            data += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            data += varint(number << 3) + varint(value)
    return data


def image(magic: int, *messages: bytes, common: bytes = _COMMON) -> bytes:
    return common + struct.pack("<I", magic) + b"".join(struct.pack("<I", len(body)) + body for body in messages)


def mm_image(vmas: Sequence[Vma]) -> bytes:
    """An `mm` image."""
    found = (
        message(1, v.start, 2, v.end, 3, v.offset, 4, v.file, 5, v.protection, 6, v.flags, 7, v.status) for v in vmas
    )
    return image(0x57492820, b"".join(message(14, vma) for vma in found))


def fake_dump(
    folder: Path,
    pages: Mapping[int, bytes] | None = None,
    vmas: Sequence[Vma] = (Vma(PAGE, 5 * PAGE),),
    files: Mapping[int, str] | None = None,
    pids: Sequence[int] = (PID,),
) -> Path:
    """A dump of processes that all have the same memory: address -> page; by default a page of `a` and a zero one."""
    pages = {PAGE: b"a" * PAGE, 2 * PAGE: bytes(PAGE)} if pages is None else pages
    folder.mkdir()
    made = {
        "inventory.img": image(0x58313116, message(1, 2), common=b""),
        "pstree.img": image(0x50273030, *(message(1, pid, 2, 0 if pid == pids[0] else pids[0]) for pid in pids)),
        "files.img": image(
            0x56303138, *(message(1, 1, 2, i, 3, message(1, i, 6, n.encode())) for i, n in (files or {}).items())
        ),
    }
    for number, pid in enumerate(pids, 1):
        made[f"core-{pid}.img"] = image(0x55053847, message(1, _SELF_MADE[MACHINE]))
        made[f"mm-{pid}.img"] = mm_image(vmas)
        made[f"pagemap-{pid}.img"] = encode_pagemap(number, [Run(address, 1) for address in sorted(pages)])
        made[f"pages-{number}.img"] = b"".join(pages[address] for address in sorted(pages))
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return folder
