"""Pictures of a simulation: distributions of start-up latency, and what each GPU did when.

    Outcomes -> one file (PNG, SVG, or HTML with the picture in it)

matplotlib draws; it comes with `pip install 'dormouse[plot]'` and is imported only here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dormouse.errors import ConfigError, HostError
from dormouse.sim.run import Outcome

_KINDS = (".png", ".svg", ".html")
_COLOURS = {"idle": "lightgrey", "start": "tab:orange", "run": "tab:blue"}  # the later hides the earlier
_MOST_LANES = 64


def check(path: Path) -> None:
    """Whether that can be drawn at all, before anything long begins. Raises ConfigError or HostError."""
    if path.suffix not in _KINDS:
        raise ConfigError(f"a plot can't be written as {path.suffix or path.name!r}", remedy="Use .png, .svg or .html")
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise HostError("plots need matplotlib", remedy="Install it: pip install 'dormouse[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """One CDF for each load, a line for each system; then a timeline for each run that has one."""
    pyplot = _pyplot()
    loads = list(dict.fromkeys((one.load.case, one.load.rate) for one in outcomes))
    timed = [one for one in outcomes if one.spans]
    lanes = [min(len({(span.node, span.gpu) for span in one.spans or ()}), _MOST_LANES) for one in timed]
    heights = [3.0] * len(loads) + [1.0 + 0.14 * count for count in lanes]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(9, sum(heights) + 1), height_ratios=heights, squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for axis, load in zip(axes[:, 0], loads, strict=False):
        _cdf(axis, [one for one in outcomes if (one.load.case, one.load.rate) == load])
        axis.set_title(f"{load[0]} {load[1]:g} requests/s".strip(), fontsize=9)
    for axis, outcome in zip(axes[len(loads) :, 0], timed, strict=True):
        _timeline(axis, outcome)
    _save(figure, path, title)
    pyplot.close(figure)


def _cdf(axis: Any, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        seconds = np.sort(np.frombuffer(outcome.records.start))
        axis.plot(np.maximum(seconds, 1e-3), np.arange(1, len(seconds) + 1) / len(seconds), label=outcome.system)
    axis.set(xscale="log", xlabel="start-up latency, s", ylabel="share of requests", ylim=(0, 1))
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def _timeline(axis: Any, outcome: Outcome) -> None:
    lanes = sorted({(span.node, span.gpu) for span in outcome.spans or ()})[:_MOST_LANES]
    number = {lane: index for index, lane in enumerate(lanes)}
    for what, colour in _COLOURS.items():
        bars = [span for span in outcome.spans or () if span.what == what and (span.node, span.gpu) in number]
        axis.barh([number[span.node, span.gpu] for span in bars], [span.end - span.begin for span in bars],
                  left=[span.begin for span in bars], color=colour, label=what)  # fmt: skip
    axis.set_yticks(range(len(lanes)), [f"{node} GPU {gpu}" for node, gpu in lanes], fontsize=5)
    words = f"{outcome.system}, {outcome.load.case}".rstrip(", ")
    axis.set_title(f"{words}, {outcome.load.rate:g} requests/s", fontsize=9)
    axis.set_xlabel("s")
    axis.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(_COLOURS), borderaxespad=0.2)


def _save(figure: Any, path: Path, title: str) -> None:
    try:
        if path.suffix != ".html":
            figure.savefig(path, dpi=130)
            return
        text = io.StringIO()
        figure.savefig(text, format="svg")
        picture = text.getvalue()
        page = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title>{picture[picture.index('<svg') :]}"
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the plot {path} can't be written: {error.strerror}", remedy="Check the folder") from error
