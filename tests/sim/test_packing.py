"""What is refused can't be, and what can be is never refused."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.sim.packing import Nodes, Replicas, excess

GB = 10**9
NODES = st.lists(st.builds(Nodes, st.integers(1, 3), st.integers(0, 4), st.integers(1, 80)), min_size=1, max_size=3)


@given(NODES, st.data())
def test_what_has_been_placed_is_never_refused(nodes: list[Nodes], data: st.DataObject) -> None:
    free = [[node.size] * node.devices for node in nodes for _ in range(node.count)]
    placed: Counter[tuple[int, int]] = Counter()
    for _ in range(data.draw(st.integers(0, 20))):
        node = data.draw(st.sampled_from(free))
        chosen = [device for device in range(len(node)) if node[device] and data.draw(st.booleans())]
        if chosen:
            size = data.draw(st.integers(1, min(node[device] for device in chosen)))
            for device in chosen:
                node[device] -= size
            placed[len(chosen), size] += 1
    wanted = data.draw(st.permutations([Replicas(count, *shape) for shape, count in placed.items()]))
    assert excess(wanted, nodes, "memory", "there") is None


@pytest.mark.parametrize(
    ("wanted", "nodes", "first_over", "why"),
    [
        ([(9, 1, 10)], [(2, 2, 20)], 0, "need 90 GB of memory, there are 80 GB where they fit"),
        ([(2, 1, 30), (1, 1, 5)], [(1, 1, 30), (1, 4, 20)], 0, "need 60 GB of memory, there are 30 GB where they fit"),
        ([(4, 1, 5), (3, 1, 11)], [(2, 1, 20)], 1, "need 3 places of 11 GB or more there, there are 2"),
        ([(1, 3, 11), (2, 1, 12)], [(1, 4, 20)], 0, "need 5 places of 11 GB or more there, there are 4"),
        ([(3, 3, 11)], [(2, 4, 20), (9, 2, 20)], 0, "need 9 places of 11 GB or more there, there are 8"),
        ([(3, 3, 8)], [(1, 4, 20)], 0, "need 9 places of 8 GB or more there, there are 8"),
        ([(5, 3, 6)], [(2, 4, 15)], 0, "need 3 or more places of 6 GB or more each, there of one node; 4 have room"),
        ([(1, 2, 5)], [(9, 1, 50)], 0, "need 10 GB of memory, there are 0 GB where they fit"),
    ],
)
def test_what_cannot_be_is_refused(
    wanted: list[tuple[int, int, int]], nodes: list[tuple[int, int, int]], first_over: int, why: str
) -> None:
    asked = [Replicas(count, devices, size * GB) for count, devices, size in wanted]
    there = [Nodes(count, devices, size * GB) for count, devices, size in nodes]
    found = excess(asked, there, "memory", "there")
    assert found is not None and (found.first_over, found.why) == (first_over, why)
