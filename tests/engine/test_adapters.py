"""Adapters in a real worker over its real socket, on the CPU and, where there is one, on a GPU: the same tests."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from dormouse.checkpoint.adapters import ImportedAdapter, open_adapter
from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.pool import SegmentPool
from dormouse.data_dir import DataDir
from dormouse.engine.frames import pack_frame
from dormouse.engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterSegment,
    AdapterUnloaded,
    Cancel,
    Delta,
    Failed,
    Finished,
    Generate,
    LoadAdapter,
    Sampling,
    TokensPrompt,
    UnloadAdapter,
)
from dormouse.store.store import Store
from dormouse.transfer.handles import await_report
from tests.adapters import factors, save_peft
from tests.checkpoint.conftest import save_tokenizer, tiny_llama
from tests.engine.worker_client import Answer, WorkerClient
from tests.models import quiet

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
SHAPES = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(2)
    for module, shape in {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.up_proj": (48, 32)}.items()
}
PROMPT = TokensPrompt(ids=[(7 * i + 3) % 64 for i in range(40)])
GREEDY = Sampling(max_tokens=4, temperature=0.0, logprobs=5)
NAMES = ("one", "two")


class Stage:
    """A worker with the model `tiny` and the imported adapters of NAMES."""

    def __init__(self, client: WorkerClient, data: DataDir, plain: Any) -> None:
        self.client, self.data, self.plain = client, data, plain
        self.store = Store.open(data.store)
        self.pool = SegmentPool(self.store)

    def adapter(self, name: str) -> ImportedAdapter:
        return open_adapter(self.data.models, name)

    def load(self, name: str, key: str | None = None, adapter: ImportedAdapter | None = None) -> None:
        """Send an adapter's segment and the message; the reply is for the caller."""
        adapter = adapter or self.adapter(name)
        handle = self.pool.take(adapter.checkpoint, "test")
        if handle.report is not None:
            await_report(handle.report)
            handle.forget_report()
        frame = pack_frame(AdapterSegment(segment=handle.info))
        socket.send_fds(self.client.socket, [frame], handle.descriptors())
        handle.close()
        self.client.send(LoadAdapter(name=key or name, table=adapter.body, scalings=dict(adapter.scalings)))

    def loaded(self, *names: str) -> None:
        for name in names:
            self.load(name)
            assert self.client.expect(AdapterLoaded).name == name

    def ask(self, *adapters: str | None) -> list[Answer]:
        """The same question to each, all at once."""
        names = [f"{number}" for number in range(len(adapters))]
        for name, adapter in zip(names, adapters, strict=True):
            self.client.send(Generate(id=name, prompt=PROMPT, sampling=GREEDY, adapter=adapter))
        answers = self.client.collect(names)
        return [answers[name] for name in names]

    def merged(self, name: str | None) -> torch.Tensor:
        """What the plain model with merged weights says after the prompt: log probabilities of each next token."""
        weights = {n: p.data.clone() for n, p in self.plain.named_parameters()}
        for module, (a, b) in PAIRS[name].items() if name is not None else ():
            delta = 2.0 * b.bfloat16().float() @ a.bfloat16().float()
            self.plain.get_submodule(module).weight.data += delta
        with torch.no_grad():
            row: torch.Tensor = self.plain(torch.tensor([PROMPT.ids])).logits[0, -1].log_softmax(-1)
        for n, p in self.plain.named_parameters():
            p.data = weights[n]
        return row

    def mapped(self) -> int:
        """How many segments of adapters the worker has mapped."""
        maps = Path(f"/proc/{self.client.process.pid}/maps").read_text()
        return len(re.findall(r"r--s .*/memfd:dormouse (?:one|two)", maps))

    def writable(self) -> bool:
        maps = Path(f"/proc/{self.client.process.pid}/maps").read_text()
        return re.search(r"w.?s .*/memfd:dormouse", maps) is not None


