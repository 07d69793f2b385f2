"""`dormouse.load_model` against `AutoModelForCausalLM.from_pretrained` of the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file as reference
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import dormouse
from dormouse.checkpoint.models import ImportedModel
from dormouse.errors import ConfigError, EngineError, NotFoundError
from tests.models import home_of

from .conftest import TINY, save_tokenizer, tiny_llama
from .test_import import do_import

PROMPT = torch.arange(1, 40).view(3, 13)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}


def from_pretrained(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **more)


def assert_same_model(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert not found.training
    assert found.dtype == expected.dtype
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(ours[name], value), name
    buffers = dict(found.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    for name, value in expected.named_buffers():
        assert buffers[name].dtype == value.dtype, name
        assert torch.equal(buffers[name], value), name
    assert [n for n, _p in found.named_parameters()] == [n for n, _p in expected.named_parameters()]
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    with torch.no_grad():
        assert torch.equal(found(PROMPT).logits, expected(PROMPT).logits)


def small_model(kind: str, **more: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **more)
    return AutoModelForCausalLM.from_config(config)


KINDS = {
    "llama": {**TINY, "tie_word_embeddings": False},
    "qwen3": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64},
    "gpt_neox": {**SMALL, "num_attention_heads": 4},
    "gemma": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "phi3": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    "mixtral": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_folder_is_the_model_that_transformers_makes_of_it(
    tmp_path: Path, kind: str, dtype: torch.dtype | None
) -> None:
    small_model(kind, **KINDS[kind]).save_pretrained(tmp_path)
    expected = from_pretrained(tmp_path) if dtype is None else from_pretrained(tmp_path, dtype=dtype)
    assert_same_model(dormouse.load_model(tmp_path, dtype=dtype), expected)


def test_tied_weights_are_one_and_in_the_file_once(hub_folder: Path) -> None:
    model = dormouse.load_model(str(hub_folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_model(model, from_pretrained(hub_folder))


@pytest.mark.parametrize("equal", [True, False])
def test_weights_that_should_be_tied_and_are_there_twice(hub_folder: Path, equal: bool) -> None:
    file = hub_folder / "model.safetensors"
    tensors = reference(file)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head if equal else head + 1}, file, {"format": "pt"})
    model = dormouse.load_model(hub_folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    assert_same_model(model, from_pretrained(hub_folder))


def test_tied_weights_under_the_other_name(hub_folder: Path) -> None:
    file = hub_folder / "model.safetensors"
    tensors = reference(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    assert_same_model(dormouse.load_model(hub_folder), from_pretrained(hub_folder))


def test_a_folder_in_shards(hub_folder: Path) -> None:
    expected = from_pretrained(hub_folder)
    (hub_folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(hub_folder, max_shard_size="10KB")
    files = sorted(hub_folder.glob("*-of-*.safetensors"))
    assert len(files) > 2
    told: list[tuple[int, int]] = []
    model = dormouse.load_model(hub_folder, progress=lambda done, total: told.append((done, total)))
    assert_same_model(model, expected)
    assert told == sorted(told)
    assert told[-1] == (sum(file.stat().st_size for file in files),) * 2
    files[0].unlink()
    with pytest.raises(ConfigError, match="which is not a file beside it"):
        dormouse.load_model(hub_folder)


def test_progress_comes_to_its_end_though_a_gpu_gets_no_headers(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_a_gpu(path: Path, _where: Any, _names: Any, progress: Any, _cancelled: Any) -> dict[str, torch.Tensor]:
        tensors = reference(path)
        plain = sum(value.nbytes for value in tensors.values())
        progress(plain, plain)
        return tensors

    monkeypatch.setattr("dormouse.checkpoint.load_model.tensors_of_file", to_a_gpu)
    told: list[tuple[int, int]] = []
    dormouse.load_model(hub_folder, progress=lambda done, total: told.append((done, total)))
    size = (hub_folder / "model.safetensors").stat().st_size
    assert told == sorted(told)
    assert told[-1] == (size, size)


def test_the_parameters_of_a_folder_are_its_files(hub_folder: Path) -> None:
    file = hub_folder / "model.safetensors"
    before = file.read_bytes()
    model = dormouse.load_model(hub_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    assert_same_model(dormouse.load_model(hub_folder), from_pretrained(hub_folder))


def test_names_of_older_versions_are_converted_and_that_is_told(
    hub_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = hub_folder / "model.safetensors"
    save_file({name.removeprefix("model."): value for name, value in reference(file).items()}, file, {"format": "pt"})
    assert_same_model(dormouse.load_model(hub_folder), from_pretrained(hub_folder))
    assert "transformers converts them on the CPU" in caplog.text


def test_experts_in_files_of_their_own_are_converted(tmp_path: Path) -> None:
    """As model hubs have them; `save_pretrained` writes them so."""
    small_model("mixtral", **KINDS["mixtral"]).save_pretrained(tmp_path)
    assert any("experts.0." in name for name in reference(tmp_path / "model.safetensors"))
    assert_same_model(dormouse.load_model(tmp_path), from_pretrained(tmp_path))


def test_tensors_that_the_model_does_not_have_are_left_out(hub_folder: Path) -> None:
    file = hub_folder / "model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "vision.weight": torch.ones(2)}
    save_file(reference(file) | extra, file, {"format": "pt"})
    assert_same_model(dormouse.load_model(hub_folder), from_pretrained(hub_folder))


def test_parts_that_must_stay_float32_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"input_layernorm"})
    tiny_llama().save_pretrained(tmp_path)
    found = dormouse.load_model(tmp_path, dtype=torch.bfloat16)
    expected = from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: value.dtype for name, value in expected.state_dict().items()}
    assert {name: value.dtype for name, value in found.state_dict().items()} == kinds
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False])
def test_an_imported_model_is_its_source_in_bfloat16(tmp_path: Path, tied: bool) -> None:
    source = tmp_path / "hub"
    small_model("llama", **(TINY | {"tie_word_embeddings": tied})).save_pretrained(source)
    save_tokenizer(source)
    do_import(source, "tiny", tmp_path / "models")
    expected = from_pretrained(source, dtype=torch.bfloat16)
    assert_same_model(dormouse.load_model("tiny", data_dir=tmp_path), expected)
    assert_same_model(dormouse.load_model("tiny", data_dir=tmp_path, dtype=torch.float32), expected.float())


def test_a_folder_is_not_mistaken_for_a_name(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_same_model(dormouse.load_model("hub", data_dir=tmp_path / "home"), from_pretrained(hub_folder))
    with pytest.raises(NotFoundError, match="no model named 'hob'"):
        dormouse.load_model("hob", data_dir=tmp_path / "home")


def test_weights_of_another_model_are_refused(hub_folder: Path, tmp_path: Path) -> None:
    do_import(hub_folder, "tiny", tmp_path / "models")
    for place in (hub_folder, tmp_path / "models" / "tiny"):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(EngineError, match=r"are not those of LlamaForCausalLM: model\.layers\.2"):
        dormouse.load_model("tiny", data_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"are not those of LlamaForCausalLM: model\.layers\.2"):
        dormouse.load_model(hub_folder)


def test_what_can_not_be_loaded_is_told(hub_folder: Path, null_folder: Path, tmp_path: Path) -> None:
    do_import(null_folder, "null", tmp_path / "models")
    with pytest.raises(ConfigError, match="a model of the null engine"):
        dormouse.load_model("null", data_dir=tmp_path)
    record = tmp_path / "models" / "null" / "dormouse.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base": "other"}))
    with pytest.raises(ConfigError, match="null is an adapter of other"):
        dormouse.load_model("null", data_dir=tmp_path)
    config = json.loads((hub_folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (hub_folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ConfigError, match="quantised with gptq"):
        dormouse.load_model(hub_folder)
    (hub_folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        dormouse.load_model(hub_folder)


@pytest.mark.model
def test_the_real_model(smollm2: ImportedModel, tmp_path: Path) -> None:
    found = dormouse.load_model(smollm2.name, data_dir=home_of(smollm2).root)
    found.save_pretrained(tmp_path)
    assert_same_model(found, from_pretrained(tmp_path))
    assert_same_model(dormouse.load_model(tmp_path), found)


@pytest.mark.gpu
def test_on_a_gpu(hub_folder: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    do_import(hub_folder, "tiny", tmp_path / "models")
    expected = from_pretrained(hub_folder, dtype=torch.bfloat16).to("cuda")
    for source in (hub_folder, "tiny"):
        found = dormouse.load_model(source, device="cuda", dtype=torch.bfloat16, data_dir=tmp_path)
        assert {value.device.type for value in [*found.parameters(), *found.buffers()]} == {"cuda"}
        assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
