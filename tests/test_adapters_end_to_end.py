"""LoRA adapters of the real model as a user has them: `dormouse import`, `dormouse serve`, HTTP, sleep and wake."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch

from dormouse.admin_client import ask_node
from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel
from dormouse.checkpoint.pool import SegmentPool
from dormouse.data_dir import DataDir
from dormouse.engine.arena import Arena
from dormouse.engine.transformers_model import load_model
from dormouse.store.store import Store
from dormouse.transfer.handles import SegmentHandle
from tests.adapters import factors, save_peft
from tests.models import home_of, lend, quiet
from tests.serving import PATIENCE, Server, data_dir, serve

__all__ = ["data_dir"]

pytestmark = [pytest.mark.root, pytest.mark.model, pytest.mark.timeout(300)]

BASE = "smollm2-135m"
SHAPES = {
    f"model.layers.{layer}.self_attn.{module}": (rows, 576)
    for layer in range(30)
    for module, rows in (("q_proj", 576), ("v_proj", 192))
}
PAIRS = {name: factors(SHAPES, seed=number, size=0.08) for number, name in enumerate(("loud", "odd"))}
PROMPT = "Once upon a time there was a dormouse who"
TOKENS = 6
_bases = itertools.count(0x3F00_0000_0000, 1 << 32)


@pytest.fixture
def home(data_dir: DataDir, smollm2: ImportedModel, tmp_path: Path) -> DataDir:
    """A data folder with the real model and two adapters of it."""
    lend(smollm2, data_dir)
    for name, pairs in PAIRS.items():
        folder = save_peft(tmp_path / name, pairs, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M")
        import_model(str(folder), name, data_dir, progress=quiet)
    return data_dir


def complete(server: Server, model: str) -> tuple[list[str], list[dict[str, float]], str]:
    """Greedy tokens, the alternatives at each place, and the start path."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 5}
    answer = httpx.post(f"{server.address}/v1/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    logprobs = answer.json()["choices"][0]["logprobs"]
    return logprobs["tokens"], logprobs["top_logprobs"], answer.headers["x-dormouse-start"].split(";")[0]


def merged_first(model: ImportedModel, name: str) -> dict[str, float]:
    """The likeliest first tokens of the model with merged weights, in float32."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model.path)
    handles: list[SegmentHandle] = []
    with Store.open(home_of(model).store) as store:
        pool = SegmentPool(store)
        assert model.checkpoint is not None
        handles.append(pool.take(model.checkpoint, "merge"))
        arena = Arena(next(_bases))
        arena.map(handles)
        arena.wait()
        plain = load_model(model.path, torch.device("cpu"), "sdpa", arena).float()
        pool.release("merge")
    for module, (a, b) in PAIRS[name].items():
        plain.get_submodule(module).weight.data += 2.0 * b @ a
    with torch.no_grad():
        row = plain(torch.tensor([tokenizer.encode(PROMPT)])).logits[0, -1].log_softmax(-1)
    best = row.topk(5)
    arena.unmap()
    return {
        tokenizer.decode([int(token)]): float(value) for value, token in zip(best.values, best.indices, strict=True)
    }


def lora(server: Server, action: str, **body: str) -> httpx.Response:
    return httpx.post(f"{server.address}/v1/{action}_lora_adapter", json=body, timeout=PATIENCE)


def test_adapters_come_and_go_while_the_model_serves_sleeps_and_wakes(
    home: DataDir, smollm2: ImportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORMOUSE_ADAPTER_ROUTES", "true")
    with serve(home, BASE, keep_alive="1h") as server:
        base, _all, start = complete(server, BASE)
        assert start == "cold"
        assert lora(server, "load", lora_name="my-loud", lora_path="loud").status_code == 200
        assert lora(server, "load", lora_name="my-odd", lora_path="odd").status_code == 200
        loud, places, start = complete(server, "my-loud")
        odd, odd_places, _start = complete(server, "my-odd")
        assert start == "hot" and base != loud != odd != base
        for name, first in (("loud", places[0]), ("odd", odd_places[0])):
            expected = merged_first(smollm2, name)
            assert max(first, key=first.__getitem__) == max(expected, key=expected.__getitem__)
            for token in first.keys() & expected.keys():
                assert first[token] == pytest.approx(expected[token], abs=0.2), (name, token)
            assert len(first.keys() & expected.keys()) >= 4

        names = [BASE, "my-loud", "my-odd"] * 4
        with ThreadPoolExecutor(len(names)) as threads:
            together = list(threads.map(lambda name: complete(server, name)[0], names))
        assert together == [base, loud, odd] * 4, "in one batch, each gets what it gets alone"

        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=PATIENCE)
        assert [model.id for model in client.models.list()] == [BASE, "my-loud", "my-odd"]
        done = subprocess.run(
            [sys.executable, "-m", "dormouse.cli", "rm", "--model", "loud", "--data-dir", str(home.root)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and "is being served" in done.stderr

        ask_node(home.run, "POST", "models", BASE, "sleep")
        assert server.workers() == []
        assert kept(server) == {"loud", "odd"}, "the adapters stay in the host service's memory"
        assert complete(server, "my-odd")[::2] == (odd, "snapshot")
        assert complete(server, "my-loud")[0] == loud
        assert complete(server, BASE)[0] == base
        assert server.metric("dormouse_adapter_load_seconds_count", adapter="odd") == 2
        assert server.metric("dormouse_fallbacks_total") == 0

        assert lora(server, "unload", lora_name="my-loud").status_code == 200
        assert kept(server) == {"odd"}
        answer = server.ask("my-loud")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert complete(server, "my-odd")[0] == odd
        snapshots = [row for row in ask_node(home.run, "GET", "snapshots")["data"] if row["kind"] == "snapshot"]
        assert snapshots[0]["raw_bytes"] < 700e6


def kept(server: Server) -> set[str]:
    """The adapters whose segments some process of the server has open or mapped."""
    found: set[str] = set()
    for process in server.family():
        for line in links(process.pid):
            found |= {name for name in PAIRS if line.startswith(f"/memfd:dormouse {name}")}
    return found


def links(pid: int) -> list[str]:
    try:
        return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def test_configured_adapters_are_served_from_the_start_and_stay(home: DataDir, tmp_path: Path) -> None:
    config = tmp_path / "dormouse.yaml"
    config.write_text(f"models: {{{BASE}: {{adapters: [loud, odd], keep_alive: 1h}}}}\nport: 0\n")
    with serve(home, str(config)) as server:
        listed = httpx.get(f"{server.address}/v1/models").json()["data"]
        assert [(model["id"], model.get("parent")) for model in listed] == [
            (BASE, None),
            ("loud", BASE),
            ("odd", BASE),
        ]
        assert lora(server, "unload", lora_name="loud").status_code == 403
        loud, _places, start = complete(server, "loud")
        assert start == "cold" and loud != complete(server, BASE)[0]
        ask_node(home.run, "POST", "models", BASE, "sleep")
        assert complete(server, "odd")[2] == "snapshot"
