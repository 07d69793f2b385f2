"""The programs that bench/snapshot_gpu.py captures and restores. They know nothing of Dormouse.

    python gpu_subjects.py llama|block|vllm '{"folder": …, "device": …, …}'

A subject gets ready, then answers questions it finds in its folder, which needs no descriptor that a snapshot could not
hold: for `ask-N` it writes `first-N` at its first token and `answer-N`, its whole answer, at the end. All are written
beside and renamed. The benchmark may ask before the subject is ready: then the answer's time is that of a cold start.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_POLL = 0.001
_PROMPT = (11, 7, 5, 3)
_TOKENS = 16
_ROOM = 256

Answer = Callable[[], Iterator[str]]
"""Yields the answer in parts; the first is the first token."""


def serve(folder: Path, answer: Answer) -> None:
    """Answer question after question, for ever."""
    number = 1
    while True:
        while not (folder / f"ask-{number}").exists():
            time.sleep(_POLL)
        parts = answer()
        text = next(parts)
        write(folder / f"first-{number}", text)
        write(folder / f"answer-{number}", text + "".join(parts))
        number += 1


def write(path: Path, text: str) -> None:
    """All or nothing."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


class Llama:
    """A Llama in plain torch: one token per step, its cache at fixed places, the step a CUDA graph on a GPU.

    `kv_bytes` more are taken and filled with zeros, as engines reserve memory for the requests that may come."""

    def __init__(self, model: Path, device: str, kv_bytes: int) -> None:
        import torch

        self._torch = torch
        self._config = config = json.loads((model / "config.json").read_text())
        self._weights = _read_weights(model, device)
        self._kv_heads = config["num_key_value_heads"]
        self._dim = config["hidden_size"] // config["num_attention_heads"]
        shape = (config["num_hidden_layers"], 2, self._kv_heads, _ROOM, self._dim)
        self._cache = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self._reserved = torch.zeros(kv_bytes, dtype=torch.uint8, device=device)
        self._places = torch.arange(_ROOM, device=device)
        rates = 10000.0 ** (-torch.arange(0, self._dim, 2, device=device).float() / self._dim)
        angles = self._places.float()[:, None] * rates
        self._cos = torch.cat((angles.cos(), angles.cos()), -1).bfloat16()
        self._sin = torch.cat((angles.sin(), angles.sin()), -1).bfloat16()
        self._token = torch.zeros(1, dtype=torch.long, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._next = torch.zeros(1, dtype=torch.long, device=device)
        self._graph = self._captured() if device.startswith("cuda") else None

    def answer(self) -> Iterator[str]:
        """A greedy answer to a fixed prompt, as token ids."""
        place, token = 0, 0
        for token in _PROMPT:
            token_after = self._run(token, place)
            place += 1
        yield str(token_after)
        for _ in range(_TOKENS - 1):
            token_after = self._run(token_after, place)
            place += 1
            yield f" {token_after}"

    def _run(self, token: int, place: int) -> int:
        self._token.fill_(token)
        self._place.fill_(place)
        if self._graph is not None:
            self._graph.replay()
        else:
            with self._torch.inference_mode():
                self._step()
        return int(self._next.item())

    def _captured(self) -> Any:
        torch = self._torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            self._step()
        return graph

    def _step(self) -> None:
        weights = self._weights
        x = weights["model.embed_tokens.weight"].index_select(0, self._token)
        seen = (self._places <= self._place)[None, None, :]
        for layer in range(self._config["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            x = x + self._attend(self._norm(x, f"{at}.input_layernorm"), at, layer, seen)
            h = self._norm(x, f"{at}.post_attention_layernorm")
            gate = self._torch.nn.functional.silu(self._linear(h, f"{at}.mlp.gate_proj"))
            x = x + self._linear(gate * self._linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        logits = self._linear(self._norm(x, "model.norm"), "lm_head")
        self._next.copy_(logits.argmax(-1))

    def _attend(self, h: Any, at: str, layer: int, seen: Any) -> Any:
        torch, cache = self._torch, self._cache[layer]
        query = self._turned(self._linear(h, f"{at}.self_attn.q_proj").view(-1, self._dim))
        key = self._turned(self._linear(h, f"{at}.self_attn.k_proj").view(-1, self._dim))
        value = self._linear(h, f"{at}.self_attn.v_proj").view(-1, self._dim)
        cache[0].index_copy_(1, self._place, key[:, None, :])
        cache[1].index_copy_(1, self._place, value[:, None, :])
        query = query.view(self._kv_heads, -1, self._dim)
        scores = (query @ cache[0].transpose(1, 2)) / math.sqrt(self._dim)
        scores = scores.float().masked_fill(~seen, float("-inf"))
        mixed = torch.softmax(scores, -1).bfloat16() @ cache[1]
        return self._linear(mixed.reshape(1, -1), f"{at}.self_attn.o_proj")

    def _turned(self, x: Any) -> Any:
        half = self._dim // 2
        turned = self._torch.cat((-x[:, half:], x[:, :half]), -1)
        return x * self._cos.index_select(0, self._place) + turned * self._sin.index_select(0, self._place)

    def _norm(self, x: Any, name: str) -> Any:
        wide = x.float()
        wide = wide * self._torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return wide.bfloat16() * self._weights[f"{name}.weight"]

    def _linear(self, x: Any, name: str) -> Any:
        return x @ self._weights[f"{name}.weight"].t()


def _read_weights(model: Path, device: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= load_file(file, device=device)
    if device == "cpu":  # else they are mapped from the files
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    return weights


class Block:
    """So many bytes of random bfloat16; its answer is the sum of all of them, as 64-bit integers."""

    def __init__(self, device: str, size: int) -> None:
        import torch

        torch.manual_seed(20_26)
        parts = [torch.empty(step // 2, dtype=torch.bfloat16, device=device) for step in _steps(size)]
        self._parts = [part.normal_(0.0, 0.02) for part in parts]
        self._torch = torch

    def answer(self) -> Iterator[str]:
        """It is exact: integers have no rounding."""
        yield ",".join(str(int(part.view(self._torch.int64).sum().item())) for part in self._parts)


def _steps(size: int, step: int = 1 << 30) -> Iterator[int]:
    for at in range(0, size, step):
        yield min(step, size - at) // 8 * 8


class Vllm:
    """vLLM in this one process, with dummy weights."""

    def __init__(self, model: Path, memory: float) -> None:
        from vllm import LLM, SamplingParams

        self._engine = LLM(
            model=str(model), load_format="dummy", skip_tokenizer_init=True, gpu_memory_utilization=memory,
            max_model_len=4096,
        )  # fmt: skip
        self._sampling = SamplingParams

    def answer(self) -> Iterator[str]:
        """One token first, then the answer to the same prompt: so the time of the first is seen."""
        yield self._ask(1)
        yield " | " + self._ask(_TOKENS)

    def _ask(self, tokens: int) -> str:
        sampling = self._sampling(max_tokens=tokens, temperature=0.0, detokenize=False, ignore_eos=True)
        (done,) = self._engine.generate([{"prompt_token_ids": list(_PROMPT)}], sampling, use_tqdm=False)
        return " ".join(str(token) for token in done.outputs[0].token_ids)


def main() -> None:
    """Nobody sees its output, so its last words go to `error`."""
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    try:
        run(kind, options)
    except BaseException:
        write(Path(options["folder"]) / "error", traceback.format_exc())
        raise


def run(kind: str, options: dict[str, Any]) -> None:
    """Get ready and answer, for ever."""
    match kind:
        case "llama":
            answer = Llama(Path(options["model"]), options["device"], options["kv_bytes"]).answer
        case "block":
            answer = Block(options["device"], options["size"]).answer
        case "vllm":
            answer = Vllm(Path(options["model"]), options["memory"]).answer
        case _:
            sys.exit(f"there is no subject {kind}")
    serve(Path(options["folder"]), answer)


if __name__ == "__main__":
    main()
