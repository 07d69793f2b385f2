"""Whether so many replicas can't have room at once, wherever they go.

Finding places for all of them is bin packing, and hard; these are bounds, which never refuse what could be placed:

- the bytes of all replicas are at most those of the nodes;
- of parts with t bytes or more, a device holds at most size // t;
- replicas over g devices or more are on nodes that have so many, and each takes g of such places.

They are looked at for every t and g that occur, for those replicas and those nodes alone that are at least as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replicas:
    """So many, each with `size` bytes on each of `devices` devices of one node."""

    count: int
    devices: int
    size: int


@dataclass(frozen=True, slots=True)
class Nodes:
    """So many, each with `devices` devices of `size` bytes."""

    count: int
    devices: int
    size: int


@dataclass(frozen=True, slots=True)
class Excess:
    """`replicas` of them are too many, from number `first_over` of those that were given on; `why` ends a sentence."""

    first_over: int
    replicas: int
    why: str


def excess(wanted: Sequence[Replicas], nodes: Sequence[Nodes], memory: str, place: str) -> Excess | None:
    """Why they can't all have room at once; None: no bound says so. `memory` and `place` are what to call it."""
    largest_first = sorted((one for one in enumerate(wanted) if one[1].count), key=lambda one: -one[1].size)
    for least in sorted({one.devices for _number, one in largest_first}):
        count = places = size = 0
        for number, one in largest_first:
            if one.devices < least:
                continue
            count += one.count
            places += one.count * one.devices
            size += one.count * one.devices * one.size
            fit = [node for node in nodes if node.devices >= least and node.size >= one.size]
            why = _too_much(size, fit, memory) or _too_many(count, places, least, one.size, fit, place)
            if why:
                return Excess(number, count, why)
    return None


def _too_much(size: int, fit: list[Nodes], memory: str) -> str:
    there = sum(node.count * node.devices * node.size for node in fit)
    return f"need {size / 1e9:g} GB of {memory}, there are {there / 1e9:g} GB where they fit" if size > there else ""


def _too_many(count: int, places: int, least: int, size: int, fit: list[Nodes], place: str) -> str:
    each = [(node.count, node.size // size * node.devices) for node in fit]
    there = sum(nodes * room for nodes, room in each)
    if places > there:
        return f"need {places} places of {size / 1e9:g} GB or more {place}, there are {there}"
    there = sum(nodes * (room // least) for nodes, room in each)
    if count > there:
        return f"need {least} or more places of {size / 1e9:g} GB or more each, {place} of one node; {there} have room"
    return ""
