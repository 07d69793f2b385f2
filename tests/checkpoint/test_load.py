"""`dormouse.load`: imported checkpoints, whole, in parts and cut over devices, sound and damaged."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as reference
from safetensors.torch import save_file

import dormouse
from dormouse import Shard, cli
from dormouse.checkpoint import load as module
from dormouse.checkpoint.load import Loaded, load_measured
from dormouse.checkpoint.models import ImportedModel
from dormouse.checkpoint.tensors import NewTensor
from dormouse.checkpoint.torch_tensors import DTYPES, NAMES
from dormouse.checkpoint.writer import write_tensors
from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, DamagedError, HostError, NotFoundError, StoreError
from dormouse.store.index import Index
from dormouse.store.store import Store
from dormouse.transfer import load_device, pinned
from dormouse.transfer.plan import LoadPlan
from dormouse.transfer.report import LoadReport
from tests.models import home_of
from tests.transfer.fake_gpu import FakeGpu, FakePinner

from .test_import import do_import
from .test_load_file import assert_same, bits


def make_checkpoint(home: DataDir, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """A model of nothing but weights, as an import leaves it, with chunks so small that most tensors lie in several."""
    new = [
        NewTensor(key, NAMES[value.dtype], tuple(value.shape), lambda value=value: iter([bits(value)]))
        for key, value in tensors.items()
    ]
    home.create()
    with pytest.MonkeyPatch.context() as patch, Store.open(home.store) as store, store.begin() as transaction:
        patch.setattr("dormouse.checkpoint.tensors.CHUNK_SIZE", 300 << 10)
        written = write_tensors(transaction, new, lambda _done, _total: None)
        transaction.commit(written.manifest(name, 0.0))
    (home.models / name).mkdir()
    (home.models / name / "weights.json").write_text("{}")
    fields = {"format": 1, "source": "", "engine": "none", "dtype": "none", "parameters": 0, "weight_bytes": 0}
    fields |= {"digest": "", "context": 0, "checkpoint": written.id}
    (home.models / name / "dormouse.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    layers = {f"layer.{n}.{part}": torch.randn(600, 1000).mul(0.02) for n in range(8) for part in ("row", "column")}
    return {
        "embed": torch.randn(1000, 64).bfloat16(),
        **{name: tensor.bfloat16() for name, tensor in layers.items()},
        "scale": torch.tensor(0.5, dtype=torch.float32),
        "zeros": torch.zeros(3 << 20, dtype=torch.bfloat16),
        "none": torch.zeros(0, 7, dtype=torch.int32),
        "packed": torch.randint(-100, 100, (77, 33), dtype=torch.int8),
        "mask": torch.rand(5, 5) > 0.5,
        "fp8": torch.randn(1000, 999).to(torch.float8_e4m3fn),
        "complex": torch.randn(9, dtype=torch.complex64),
        "double": torch.randn(400, 300, dtype=torch.float64),
        "half": torch.randn(1111, dtype=torch.float16),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor]) -> DataDir:
    folder = DataDir(tmp_path_factory.mktemp("home"))
    make_checkpoint(folder, "model", weights)
    return folder


def measured(home: DataDir, tensors: list[str] | None = None) -> Loaded:
    rest = dict.fromkeys(("dtype", "shard", "tier", "progress", "cancelled"))
    return load_measured("model", [torch.device("cpu")], tensors=tensors, data_dir=home, **rest)


def test_all_tensors_are_what_was_stored(home: DataDir, weights: dict[str, torch.Tensor]) -> None:
    found = dormouse.load("model", data_dir=home.root)
    assert list(found) == list(weights)
    assert_same(found, weights)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values() if tensor.numel()}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    found["scale"].fill_(2)  # memory of its own
    assert dormouse.load("model", data_dir=home.root)["scale"] == 0.5


def test_the_data_folder_is_that_of_the_environment(home: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORMOUSE_HOME", str(home.root))
    assert dormouse.load("model", tensors=["scale"]) == {"scale": torch.tensor(0.5)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(data=st.data())
def test_some_tensors_are_the_same_tensors(
    home: DataDir, weights: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(list(weights)), unique=True))
    found = dormouse.load("model", data_dir=home.root, tensors=names)
    assert_same(found, {name: tensor for name, tensor in weights.items() if name in names})


def test_fewer_tensors_are_fewer_bytes_read(home: DataDir) -> None:
    whole = measured(home).report
    part = measured(home, ["layer.3.*"])
    assert list(part.tensors[0]) == ["layer.3.row", "layer.3.column"]
    assert 0 < part.report.stored_bytes < whole.stored_bytes / 4
    assert measured(home, ["zeros", "none"]).report.stored_bytes < whole.stored_bytes / 2


def test_floats_are_cast_and_nothing_else(home: DataDir, weights: dict[str, torch.Tensor]) -> None:
    wide = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    expected = {name: value.float() if value.dtype in wide else value for name, value in weights.items()}
    assert_same(dormouse.load("model", data_dir=home.root, dtype=torch.float32), expected)
    with pytest.raises(ConfigError, match=r"nothing can be cast to torch\.int8"):
        dormouse.load("model", data_dir=home.root, dtype=torch.int8)


def test_what_a_cast_leaves_as_it_is_does_not_keep_the_rest_in_memory(home: DataDir) -> None:
    found = dormouse.load("model", data_dir=home.root, tensors=["layer.*", "zeros", "mask"], dtype=torch.float32)
    assert found["mask"].untyped_storage().nbytes() == 25


def test_a_cast_that_finds_no_memory_leaves_nothing(home: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[weakref.ref[torch.Tensor]] = []

    def to(tensor: torch.Tensor, _dtype: torch.dtype) -> torch.Tensor:
        blocks.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(HostError, match=r"no memory for them as torch\.float32"):
        dormouse.load("model", data_dir=home.root, dtype=torch.float32)
    assert [block() for block in blocks] == [None]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_what_torch_would_cut(home: DataDir, weights: dict[str, torch.Tensor], count: int) -> None:
    dimensions = {"*.row": 1, "*.column": 0, "fp8": -1, "embed": 0}
    parts = dormouse.load("model", data_dir=home.root, device=["cpu"] * count, shard=Shard(dimensions))
    assert len(parts) == count
    cut = {"fp8": 1, "embed": 0} | {f"layer.{n}.{part}": part == "row" for n in range(8) for part in ("row", "column")}
    for device, found in enumerate(parts):
        expected = {
            name: torch.chunk(tensor, count, int(cut[name]))[device].contiguous() if name in cut else tensor
            for name, tensor in weights.items()
        }
        assert_same(found, expected)


def test_several_devices_without_a_shard_get_all_of_it(home: DataDir, weights: dict[str, torch.Tensor]) -> None:
    one, other = dormouse.load("model", data_dir=home.root, device=("cpu", "cpu"), tensors=["embed", "fp8"])
    assert_same(one, {name: weights[name] for name in ("embed", "fp8")})
    assert_same(one, other)
    assert one["fp8"].data_ptr() != other["fp8"].data_ptr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensors": ["nothing*"]}, r"no tensor of the checkpoint of model is called 'nothing\*'"),
        ({"shard": Shard({"embed": 0})}, "nothing to cut"),
        ({"device": [], "shard": None}, "there is no device to load to"),
        ({"device": "meta"}, "nothing can be loaded to 'meta'"),
        ({"device": ["cpu"], "shard": Shard({"embed": 3})}, "can't be cut along dimension 3"),
        ({"tier": object()}, "a tier serves loads to GPUs"),
    ],
)
def test_what_can_not_be_meant_is_refused(home: DataDir, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        dormouse.load("model", data_dir=home.root, **arguments)  # type: ignore[call-overload]
    assert caught.value.remedy


def test_names_that_are_not_there_are_told(home: DataDir) -> None:
    with pytest.raises(NotFoundError, match="Did you mean model"):
        dormouse.load("modle", data_dir=home.root)


def test_a_model_without_weights(null_folder: Path, tmp_path: Path) -> None:
    do_import(null_folder, "null", tmp_path / "models")
    with pytest.raises(ConfigError, match="model null has no weights"):
        dormouse.load("null", data_dir=tmp_path)


def test_a_program_that_loads_keeps_its_own_settings_of_the_heap(home: DataDir) -> None:
    program = (
        "import sys, dormouse; from dormouse.transfer.memory import keep_freed_memory as ours\n"
        "dormouse.load('model', data_dir=sys.argv[1]); print(ours.cache_info().currsize)"
    )
    command = [sys.executable, "-c", program, str(home.root)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout == "0\n"


def test_progress_and_cancel(home: DataDir) -> None:
    told: list[tuple[int, int]] = []
    dormouse.load("model", data_dir=home.root, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    cancelled = threading.Event()
    threads = threading.active_count()
    with pytest.raises(StoreError, match="given up"):
        dormouse.load("model", data_dir=home.root, progress=lambda _done, _total: cancelled.set(), cancelled=cancelled)
    assert threading.active_count() == threads


def test_more_than_the_free_memory_is_refused(home: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dormouse.host_memory.available", lambda: 1 << 20)
    with pytest.raises(HostError, match="don't fit into the 1048576 that are free"):
        dormouse.load("model", data_dir=home.root)


def test_damage_is_named_and_leaves_nothing(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    home = DataDir(tmp_path / "home")
    make_checkpoint(home, "model", weights)
    (pack,) = (home.store / "packs").glob("*.pack")
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 4
    pack.write_bytes(data)
    gc.collect()  # mappings of other tests' tensors
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DamagedError, match=r"the weights of model can't be read: chunk .* is damaged") as caught:
        dormouse.load("model", data_dir=home.root)
    assert "dormouse import SOURCE --name model --replace" in caught.value.remedy
    del caught
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert_same(dormouse.load("model", data_dir=home.root, tensors=["embed"]), {"embed": weights["embed"]})
    pack.write_bytes(data[:-9000])
    with pytest.raises(StoreError):
        dormouse.load("model", data_dir=home.root)


@pytest.mark.parametrize("field", ["size", "chunk_size"])
def test_a_table_that_does_not_fit_its_chunks_is_refused(
    home: DataDir, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is signed, so only a bug could write it; a load must not believe it all the same."""
    import msgspec

    def other(data: bytes, what: str) -> object:
        body = decode(data, what)
        return msgspec.structs.replace(body, **{field: getattr(body, field) // 2})

    decode = module.decode_body
    monkeypatch.setattr(module, "decode_body", other)
    with pytest.raises(DamagedError, match="the checkpoint of model is damaged"):
        dormouse.load("model", data_dir=home.root)


def test_an_import_gives_back_its_tensors(hub_folder: Path, tmp_path: Path) -> None:
    do_import(hub_folder, "tiny", tmp_path / "models")
    source = reference(hub_folder / "model.safetensors")
    assert_same(dormouse.load("tiny", data_dir=tmp_path), {name: value.bfloat16() for name, value in source.items()})


@pytest.mark.model
def test_the_real_model(smollm2: ImportedModel) -> None:
    from .test_import import weights_of

    found = dormouse.load(smollm2.name, data_dir=home_of(smollm2).root)
    assert len(found) == 272
    assert_same(found, weights_of(smollm2))


def test_importing_the_package_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, dormouse; print(sorted({'torch', 'numpy', 'dormouse.checkpoint.load'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    assert {"load", "load_file", "load_model", "Shard"} <= set(dir(dormouse))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dormouse.nonsense  # noqa: B018


def test_the_verb_tells_figures(home: DataDir) -> None:
    arguments = ["load", "model", "--data-dir", str(home.root)]
    result = json.loads(CliRunner().invoke(cli.cli, [*arguments, "--json", "--tensors", "layer.*"]).output)
    assert (result["name"], result["tensors"]) == ("model", 16)
    assert 0 <= result["plain_bytes"] - 16 * 600 * 1000 * 2 < 16 * 256
    assert 0 < result["direct_bytes"] + result["cached_bytes"] <= result["stored_bytes"]
    assert "Loaded model: 26 tensors" in CliRunner().invoke(cli.cli, arguments).output


def test_an_index_that_proves_to_be_damaged_is_built_anew(
    home: DataDir, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was opened to be read, which does not look at all of it."""
    original = Index.locate
    failures = [DamagedError("the index failed: database disk image is malformed")]

    def locate(index: Index, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(index, *arguments)

    monkeypatch.setattr(Index, "locate", locate)
    assert_same(dormouse.load("model", data_dir=home.root), weights)
    assert not failures


@pytest.fixture
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LoadPlan]]:
    """GPUs made of CPU tensors, which do all as late as they may. The plans they were given."""
    plans: list[LoadPlan] = []
    pinner = FakePinner()

    def on_fakes(plan: LoadPlan, blocks: list[torch.Tensor], **options: Any) -> LoadReport:
        plans.append(plan)
        gpus = [FakeGpu(late=True) for _block in blocks]
        return load_device.carry_out(plan, blocks, gpus, pinner, kernels=True, **options)

    pinned.free_pinned()
    monkeypatch.setattr(load_device, "load_device", on_fakes)
    monkeypatch.setattr(module, "find_device", torch.device)
    monkeypatch.setattr(module, "_gpu_block", lambda size, _device: torch.full((size,), 0xAB, dtype=torch.uint8))
    yield plans
    pinned.free_pinned()


def test_loads_to_gpus_bring_the_same_tensors(
    home: DataDir, weights: dict[str, torch.Tensor], fake_gpus: list[LoadPlan]
) -> None:
    assert_same(dormouse.load("model", data_dir=home.root, device="cuda:0"), weights)
    assert_same(dormouse.load("model", data_dir=home.root, device="cuda:0", tensors=["f*"]), {"fp8": weights["fp8"]})
    devices = ["cuda:0", "cuda:1", "cuda:2"]
    parts = dormouse.load("model", data_dir=home.root, device=devices, shard=Shard({"*.row": 1, "fp8": 0}))
    for device, found in enumerate(parts):
        cut = {name: 1 for name in weights if name.endswith("row")} | {"fp8": 0}
        expected = {
            name: torch.chunk(value, 3, cut[name])[device].contiguous() if name in cut else value
            for name, value in weights.items()
        }
        assert_same(found, expected)
    assert len(fake_gpus) == 3


def test_what_a_tier_holds_is_not_read_again(
    home: DataDir, weights: dict[str, torch.Tensor], fake_gpus: list[LoadPlan]
) -> None:
    with dormouse.DramTier(256 << 20, pin=False, slab_bytes=64 << 20) as tier:
        first = dormouse.hold("model", tier, data_dir=home.root)
        assert 0 < first.read_bytes <= tier.held_bytes <= 256 << 20
        assert dormouse.hold("model", tier, data_dir=home.root).read_bytes == 0
        assert_same(dormouse.load("model", data_dir=home.root, device="cuda:0", tier=tier), weights)
        with pytest.raises(NotFoundError):
            dormouse.hold("nobody", tier, data_dir=home.root)
    with dormouse.DramTier(1 << 20, pin=False, slab_bytes=1 << 20) as small:
        with pytest.raises(StoreError, match="DRAM tier"):
            dormouse.hold("model", small, data_dir=home.root)


def test_a_safetensors_file_on_a_gpu(
    tmp_path: Path, weights: dict[str, torch.Tensor], fake_gpus: list[LoadPlan]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(weights, path)
    found = dormouse.load_file(path, device="cuda:0")
    assert_same(found, reference(path))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values() if tensor.numel())
    assert fake_gpus[0].plain_bytes <= path.stat().st_size
    save_file({"none": torch.zeros(0, 3)}, path)
    assert_same(dormouse.load_file(path, device="cuda:0"), reference(path))


def test_a_model_on_a_gpu_has_its_parameters_there(
    hub_folder: Path, fake_gpus: list[LoadPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as that can be seen without one: all tensors went the GPU's way."""
    from dormouse.checkpoint import load_model

    monkeypatch.setattr(load_model, "find_device", torch.device)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, _device: model)
    model = dormouse.load_model(hub_folder, device="cuda:0")
    source = reference(hub_folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.items())
    assert len(fake_gpus) == 1


def test_a_full_gpu_is_told_and_nothing_is_kept(home: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_size: int, _device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(module, "find_device", torch.device)
    monkeypatch.setattr(module, "_gpu_block", full)
    with pytest.raises(HostError, match="don't fit into the GPU: CUDA out of memory"):
        dormouse.load("model", data_dir=home.root, device="cuda:0")


@pytest.mark.gpu
def test_on_a_gpu(home: DataDir, weights: dict[str, torch.Tensor]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = dormouse.load("model", data_dir=home.root, device="cuda")
    assert {tensor.device.type for tensor in found.values()} == {"cuda"}
    assert_same(found, weights)
    assert_same(dormouse.load("model", data_dir=home.root, device=0, tensors=["fp8"]), {"fp8": weights["fp8"]})
    parts = dormouse.load("model", data_dir=home.root, device=["cuda:0"] * 2, shard=Shard({"*.row": 1, "fp8": 0}))
    assert torch.equal(torch.cat([part["layer.2.row"] for part in parts], 1).cpu(), weights["layer.2.row"])
    assert bits(parts[0]["fp8"]) + bits(parts[1]["fp8"]) == bits(weights["fp8"])


def test_every_type_has_one_name() -> None:
    assert len(NAMES) == len(DTYPES)
