"""The queue: order, priorities, caps, and nobody starves."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from dormouse.schedule.cluster import Cluster, Request, Running, State, Tier
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.place import Decision
from dormouse.schedule.queue import Fairness, Queue
from tests.schedule.clusters import Keeper, busy, check_memory, clusters, hot, lay, model, node


def one_place(slots: int = 1) -> Cluster:
    """One GPU that a busy replica of another model has; m fits when that has gone."""
    view = Cluster([node("a")], [model("m", 60, slots=slots), model("n", 60), model("other", 60)])
    for name in ("m", "n"):
        lay(view, view.model(name), "a")
    view.put(replace(busy("r", "other", "a", until=9.0), requests=(Running("x", 0.0, movable=False),)))
    return view


def served(queue: Queue, keeper: Keeper) -> list[str]:
    """The names in the decisions of one dispatch, in order: placed, or another one's migration was begun for them."""
    return [decision.request.name for decision in decided(queue, keeper)]


def decided(queue: Queue, keeper: Keeper) -> list[Decision]:
    """The decisions of one dispatch."""
    decisions: list[Decision] = []

    def commit(decision: Decision) -> None:
        decisions.append(decision)
        keeper.commit(decision)

    queue.dispatch(keeper.view, Estimator(), keeper.now, commit)
    return decisions


def test_first_come_first_served_within_a_model() -> None:
    view = one_place(slots=4)
    keeper, queue = Keeper(view), Queue()
    for number in (2, 0, 1):
        queue.push(Request(f"q{number}", "m", float(number)))
    keeper.now = 3.0
    assert served(queue, keeper) == [] and len(queue) == 3
    keeper.advance(10.0)
    assert served(queue, keeper) == ["q0"]  # the replica that it starts is for the others, too, once it is ready
    keeper.advance(60.0)
    assert served(queue, keeper) == ["q1", "q2"]


def test_whichever_slot_is_free_first_takes_the_one_that_came_first() -> None:
    """Two replicas are busy; the one that was to be free last is free first."""
    view = Cluster([node("a"), node("b")], [model("m", 60)])
    view.put(busy("soon", "m", "a", until=4.0))
    view.put(busy("late", "m", "b", until=6.0))
    keeper, queue = Keeper(view), Queue()
    queue.push(Request("q0", "m", 0.0))
    queue.push(Request("q1", "m", 1.0))
    assert served(queue, keeper) == []
    view.put(hot("late", "m", "b"))
    assert served(queue, keeper) == ["q0"] and view.replica("late").requests[0].name == "q0"


def test_a_line_gets_a_replica_for_each_that_would_wait_longer() -> None:
    """The head waits for a slot that is free in a moment; those behind it would wait long, and there is room."""
    view = Cluster([node("a", 4)], [model("m", 60)])
    lay(view, view.model("m"), "a", Tier.DRAM)
    view.put(busy("r", "m", "a", until=0.2))
    keeper, queue = Keeper(view), Queue()
    for number in range(4):
        queue.push(Request(f"q{number}", "m", 0.0, expected_tokens=100))
    assert served(queue, keeper) == ["q3", "q2", "q1"] and queue.waiting("m") == 1
    keeper.advance(0.5)
    assert served(queue, keeper) == ["q0"]


def test_those_behind_wait_when_their_turn_comes_soon() -> None:
    view = Cluster([node("a", 4)], [model("m", 60, slots=4)])
    lay(view, view.model("m"), "a", Tier.DRAM)
    running = tuple(Running(f"x{number}", 0.0, 0, 10) for number in range(4))
    view.put(replace(busy("r", "m", "a", until=0.3), requests=running))
    keeper, queue = Keeper(view), Queue()
    for number in range(3):
        queue.push(Request(f"q{number}", "m", 0.0, expected_tokens=10))
    assert served(queue, keeper) == [] and len(list(view.replicas_of("m"))) == 1


def test_a_free_slot_is_used_however_many_wait_in_vain() -> None:
    """Models that wait for a place, older than a request whose model has a free slot."""
    names = [f"m{number}" for number in range(6)]
    view = Cluster([node("a"), node("b")], [model(name, 60) for name in (*names, "other", "mine")])
    for name in names:
        lay(view, view.model(name), "a")
    view.put(busy("r", "other", "a", until=50.0))
    view.put(busy("mine", "mine", "b", until=50.0))
    keeper, queue = Keeper(view), Queue(Fairness(blocked_models=2))
    for number, name in enumerate(names):
        queue.push(Request(f"q{number}", name, float(number)))
    queue.push(Request("late", "mine", 9.0))
    keeper.now = 10.0
    assert served(queue, keeper) == []
    view.put(hot("mine", "mine", "b"))
    assert served(queue, keeper) == ["late"]