PAIRS = {name: factors(SHAPES, seed=number, size=0.4) for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module", params=DEVICES)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    folder = tmp_path_factory.mktemp("adapters")
    plain = tiny_llama()
    plain.save_pretrained(folder / "hub")
    save_tokenizer(folder / "hub")
    data = DataDir(folder / "data").create()
    model = import_model(str(folder / "hub"), "tiny", data, progress=quiet)
    for name in NAMES:
        import_model(str(save_peft(folder / name, PAIRS[name])), name, data, progress=quiet)
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with WorkerClient(folder / "log") as client:
        client.load(model.path, device=request.param)
        yield Stage(client, data, plain.eval())


@pytest.fixture(autouse=True)
def nothing_left(stage: Stage) -> Iterator[None]:
    yield
    for name in NAMES:
        stage.client.send(UnloadAdapter(name=name))
        stage.client.expect(AdapterUnloaded)
    assert stage.mapped() == 0
    stage.pool.release("test")


def first_logprobs(answer: Answer) -> dict[int, float]:
    assert isinstance(answer.end, Finished), answer.end
    assert answer.deltas[0].logprobs is not None
    return {alternative.token_id: alternative.logprob for alternative in answer.deltas[0].logprobs[0][1:]}


def test_answers_in_one_batch_are_those_of_the_merged_models(stage: Stage) -> None:
    (before,) = stage.ask(None)
    stage.loaded("one", "two")
    assert not stage.writable()
    order = [None, "one", "two", "one", None, "two", "two"]
    answers = stage.ask(*order)
    for adapter, answer in zip(order, answers, strict=True):
        expected = stage.merged(adapter)
        for token, logprob in first_logprobs(answer).items():
            assert abs(float(expected[token]) - logprob) < 0.06, (adapter, token)
        assert answer.token_ids[0] == int(expected.argmax())
    assert answers[0].token_ids == answers[4].token_ids == before.token_ids
    assert len({tuple(sorted(first_logprobs(answers[i]).items())) for i in range(3)}) == 3


def test_it_is_loaded_between_the_tokens_of_others(stage: Stage) -> None:
    long = Sampling(max_tokens=60, temperature=1.0, seed=3)
    stage.client.send(Generate(id="long", prompt=PROMPT, sampling=long))
    assert isinstance(stage.client.receive(), Delta)
    stage.load("one")
    seen = [stage.client.receive()]
    while not isinstance(seen[-1], AdapterLoaded):
        seen.append(stage.client.receive())
    stage.client.send(Generate(id="short", prompt=PROMPT, sampling=GREEDY, adapter="one"))
    ends = sum(isinstance(message, Finished) for message in seen)
    while ends < 2:
        ends += isinstance(stage.client.receive(), Finished)
    assert all(isinstance(message, Delta | AdapterLoaded | Finished) for message in seen)


def test_a_second_loading_of_the_same_is_nothing_new(stage: Stage) -> None:
    stage.loaded("one", "one")
    assert stage.mapped() <= 1  # a GPU has a copy instead


def test_the_worker_forgets_all_when_it_is_parked(stage: Stage) -> None:
    stage.loaded("one", "two")
    (before,) = stage.ask("two")
    stage.client.quiesce()
    assert stage.mapped() == 0
    stage.load("one")
    failed = stage.client.expect(AdapterFailed)
    assert failed.name == "one" and "no model now" in failed.message
    stage.client.resume()
    (lost,) = stage.ask("two")
    assert isinstance(lost.end, Failed) and "two is not loaded" in lost.end.message
    stage.loaded("two")
    (after,) = stage.ask("two")
    assert after.token_ids == before.token_ids
    assert first_logprobs(after) == pytest.approx(first_logprobs(before), abs=0.02)


def test_an_adapter_in_use_is_not_unloaded(stage: Stage) -> None:
    stage.loaded("one")
    long = Sampling(max_tokens=60, temperature=1.0, seed=3)
    stage.client.send(Generate(id="long", prompt=PROMPT, sampling=long, adapter="one"))
    stage.client.send(UnloadAdapter(name="one"))
    while not isinstance(message := stage.client.receive(), AdapterFailed):
        assert isinstance(message, Delta)
    assert "are running" in message.message
    stage.client.send(Cancel(id="long"))
    stage.client.send(UnloadAdapter(name="one"))
    seen = [stage.client.receive()]
    while not isinstance(seen[-1], AdapterUnloaded):
        seen.append(stage.client.receive())
    assert any(isinstance(message, Finished) for message in seen)
    assert stage.mapped() == 0


def test_a_request_behind_an_unloading_fails_by_itself(stage: Stage) -> None:
    stage.loaded("one")
    frames = [UnloadAdapter(name="one"), Generate(id="late", prompt=PROMPT, sampling=GREEDY, adapter="one")]
    stage.client.socket.sendall(b"".join(pack_frame(frame) for frame in frames))
    seen = [stage.client.receive(), stage.client.receive()]
    assert {type(message) for message in seen} == {AdapterUnloaded, Failed}
    (after,) = stage.ask(None)
    assert isinstance(after.end, Finished)


def test_what_does_not_fit_is_told_by_name_and_harms_nobody(stage: Stage) -> None:
    (before,) = stage.ask(None)
    good = stage.adapter("one")
    module = next(iter(good.scalings))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"scalings": {"model.layers.9.x": 1.0}}, "model.layers.9.x"),
        ({"body": msgspec.structs.replace(good.body, size=good.body.size + 256)}, "where its table says"),
    ]
    for fields, said in wrong:
        stage.load("one", adapter=replace(good, **fields))
        failed = stage.client.expect(AdapterFailed)
        assert failed.name == "one" and said in failed.message, failed
    stage.client.send(LoadAdapter(name="one", table=good.body, scalings={module: 1.0}))
    assert "without its segment" in stage.client.expect(AdapterFailed).message
    (unknown,) = stage.ask("nobody")
    assert isinstance(unknown.end, Failed)
    (after,) = stage.ask(None)
    assert after.token_ids == before.token_ids
