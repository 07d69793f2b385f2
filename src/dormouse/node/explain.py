"""What a node would do next, and what it did, as plain data: for `dormouse ls --why`, `dormouse explain`, admin API.

Forecast, Keeping, schedule.place  ->  JSON-ready dicts (catalogue.py makes tables of them)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dormouse.node.forecast import Forecast, Standing, estimate_json
from dormouse.node.keeping import Keeping
from dormouse.node.replica import State as Doing
from dormouse.schedule.cluster import Cluster, Request, StartPath
from dormouse.schedule.place import Decision, Option, place

PATHS: tuple[StartPath, ...] = ("sleep", "snapshot", "template", "cold")
"""In the order in which a node tries them."""
_STEPS_DOWN = (Doing.READY, Doing.DOZING)
_THERE = (Doing.READY, Doing.STARTING, Doing.RESTORING, Doing.WAKING, Doing.RESUMING)


def outlook(one: Standing, path: StartPath, view: Cluster, forecast: Forecast, keeping: Keeping) -> dict[str, Any]:
    """The path of its next start, how long that should take, and what it steps down to while nobody asks."""
    idle = one.doing in _STEPS_DOWN and not (one.running or one.waiting)
    step = keeping.next_step(one.name, asleep=one.doing is Doing.DOZING) if idle else None
    why = keeping.why(one.model)
    return {
        "name": one.model,
        "state": one.doing.value,
        "path": path,
        **estimate_json(forecast.estimate(one, path, view)),
        "step": {"to": step.to, "at": step.at} if step is not None else None,
        "why": f"{why}, until its room is needed" if idle and step is None and not one.pinned else why,
    }


def explanation(
    one: Standing, path: StartPath, view: Cluster, forecast: Forecast, keeping: Keeping, now: float
) -> dict[str, Any]:
    """The decision that a request would get now with its alternatives, the paths that are open, and latest starts."""
    request = Request("next", one.model, now)
    decision = place(request, view, forecast.estimator, now, worth=keeping.worth(view))
    return {
        **outlook(one, path, view, forecast, keeping),
        "paths": list(_open_paths(one, view, forecast)),
        "decision": decision_json(decision),
        "latest": [told.as_json() for told in forecast.told(one.model)],
    }


def _open_paths(one: Standing, view: Cluster, forecast: Forecast) -> Iterable[dict[str, Any]]:
    for path in PATHS:
        found = forecast.estimate(one, path, view) if path != "sleep" or one.doing is Doing.DOZING else None
        if found is not None and one.doing not in _THERE:
            yield {"path": path, **estimate_json(found)}


def decision_json(decision: Decision) -> dict[str, Any]:
    """As plain data."""
    chosen = decision.chosen
    return {
        "why": decision.why(),
        "chosen": option_json(chosen) if chosen is not None else None,
        "alternatives": [option_json(option) for option in decision.alternatives],
        "blocked": decision.blocked,
    }


def option_json(option: Option) -> dict[str, Any]:
    """As plain data."""
    return {
        "action": option.action,
        "path": option.path,
        "gpus": list(option.gpus),
        "seconds": option.seconds,
        "penalty": option.penalty,
        **estimate_json(option.estimate),
        "evicts": {one.replica: one.to for one in option.evict},
        "after": list(option.blockers),
    }
