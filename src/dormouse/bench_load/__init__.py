"""`dormouse bench load`: how fast weights come from files into memory or onto a GPU, by peers' loaders and by ours."""

from dormouse.bench_load.course import measure
from dormouse.bench_load.options import Hooks, Options, options
from dormouse.bench_load.result import Result, markdown, table

__all__ = ["Hooks", "Options", "Result", "markdown", "measure", "options", "table"]
