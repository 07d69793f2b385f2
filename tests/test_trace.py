"""Phases on one axis, and the traces that are made of them."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse import phases as phases_module
from dormouse.engine.messages import Resumed
from dormouse.phases import Phase, Phases, host_clock
from dormouse.snapshot import service_messages
from dormouse.trace import Operation, chrome_trace, gigabytes_per_second

AMOUNTS = st.none() | st.integers(0, 1 << 50)
STEPS = st.builds(
    Phase,
    name=st.text(min_size=1, max_size=20),
    start=st.floats(-5, 100),
    seconds=st.floats(0, 100),
    bytes=AMOUNTS,
    stored=AMOUNTS,
    track=st.sampled_from(("", "criu", "fill", "worker")),
)
PHASES = st.builds(Phases, origin=st.floats(0, 1e9), steps=st.lists(STEPS, max_size=30))


def operation(phases: Phases, name: str = "mouse") -> Operation:
    return Operation("start", name, "snapshot", 1.7e9, phases)


def steps_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


@given(st.lists(PHASES, max_size=3))
def test_a_trace_is_what_viewers_read_and_has_every_step(many: list[Phases]) -> None:
    trace = json.loads(json.dumps(chrome_trace([operation(phases) for phases in many]), allow_nan=False))
    named = set()
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid", "args"} <= event.keys()
        assert event["ph"] in ("M", "X")
        if event["ph"] == "M" and event["name"] == "thread_name":
            named.add((event["pid"], event["tid"]))
    steps = steps_of(trace)
    assert all(step["ts"] >= 0 and step["dur"] >= 0 and math.isfinite(step["ts"] + step["dur"]) for step in steps)
    assert {(step["pid"], step["tid"]) for step in steps} <= named
    assert sorted(step["name"] for step in steps) == sorted(step.name for phases in many for step in phases.steps)
    for _row, row in itertools.groupby(steps, lambda step: (step["pid"], step["tid"])):
        assert_nested(list(row))


def assert_nested(row: list[dict[str, Any]]) -> None:
    """What viewers want of a row: two events are apart, or one lies in the other."""
    slack = 0.1  # microseconds
    for one, other in itertools.combinations(row, 2):
        first, second = sorted((one, other), key=lambda step: (step["ts"], -step["dur"]))
        end, other_end = first["ts"] + first["dur"], second["ts"] + second["dur"]
        assert end <= second["ts"] + slack or other_end <= end + slack


def test_tracks_are_rows_side_by_side_on_one_axis() -> None:
    node, host = Phases(100.0), Phases(100.5)
    node.add("host", 100.0, 103.0)
    host.add("criu images", 100.75, 102.0, track="criu", bytes=1000)
    host.add("cell", 100.5, 100.75)
    node.nest("host", host, track="host")
    found = {step["name"]: step for step in steps_of(chrome_trace([operation(node)]))}
    assert [(name, step["ts"], step["dur"]) for name, step in found.items()] == [
        ("host", 0.0, 3e6),
        ("host.cell", 0.5e6, 0.25e6),
        ("host.criu images", 0.75e6, 1.25e6),
    ]
    assert len({step["tid"] for step in found.values()}) == 3
    assert found["host.criu images"]["args"]["bytes"] == 1000


def test_a_step_that_raises_is_timed_and_may_tell_late_what_it_moved() -> None:
    phases = Phases()
    with pytest.raises(ValueError, match="no"), phases.time("fill", track="fill") as moved:
        moved.bytes, moved.stored = 2_000_000_000, 5
        raise ValueError("no")
    (step,) = phases.steps
    assert (step.name, step.track, step.bytes, step.stored) == ("fill", "fill", 2_000_000_000, 5)
    assert gigabytes_per_second(msgspec.structs.replace(step, seconds=0.5)) == 4.0
    assert gigabytes_per_second(Phase("wait", 0.0, 0.5)) is None


def test_steps_of_one_name_add_up() -> None:
    phases = Phases(0.0, [Phase("b", 1.0, 0.25), Phase("a", 0.0, 1.0), Phase("b", 2.0, 0.5)])
    assert phases.seconds() == {"a": 1.0, "b": 0.75}
    assert str(phases) == "a 1.000, b 0.750"


@given(PHASES)
def test_messages_carry_phases_as_they_are(phases: Phases) -> None:
    captured = service_messages.Captured(call=1, snapshot_id="s", raw_bytes=1, stored_bytes=1, phases=phases)
    reply = service_messages.decode_reply(service_messages.encode(captured))
    assert isinstance(reply, service_messages.Captured)
    assert reply.phases == phases
    resumed = Resumed(phases=phases)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(resumed), type=Resumed) == resumed
    done = operation(phases)
    assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(done))), Operation) == done


def test_a_restored_process_reads_the_clock_of_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc tells it after CRIU has restored a process 22 seconds after its capture."""
    offsets = tmp_path / "timens_offsets"
    monkeypatch.setattr(phases_module, "_OFFSETS", offsets)
    without = host_clock() - time.monotonic()
    offsets.write_text("monotonic         -22 270396553\nboottime          -22 270389422\n")
    shifted = host_clock() - time.monotonic()
    assert shifted - without == pytest.approx(22 - 0.270396553, abs=0.01)
