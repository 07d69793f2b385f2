"""The state machine alone: what happens in each situation, and what may never happen in any."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dormouse.errors import (
    BusyError,
    DamagedError,
    DeadlineError,
    DiskFullError,
    DormouseError,
    EngineError,
    HostError,
    IncompatibleError,
    NotFoundError,
    SnapshotError,
    StoppingError,
    StoreError,
    UntrustedError,
    WeightsError,
)
from dormouse.node import replica as r
from dormouse.node.replica import Replica, Start, State
from dormouse.phases import Phase, Phases


def new_replica(
    keep_alive: float = 10.0,
    max_concurrent: int = 2,
    snapshots: bool = True,
    snapshot_id: str | None = None,
    dozes: bool = False,
    captured_beside: Callable[[], bool] = lambda: False,
) -> Replica:
    return Replica(
        "mouse",
        stay=lambda now: r.Stay(now + keep_alive),
        max_concurrent=max_concurrent,
        snapshots=snapshots,
        snapshot_id=snapshot_id,
        now=0.0,
        dozes=dozes,
        captured_beside=captured_beside,
    )


def ready_replica(**options: float | bool | str | Callable[[], bool] | None) -> Replica:
    replica = new_replica(**options)  # type: ignore[arg-type]
    replica.handle(r.Request(0), 0.0)
    replica.handle(r.Done(), 1.0)
    replica.handle(r.Leave(0), 2.0)
    return replica


def test_first_request_starts_cold_and_is_told_so() -> None:
    replica = new_replica()
    assert replica.handle(r.Request(1), 0.0) == [r.StartCold()]
    phases = Phases(0.0, [Phase("load", 0.0, 2.5)])
    ready, serve = replica.handle(r.Done(phases=phases), 2.5)
    assert ready == r.Ready(Start("cold", 2.5), phases)
    assert serve == r.Serve(1, Start("cold", 2.5))
    assert str(Start("snapshot", 1.17)) == "snapshot; 1.170"


def test_request_to_a_ready_replica_is_hot() -> None:
    assert ready_replica().handle(r.Request(1), 3.0) == [r.Serve(1, Start("hot", 0.0))]


def test_many_requests_share_one_restore() -> None:
    replica = new_replica(snapshot_id="s", max_concurrent=8)
    assert replica.handle(r.Request(1), 0.0) == [r.Restore("s")]
    assert replica.handle(r.Request(2), 0.5) == []
    start = Start("snapshot", 1.0)
    assert replica.handle(r.Done(), 1.0) == [r.Ready(start, Phases(0.0)), r.Serve(1, start), r.Serve(2, start)]


def test_first_idle_captures_then_sleeps() -> None:
    replica = ready_replica()
    assert replica.deadline == 12.0
    assert replica.handle(r.Tick(), 11.9) == []
    assert replica.handle(r.Tick(), 12.0) == [r.Quiesce()]
    assert replica.handle(r.Done(), 12.1) == [r.Capture()]
    assert replica.handle(r.Done(snapshot_id="s"), 12.5) == []
    assert (replica.state, replica.snapshot_id, replica.deadline) == (State.ASLEEP, "s", None)


def test_later_idle_with_a_valid_snapshot_only_stops() -> None:
    replica = ready_replica(snapshot_id="s")
    assert replica.handle(r.Tick(), 12.0) == [r.Stop()]
    replica.handle(r.Done(), 12.1)
    assert replica.handle(r.Request(9), 13.0) == [r.Restore("s")]


def test_without_snapshots_it_only_stops_and_starts_cold() -> None:
    replica = ready_replica(snapshots=False)
    assert replica.handle(r.Tick(), 12.0) == [r.Stop()]
    replica.handle(r.Done(), 12.1)
    assert replica.handle(r.Request(9), 13.0) == [r.StartCold()]


def test_kept_forever_sleeps_only_when_told() -> None:
    replica = ready_replica(keep_alive=math.inf)
    assert replica.deadline is None
    assert replica.handle(r.Tick(), 1e9) == []
    assert replica.handle(r.Sleep(), 1e9) == [r.Quiesce()]


def test_failed_restore_falls_back_to_cold_and_says_why() -> None:
    replica = new_replica(snapshot_id="s")
    replica.handle(r.Request(1), 0.0)
    error = IncompatibleError("other kernel")
    assert replica.handle(r.Failed(error), 0.5) == [r.Fallback("snapshot", "s", error), r.StartCold()]
    effects = replica.handle(r.Done(), 4.0)
    assert effects[-1] == r.Serve(1, Start("cold", 4.0))
    assert replica.snapshot_id is None


def test_suspect_snapshot_is_tried_once_more_then_never_again_and_captured_anew() -> None:
    replica = new_replica(snapshot_id="s")
    replica.handle(r.Request(1), 0.0)
    error = SnapshotError("criu failed")
    assert replica.handle(r.Failed(error), 0.5) == [r.Retry("s", error), r.Restore("s")]
    effects = replica.handle(r.Failed(error), 1.0)
    assert effects == [r.Quarantine("s", error), r.Fallback("snapshot", "s", error), r.StartCold()]
    replica.handle(r.Done(), 4.0)
    replica.handle(r.Leave(1), 5.0)
    assert replica.handle(r.Tick(), 15.0) == [r.Quiesce()]
    assert replica.handle(r.Done(), 15.1) == [r.Capture()]
    replica.handle(r.Done(snapshot_id="s2"), 15.2)
    assert replica.handle(r.Request(2), 16.0) == [r.Restore("s2")]


def test_second_try_that_succeeds_clears_the_snapshot_once_somebody_was_answered() -> None:
    replica = new_replica(snapshot_id="s")
    error = SnapshotError("criu failed")
    for waiter in range(3):
        replica.handle(r.Request(waiter), 0.0)
        assert replica.handle(r.Failed(error), 0.5) == [r.Retry("s", error), r.Restore("s")]
        replica.handle(r.Done(), 1.0)
        replica.handle(r.Leave(waiter), 2.0)
        replica.handle(r.Sleep(), 2.0)
        replica.handle(r.Done(), 2.1)
    assert replica.snapshot_id == "s"


def test_worker_that_dies_before_it_has_answered_anyone_counts_against_its_snapshot() -> None:
    replica = new_replica(snapshot_id="s")
    error = EngineError("killed")
    for waiter, told in enumerate((r.Retry("s", error), r.Quarantine("s", error))):
        assert replica.handle(r.Request(waiter), 0.0) == [r.Restore("s")]
        replica.handle(r.Done(), 1.0)
        assert replica.handle(r.WorkerDied(error), 1.5) == [told, r.Stop()]
        replica.handle(r.Leave(waiter), 1.6)
        replica.handle(r.Done(), 2.0)
    assert replica.handle(r.Request(9), 3.0) == [r.StartCold()]


def test_worker_that_dies_later_does_not() -> None:
    replica = ready_replica(snapshot_id="s")
    assert replica.handle(r.WorkerDied(EngineError("killed")), 3.0) == [r.Stop()]


def test_nor_does_one_whose_canary_was_judged_well() -> None:
    replica = new_replica(snapshot_id="s")
    for waiter in range(4):
        assert replica.handle(r.Request(waiter), 0.0) == [r.Restore("s")]
        replica.handle(r.Done(proven=True), 1.0)
        assert replica.handle(r.WorkerDied(EngineError("out of memory")), 1.5) == [r.Stop()]
        replica.handle(r.Leave(waiter), 1.6)
        replica.handle(r.Done(), 2.0)


def bad_snapshot(replica: Replica, number: int) -> list[r.Effect]:
    """A model whose snapshot is damaged starts cold and falls asleep; what follows from falling asleep."""
    replica.handle(r.Request(number), 0.0)
    effects = replica.handle(r.Failed(DamagedError("flipped")), 0.5)
    assert isinstance(effects[0], r.Quarantine) and effects[-1] == r.StartCold()
    assert (r.GiveUp(r.MAX_QUARANTINES) in effects) is (number == r.MAX_QUARANTINES)
    replica.handle(r.Done(), 1.0)
    replica.handle(r.Leave(number), 2.0)
    return replica.handle(r.Tick(), 12.0)


def captured(replica: Replica, snapshot_id: str) -> None:
    replica.handle(r.Done(), 12.1)
    replica.handle(r.Done(snapshot_id=snapshot_id), 12.2)
    assert (replica.state, replica.snapshot_id) == (State.ASLEEP, snapshot_id)


def replica_without_hope() -> Replica:
    replica = new_replica(snapshot_id="s1")
    for number in range(1, r.MAX_QUARANTINES):
        assert bad_snapshot(replica, number) == [r.Quiesce()]
        captured(replica, f"s{number + 1}")
    assert bad_snapshot(replica, r.MAX_QUARANTINES) == [r.Stop()]
    replica.handle(r.Done(), 13.0)
    replica.handle(r.Request(8), 14.0)
    replica.handle(r.Done(), 15.0)
    return replica


def test_a_model_whose_snapshots_are_all_bad_is_captured_no_more_until_told() -> None:
    replica = replica_without_hope()
    replica.handle(r.Leave(8), 16.0)
    assert replica.handle(r.Tick(), 30.0) == [r.Stop()]
    replica.handle(r.Done(), 31.0)
    replica.handle(r.Request(9), 32.0)
    replica.handle(r.Done(), 33.0)
    replica.handle(r.Sleep(capture=True), 33.5)
    assert replica.handle(r.Leave(9), 34.0) == [r.Quiesce()]


def test_a_release_gives_new_hope() -> None:
    replica = replica_without_hope()
    replica.handle(r.Offer("s1"), 15.5)
    replica.handle(r.Withdraw("s1"), 15.6)
    replica.handle(r.Leave(8), 16.0)
    assert replica.handle(r.Tick(), 30.0) == [r.Quiesce()]


def test_bad_snapshots_with_a_good_one_between_them_are_not_in_a_row() -> None:
    replica = new_replica(snapshot_id="s0")
    for number in range(3 * r.MAX_QUARANTINES):
        replica.handle(r.Request(100 + number), 0.0)
        replica.handle(r.Done(proven=True), 0.1)
        replica.handle(r.Leave(100 + number), 0.2)
        replica.handle(r.Sleep(), 0.3)
        replica.handle(r.Done(), 0.4)
        assert bad_snapshot(replica, 0) == [r.Quiesce()]
        captured(replica, f"s{number + 1}")


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (SnapshotError("x"), r.Verdict.SUSPECT),
        (EngineError("x"), r.Verdict.SUSPECT),
        (DeadlineError("x"), r.Verdict.SUSPECT),
        (DamagedError("x"), r.Verdict.BAD),
        (IncompatibleError("x"), r.Verdict.UNFIT),
        (NotFoundError("x"), r.Verdict.UNFIT),
        (UntrustedError("x"), r.Verdict.UNFIT),
        (HostError("x"), r.Verdict.INNOCENT),
        (DiskFullError("x"), r.Verdict.INNOCENT),
        (WeightsError("x"), r.Verdict.INNOCENT),
        (StoreError("x"), r.Verdict.INNOCENT),
        (BusyError("x", retry_after=1), r.Verdict.INNOCENT),
    ],
)
def test_what_becomes_of_a_snapshot_depends_on_whose_fault_it_was(error: DormouseError, verdict: r.Verdict) -> None:
    assert r.judge(error) is verdict
    replica = new_replica(snapshot_id="s")
    replica.handle(r.Request(1), 0.0)
    effects = replica.handle(r.Failed(error), 0.5)
    at_once = verdict is r.Verdict.SUSPECT and not isinstance(error, DeadlineError)
    assert isinstance(effects[-1], r.Restore if at_once else r.StartCold)
    assert any(isinstance(effect, r.Quarantine) for effect in effects) is (verdict is r.Verdict.BAD)
    kept = verdict in (r.Verdict.SUSPECT, r.Verdict.INNOCENT)
    assert replica.snapshot_id == ("s" if kept else None)


def test_snapshot_is_not_blamed_for_what_came_after_its_restore() -> None:
    replica = new_replica(snapshot_id="s")
    replica.handle(r.Request(1), 0.0)
    error = DamagedError("the weights are damaged")
    assert replica.handle(r.Failed(error, restored=True), 1.0) == [r.Fallback("snapshot", "s", error), r.StartCold()]
    assert replica.snapshot_id == "s"


def test_without_a_snapshot_a_template_is_the_start_path() -> None:
    replica = new_replica()
    replica.handle(r.OfferTemplate("t"), 0.0)
    assert replica.handle(r.Request(1), 1.0) == [r.RestoreTemplate("t")]
    start = Start("template", 1.0)
    assert replica.handle(r.Done(), 2.0) == [r.Ready(start, Phases(0.0)), r.Serve(1, start)]


def test_own_snapshot_comes_before_the_template_and_the_template_before_cold() -> None:
    replica = new_replica(snapshot_id="s")
    replica.handle(r.OfferTemplate("t"), 0.0)
    assert replica.handle(r.Request(1), 1.0) == [r.Restore("s")]
    error = DamagedError("flipped")
    effects = replica.handle(r.Failed(error), 2.0)
    assert effects == [r.Quarantine("s", error), r.Fallback("snapshot", "s", error), r.RestoreTemplate("t")]
    effects = replica.handle(r.Failed(error), 3.0)
    assert effects == [r.Quarantine("t", error), r.Fallback("template", "t", error), r.StartCold()]
    assert replica.handle(r.Done(), 5.0)[-1] == r.Serve(1, Start("cold", 4.0))


def test_template_is_not_blamed_for_a_model_that_cannot_be_loaded() -> None:
    replica = new_replica()
    replica.handle(r.OfferTemplate("t"), 0.0)
    replica.handle(r.Request(1), 1.0)
    error = EngineError("no such file")
    effects = replica.handle(r.Failed(error, restored=True), 2.0)
    assert effects == [r.Fallback("template", "t", error), r.StartCold()]


def test_template_of_another_host_is_replaced_without_quarantine() -> None:
    replica = new_replica()
    replica.handle(r.OfferTemplate("t"), 0.0)
    replica.handle(r.Request(1), 1.0)
    error = IncompatibleError("other kernel")
    effects = replica.handle(r.Failed(error), 2.0)
    assert effects == [r.Discard("t"), r.Fallback("template", "t", error), r.StartCold()]


def test_without_snapshots_no_template_is_used() -> None:
    replica = new_replica(snapshots=False)
    replica.handle(r.OfferTemplate("t"), 0.0)
    replica.handle(r.Offer("s"), 0.0)
    assert replica.handle(r.Request(1), 1.0) == [r.StartCold()]


def test_withdrawn_snapshot_is_not_used_and_a_released_one_is() -> None:
    replica = new_replica(snapshot_id="s")
    replica.handle(r.Withdraw("other"), 0.0)
    assert replica.snapshot_id == "s"
    replica.handle(r.Withdraw("s"), 0.0)
    assert replica.snapshot_id is None
    replica.handle(r.Offer("s"), 0.0)
    assert replica.handle(r.Request(1), 1.0) == [r.Restore("s")]


def test_a_new_snapshot_can_be_asked_for_where_there_is_one() -> None:
    replica = ready_replica(snapshot_id="s")
    assert replica.handle(r.Sleep(capture=True), 3.0) == [r.Quiesce()]
    replica.handle(r.Done(), 3.1)
    replica.handle(r.Done(snapshot_id="s2"), 3.2)
    assert (replica.state, replica.snapshot_id, replica.sleeps) == (State.ASLEEP, "s2", 1)


def test_asking_for_a_snapshot_tries_again_after_many_failures() -> None:
    replica = ready_replica()
    for _ in range(r.MAX_CAPTURE_FAILURES):
        replica.handle(r.Sleep(), 3.0)
        replica.handle(r.Done(), 3.0)
        assert replica.handle(r.Failed(DiskFullError("no room")), 3.0)[-1] == r.Stop()
        replica.handle(r.Done(), 3.0)
        replica.handle(r.Request(1), 4.0)
        replica.handle(r.Done(), 4.0)
        replica.handle(r.Leave(1), 4.0)
    assert replica.handle(r.Sleep(capture=True), 5.0) == [r.Quiesce()]


def test_failed_cold_start_fails_everyone_who_waits_and_the_next_tries_again() -> None:
    replica = new_replica()
    replica.handle(r.Request(1), 0.0)
    replica.handle(r.Request(2), 0.0)
    error = EngineError("no such file")
    assert replica.handle(r.Failed(error), 1.0) == [r.Fail(1, error), r.Fail(2, error)]
    assert replica.state is State.ASLEEP and replica.last_error is error
    assert replica.handle(r.Request(3), 2.0) == [r.StartCold()]


def test_request_while_quiescing_resumes_at_once() -> None:
    replica = ready_replica()
    replica.handle(r.Tick(), 12.0)
    assert replica.handle(r.Request(1), 12.01) == []
    assert replica.handle(r.Done(), 12.05) == [r.Resume()]
    (serve,) = replica.handle(r.Done(), 12.06)
    assert isinstance(serve, r.Serve) and serve.start.path == "hot"
    assert math.isclose(serve.start.seconds, 0.05)


def test_request_while_capturing_waits_for_the_restore() -> None:
    replica = ready_replica()
    replica.handle(r.Tick(), 12.0)
    replica.handle(r.Done(), 12.1)
    assert replica.handle(r.Request(1), 12.2) == []
    assert replica.handle(r.Done(snapshot_id="s"), 12.5) == [r.Restore("s")]
    assert replica.handle(r.Done(), 13.5)[-1] == r.Serve(1, Start("snapshot", 1.0))


def test_failed_capture_resumes_and_is_tried_later_and_later_then_given_up() -> None:
    replica = ready_replica()
    now = 12.0
    error = DiskFullError("no room")
    for attempt in range(r.MAX_CAPTURE_FAILURES):
        assert replica.handle(r.Tick(), now) == [r.Quiesce()]
        replica.handle(r.Done(), now)
        assert replica.handle(r.Failed(error), now) == [r.CaptureFailed(error), r.Resume()]
        replica.handle(r.Done(), now)
        assert replica.deadline == now + 10.0 * 2 ** (attempt + 1)
        now = replica.deadline
    assert replica.handle(r.Tick(), now) == [r.Stop()]


def test_failed_capture_and_failed_resume_kill_the_worker() -> None:
    replica = ready_replica()
    replica.handle(r.Tick(), 12.0)
    replica.handle(r.Done(), 12.1)
    replica.handle(r.Failed(DiskFullError("no room")), 12.2)
    assert replica.handle(r.Failed(EngineError("stuck")), 12.3) == [r.Stop()]


def test_dead_worker_is_cleared_away_and_waiters_get_a_new_one() -> None:
    replica = ready_replica(max_concurrent=1)
    replica.handle(r.Request(1), 3.0)
    replica.handle(r.Request(2), 3.0)
    assert replica.handle(r.WorkerDied(EngineError("killed")), 4.0) == [r.Stop()]
    assert replica.handle(r.Done(), 4.1) == [r.StartCold()]
    replica.handle(r.Leave(1), 4.2)
    assert replica.handle(r.Done(), 5.0)[-1] == r.Serve(2, Start("cold", 5.0 - 4.1))


def test_worker_that_cannot_be_stopped_is_tried_again_and_nobody_waits_for_it() -> None:
    replica = ready_replica(snapshot_id="s")
    replica.handle(r.Tick(), 12.0)
    replica.handle(r.Request(1), 12.1)
    error = EngineError("unkillable")
    assert replica.handle(r.Failed(error), 12.2) == [r.Fail(1, error)]
    assert replica.deadline == 12.2 + r.STOP_RETRY
    assert replica.handle(r.Tick(), replica.deadline) == [r.Stop()]


def test_shutdown_fails_waiters_stops_and_refuses() -> None:
    replica = new_replica()
    replica.handle(r.Request(1), 0.0)
    (failed,) = replica.handle(r.Shutdown(), 0.5)
    assert isinstance(failed, r.Fail) and isinstance(failed.error, StoppingError)
    assert replica.handle(r.Done(), 1.0)[-1] == r.Stop()
    replica.handle(r.Done(), 1.1)
    (refused,) = replica.handle(r.Request(2), 2.0)
    assert isinstance(refused, r.Fail) and isinstance(refused.error, StoppingError)
    assert replica.state is State.ASLEEP


def dozing_replica(**options: float | bool | str | None) -> Replica:
    """One whose process stayed when it fell asleep, with the snapshot `s`."""
    replica = ready_replica(dozes=True, snapshot_id="s", **options)
    assert replica.handle(r.Tick(), 12.0) == [r.Quiesce()]
    assert replica.handle(r.Done(keep=True), 12.1) == []
    assert (replica.state, replica.deadline, replica.sleeps) == (State.DOZING, None, 1)
    return replica


def test_first_idle_captures_and_the_process_stays() -> None:
    replica = ready_replica(dozes=True)
    assert replica.handle(r.Tick(), 12.0) == [r.Quiesce()]
    assert replica.handle(r.Done(keep=True), 12.1) == [r.Capture(keep=True)]
    assert replica.handle(r.Done(snapshot_id="s"), 12.5) == []
    assert (replica.state, replica.snapshot_id) == (State.DOZING, "s")


def test_a_process_that_has_no_room_is_ended_as_ever() -> None:
    replica = ready_replica(dozes=True)
    replica.handle(r.Tick(), 12.0)
    assert replica.handle(r.Done(keep=False), 12.1) == [r.Capture()]
    replica.handle(r.Done(snapshot_id="s"), 12.5)
    assert replica.state is State.ASLEEP
    replica.handle(r.Request(1), 13.0)
    replica.handle(r.Done(), 14.0)
    replica.handle(r.Leave(1), 14.0)
    assert replica.handle(r.Tick(), 24.0) == [r.Quiesce()], "what it takes is known only when it is parked"
    assert replica.handle(r.Done(keep=False), 24.1) == [r.Stop()]


def test_a_request_wakes_the_process_by_the_path_sleep() -> None:
    replica = dozing_replica()
    assert replica.handle(r.Request(1), 20.0) == [r.Wake()]
    assert replica.state is State.WAKING
    start = Start("sleep", 0.5)
    assert replica.handle(r.Done(phases={"resume": 0.5}), 20.5) == [r.Ready(start, {"resume": 0.5}), r.Serve(1, start)]


def test_a_wake_that_fails_falls_back_to_the_snapshot_and_on() -> None:
    replica = dozing_replica()
    replica.handle(r.OfferTemplate("t"), 13.0)
    replica.handle(r.Request(1), 20.0)
    error = EngineError("killed")
    assert replica.handle(r.Failed(error), 20.5) == [r.Fallback("sleep", "", error), r.Restore("s")]
    damage = DamagedError("flipped")
    effects = replica.handle(r.Failed(damage), 21.0)
    assert effects == [r.Quarantine("s", damage), r.Fallback("snapshot", "s", damage), r.RestoreTemplate("t")]
    assert replica.handle(r.Done(), 22.0)[-1] == r.Serve(1, Start("template", 2.0))


def test_a_wake_that_fails_when_nobody_waits_any_more_leaves_it_asleep() -> None:
    replica = dozing_replica()
    replica.handle(r.Request(1), 20.0)
    replica.handle(r.Leave(1), 20.1)
    error = EngineError("killed")
    assert replica.handle(r.Failed(error), 20.5) == [r.Fallback("sleep", "", error)]
    assert (replica.state, replica.snapshot_id) == (State.ASLEEP, "s")


def test_a_wake_that_nobody_wants_any_more_leaves_the_process_as_it_was() -> None:
    replica = dozing_replica()
    replica.handle(r.Request(1), 20.0)
    replica.handle(r.Leave(1), 20.1)
    assert replica.handle(r.Abandoned(), 20.2) == []
    assert replica.state is State.DOZING
    assert replica.handle(r.Request(2), 21.0) == [r.Wake()]


def test_a_process_whose_room_is_needed_is_ended_and_restored_later() -> None:
    replica = dozing_replica()
    assert replica.handle(r.Sleep(), 20.0) == [r.Stop()]
    replica.handle(r.Done(), 20.1)
    assert replica.handle(r.Request(1), 21.0) == [r.Restore("s")]


@pytest.mark.parametrize("when", ["quiescing", "capturing"])
def test_a_process_whose_room_is_needed_meanwhile_does_not_stay(when: str) -> None:
    replica = ready_replica(dozes=True)
    replica.handle(r.Tick(), 12.0)
    if when == "quiescing":
        replica.handle(r.Sleep(), 12.05)
        assert replica.handle(r.Done(keep=True), 12.1) == [r.Capture()]
        assert replica.handle(r.Done(snapshot_id="s"), 12.5) == []
    else:
        assert replica.handle(r.Done(keep=True), 12.1) == [r.Capture(keep=True)]
        replica.handle(r.Sleep(), 12.2)
        assert replica.handle(r.Done(snapshot_id="s"), 12.5) == [r.Stop()]
        replica.handle(r.Done(), 12.6)
    assert (replica.state, replica.snapshot_id) == (State.ASLEEP, "s")


def test_a_request_during_a_capture_after_which_the_process_stays_waits_for_no_restore() -> None:
    replica = ready_replica(dozes=True)
    replica.handle(r.Tick(), 12.0)
    replica.handle(r.Done(keep=True), 12.1)
    replica.handle(r.Request(1), 12.2)
    assert replica.handle(r.Done(snapshot_id="s"), 12.5) == [r.Wake()]


def test_a_failed_capture_lets_the_process_doze_and_is_tried_again_the_next_time() -> None:
    replica = ready_replica(dozes=True)
    error = DiskFullError("no room")
    for attempt in range(r.MAX_CAPTURE_FAILURES):
        now = 100.0 * (attempt + 1)
        replica.handle(r.Sleep(keep=True), now)
        assert replica.handle(r.Done(keep=True), now) == [r.Capture(keep=True)]
        assert replica.handle(r.Failed(error), now) == [r.CaptureFailed(error)]
        assert (replica.state, replica.snapshot_id) == (State.DOZING, None)
        assert replica.handle(r.Request(attempt), now) == [r.Wake()]
        replica.handle(r.Done(), now)
        replica.handle(r.Leave(attempt), now)
    replica.handle(r.Sleep(keep=True), 900.0)
    assert replica.handle(r.Done(keep=True), 900.0) == [], "no capture any more, but the process may stay"
    assert replica.state is State.DOZING


def test_the_death_of_a_process_that_dozes_costs_nothing_but_the_process() -> None:
    replica = new_replica(snapshot_id="s", dozes=True)
    for waiter in range(4):
        assert replica.handle(r.Request(waiter), 0.0) == [r.Restore("s")]
        replica.handle(r.Leave(waiter), 0.5)
        replica.handle(r.Done(), 1.0)  # and so it has not answered anyone
        replica.handle(r.Sleep(keep=True), 1.1)
        replica.handle(r.Done(keep=True), 1.2)
        assert replica.handle(r.WorkerDied(EngineError("killed")), 2.0) == [r.Stop()]
        replica.handle(r.Done(), 2.1)
        assert (replica.state, replica.snapshot_id) == (State.ASLEEP, "s")


def test_a_snapshot_can_be_asked_for_while_it_dozes() -> None:
    replica = dozing_replica()
    assert replica.handle(r.Sleep(capture=True), 20.0) == [r.Capture()]
    replica.handle(r.Done(snapshot_id="s2"), 20.5)
    assert (replica.state, replica.snapshot_id) == (State.ASLEEP, "s2")


def test_a_quiescing_that_fails_with_a_valid_snapshot_is_no_failed_capture() -> None:
    replica = ready_replica(dozes=True, snapshot_id="s")
    replica.handle(r.Tick(), 12.0)
    assert replica.handle(r.Failed(EngineError("stuck")), 12.1) == [r.Stop()]
    replica.handle(r.Done(), 12.2)
    assert (replica.state, replica.snapshot_id) == (State.ASLEEP, "s")


def test_shutdown_ends_a_process_that_dozes() -> None:
    replica = dozing_replica()
    assert replica.handle(r.Shutdown(), 20.0) == [r.Stop()]


OPERATIONS = (r.StartCold, r.Restore, r.RestoreTemplate, r.Wake, r.Quiesce, r.Capture, r.Resume, r.Stop)
STARTS = (r.StartCold, r.Restore, r.RestoreTemplate)
ERRORS: tuple[DormouseError, ...] = (
    EngineError("by chance"),
    SnapshotError("by chance"),
    DamagedError("by chance"),
    IncompatibleError("by chance"),
    HostError("by chance"),
    DeadlineError("by chance"),
)


def test_a_snapshot_that_was_replaced_while_it_was_restored_is_followed_by_the_newer_one() -> None:
    replica = new_replica(snapshot_id="s1")
    assert replica.handle(r.Request(1), 0.0) == [r.Restore("s1")]
    assert replica.handle(r.Renew("s2"), 0.1) == []
    gone = NotFoundError("there is no snapshot s1")
    assert replica.handle(r.Failed(gone), 0.2) == [r.Fallback("snapshot", "s1", gone), r.Restore("s2")]
    assert replica.handle(r.Failed(gone), 0.3) == [r.Fallback("snapshot", "s2", gone), r.StartCold()]


def test_what_is_not_the_snapshots_fault_is_no_reason_to_try_a_newer_one() -> None:
    replica = new_replica(snapshot_id="s1")
    replica.handle(r.Request(1), 0.0)
    replica.handle(r.Renew("s2"), 0.1)
    full = HostError("no memory")
    assert replica.handle(r.Failed(full), 0.2) == [r.Fallback("snapshot", "s1", full), r.StartCold()]
    assert replica.snapshot_id == "s2"


def test_one_is_captured_at_a_time_and_the_others_sleep_without() -> None:
    beside = True
    replica = ready_replica(captured_beside=lambda: beside)
    assert replica.handle(r.Sleep(), 3.0) == [r.Stop()] and not replica.capturing
    assert replica.handle(r.Done(), 4.0) == []
    assert replica.handle(r.Request(5), 5.0) == [r.StartCold()]
    replica.handle(r.Done(), 6.0)
    replica.handle(r.Leave(5), 7.0)
    assert replica.handle(r.Sleep(capture=True), 8.0) == [r.Quiesce()]  # somebody wants just that
    assert replica.capturing


class AnyOrder(RuleBasedStateMachine):
    """The world around a replica, doing whatever it may do in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.replica = new_replica(max_concurrent=2, dozes=True, captured_beside=lambda: self.beside)
        self.operation: r.Operation | None = None
        self.workers = 0
        self.parked = False
        self.waiting: set[int] = set()
        self.served: set[int] = set()
        self.next_waiter = 0
        self.began: dict[int, float] = {}
        self.ready_at = -1.0
        self.word_due = self.retried = False
        self.restored: str | None = None
        self.closing = self.hopeless = self.proven = self.beside = False
        self.ids = 0
        self.quarantined: set[str] = set()
        self.suspicions: dict[str, int] = {}

    def send(self, event: r.Event) -> None:
        self.now += 0.25
        if isinstance(event, r.Done | r.Failed | r.Abandoned):
            self.operation = None
        self.retried = False
        for effect in self.replica.handle(event, self.now):
            self.take(effect)

    def take(self, effect: r.Effect) -> None:
        match effect:
            case r.Serve():
                assert self.workers == 1 and not self.parked and self.operation is None
                self.waiting.remove(effect.waiter)
                self.served.add(effect.waiter)
                began = self.began[effect.waiter]
                assert began >= self.ready_at or effect.start == self.replica.last_start, "waited for a start, untold"
                if effect.start.path == "hot":
                    assert effect.start.seconds == self.now - began and began >= self.ready_at
            case r.Fail():
                self.waiting.remove(effect.waiter)
            case r.Fallback():
                assert self.word_due or self.retried
                self.word_due = False
            case r.Retry():
                assert effect.snapshot_id not in self.quarantined
                self.word_due, self.retried = False, True
            case r.Quarantine():
                assert effect.snapshot_id not in self.quarantined, "quarantined twice"
                self.quarantined.add(effect.snapshot_id)
            case r.Ready():
                assert self.workers == 1
                self.ready_at = self.now
            case r.CaptureFailed() | r.Discard():
                pass
            case r.GiveUp():
                self.hopeless = True
            case _:
                self.begin(effect)

    def begin(self, effect: r.Operation) -> None:
        assert isinstance(effect, OPERATIONS)
        assert self.operation is None, "two operations at once"
        assert not self.word_due, "another start after a bad snapshot without a word"
        if isinstance(effect, STARTS):
            assert self.workers == 0, "two workers"
        if isinstance(effect, r.Restore):
            assert effect.snapshot_id not in self.quarantined, "a quarantined snapshot is used"
            assert self.suspicions.get(effect.snapshot_id, 0) < 2, "a third try"
        if isinstance(effect, r.RestoreTemplate):
            assert effect.template_id not in self.quarantined, "a quarantined template is used"
        if isinstance(effect, r.Capture):
            assert not self.hopeless, "captured although no capture was any good"
            assert self.replica.capturing
        if isinstance(effect, r.Quiesce | r.Capture):
            assert not self.served, "captured with a request in flight"
        if isinstance(effect, r.Capture | r.Resume | r.Wake):
            assert self.workers == 1 and self.parked
        if isinstance(effect, r.Stop):
            self.served.clear()
        self.operation = effect

    @rule(waited=st.none() | st.sampled_from([0.0, 0.2, 1.0, 5.0]))
    def request(self, waited: float | None) -> None:
        self.waiting.add(self.next_waiter)
        self.next_waiter += 1
        since = None if waited is None else max(self.now - waited, 0.0)
        self.began[self.next_waiter - 1] = self.now + 0.25 if since is None else since
        self.send(r.Request(self.next_waiter - 1, since))

    @rule(pick=st.integers(0))
    def leave(self, pick: int) -> None:
        if everyone := sorted(self.waiting | self.served):
            waiter = everyone[pick % len(everyone)]
            if waiter in self.served:
                self.suspicions.clear()
                self.hopeless &= self.restored is None
            self.waiting.discard(waiter)
            self.served.discard(waiter)
            self.send(r.Leave(waiter))

    @precondition(lambda self: self.operation is not None)
    @rule(judged=st.booleans(), room=st.booleans())
    def succeed(self, judged: bool, room: bool) -> None:
        operation = self.operation
        self.proven = isinstance(operation, r.Restore) and judged
        if self.proven:
            self.suspicions.clear()
            self.hopeless = False
        match operation:
            case r.StartCold() | r.Restore() | r.RestoreTemplate():
                self.workers, self.parked = 1, False
                self.restored = operation.snapshot_id if isinstance(operation, r.Restore) else None
            case r.Quiesce():
                self.parked = True
            case r.Resume():
                self.parked = False
            case r.Wake():
                self.parked, self.restored = False, None
            case r.Capture() | r.Stop():
                self.workers = int(isinstance(operation, r.Capture) and operation.keep)
        captured = self.new_id("s") if isinstance(operation, r.Capture) else None
        keep = room and isinstance(operation, r.Quiesce)
        self.send(r.Done(snapshot_id=captured, proven=self.proven, keep=keep))
        if isinstance(operation, r.Capture) and self.operation is None:
            assert self.replica.state is (State.DOZING if operation.keep else State.ASLEEP)

    @precondition(lambda self: self.operation is not None)
    @rule(error=st.sampled_from(ERRORS), restored=st.booleans())
    def fail(self, error: DormouseError, restored: bool) -> None:
        operation = self.operation
        self.word_due = isinstance(operation, r.Restore | r.RestoreTemplate | r.Wake)
        if isinstance(operation, r.Wake):
            self.workers = 0
        if isinstance(operation, r.Restore) and r.judge(error) is r.Verdict.SUSPECT and not restored:
            self.suspect(operation.snapshot_id)
        self.send(r.Failed(error, restored=restored))
        assert not self.word_due

    def suspect(self, snapshot_id: str) -> None:
        self.suspicions[snapshot_id] = self.suspicions.get(snapshot_id, 0) + 1

    def new_id(self, prefix: str) -> str:
        self.ids += 1
        return f"{prefix}{self.ids}"

    @rule()
    def offer(self) -> None:
        self.hopeless = False
        self.send(r.Offer(self.new_id("s")))

    @rule()
    def renew(self) -> None:
        self.send(r.Renew(self.new_id("s")))
        if self.replica.state not in (State.ASLEEP, State.DOZING, State.READY) or self.operation is None:
            assert self.replica.snapshot_id == f"s{self.ids}"

    @rule(beside=st.booleans())
    def another_is_captured(self, beside: bool) -> None:
        self.beside = beside

    @rule()
    def withdraw(self) -> None:
        if self.replica.snapshot_id is not None:
            self.send(r.Withdraw(self.replica.snapshot_id))
            assert self.replica.snapshot_id is None

    @rule(there=st.booleans())
    def offer_template(self, there: bool) -> None:
        self.send(r.OfferTemplate(self.new_id("t") if there else None))

    @precondition(lambda self: isinstance(self.operation, STARTS) and not self.waiting)
    @rule()
    def abandon(self) -> None:
        self.send(r.Abandoned())

    @precondition(lambda self: isinstance(self.operation, r.Wake) and not self.waiting)
    @rule()
    def abandon_a_wake(self) -> None:
        self.send(r.Abandoned())
        assert self.replica.state is State.DOZING or isinstance(self.operation, r.Stop | r.Capture)

    @precondition(lambda self: self.replica.state in (State.READY, State.DOZING))
    @rule()
    def die(self) -> None:
        self.served.clear()
        if self.restored is not None and not self.proven and self.replica.state is State.READY:
            self.suspect(self.restored)
        self.send(r.WorkerDied(EngineError("killed")))

    @rule(capture=st.booleans(), keep=st.booleans())
    def press(self, capture: bool, keep: bool) -> None:
        self.hopeless &= not (capture and self.replica.state is not State.ASLEEP)
        dozes = self.replica.state is State.DOZING
        self.send(r.Sleep(capture, keep))
        assert not dozes or (self.replica.state is State.DOZING) is (keep and not capture)

    @rule()
    def tick(self) -> None:
        if self.replica.deadline is not None:
            self.now = max(self.now, self.replica.deadline)
        self.send(r.Tick())

    @precondition(lambda self: self.next_waiter > 5)
    @rule()
    def shut_down(self) -> None:
        self.closing = True
        self.send(r.Shutdown())

    @invariant()
    def whoever_waits_is_waited_for(self) -> None:
        assert self.replica.waiting == len(self.waiting)
        assert self.replica.in_flight == len(self.served)
        if self.waiting:
            retry = self.replica.state is State.STOPPING and self.replica.deadline is not None
            full = self.replica.state is State.READY and len(self.served) == 2
            assert self.operation is not None or retry or full

    @invariant()
    def asleep_means_no_worker(self) -> None:
        if self.replica.state is State.ASLEEP:
            assert self.workers == 0 and self.operation is None
        if self.replica.state is State.DOZING:
            assert self.workers == 1 and self.parked and self.operation is None and not self.closing
        if self.closing:
            assert not self.waiting

    def teardown(self) -> None:
        """Whatever happened: when all goes well from here on, everyone is served or failed and nothing stays."""
        for _ in range(120):
            if self.operation is not None:
                self.succeed(False, False)
            elif self.served:
                self.leave(0)
            elif self.replica.state is not State.ASLEEP:
                self.press(False, False)
                self.tick()
        assert not self.waiting and not self.served and self.workers == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
