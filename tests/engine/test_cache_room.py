"""How many tokens a cache on a GPU has room for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dormouse.engine.messages import Load
from dormouse.engine.transformers_engine import DEFAULT_KV_TOKENS, _kv_tokens
from dormouse.errors import HostError

GIB = 1 << 30
MODEL = SimpleNamespace(device=torch.device("cuda", 0))
TOKEN = 128 << 10  # as an 8B Llama's


def room(monkeypatch: pytest.MonkeyPatch, free: int, **options: float) -> int:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 140 * GIB))
    return _kv_tokens(Load(engine="transformers", path="", **options), MODEL, TOKEN)  # type: ignore[arg-type]


def test_a_part_of_the_gpu_is_taken_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room(monkeypatch, 123 * GIB, kv_share=0.8) == 112 * GIB // TOKEN
    assert room(monkeypatch, 123 * GIB, kv_tokens=500_000, kv_share=0.8) == 500_000
    assert room(monkeypatch, 123 * GIB) == DEFAULT_KV_TOKENS
    assert room(monkeypatch, 4 * GIB) == GIB // TOKEN


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="at most 107520 may be used") as caught:
        room(monkeypatch, 108 * GIB, kv_share=0.8)
    assert "kv_share" in caught.value.remedy
