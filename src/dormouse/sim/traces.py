"""Requests: read from published traces, or drawn.

    file -> read_trace -> Trace;  read_lengths -> token lengths;  drawn(...) -> Trace

A trace is four columns, in order of arrival: when (seconds from its start), which model (a number), tokens in, tokens
out. Files are known by what is in them, not by their names:

* Azure LLM inference 2023 (`TIMESTAMP,ContextTokens,GeneratedTokens`),
* Mooncake (JSON lines with `timestamp` in milliseconds, `input_length`, `output_length`),
* Azure Functions 2021 (`app,func,end_timestamp,duration`): each function is a model, and its tokens out are as many as
  fill its duration.

A row that is not as it should be stops the reading with a sentence that names file and row.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dormouse.errors import ConfigError

MOST_TOKENS = 1 << 24
TOKENS_PER_SECOND = 20.0
"""What a second of a function's run counts for."""


@dataclass(frozen=True)
class Trace:
    """Columns of equal length. `model` counts from 0; `names` is empty when the trace does not tell models apart."""

    time: NDArray[np.float64]
    model: NDArray[np.int64]
    tokens_in: NDArray[np.int64]
    tokens_out: NDArray[np.int64]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.time)

    def until(self, seconds: float) -> Trace:
        """Its first part."""
        end = int(np.searchsorted(self.time, seconds))
        return Trace(self.time[:end], self.model[:end], self.tokens_in[:end], self.tokens_out[:end], self.names)


@dataclass(frozen=True)
class Row:
    time: float
    name: str
    tokens_in: int
    tokens_out: int


def read_trace(path: Path) -> Trace:
    """The requests of a file, in order of arrival, the first at 0."""
    rows = list(_rows(path))
    if not rows:
        raise _bad(path, 1, "has no requests")
    rows.sort(key=lambda row: row.time)
    start = rows[0].time
    names = sorted({row.name for row in rows} - {""})
    number = {name: index for index, name in enumerate(names)}
    return Trace(
        np.array([row.time - start for row in rows]),
        np.array([number.get(row.name, 0) for row in rows], dtype=np.int64),
        np.array([row.tokens_in for row in rows], dtype=np.int64),
        np.array([row.tokens_out for row in rows], dtype=np.int64),
        tuple(names),
    )


