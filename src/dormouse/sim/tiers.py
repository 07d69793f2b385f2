"""The DRAM and disk tiers of the simulated nodes: what lies in them, and what goes when they are full.

keep, forget, touch -> the view of schedule/ (who holds what), and the time that DRAM was taken
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from dormouse.schedule.cluster import Cluster, Tier
from dormouse.sim.events import Clock


class Store:
    """One tier of one node: the least recently used goes. What is larger than the tier never comes in."""

    __slots__ = ("_keys", "limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._keys: OrderedDict[str, int] = OrderedDict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def touch(self, key: str) -> None:
        if key in self._keys:
            self._keys.move_to_end(key)

    def add(self, key: str, size: int) -> list[str] | None:
        """What went for it; None when it does not come in."""
        if key in self._keys:
            self._keys.move_to_end(key)
            return []
        if size > self.limit:
            return None
        gone: list[str] = []
        while self.used + size > self.limit:
            old, freed = self._keys.popitem(last=False)
            self.used -= freed
            gone.append(old)
        self._keys[key] = size
        self.used += size
        return gone

    def drop(self, key: str) -> bool:
        size = self._keys.pop(key, None)
        self.used -= size or 0
        return size is not None


class Tiers:
    """All of them. `byte_seconds` are of DRAM."""

    def __init__(self, view: Cluster, clock: Clock) -> None:
        self.view = view
        self._clock = clock
        self._byte_seconds = 0.0
        self._used = 0
        self._since = 0.0
        self._stores: dict[tuple[str, Tier], Store] = {}
        for name in view.nodes:
            node = view.node(name)
            self._stores[name, Tier.DRAM] = Store(node.dram_tier)
            self._stores[name, Tier.DISK] = Store(node.disk_tier)

    @property
    def byte_seconds(self) -> float:
        """Of DRAM, until now."""
        return self._byte_seconds + self._used * (self._clock.now - self._since)

    def fits(self, size: int, node: str, tier: Tier) -> bool:
        """Whether it could be kept."""
        return size <= self._stores[node, tier].limit

    def touch(self, key: str, node: str) -> None:
        """It has been read."""
        for tier in (Tier.DISK, Tier.DRAM):
            self._stores[node, tier].touch(key)

    def keep(self, key: str, size: int, node: str, tier: Tier) -> bool:
        """Put an artifact into a tier of a node; whether it is there."""
        store = self._stores[node, tier]
        before = store.used
        gone = store.add(key, size)
        if gone is None:
            return False
        for old in gone:
            self.view.lose(old, node, tier)
        self.view.hold(key, node, tier)
        if tier is Tier.DRAM:
            self._count(store.used - before)
        return True

    def forget(self, key: str, node: str, tier: Tier) -> None:
        """Take an artifact out of a tier of a node."""
        store = self._stores[node, tier]
        before = store.used
        if store.drop(key):
            self.view.lose(key, node, tier)
            if tier is Tier.DRAM:
                self._count(store.used - before)

    def lose(self, node: str) -> None:
        """A node is gone: what it had in DRAM is lost, its disk is as it was when it comes back."""
        store = self._stores[node, Tier.DRAM]
        self._count(-store.used)
        self._stores[node, Tier.DRAM] = Store(store.limit)

    def come_back(self, node: str) -> None:
        """The view knows the node again, and now what lies on its disk."""
        for key in self._stores[node, Tier.DISK]:
            self.view.hold(key, node, Tier.DISK)

    def _count(self, more: int) -> None:
        self._byte_seconds, self._since = self.byte_seconds, self._clock.now
        self._used += more
