"""Ways to load that the tests of `dormouse bench load` measure: a right one, and each way to be wrong."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from dormouse.bench_load.method import Job, Method, MissingError, Tensors

_ROOT = str(Path(__file__).parent.parent)
_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join((_ROOT, str(Path(_ROOT) / "src"), os.environ.get("PYTHONPATH", "")))}


def _load(job: Job, _prepared: Any = None) -> Tensors:
    from safetensors.torch import load_file

    return {name: tensor for file in job.files for name, tensor in load_file(file).items()}


def _with_one_bit_flipped(job: Job, _prepared: Any) -> Tensors:
    tensors = _load(job)
    tensor = tensors["model.norm.weight"]
    tensor[tensor.numel() // 3] = -tensor[tensor.numel() // 3]
    return tensors


def _with_one_left_out(job: Job, _prepared: Any) -> Tensors:
    tensors = _load(job)
    del tensors["model.norm.weight"]
    return tensors


def _of_another_shape(job: Job, _prepared: Any) -> Tensors:
    tensors = _load(job)
    return tensors | {"lm_head.weight": tensors["lm_head.weight"].T}


def _failing(job: Job, _prepared: Any) -> Tensors:
    raise RuntimeError("out of luck")


def _dying(job: Job, _prepared: Any) -> Tensors:
    print("the last thing it said", file=sys.stderr, flush=True)
    os.abort()


def _hanging(job: Job, _prepared: Any) -> Tensors:
    time.sleep(600)
    return {}


def _talking(job: Job, _prepared: Any) -> Tensors:
    print("loading, please wait")  # must not be taken for the protocol
    os.write(1, b"{}\n")
    return _load(job)


def _absent(device: str) -> str:
    raise MissingError("it can't be imported")


def _method(name: str, load: Any, prepare: Any = lambda device: "1.0") -> Method:
    place = f"{__name__}:{name.upper()}"
    return Method(place, name, "a test", "plain", prepare, load, environment=_ENVIRONMENT)


RIGHT = _method("right", _load)
FLIPPED = _method("flipped", _with_one_bit_flipped)
SHORT = _method("short", _with_one_left_out)
TURNED = _method("turned", _of_another_shape)
FAILING = _method("failing", _failing)
DYING = _method("dying", _dying)
HANGING = _method("hanging", _hanging)
TALKING = _method("talking", _talking)
ABSENT = _method("absent", _load, _absent)
