"""Import of PEFT adapters: what arrives, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dormouse import catalogue, cli
from dormouse.checkpoint.adapters import ImportedAdapter, open_adapter
from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel, open_model
from dormouse.checkpoint.peft_source import read_adapter
from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, DamagedError, DormouseError, NotFoundError
from dormouse.store.store import Store
from tests.adapters import factors, save_peft
from tests.checkpoint.conftest import TINY, save_tokenizer, tiny_llama
from tests.models import quiet

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SHAPES = {Q: (32, 32), V: (16, 32)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataDir:
    """A data folder with the model `tiny`."""
    hub = tmp_path_factory.mktemp("hub") / "hub"
    tiny_llama().save_pretrained(hub)
    save_tokenizer(hub)
    folder = DataDir(tmp_path_factory.mktemp("data")).create()
    import_model(str(hub), "tiny", folder, progress=quiet)
    return folder


def take(data: DataDir, source: Path, name: str = "mine", **options: Any) -> ImportedModel:
    return import_model(str(source), name, data, progress=quiet, replace=True, **options)


def stored(data: DataDir, adapter: ImportedAdapter) -> dict[str, torch.Tensor]:
    """The tensors as the store has them."""
    with Store.open(data.store) as store, store.reader() as reader:
        refs = store.manifest(adapter.checkpoint).refs
        whole = bytearray(b"".join(reader.plain(chunk) for chunk in reader.locate(refs)))
    bytes_of = torch.frombuffer(whole, dtype=torch.uint8)
    return {
        tensor.name: bytes_of[tensor.offset : tensor.offset + tensor.length].view(torch.bfloat16).view(tensor.shape)
        for tensor in adapter.body.tensors
    }


def test_an_adapter_arrives_with_its_tensors_scaling_and_base(data: DataDir, tmp_path: Path) -> None:
    pairs = factors(SHAPES)
    model = take(data, save_peft(tmp_path / "a", pairs))
    assert (model.base, model.engine, model.parameters) == ("tiny", "transformers", 8 * (64 + 48))
    adapter = open_adapter(data.models, "mine")
    assert (adapter.base, adapter.scalings) == ("tiny", {Q: 2.0, V: 2.0})
    found = stored(data, adapter)
    for name, (a, b) in pairs.items():
        assert torch.equal(found[f"{name}.lora_A"], a.bfloat16())
        assert torch.equal(found[f"{name}.lora_B"], b.bfloat16())


def test_scalings_are_those_of_peft(data: DataDir, tmp_path: Path) -> None:
    plain, odd = factors({Q: SHAPES[Q]}), factors({V: SHAPES[V]}, rank=4)
    take(data, save_peft(tmp_path / "a", plain | odd, rank_pattern={"layers.1.self_attn.v_proj": 4}))
    assert open_adapter(data.models, "mine").scalings == {Q: 2.0, V: 4.0}
    patterns = {"rank_pattern": {f"^{V}": 4}, "alpha_pattern": {"v_proj": 6, "proj": 99}, "use_rslora": True}
    take(data, save_peft(tmp_path / "b", plain | odd, **patterns))
    assert open_adapter(data.models, "mine").scalings == {Q: 16 / math.sqrt(8), V: 3.0}


def test_the_base_is_found_by_its_source_or_name_or_is_given(data: DataDir, tmp_path: Path) -> None:
    source = open_model(data.models, "tiny").source
    for number, hint in enumerate(("tiny", "someone/Tiny", "someone/tiny/", source)):
        folder = save_peft(tmp_path / str(number), factors(SHAPES), base_model_name_or_path=hint)
        assert take(data, folder).base == "tiny"
    for number, hint in enumerate(("someone/Large", "", None, "adapter-of-tiny")):
        folder = save_peft(tmp_path / f"no{number}", factors(SHAPES), base_model_name_or_path=hint)
        with pytest.raises(NotFoundError, match="base model of") as caught:
            take(data, folder)
        assert "--base; imported are: tiny" in caught.value.remedy
        assert take(data, folder, base="tiny").base == "tiny"
    with pytest.raises(NotFoundError, match="no model named 'large'"):
        take(data, folder, base="large")
    with pytest.raises(ConfigError, match="mine is an adapter itself"):
        take(data, folder, base="mine", name="other")
    with pytest.raises(ConfigError, match="is no adapter"):
        take(data, Path(source), name="other", base="tiny")


def test_an_adapter_does_not_take_the_place_of_its_own_base(data: DataDir, tmp_path: Path) -> None:
    folder = save_peft(tmp_path / "a", factors(SHAPES))
    with pytest.raises(ConfigError, match="is an adapter of tiny, whose place it can't take"):
        take(data, folder, name="tiny")
    base = open_model(data.models, "tiny")
    assert base.base is None and base.checkpoint is not None
    with Store.open(data.store) as store:
        assert store.manifest(base.checkpoint).refs


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "of the PEFT type 'IA3'"),
        ({"peft_type": ""}, "of the PEFT type 'unknown'"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"arrow_config": {"top_k": 3}}, "a choice among adapters"),
        ({"rank_pattern": {"(a+)+$": 8}}, "regular expression"),
        ({"alpha_pattern": {".*": 8}}, "regular expression"),
        ({"r": 0}, "impossible r or lora_alpha"),
        ({"r": "8"}, "adapter_config.json is not valid"),
        ({"lora_alpha": None}, "adapter_config.json is not valid"),
        ({"r": 4}, "has rank 8 for model.layers.0.self_attn.q_proj, adapter_config.json says 4"),
        ({"target_modules": ["v_proj"]}, "not among the target_modules"),
    ],
)
def test_what_is_more_than_two_factors_is_refused_by_name(
    data: DataDir, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    before = sorted(path.name for path in data.models.iterdir())
    with pytest.raises(ConfigError) as caught:
        take(data, save_peft(tmp_path / "a", factors(SHAPES), **config), name="refused")
    assert said in caught.value.message and caught.value.remedy
    assert sorted(path.name for path in data.models.iterdir()) == before


def test_a_string_of_targets_is_not_run(data: DataDir, tmp_path: Path) -> None:
    take(data, save_peft(tmp_path / "a", factors(SHAPES), target_modules="(x+x+)+y"))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_A.weight": (8, 32)}, "only one of the two factors"),
        ({"lora_A.weight": (8, 32), "lora_B.weight": (33, 8)}, "B (33, 8) where the base's weight of shape (32, 32)"),
        ({"lora_A.weight": (8, 31), "lora_B.weight": (32, 8)}, "A (8, 31)"),
        ({"lora_A.weight": (8, 32), "lora_B.weight": (32, 7)}, "B (32, 7)"),
        ({"lora_A.weight": (8, 32, 1), "lora_B.weight": (32, 8)}, "of shape (8, 32, 1)"),
        ({"lora_magnitude_vector.weight": (32,)}, "lora_magnitude_vector.weight is no factor"),
        ({"lora_A.weight": (8, 32), "lora_B.weight": (32, 8), "lora_B.bias": (32,)}, "lora_B.bias is no factor"),
        ({"lora_embedding_A": (8, 32)}, "lora_embedding_A is no factor"),
        ({}, "has no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_module_and_shape(
    data: DataDir, tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    folder = save_peft(tmp_path / "a", factors({Q: SHAPES[Q]}))
    save_file(
        {f"base_model.model.{Q}.{name}": torch.zeros(shape) for name, shape in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(ConfigError) as caught:
        take(data, folder, name="refused")
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("model.layers.7.self_attn.q_proj", "which tiny does not have as a linear layer"),
        ("model.layers.0.input_layernorm", "does not have as a linear layer"),
        ("model.layers.0.mlp.experts.3.up_proj", "does not see every token"),
        ("lm_head", "does not see every token"),
    ],
)
def test_modules_that_the_base_lacks_are_refused(data: DataDir, tmp_path: Path, module: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        take(data, save_peft(tmp_path / "a", factors({module: (32, 32)})), name="refused")


def test_pickled_and_missing_weights_are_refused(data: DataDir, tmp_path: Path) -> None:
    folder = save_peft(tmp_path / "a", factors(SHAPES))
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ConfigError, match="truncated"):
        take(data, folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="pickled"):
        take(data, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
        take(data, folder)


@settings(max_examples=60, deadline=None)
@given(
    config=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["peft_type", "r", "lora_alpha", "rank_pattern", "target_modules", "bias"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_configuration_is_read_or_refused_in_one_sentence(
    data: DataDir, tmp_path_factory: pytest.TempPathFactory, config: bytes
) -> None:
    folder = save_peft(tmp_path_factory.mktemp("fuzz"), factors({Q: SHAPES[Q]}))
    (folder / "adapter_config.json").write_bytes(config)
    staging = data.models / ".staging"
    staging.mkdir(exist_ok=True)
    try:
        read_adapter(folder, "x", staging, "tiny")
    except DormouseError as error:
        assert error.message and error.remedy
    finally:
        for path in staging.iterdir():
            path.unlink()
        staging.rmdir()


def test_damage_in_the_models_folder_is_named(data: DataDir, tmp_path: Path) -> None:
    take(data, save_peft(tmp_path / "a", factors(SHAPES)), name="hurt")
    path = data.models / "hurt" / "adapter.json"
    for text, said in (
        ("{", "can't be read"),
        ('{"version":2,"modules":{}}', "newer than 1"),
        (json.dumps({"version": 1, "modules": {Q: 1.0}}), "does not belong to"),
    ):
        path.write_text(text)
        with pytest.raises(DamagedError, match=said):
            open_adapter(data.models, "hurt")
    with pytest.raises(ConfigError, match="tiny is a model, not an adapter"):
        open_adapter(data.models, "tiny")


@pytest.fixture
def own(tmp_path: Path) -> DataDir:
    """A data folder with a model `base` that a test may replace, and an adapter of it."""
    folder = DataDir(tmp_path / "own").create()
    import_base(folder, tmp_path)
    take(folder, save_peft(tmp_path / "adapter", factors(SHAPES)), base="base")
    return folder


def import_base(data: DataDir, place: Path, seed: int = 0, **sizes: int) -> None:
    torch.manual_seed(seed)
    hub = place / f"hub {seed} {len(sizes)}"
    LlamaForCausalLM(LlamaConfig(**{**TINY, **sizes})).save_pretrained(hub)
    save_tokenizer(hub)
    import_model(str(hub), "base", data, progress=quiet, replace=True)


def test_that_the_base_was_replaced_is_told(own: DataDir, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import_base(own, tmp_path)
    open_adapter(own.models, "mine")
    assert "replaced" not in caplog.text  # the same model once more
    import_base(own, tmp_path, seed=1)
    open_adapter(own.models, "mine")
    assert "base was replaced since adapter mine was imported: it fits" in caplog.text
    import_base(own, tmp_path, hidden_size=64, intermediate_size=96)
    with pytest.raises(
        ConfigError, match=r"base was replaced since adapter mine was imported: .*does not fit"
    ) as caught:
        open_adapter(own.models, "mine")
    assert caught.value.remedy == "Import an adapter that was trained on it"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_removing_a_base_names_the_adapters_that_are_left(own: DataDir, tmp_path: Path, options: list[str]) -> None:
    take(own, tmp_path / "adapter", "another", base="base")
    arguments = ["rm", "--model", "base", "another", "--data-dir", str(own.root), *options]
    done = CliRunner().invoke(cli.cli, arguments)
    assert done.exit_code == 0
    if options:
        assert json.loads(done.stdout)["adapters_without_base"] == ["mine"]
    else:
        assert "warning: left without their base: mine\n" in done.stderr
    assert open_model(own.models, "mine").base == "base"


def test_it_is_listed_and_removed_like_a_model(data: DataDir, tmp_path: Path) -> None:
    folder = save_peft(tmp_path / "a", factors(SHAPES))
    run = CliRunner().invoke
    options = ["--data-dir", str(data.root), "--json"]
    done = run(cli.cli, ["import", str(folder), "--name", "gone", "--base", "tiny", *options])
    assert json.loads(done.stdout)["base"] == "tiny", done.output
    row = next(row for row in catalogue.listing(data)["models"] if row["name"] == "gone")
    assert (row["base"], row["state"], row["rss_bytes"]) == ("tiny", catalogue.NOT_SERVED, 0)
    checkpoint = open_adapter(data.models, "gone").checkpoint
    assert run(cli.cli, ["rm", "--model", "gone", *options]).exit_code == 0
    with Store.open(data.store) as store, pytest.raises(NotFoundError):
        store.manifest(checkpoint)
    assert open_model(data.models, "tiny").base is None
