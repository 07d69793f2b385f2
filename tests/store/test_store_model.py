"""Random sequences of operations on a store and on plain dictionaries must agree at every step."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_tools import commit, noise, text, zeros

from dormouse.store.codec import Codec
from dormouse.store.store import Store

plain_chunks = st.builds(
    lambda make, seed, size: make(seed, size),
    st.sampled_from([noise, text, zeros]),
    st.integers(0, 3),
    st.sampled_from([1, 5000, 30_000]),
)
plain_sets = st.lists(plain_chunks, max_size=5)


class StoreAgainstModel(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="dormouse-test-")) / "store"
        self.store = Store.open(self.path)
        self.model: dict[str, list[bytes]] = {}
        self.count = 0

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.path.parent)

    @rule(plains=plain_sets, codec=st.sampled_from(Codec))
    def commit(self, plains: list[bytes], codec: Codec) -> None:
        self.count += 1
        commit(self.store, f"m{self.count}", plains, codec)
        self.model[f"m{self.count}"] = plains

    @rule(plains=plain_sets)
    def give_up(self, plains: list[bytes]) -> None:
        with self.store.begin() as transaction:
            for plain in plains:
                transaction.put(plain)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        manifest_id = data.draw(st.sampled_from(sorted(self.model)))
        self.store.remove(manifest_id)
        del self.model[manifest_id]

    @rule()
    def collect_garbage(self) -> None:
        before = sum(path.stat().st_size for path in self.path.rglob("*.pack"))
        report = self.store.collect_garbage()
        assert before - report.freed_bytes == sum(path.stat().st_size for path in self.path.rglob("*.pack"))
        if not self.model:
            assert not list(self.path.rglob("*.pack"))

    @rule(lose_index=st.booleans())
    def reopen(self, lose_index: bool) -> None:
        self.store.close()
        if lose_index:
            (self.path / "index.sqlite").unlink()
        self.store = Store.open(self.path)

    @invariant()
    def agree(self) -> None:
        rows = {row.id: row for row in self.store.manifests()}
        assert rows.keys() == self.model.keys()
        for manifest_id, plains in self.model.items():
            refs = self.store.manifest(manifest_id).refs
            assert [bytes(self.store.read(digest)) for digest in refs] == plains
            assert rows[manifest_id].raw_bytes == sum(map(len, plains))
        assert self.store.verify().ok


StoreAgainstModel.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestStoreAgainstModel = StoreAgainstModel.TestCase
