"""Checkpoints: the tensor table, the chunks, and that no crash, replacement or removal leaves a wrong or stray one."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.checkpoint import tensors
from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel, open_model, remove_model
from dormouse.checkpoint.pool import SegmentPool
from dormouse.checkpoint.tensors import ALIGNMENT, NewTensor, decode_body, encode_body, lay_out
from dormouse.checkpoint.writer import chunk_codecs, copy_checkpoint, sweep, write_tensors
from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, DamagedError, NotFoundError
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Store
from dormouse.transfer.handles import await_report
from tests.models import quiet


def constant(name: str, dtype: str, data: bytes) -> NewTensor:
    shape = (len(data) // tensors.ITEM_SIZES[dtype],)
    return NewTensor(name, dtype, shape, lambda: iter([data[: len(data) // 2], data[len(data) // 2 :]]))


def null_source(folder: Path, **settings: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "dormouse-null", "null": settings}))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data").create()


@pytest.fixture
def weighty(tmp_path: Path, data: DataDir) -> ImportedModel:
    """A model with 9 MiB of weights: more than two chunks, some of them zeros."""
    return import_model(str(null_source(tmp_path / "source", weights_mb=9)), "heavy", data, progress=quiet)


some_tensors = st.lists(
    st.tuples(st.sampled_from(sorted(tensors.ITEM_SIZES)), st.integers(0, 700)), min_size=1, max_size=12
)


@given(kinds=some_tensors)
def test_tables_survive_and_tensors_are_aligned(kinds: list[tuple[str, int]]) -> None:
    made = [
        constant(f"t{i}", dtype, bytes(count * tensors.ITEM_SIZES[dtype])) for i, (dtype, count) in enumerate(kinds)
    ]
    body = lay_out(made)
    assert all(tensor.offset % ALIGNMENT == 0 for tensor in body.tensors)
    if body.size:
        assert decode_body(encode_body(body), "it") == body
        assert tensors.decode_table(tensors.encode_table(body), "it") == body


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_no_table(data: bytes) -> None:
    for decode in (decode_body, tensors.decode_table):
        with pytest.raises(DamagedError):
            decode(data, "it")


SOUND = lay_out([constant("a", "BF16", bytes(600)), constant("b", "U8", bytes(10))])


@given(
    field=st.sampled_from(["offset", "length", "shape", "dtype", "name"]),
    which=st.integers(0, 1),
    value=st.integers(-(1 << 70), 1 << 70)
    | st.lists(st.integers(-9, 1 << 62), max_size=70)
    | st.sampled_from(["F99", "U8", "BF16", "a", "b"]),
    size=st.sampled_from([SOUND.size, 0, -1, 1, 1 << 60]),
    chunk_size=st.sampled_from([SOUND.chunk_size, 0, -1, 1 << 30]),
)
def test_a_table_with_other_values_is_refused_or_lies_within_its_segment(
    field: str, which: int, value: object, size: int, chunk_size: int
) -> None:
    plain = msgspec.to_builtins(SOUND) | {"size": size, "chunk_size": chunk_size}
    plain["tensors"][which][field] = value
    try:
        encoded = msgspec.msgpack.encode(plain)
    except OverflowError:
        return
    try:
        body = decode_body(encoded, "the checkpoint of m")
    except DamagedError as error:
        assert error.message.startswith("the checkpoint of m") and error.remedy
        return
    assert all(0 <= tensor.offset <= tensor.offset + tensor.length <= body.size for tensor in body.tensors)


def test_a_newer_table_is_refused_as_such() -> None:
    newer = msgspec.msgpack.encode(msgspec.to_builtins(SOUND) | {"version": 2})
    with pytest.raises(DamagedError, match="version 2, newer than 1"):
        decode_body(newer, "it")


def test_the_segment_is_the_tensors_in_their_places(tmp_path: Path) -> None:
    first, second = os.urandom(9 << 20), os.urandom((8 << 20) + 2)
    with Store.open(tmp_path) as store:
        with store.begin() as transaction:
            written = write_tensors(
                transaction, [constant("a", "BF16", first), constant("b", "U8", second)], quiet_bytes
            )
            transaction.commit(written.manifest("m", 1.0))
        whole = b"".join(store.read(digest) for digest in written.refs)
        assert store.manifest(written.id).name == "m"
    assert [len(first), (9 << 20)] == [written.body.tensors[0].length, written.body.tensors[1].offset]
    assert whole == first + second
    assert len(written.refs) == 3


@pytest.mark.parametrize(
    ("tensors_in", "codecs"),
    [
        ([("BF16", 9 << 20)], [Codec.BF16, Codec.BF16]),
        ([("F16", 100), ("F32", 300)], [Codec.FP32]),
        ([("F8_E4M3", 5 << 20), ("F8_E5M2", 7 << 20)], [Codec.FP8_E4M3, Codec.FP8_E5M2]),
        ([("F8_E4M3FNUZ", 10)], [Codec.FP8_E4M3]),
        ([("BF16", 6 << 20), ("I8", 20 << 20)], [Codec.BF16, Codec.LZ4, Codec.LZ4, Codec.LZ4]),
        ([("BOOL", 0), ("C64", 8), ("F64", 8), ("F8_E8M0", 8), ("BF16", 16)], [Codec.LZ4]),
    ],
)
def test_a_chunk_is_coded_as_what_has_most_of_it(tensors_in: list[tuple[str, int]], codecs: list[Codec]) -> None:
    body = lay_out(
        NewTensor(f"t{at}", dtype, (length // tensors.ITEM_SIZES[dtype],), lambda: iter([]))
        for at, (dtype, length) in enumerate(tensors_in)
    )
    assert chunk_codecs(body) == codecs


def bfloats(count: int) -> bytes:
    """Numbers as weights are."""
    normal = np.random.default_rng(1).normal(0, 0.02, count).astype("<f4")
    return (normal.view("<u4") >> 16).astype("<u2").tobytes()


def test_numbers_take_less_room_and_all_else_as_much(tmp_path: Path) -> None:
    first, second = bfloats(4 << 20), os.urandom(8 << 20)
    with Store.open(tmp_path / "a") as store, Store.open(tmp_path / "b") as other:
        with store.begin() as transaction:
            written = write_tensors(
                transaction, [constant("a", "BF16", first), constant("b", "U8", second)], quiet_bytes
            )
            transaction.commit(written.manifest("m", 1.0))
        copy_checkpoint(written.id, store, other)
        for each in (store, other):
            with each.reader() as reader:
                numbers, others = reader.locate(written.refs)
                assert (numbers.codec, others.codec) == (Codec.BF16, Codec.RAW)
                assert numbers.stored_length < 0.68 * len(first)
                assert reader.plain(numbers) == first and reader.plain(others) == second


def quiet_bytes(done: int, total: int) -> None:
    assert 0 < done <= total


def test_a_tensor_that_gives_too_little_fails_the_import(tmp_path: Path) -> None:
    short = NewTensor("short", "U8", (10,), lambda: iter([b"12345"]))
    with (
        Store.open(tmp_path) as store,
        store.begin() as transaction,
        pytest.raises(ConfigError, match="tensor short gave 5 bytes where its shape needs 10"),
    ):
        write_tensors(transaction, [short], quiet_bytes)


def test_equal_weights_of_two_models_are_stored_once(weighty: ImportedModel, data: DataDir, tmp_path: Path) -> None:
    before = sum(pack.stat().st_size for pack in (data.store / "packs").iterdir())
    again = import_model(str(tmp_path / "source"), "twin", data, progress=quiet)
    assert again.checkpoint != weighty.checkpoint and again.digest == weighty.digest
    assert sum(pack.stat().st_size for pack in (data.store / "packs").iterdir()) == before


def test_a_replaced_model_gives_its_space_back(weighty: ImportedModel, data: DataDir, tmp_path: Path) -> None:
    other = import_model(
        str(null_source(tmp_path / "other", weights_mb=1)), "heavy", data, progress=quiet, replace=True
    )
    with Store.open(data.store) as store:
        assert [row.id for row in store.manifests()] == [other.checkpoint]
    assert sum(pack.stat().st_size for pack in (data.store / "packs").iterdir()) < 2 << 20


def test_a_removed_model_leaves_a_checkpoint_that_the_sweep_takes(weighty: ImportedModel, data: DataDir) -> None:
    with Store.open(data.store) as store:
        assert sweep(store, data.models) == []
        remove_model(data.models, "heavy")
        assert sweep(store, data.models) == [weighty.checkpoint]
        assert store.manifests() == []


def test_the_sweep_spares_what_it_can_not_judge(weighty: ImportedModel, data: DataDir) -> None:
    record = weighty.path / "dormouse.json"
    sound = record.read_bytes()
    with Store.open(data.store) as store:
        for text in (b"{", sound.replace(b'"format": 1', b'"format": 2')):
            record.write_bytes(text)
            assert sweep(store, data.models) == []
        record.unlink()
        assert sweep(store, data.models) == []
        with store.begin() as transaction:  # a snapshot of a model that is gone is none of its business
            transaction.commit(Manifest("s1", "snapshot", "gone", 1.0, b"", []))
        remaining = {row.id for row in store.manifests()}
    assert remaining == {weighty.checkpoint, "s1"}


def test_the_sweep_waits_for_no_import_that_publishes(weighty: ImportedModel, data: DataDir) -> None:
    remove_model(data.models, "heavy")
    lock = os.open(data.models, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    with Store.open(data.store) as store:
        assert sweep(store, data.models) == []
        os.close(lock)
        assert sweep(store, data.models) == [weighty.checkpoint]


def test_an_import_killed_at_any_step_leaves_the_old_model_or_the_new(tmp_path: Path) -> None:
    null_source(tmp_path / "old", weights_mb=2)
    null_source(tmp_path / "new", weights_mb=1)
    driver = [sys.executable, "-m", "tests.checkpoint.crash_driver", str(tmp_path)]
    done = subprocess.run(driver, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def test_a_copy_in_another_store_is_the_same(weighty: ImportedModel, data: DataDir, tmp_path: Path) -> None:
    assert weighty.checkpoint is not None
    with Store.open(data.store) as store, Store.open(tmp_path / "other") as other:
        copy_checkpoint(weighty.checkpoint, store, other)
        assert other.manifest(weighty.checkpoint) == store.manifest(weighty.checkpoint)
        assert other.verify().ok


# The pool


@pytest.fixture
def store(data: DataDir, weighty: ImportedModel) -> Iterator[Store]:
    with Store.open(data.store) as store:
        yield store


def memfds() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return [link for link in found if link.startswith("/memfd:dormouse")]


def test_users_share_one_segment_until_the_last_has_gone(store: Store, weighty: ImportedModel) -> None:
    assert weighty.checkpoint is not None
    pool = SegmentPool(store)
    one = pool.take(weighty.checkpoint, "one")
    assert one.report is not None
    await_report(one.report)
    two = pool.take(weighty.checkpoint, "two")
    assert two.report is None  # it is filled already
    assert os.fstat(one.memory).st_ino == os.fstat(two.memory).st_ino
    data = os.pread(two.memory, two.size, 0)
    with store.reader() as reader:
        assert data == b"".join(reader.plain(c) for c in reader.locate(store.manifest(weighty.checkpoint).refs))
    for handle in (one, two):
        handle.close()
    pool.release("one")
    pool.release("nobody")
    assert len(memfds()) == 1
    pool.release("two")
    pool.release("two")
    assert memfds() == []


def test_a_user_who_leaves_while_it_fills_leaves_nothing(store: Store, weighty: ImportedModel) -> None:
    assert weighty.checkpoint is not None
    pool = SegmentPool(store)
    for _ in range(20):
        pool.take(weighty.checkpoint, "one").close()
        pool.release("one")
    for thread in threading.enumerate():
        if thread.name.startswith("fill"):
            thread.join()
    assert memfds() == []


def test_users_who_come_and_go_at_once_all_find_the_right_bytes(store: Store, weighty: ImportedModel) -> None:
    """Eight threads, each many times: take, perhaps wait, look, leave."""
    checkpoint = weighty.checkpoint
    assert checkpoint is not None
    with store.reader() as reader:
        expected = b"".join(reader.plain(c) for c in reader.locate(store.manifest(checkpoint).refs))
    pool = SegmentPool(store)

    def come_and_go(number: int) -> int:
        dice = random.Random(number)
        right = 0
        for visit in range(15):
            user = f"{number}.{visit}"
            handle = pool.take(checkpoint, user)
            if dice.random() < 0.7:
                if handle.report is not None:
                    await_report(handle.report)
                right += os.pread(handle.memory, handle.size, 0) == expected
            else:
                right += 1
            handle.close()
            pool.release(user)
        return right

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(come_and_go, range(8))) == [15] * 8
    for thread in threading.enumerate():
        if thread.name.startswith("fill"):
            thread.join()
    assert memfds() == []


def test_damage_is_told_to_everybody_and_heals_with_the_next_import(
    store: Store, data: DataDir, weighty: ImportedModel, tmp_path: Path
) -> None:
    assert weighty.checkpoint is not None
    refs = store.manifest(weighty.checkpoint).refs
    for digest in refs[:2]:
        (chunk,) = store.locate([digest])
        with (data.store / "packs" / f"{chunk.pack:08d}.pack").open("r+b") as pack:
            pack.seek(chunk.offset + 99)
            byte = pack.read(1)
            pack.seek(chunk.offset + 99)
            pack.write(bytes([byte[0] ^ 4]))
    pool = SegmentPool(store)
    handles = [pool.take(weighty.checkpoint, str(user)) for user in range(3)]
    for handle in handles:
        assert handle.report is not None
        with pytest.raises(DamagedError, match=r"the weights of heavy can't be read: chunk .* is damaged") as caught:
            await_report(handle.report)
        assert "--name heavy --replace" in caught.value.remedy
        handle.close()
    for thread in threading.enumerate():
        if thread.name.startswith("fill"):
            thread.join()
    assert memfds() == []
    healed = import_model(str(tmp_path / "source"), "heavy", data, progress=quiet, replace=True)
    assert healed.checkpoint is not None
    again = pool.take(healed.checkpoint, "again")
    assert again.report is not None
    await_report(again.report)
    again.close()
    pool.release("again")


def test_segments_to_keep_stay_within_the_budget_and_the_oldest_go_first(
    store: Store, data: DataDir, tmp_path: Path
) -> None:
    checkpoints = {}
    for number, name in enumerate("abc"):
        source = tmp_path / name
        source.mkdir()
        settings = {"weights_mb": 1 + number}
        (source / "config.json").write_text(json.dumps({"model_type": "dormouse-null", "null": settings}))
        checkpoints[name] = import_model(str(source), name, data, progress=quiet).checkpoint or ""
    pool = SegmentPool(store, keep_bytes=4 << 20)

    def visit(name: str, *, keep: bool = True) -> bool:
        """Whether it was in memory already."""
        handle = pool.take(checkpoints[name], "one", keep=keep)
        there = handle.report is None
        if handle.report is not None:
            await_report(handle.report)
        handle.close()
        pool.release("one", checkpoints[name])
        return there

    assert [visit(name) for name in "aa"] == [False, True]
    assert [visit(name) for name in "bab"] == [False, True, True]
    assert sum(pool.kept.values()) == 3 << 20 and len(memfds()) == 2
    assert not visit("c")  # 1 + 2 + 3 MiB are too many: a, which was used before b, goes first, and does not suffice
    assert sum(pool.kept.values()) == 3 << 20
    assert [visit(name) for name in "ca"] == [True, False]
    pool.forget(checkpoints["a"])
    pool.forget("nothing")
    assert [visit(name, keep=False) for name in "aa"] == [False, False]
    holder = pool.take(checkpoints["c"], "two", keep=True)
    assert holder.report is None
    pool.forget(checkpoints["c"])
    holder.close()
    pool.release("two")
    assert memfds() == [] and sum(pool.kept.values()) == 0


def test_what_is_larger_than_the_budget_is_not_kept(store: Store, weighty: ImportedModel) -> None:
    assert weighty.checkpoint is not None
    pool = SegmentPool(store, keep_bytes=weighty.weight_bytes - 1)
    handle = pool.take(weighty.checkpoint, "one", keep=True)
    assert handle.report is not None
    await_report(handle.report)
    handle.close()
    pool.release("one")
    assert memfds() == []


def test_no_such_checkpoint(store: Store) -> None:
    pool = SegmentPool(store)
    with pytest.raises(NotFoundError, match="there is no checkpoint nothing") as caught:
        pool.take("nothing", "one")
    assert "Restart `dormouse serve`" in caught.value.remedy
    with pytest.raises(NotFoundError, match="there is no checkpoint nothing") as caught:
        pool.take("nothing", "one", adapter=True)
    assert caught.value.remedy.startswith("Unload the adapter and load it again")
    with store.begin() as transaction:
        transaction.commit(Manifest("s1", "snapshot", "m", 1.0, b"", []))
    with pytest.raises(DamagedError, match="s1 is no checkpoint but a snapshot"):
        pool.take("s1", "one")
    assert memfds() == []


def test_a_model_whose_record_names_no_checkpoint_is_still_a_model(data: DataDir, tmp_path: Path) -> None:
    model = import_model(str(null_source(tmp_path / "light")), "light", data, progress=quiet)
    assert model.checkpoint is None and open_model(data.models, "light") == model
