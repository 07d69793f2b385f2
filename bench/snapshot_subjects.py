"""The processes that bench/snapshot_cpu.py captures. Each builds its memory, says `ready` and then obeys commands.

    python snapshot_subjects.py heap --mb 4096            memory as services have it, see `Heap`
    python snapshot_subjects.py transformers --path DIR   a language model loaded the usual way, see `Model`

Commands are lines on descriptor 3, each answered by one line: `ping`, `prove` (what nothing but intact memory can
answer) and `sum` (more of the same that is not timed). The end of the stream ends the process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import xxhash

CONTROL_FD = 3
SEED = 20_240_229

_MAPPING = 64 << 20
_POOL = 32 << 20
_PAGE = mmap.PAGESIZE
_LONGEST_BLOCK = 1024 * _PAGE
_PR_SET_THP_DISABLE = 41
_WORDS_IN_USE = 20_000


class Subject(Protocol):
    def prove(self) -> str: ...

    def sum(self) -> str: ...


class Heap:
    """Half zero pages that were written to, a quarter float32 weights, 3/16 text, 1/16 Python objects. All but the
    objects lie in mappings of 64 MiB, in blocks of 4 to 1,024 pages, mixed."""

    def __init__(self, megabytes: int, huge_pages: str) -> None:
        chosen = random.Random(SEED)
        raw = megabytes << 20
        self._mappings = list(_mappings(raw * 15 // 16, huge_pages == "on"))
        pools = {"weights": _weights(), "text": _text(chosen, min(_POOL, max(_LONGEST_BLOCK + _PAGE, raw // 16)))}
        left = {"zero": raw // 2, "weights": raw // 4, "text": raw * 3 // 16}
        for mapping in self._mappings:
            _fill(mapping, chosen, pools, left)
        del pools
        self._objects = _objects(chosen, raw // 16)

    def prove(self) -> str:
        state = xxhash.xxh3_128()
        for mapping in self._mappings:
            state.update(mapping)
        for record in self._objects:
            state.update(f"{record['id']}{record['name']}{record['tags']}{record['score']}".encode())
        return state.hexdigest()

    def sum(self) -> str:
        return ""


def _mappings(length: int, huge_pages: bool) -> Iterator[mmap.mmap]:
    while length > 0:
        mapping = mmap.mmap(-1, min(length, _MAPPING), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        length -= len(mapping)
        yield mapping


def _fill(mapping: mmap.mmap, chosen: random.Random, pools: dict[str, bytes], left: dict[str, int]) -> None:
    at = 0
    while at < len(mapping):
        kind = chosen.choices(list(left), [max(0, rest) + 1 for rest in left.values()])[0]
        length = min(_PAGE * int(2 ** chosen.uniform(2, 10)), len(mapping) - at)
        if kind == "zero":
            mapping[at : at + length] = bytes(length)
        else:
            start = chosen.randrange(0, len(pools[kind]) - length, 4)
            mapping[at : at + length] = pools[kind][start : start + length]
        left[kind] -= length
        at += length


def _weights() -> bytes:
    import numpy

    values = numpy.random.default_rng(SEED).standard_normal(_POOL // 4, dtype=numpy.float32)
    return (values * numpy.float32(0.02)).tobytes()


def _text(chosen: random.Random, size: int) -> bytes:
    """Words as often as words are used (Zipf), with punctuation."""
    letters, weights = "etaoinshrdlucmfwygpbvk", [12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1]
    words = ["".join(chosen.choices(letters, weights, k=chosen.randint(2, 10))) for _ in range(_WORDS_IN_USE)]
    words = [word + chosen.choices(["", ",", ".", ".\n"], [20, 2, 1, 1])[0] for word in words]
    frequencies = [1 / (rank + 3) for rank in range(len(words))]
    parts: list[bytes] = []
    length = 0
    while length < size:
        parts.append((" ".join(chosen.choices(words, frequencies, k=100_000)) + " ").encode())
        length += len(parts[-1])
    return b"".join(parts)


def _objects(chosen: random.Random, size: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    goal = _resident() + size
    while len(records) % 500 or _resident() < goal:
        number = len(records)
        records.append(
            {
                "id": number,
                "name": f"record {number} of {chosen.randrange(1 << 40)}",
                "tags": [f"tag {chosen.randrange(1000)}" for _ in range(3)],
                "score": chosen.random(),
            }
        )
    return records


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


class Model:
    """A model that transformers has loaded; its weights are ordinary memory of the process."""

    _PROMPT = "What does a dormouse do in winter?"
    _TOKENS = 16

    def __init__(self, path: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        for parameter in self._model.parameters():
            parameter.data = parameter.data.clone()  # what was loaded may be a mapping of the file

    def prove(self) -> str:
        messages = [{"role": "user", "content": self._PROMPT}]
        prompt = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with self._torch.inference_mode():
            made = self._model.generate(**prompt, max_new_tokens=self._TOKENS, do_sample=False)
        text: str = self._tokenizer.decode(made[0][prompt["input_ids"].shape[1] :])
        return text

    def sum(self) -> str:
        state = xxhash.xxh3_128()
        for parameter in self._model.parameters():
            state.update(parameter.data.view(self._torch.uint8).numpy())
        return state.hexdigest()


def serve(subject: Subject, control: socket.socket) -> None:
    """Obey until the other end closes."""
    answers = {"ping": lambda: "here", "prove": subject.prove, "sum": subject.sum}
    control.sendall(b'"ready"\n')
    received = b""
    while data := control.recv(4096):
        received += data
        while b"\n" in received:
            line, _, received = received.partition(b"\n")
            control.sendall(json.dumps(answers[line.decode()]()).encode() + b"\n")


def main() -> None:
    """Build the subject and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["heap", "transformers"])
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--path")
    parser.add_argument("--huge-pages", choices=["host", "on", "off"], default="host")
    arguments = parser.parse_args()
    if arguments.huge_pages == "off":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    subject: Subject = (
        Heap(arguments.mb, arguments.huge_pages) if arguments.kind == "heap" else Model(arguments.path or os.curdir)
    )
    subject.prove()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # until here it could tell why it failed
    with socket.socket(fileno=CONTROL_FD) as control:
        serve(subject, control)


if __name__ == "__main__":
    main()
