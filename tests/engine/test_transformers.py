"""The transformers engine on the real model, in a real worker over a real socket."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dormouse.checkpoint.models import ImportedModel
from dormouse.engine.messages import (
    Cancel,
    ChatPrompt,
    Failed,
    Finished,
    Generate,
    Load,
    Prompt,
    Sampling,
    TextPrompt,
    TokensPrompt,
    WorkerError,
)

from .worker_client import Answer, HeldWeights, WorkerClient

pytestmark = pytest.mark.model

GREEDY = Sampling(max_tokens=24, temperature=0)


def chat(text: str) -> ChatPrompt:
    return ChatPrompt(messages=[{"role": "user", "content": text}])


CAPITAL = chat("What is the capital of France?")


def ended(answer: Answer) -> Finished:
    assert isinstance(answer.end, Finished), answer.end
    return answer.end


def failed(answer: Answer) -> Failed:
    assert isinstance(answer.end, Failed), answer.end
    return answer.end


def memory_kb(pid: int, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def test_it_answers_through_its_chat_template(real: WorkerClient) -> None:
    answer = real.ask(CAPITAL, GREEDY)
    assert answer.text == "The capital of France is Paris."
    end = ended(answer)
    # The template's own system message is in front: 37 tokens, where the question alone has 7.
    assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("stop", 37, len(answer.token_ids))
    assert len(answer.deltas) > 1


def test_the_same_prompt_as_text_gives_the_same_answer(real: WorkerClient) -> None:
    rendered = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = real.ask(TextPrompt(rendered), GREEDY)
    assert (answer.text, ended(answer).prompt_tokens) == ("The capital of France is Paris.", 37)


def test_a_stop_string_across_tokens_is_cut_and_never_shown(real: WorkerClient) -> None:
    answer = real.ask(CAPITAL, Sampling(max_tokens=24, temperature=0, stop=("nce is",)))
    assert (answer.text, ended(answer).reason) == ("The capital of Fra", "stop")


def test_max_tokens_ends_an_answer(real: WorkerClient) -> None:
    answer = real.ask(CAPITAL, Sampling(max_tokens=3, temperature=0))
    assert (answer.text, ended(answer).reason, ended(answer).completion_tokens) == ("The capital of", "length", 3)


def test_the_tokens_shown_decode_to_the_text_shown(real: WorkerClient) -> None:
    prompt = TextPrompt("Emoji and accents: 🐭 é ñ 你好 🐭 é ñ 你好 🐭 é")
    answer = real.ask(prompt, Sampling(max_tokens=40, temperature=0))
    assert "�" not in answer.text
    assert any(ord(character) > 0xFF for character in answer.text)
    assert any(delta.text == "" for delta in answer.deltas)  # a character of several tokens was held back


def test_seeds_decide_and_neighbours_do_not(real: WorkerClient) -> None:
    requests: dict[str, tuple[Prompt, Sampling]] = {
        subject: (chat(f"Tell me about {subject}."), Sampling(max_tokens=8, temperature=1, top_p=0.95, seed=i))
        for i, subject in enumerate(["cats", "the sea at night", "old " * 300 + "books", "rain"])
    }
    together = real.run(requests)
    for name, (prompt, sampling) in requests.items():
        alone = real.ask(prompt, sampling)
        assert alone.token_ids == together[name].token_ids, name
    other = real.ask(requests["cats"][0], Sampling(max_tokens=8, temperature=1, top_p=0.95, seed=99))
    assert other.token_ids != together["cats"].token_ids


def test_without_a_seed_answers_differ(real: WorkerClient) -> None:
    sampling = Sampling(max_tokens=16, temperature=1.5)
    answers = real.run({str(i): (chat("Tell me a story."), sampling) for i in range(3)})
    assert len({answer.text for answer in answers.values()}) == 3


def test_logprobs_are_those_of_the_model(real: WorkerClient) -> None:
    answer = real.ask(CAPITAL, Sampling(max_tokens=4, temperature=0, logprobs=3))
    for delta in answer.deltas:
        assert delta.logprobs is not None
        own, *best = delta.logprobs[0]
        assert own == best[0]  # greedy: the chosen token is the most likely
        assert len(best) == 3
        assert 0 >= best[0].logprob >= best[1].logprob >= best[2].logprob
    assert answer.deltas[0].logprobs is not None
    assert answer.deltas[0].logprobs[0][0].text == "The"


def test_cancel_ends_one_request_and_not_the_other(real: WorkerClient) -> None:
    long = Sampling(max_tokens=4000, temperature=1, seed=1)
    real.send(Generate(id="long", prompt=TextPrompt("Once upon a time"), sampling=long))
    real.send(Generate(id="short", prompt=CAPITAL, sampling=GREEDY))
    real.send(Cancel(id="long"))
    answers = real.collect(["long", "short"])
    assert ended(answers["long"]).reason == "cancel"
    assert answers["short"].text == "The capital of France is Paris."


@pytest.mark.parametrize(("prompt", "param"), [(chat("long " * 9000), "messages"), (TextPrompt("a " * 9000), "prompt")])
def test_a_prompt_that_is_too_long_is_told_in_numbers(real: WorkerClient, prompt: Prompt, param: str) -> None:
    end = failed(real.ask(prompt, GREEDY))
    assert (end.reason, end.bad_request, end.param) == ("context_length_exceeded", True, param)
    assert "maximum context length is 8192 tokens" in end.message
    assert f"your {param} resulted in 90" in end.message


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ChatPrompt(messages=[{"role": "user"}]), "chat template refuses these messages"),
        (ChatPrompt(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]), "chat template refuses"),
        (TextPrompt(""), "the prompt is empty"),
        (TokensPrompt([1, 49152]), "token ids must be from 0 to 49151"),
        (TokensPrompt([-1]), "token ids must be from 0 to 49151"),
    ],
)
def test_prompts_that_cannot_be_rendered_are_the_callers_fault(
    real: WorkerClient, prompt: Prompt, message: str
) -> None:
    end = failed(real.ask(prompt, GREEDY))
    assert end.bad_request
    assert message in end.message


def test_more_requests_than_the_cache_holds_all_finish(smollm2: ImportedModel, tmp_path: Path) -> None:
    with WorkerClient(tmp_path / "log") as worker:
        loaded = worker.load(smollm2.path, kv_tokens=256)
        assert (loaded.context, loaded.kv_tokens) == (256, 256)
        answers = worker.run({str(i): (CAPITAL, GREEDY) for i in range(12)})
        assert {answer.text for answer in answers.values()} == {"The capital of France is Paris."}
        long = worker.ask(TextPrompt("and " * 230), Sampling(max_tokens=10_000, temperature=0))
        assert ended(long).prompt_tokens + ended(long).completion_tokens <= 256


def test_sleep_drops_the_cache_and_changes_no_answer(real: WorkerClient) -> None:
    pid = real.process.pid
    prompt = TextPrompt("A long text that leaves much in the cache. " * 50)
    first = real.ask(prompt, Sampling(max_tokens=6, temperature=0))
    before = memory_kb(pid, "RssAnon")
    real.quiesce()
    after = memory_kb(pid, "RssAnon")
    assert before - after > 450 * 20  # 450 tokens of 23 kB each, and some of the heap
    real.resume()
    assert real.ask(prompt, Sampling(max_tokens=6, temperature=0)).token_ids == first.token_ids
    real.quiesce()
    real.resume()
    assert real.ask(CAPITAL, GREEDY).text == "The capital of France is Paris."


def test_the_weights_are_the_shared_segment_and_nothing_else(real: WorkerClient, smollm2: ImportedModel) -> None:
    real.ask(CAPITAL, GREEDY)
    smaps = Path(f"/proc/{real.process.pid}/smaps").read_text()
    start = smaps.index("/memfd:dormouse smollm2-135m")
    assert re.search(r"^[0-9a-f]+-[0-9a-f]+ r--s ", smaps[smaps.rfind("\n", 0, start) + 1 :])
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", smaps[start : start + 2000], re.MULTILINE)[:20])
    assert int(fields["Rss"]) > smollm2.weight_bytes // 1024 * 0.9
    assert int(fields["Anonymous"]) == 0
    real.quiesce()
    assert "memfd" not in Path(f"/proc/{real.process.pid}/maps").read_text()
    real.resume()
    assert real.ask(CAPITAL, GREEDY).text == "The capital of France is Paris."


def test_an_engine_prepared_without_a_model_loads_one_and_answers_the_same(
    smollm2: ImportedModel, tmp_path: Path
) -> None:
    with WorkerClient(tmp_path / "log") as worker:
        prepared = worker.prepare()
        assert set(prepared.phases.seconds()) == {"import", "rehearsal"}
        worker.quiesce()
        worker.resume()
        assert worker.load(smollm2.path).phases.seconds()["import"] < prepared.phases.seconds()["import"] / 2
        assert worker.ask(CAPITAL, GREEDY).text == "The capital of France is Paris."


def test_a_model_without_a_chat_template_says_so(smollm2: ImportedModel, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in smollm2.path.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).symlink_to(file)
    with WorkerClient(tmp_path / "log") as worker:
        worker.load(bare)
        end = failed(worker.ask(CAPITAL, GREEDY))
        assert (end.reason, end.bad_request) == ("no_chat_template", True)
        assert worker.ask(TextPrompt("Hello"), GREEDY).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_tokens": 1 << 40}, "needs"),
        ({"device": "cuda:0"}, "cuda-bindings is missing|no NVIDIA driver"),
        ({"device": "toaster"}, "there is no device 'toaster'"),
        ({"path": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_load_that_cannot_work_says_why(
    smollm2: ImportedModel, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with WorkerClient(tmp_path / "log") as worker:
        worker.weights = HeldWeights(smollm2.path)
        worker.weights.send(worker.socket)
        worker.send(Load(**{"engine": "transformers", "path": str(smollm2.path), **options}))  # type: ignore[arg-type]
        error = worker.expect(WorkerError)
        assert re.search(message, error.message)
        assert error.remedy