def _rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("{"):
                yield from _mooncake(path, file)
            else:
                yield from _csv(path, csv.reader(file))
    except OSError as error:
        raise ConfigError(f"can't read the trace {path}: {error.strerror}", remedy="Check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"the trace {path} is not text: {error}", remedy="Give the CSV or JSON lines file") from error


def _bad(path: Path, row: int, what: str) -> ConfigError:
    return ConfigError(f"{path}, row {row}: {what}", remedy="Correct or remove the row")


def _csv(path: Path, rows: Iterator[list[str]]) -> Iterator[Row]:
    header = [name.strip() for name in next(rows, [])]
    for names, parse in _FORMATS.items():
        if header == list(names):
            for number, cells in enumerate(rows, 2):
                if cells:
                    yield _parsed(path, number, cells, len(names), parse)
            return
    known = "; ".join(",".join(names) for names in _FORMATS)
    raise ConfigError(f"{path}, row 1: no trace that we know has the columns {','.join(header)[:200]!r}",
                      remedy=f"Known are JSON lines of Mooncake, and the columns {known}")  # fmt: skip


def _parsed(path: Path, number: int, cells: list[str], columns: int, parse: Callable[[list[str]], Row]) -> Row:
    if len(cells) != columns:
        raise _bad(path, number, f"has {len(cells)} columns instead of {columns}")
    try:
        return parse(cells)
    except (ValueError, OverflowError) as error:
        raise _bad(path, number, str(error)) from error


def _tokens(value: Any, what: str) -> int:
    if isinstance(value, str):
        if not value.strip().isdecimal():
            raise ValueError(f"{what} is {value[:40]!r}, not a number of tokens")
        value = int(value) if len(value) < 20 else MOST_TOKENS + 1
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_TOKENS:
        raise ValueError(f"{what} is {str(value)[:40]!r}, not a number of tokens from 0 to {MOST_TOKENS}")
    return value


def _seconds(value: Any, what: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < 1e12:
        raise ValueError(f"{what} is {str(value)[:40]!r}, not a time")
    return seconds


_EPOCH = datetime(1970, 1, 1)


def _azure_llm(cells: list[str]) -> Row:
    stamp, tokens_in, tokens_out = cells
    try:  # seven digits of a second are one more than datetime knows
        moment = datetime.fromisoformat(stamp[:26])
    except ValueError:
        raise ValueError(f"TIMESTAMP is {stamp[:40]!r}, not a date and time") from None
    time = (moment.replace(tzinfo=None) - _EPOCH) / timedelta(seconds=1)
    return Row(time, "", _tokens(tokens_in, "ContextTokens"), _tokens(tokens_out, "GeneratedTokens"))


def _azure_functions(cells: list[str]) -> Row:
    app, function, end, length = cells
    duration = _seconds(length, "duration")
    tokens = min(max(round(duration * TOKENS_PER_SECOND), 1), MOST_TOKENS)
    return Row(max(_seconds(end, "end_timestamp") - duration, 0.0), f"{app}/{function}", 0, tokens)


_FORMATS: dict[tuple[str, ...], Callable[[list[str]], Row]] = {
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): _azure_llm,
    ("app", "func", "end_timestamp", "duration"): _azure_functions,
}


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise _bad(path, number, "is not JSON") from None
        missing = {"timestamp", "input_length", "output_length"} - (set(value) if isinstance(value, dict) else set())
        if missing:
            raise _bad(path, number, f"lacks {', '.join(sorted(missing))}")
        try:
            yield Row(_seconds(value["timestamp"], "timestamp") / 1000, "",
                      _tokens(value["input_length"], "input_length"),
                      _tokens(value["output_length"], "output_length"))  # fmt: skip
        except ValueError as error:
            raise _bad(path, number, str(error)) from error


# ---- drawn


def popularity(models: int, alpha: float) -> NDArray[np.float64]:
    """Shares of requests, the most asked-for model first: Zipf's law with exponent `alpha`; 0 is even."""
    weights = np.arange(1, models + 1, dtype=np.float64) ** -alpha
    return np.asarray(weights / weights.sum())


def gamma_times(count: int, duration: float, cv: float, random: np.random.Generator) -> NDArray[np.float64]:
    """`count` arrivals within `duration` whose gaps have the coefficient of variation `cv`.

    Gaps are those of a Gamma renewal process under the condition that so many arrive (which makes them a Dirichlet
    division of the time); the phase is random, so a burst may lie anywhere."""
    if count == 0:
        return np.zeros(0)
    gaps = random.gamma(1 / cv**2, 1.0, count) if cv else np.ones(count)
    total = gaps.sum()
    gaps = np.full(count, 1 / count) if total <= 0 else gaps / total
    return np.asarray(np.sort((np.cumsum(gaps) + random.random()) % 1.0) * duration)


def drawn(
    shares: NDArray[np.float64],
    *,
    rate: float,
    duration: float,
    cv: float,
    lengths: Sequence[NDArray[np.int64]],
    random: np.random.Generator,
) -> Trace:
    """`rate` requests a second over all models, each model's arrivals by themselves, and lengths from the pool
    `lengths` = (tokens in, tokens out), the two of one request together."""
    counts = random.multinomial(round(rate * duration), shares)
    times = np.concatenate([gamma_times(int(count), duration, cv, random) for count in counts])
    model = np.repeat(np.arange(len(shares)), counts)
    order = np.argsort(times, kind="stable")
    pick = random.integers(0, len(lengths[0]), len(times))
    return Trace(times[order], model[order], lengths[0][pick], lengths[1][pick])


def drawn_models(count: int, shares: NDArray[np.float64], cv: float, random: np.random.Generator) -> NDArray[np.int64]:
    """Whose each of `count` requests is, in their order: each model's are spread over them with the given CV."""
    counts = random.multinomial(count, shares)
    places = np.concatenate([gamma_times(int(number), 1.0, cv, random) for number in counts])
    return np.asarray(np.repeat(np.arange(len(shares)), counts)[np.argsort(places, kind="stable")])


def drawn_lengths(mean_in: float, mean_out: float, cv: float, random: np.random.Generator) -> list[NDArray[np.int64]]:
    """A pool of lengths: log-normal with these means."""
    sigma = math.sqrt(math.log1p(cv**2))
    pool = [np.exp(random.normal(math.log(mean) - sigma**2 / 2, sigma, 4096)) for mean in (mean_in, mean_out)]
    return [np.clip(np.rint(values), 1, MOST_TOKENS).astype(np.int64) for values in pool]