def test_priority_is_a_head_start_of_some_seconds() -> None:
    for age, first in ((5.0, "high"), (15.0, "low")):
        view = one_place()
        keeper, queue = Keeper(view), Queue(Fairness(priority_seconds=10.0))
        queue.push(Request("low", "m", 0.0))
        queue.push(Request("high", "n", age, priority=1))
        keeper.advance(20.0)
        assert served(queue, keeper)[0] == first


def test_a_tenant_at_its_cap_is_passed_over() -> None:
    view = Cluster([node("a")], [model("m", slots=8)])
    view.put(hot("r", "m", "a"))
    keeper, queue = Keeper(view), Queue(Fairness(tenant_caps={"t": 1}))
    requests = [Request("t1", "m", 0.0, tenant="t"), Request("t2", "m", 1.0, tenant="t"), Request("u1", "m", 2.0)]
    for request in requests:
        queue.push(request)
    assert served(queue, keeper) == ["t1", "u1"]
    queue.finished(requests[0])
    assert served(queue, keeper) == ["t2"]


def test_what_is_given_up_leaves_its_claim() -> None:
    view = one_place()
    keeper, queue = Keeper(view), Queue()
    queue.push(Request("q", "m", 0.0))
    assert served(queue, keeper) == [] and view.claim_of("q")
    assert queue.remove("q", view) and not view.claim_of("q") and not queue.remove("q", view)


def test_a_migration_is_begun_once() -> None:
    view = Cluster([node("a"), node("b")], [model("m", 60), model("other", 60)])
    lay(view, view.model("m"), "a", Tier.DRAM)
    lay(view, view.model("other"), "b", Tier.DRAM)
    view.put(busy("r", "other", "a", until=100.0))
    keeper, queue = Keeper(view), Queue()
    queue.push(Request("q", "m", 0.0))
    assert served(queue, keeper) == ["q"]
    view.put(replace(view.replica("r"), expected=90.0))
    assert served(queue, keeper) == [] and len(queue) == 1
    view.drop("r")
    assert served(queue, keeper) == ["q"] and len(queue) == 0


def test_a_large_model_gets_its_place_among_many_small_ones() -> None:
    """Small requests keep all GPUs busy, one after the other; the one that needs them all must not wait forever."""
    view = Cluster([node("a", 4, 80)], [model("big", 200, 4), *(model(f"s{n}", 60) for n in range(8))])
    for name in view.models:
        lay(view, view.model(name), "a")
    keeper, queue = Keeper(view, service=4.0), Queue(Fairness(patience=10.0))
    done: list[str] = []
    for second in range(120):
        if second == 5:
            queue.push(Request("big", "big", 5.0))
        queue.push(Request(f"s{second}a", f"s{second % 8}", float(second)))
        queue.push(Request(f"s{second}b", f"s{(second + 3) % 8}", float(second)))
        keeper.advance(float(second))
        done += served(queue, keeper)
        if "big" in done:
            return
    raise AssertionError(f"big has not been served; {len(done)} others were")


@settings(max_examples=40, deadline=None)
@given(
    view=clusters(),
    arrivals=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(0, 2)), min_size=1, max_size=25),
)
def test_every_request_that_can_run_does(view: Cluster, arrivals: list[tuple[int, int, int]]) -> None:
    """With requests that end and no end of time, nothing is left but what no node could ever run."""
    names = sorted(view.models)
    keeper, queue = Keeper(view, service=3.0), Queue(Fairness(patience=5.0))
    for number, (which, at, priority) in enumerate(arrivals):
        queue.push(Request(f"q{number}", names[which % len(names)], float(at), priority))
    placed: list[str] = []
    for second in range(0, 3000, 5):
        keeper.advance(float(second))
        placed += [one.request.name for one in decided(queue, keeper) if one.chosen and one.chosen.action != "wait"]
        if not len(queue):
            break
    left = {f"q{number}": names[which % len(names)] for number, (which, _at, _p) in enumerate(arrivals)}
    assert len(placed) == len(set(placed))
    for name in placed:
        left.pop(name)
    assert not {one for one in left.values() if possible(view, one)}


