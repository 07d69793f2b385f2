"""The transformers engine on an NVIDIA GPU, by the same code as on the CPU. Skipped, visibly, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dormouse.checkpoint.importer import import_model
from dormouse.data_dir import DataDir
from dormouse.engine.device_copy import PIECE, to_device
from dormouse.engine.messages import Finished, Sampling, TokensPrompt
from tests.checkpoint.conftest import save_tokenizer, tiny_llama
from tests.engine.worker_client import WorkerClient

pytestmark = pytest.mark.gpu

PROMPT = TokensPrompt(ids=[5, 9, 13, 21, 34])
GREEDY = Sampling(max_tokens=24, temperature=0.0, logprobs=2)
SEEDED = Sampling(max_tokens=24, temperature=1.0, seed=11)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerClient]:
    """A worker that has loaded a tiny Llama onto the first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    folder = tmp_path_factory.mktemp("gpu")
    tiny_llama().save_pretrained(folder / "hub")
    save_tokenizer(folder / "hub")
    model = import_model(str(folder / "hub"), "tiny", DataDir(folder), progress=lambda _step, _done, _total: None)
    with WorkerClient(Path(folder) / "log") as client:
        client.load(model.path, device="cuda:0")
        yield client


def test_greedy_and_seeded_answers_are_the_same_every_time_and_after_a_quiesce(worker: WorkerClient) -> None:
    before = [worker.ask(PROMPT, sampling).token_ids for sampling in (GREEDY, GREEDY, SEEDED, SEEDED)]
    assert before[0] == before[1] and before[2] == before[3]
    worker.quiesce()
    worker.resume()
    assert [worker.ask(PROMPT, sampling).token_ids for sampling in (GREEDY, SEEDED)] == [before[0], before[2]]


def test_many_requests_at_once_are_all_answered(worker: WorkerClient) -> None:
    answers = worker.run({f"r{i}": (TokensPrompt(ids=[3 + i, 7, 11]), SEEDED) for i in range(32)})
    assert all(isinstance(answer.end, Finished) and answer.token_ids for answer in answers.values())


def test_logprobs_come_with_every_token(worker: WorkerClient) -> None:
    answer = worker.ask(PROMPT, GREEDY)
    assert sum(len(delta.logprobs or ()) for delta in answer.deltas) == len(answer.token_ids)


@pytest.mark.gpu(alone=True)
@pytest.mark.timeout(180)
def test_a_worker_that_sleeps_gives_its_cache_back_and_answers_as_before(tmp_path: Path) -> None:
    """Sixteen times, with nothing left behind from one to the next."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    tiny_llama().save_pretrained(tmp_path / "hub")
    save_tokenizer(tmp_path / "hub")
    model = import_model(str(tmp_path / "hub"), "tiny", DataDir(tmp_path), progress=lambda _step, _done, _total: None)
    with WorkerClient(tmp_path / "log") as client:
        loaded = client.load(model.path, device="cuda:0", kv_tokens=1 << 20)
        print({name: round(seconds, 3) for name, seconds in loaded.phases.seconds().items()})
        before = [client.ask(PROMPT, sampling).token_ids for sampling in (GREEDY, SEEDED)]
        free: list[int] = []
        for _ in range(16):
            awake = torch.cuda.mem_get_info(0)[0]
            print(client.quiesce())
            free.append(torch.cuda.mem_get_info(0)[0])
            assert free[-1] - awake >= (1 << 20) * 128, "the cache's memory was kept"  # bytes of keys and values
            print(client.resume())
            assert [client.ask(PROMPT, sampling).token_ids for sampling in (GREEDY, SEEDED)] == before
        assert free[1] - free[-1] < 8 << 20, free
    assert "without CUDA graphs" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("size", [1, 1000, PIECE, 9 * PIECE + 77])
def test_what_goes_through_pinned_pieces_arrives(size: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    source = torch.randint(0, 256, (size,), dtype=torch.uint8)
    for _ in range(2):
        assert torch.equal(to_device(source, torch.device("cuda:0")).cpu(), source)
