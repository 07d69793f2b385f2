"""What a start of this node has to teach: its phases, cut into the parts that estimates are made of.

    room | host, load ... (a process comes back)  | resume, canary ...
         | weights segment .............. |       |
         0                    process and image -> |  ready -> the end

A start begins when there is room for it. The process is there when it waits for its weights (the step `….weights`) or,
where none are waited for, when the host is done with it. What of this was reading and feeding images is the image's,
the rest the process'. All that follows both is "ready". So the parts add up to the whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from dormouse.phases import Phase, Phases
from dormouse.schedule.cluster import Link, ModelCost, Move, PhaseName, StartPath, StartPlan
from dormouse.schedule.estimate import Estimate, Observed, Transferred, shared, sources

_IMAGE: dict[StartPath, tuple[str, ...]] = {
    "snapshot": ("host.criu images", "host.fill ahead", "host.criu finish", "host.fill"),
    "template": ("host.criu images", "host.fill ahead", "host.criu finish", "host.fill"),
    "cold": ("load.import",),
}
"""The steps in which an image is read, by path."""


def seconds_of(phases: Phases) -> float:
    """How long a start took once there was room for it."""
    return max(_end(phases.steps) - _began(phases.steps), 0.0)


def observed(
    model: ModelCost,
    node: str,
    plan: StartPlan,
    phases: Phases,
    *,
    expected: Estimate | None = None,
    links: dict[str, Link] | None = None,
) -> Observed:
    """A start by `plan`, from its phases. `links` are those of the node as they were when it began."""
    steps, began = phases.steps, _began(phases.steps)
    end = max(_end(steps), began)
    there = max(began, min(_process_end(steps), end))
    weights_end = max([began, *(step.end for step in steps if step.name.endswith(".segment"))])
    image = _overlapped(step for step in steps if step.name in _IMAGE.get(plan.path, ()))
    image = min(image, there - began) if plan.image is not None and plan.image.size else 0.0
    transfers = []
    if plan.image is not None and image:
        transfers.append(_transferred(plan.image, image, links, plan.weights))
    if plan.weights is not None and plan.weights.size and weights_end > began:
        transfers.append(_transferred(plan.weights, weights_end - began, links, plan.image))
    parts: tuple[tuple[PhaseName, float], ...] = (
        ("process", there - began - image),
        ("ready", end - max(there, weights_end)),
    )
    return Observed(
        model.name,
        model.engine,
        node,
        plan.path,
        end - began,
        tuple(transfers),
        parts,
        expected.mean if expected else None,
        sources=sources(plan),
        pace=expected.pace if expected else None,
    )


def _transferred(move: Move, seconds: float, links: dict[str, Link] | None, beside: Move | None) -> Transferred:
    """The seconds are the first link's, where the bytes come from; what follows keeps up with it or is counted in."""
    link = (links or {}).get(move.links[0])
    ahead = (link.ahead(move.size) if link else 0) + shared(beside, move.links[0], move.size)
    return Transferred(move.name, move.links[:1], move.size, seconds, ahead)


def _began(steps: Iterable[Phase]) -> float:
    return next((step.end for step in steps if step.name == "room"), 0.0)


def _end(steps: Iterable[Phase]) -> float:
    return max((step.end for step in steps), default=0.0)


def _process_end(steps: list[Phase]) -> float:
    """When the process was there: when it began to wait for its weights."""
    waits = [step.start for step in steps if step.name in ("load.weights", "resume.weights")]
    hosts = [step.end for step in steps if step.name in ("host", "segments", "load")]
    return min(waits) if waits else max(hosts, default=_end(steps))


def _overlapped(steps: Iterable[Phase]) -> float:
    """The seconds in which any of these steps ran."""
    total, until = 0.0, float("-inf")
    for step in sorted(steps, key=lambda one: one.start):
        total += max(step.end - max(step.start, until), 0.0)
        until = max(until, step.end)
    return total