@settings(max_examples=60, deadline=None)
@given(
    view=clusters(),
    arrivals=st.lists(
        st.tuples(*(st.integers(0, most) for most in (5, 60, 3, 2)), st.none() | st.integers(1, 40)),
        min_size=1,
        max_size=25,
    ),
)
def test_with_caps_and_a_view_made_anew_nobody_starves(
    view: Cluster, arrivals: list[tuple[int, int, int, int, int | None]]
) -> None:
    """As the node does it: free slots are taken past the queue, each dispatch sees another view with the claims of the
    last one, some give up. No tenant has more than its cap, and whatever can run does."""
    caps = {"t0": 1, "t1": 2}
    names, estimator = sorted(view.models), Estimator()
    keeper, queue = Keeper(view, service=3.0), Queue(Fairness(patience=5.0, tenant_caps=caps))
    running: dict[str, Request] = {}
    coming = [
        (float(at), Request(f"q{number}", names[which % len(names)], float(at), priority, f"t{tenant}"), patience)
        for number, (which, at, priority, tenant, patience) in enumerate(arrivals)
    ]
    gone: set[str] = set()

    def commit(decision: Decision) -> None:
        keeper.commit(decision)
        if decision.chosen and decision.chosen.action != "wait":
            running[decision.request.name] = decision.request

    for second in range(0, 3000, 2):
        for name in keeper.advance(float(second)):
            if name in running:
                queue.finished(running.pop(name))
                gone.add(name)
        for at, request, patience in coming:
            if second - 2 < at <= second:
                queue.push(request)
                free = next((one for one in view.soonest(request.model) if view.takes_now(request.model)), None)
                kept = free is not None and view.is_kept(free.node, free.gpus, "")
                if free is not None and not kept and queue.head(request.model) is request:
                    queue.take(request)
                    keeper._queue(request, free.name)
                    running[request.name] = request
            if patience is not None and at + patience <= second and queue.remove(request.name, view):
                gone.add(request.name)
        claims = list(view.claims)
        for claim in claims:
            view.release(claim.request)
        for claim in claims:
            view.claim(claim)
        queue.look_anew()
        queue.dispatch(view, estimator, keeper.now, commit)
        check_memory(view)
        for tenant, cap in caps.items():
            assert sum(one.tenant == tenant for one in running.values()) <= cap
        if second > 62 and not (len(queue) or running):
            break
    left = {request.model for _at, request, _patience in coming if request.name not in gone}
    assert not {name for name in left if possible(view, name)}
    assert not any(queue._running.values()) and not (queue._parked and not queue._requests)


def test_a_place_that_is_kept_is_the_heads_of_the_line() -> None:
    view = one_place()
    keeper, queue = Keeper(view), Queue()
    queue.push(Request("first", "m", 0.0))
    assert served(queue, keeper) == [] and view.claim_of("first")
    queue.push(Request("urgent", "m", 1.0, priority=1))
    assert served(queue, keeper) == [] and view.claim_of("urgent") and not view.claim_of("first")
    view.drop("r")
    assert served(queue, keeper)[0] == "urgent"


def test_a_place_kept_for_one_at_its_tenants_cap_is_free_for_others() -> None:
    view = one_place()
    keeper, queue = Keeper(view), Queue(Fairness(tenant_caps={"t": 1}))
    queue.push(Request("capped", "m", 0.0, tenant="t"))
    assert served(queue, keeper) == [] and view.claim_of("capped")
    taken(queue, Request("elsewhere", "other", 1.0, tenant="t"))
    queue.push(Request("q", "n", 2.0))
    view.drop("r")
    assert served(queue, keeper) == ["q"]


def test_one_of_a_capped_tenant_gets_the_turn_of_one_that_goes() -> None:
    view = one_place()
    keeper, queue = Keeper(view), Queue(Fairness(tenant_caps={"t": 1}))
    running = Request("running", "other", 0.0, tenant="t")
    taken(queue, running)
    queue.push(Request("t1", "m", 1.0, tenant="t"))
    queue.push(Request("t2", "m", 2.0, tenant="t"))
    assert served(queue, keeper) == []
    queue.finished(running)
    assert served(queue, keeper) == []  # it is t1's turn, but there is no place yet
    assert queue.remove("t1", view)
    view.drop("r")
    assert served(queue, keeper) == ["t2"]


def test_the_head_of_a_line_is_none_of_a_tenant_at_its_cap() -> None:
    queue = Queue(Fairness(tenant_caps={"t": 1}))
    one = Request("one", "m", 0.0, tenant="t")
    taken(queue, one)
    queue.push(Request("two", "m", 0.0, tenant="t"))
    assert queue.head("m") is None
    queue.push(Request("three", "m", 1.0))
    head = queue.head("m")
    assert head is not None and head.name == "three"
    queue.finished(one)
    head = queue.head("m")
    assert head is not None and head.name == "two"


def taken(queue: Queue, request: Request) -> None:
    """It gets a slot that is free."""
    queue.push(request)
    head = queue.head(request.model)
    assert head is request
    queue.take(head)


def possible(view: Cluster, name: str) -> bool:
    """Whether a node that has (or can fetch) a model could hold it when nothing else ran."""
    one = view.model(name)
    if any(replica.state is not State.SLEEPING for replica in view.replicas_of(name)):
        return True
    for where in view.nodes:
        sizes = enumerate(view.node(where).gpus)
        allowed = [size for gpu, size in sizes if not one.only_on or gpu in one.only_on]
        fits = len([size for size in allowed if size >= one.device_bytes]) >= one.gpus
        if fits and view.node(where).host_bytes >= one.host_bytes and view.nearest(one.weights.key, where) is not None:
            return True
    return False
