"""`dormouse bench load` on a few MB: its figures mean nothing here; what it tells of good and bad loaders does."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors import safe_open

from dormouse.bench_load import cache, course, lora, weights
from dormouse.bench_load.course import measure
from dormouse.bench_load.method import Job, Method, find
from dormouse.bench_load.methods import METHODS
from dormouse.bench_load.options import Hooks, Options, options_of
from dormouse.bench_load.result import Result, Row, markdown, read_result
from dormouse.errors import ConfigError
from tests import bench_load_methods as known

SIZE = 3_000_000
SILENT = Hooks(lambda _text: None, lambda _text: None)


def run(folder: Path, *methods: Method, **settings: object) -> Result:
    chosen = {"conditions": ("warm",), **settings}
    return measure(Options(folder=folder, size=SIZE, shards=2, methods=methods, **chosen), SILENT)  # type: ignore[arg-type]


def row_of(result: Result, name: str) -> Row:
    return next(row for row in result.rows if row.method == name)


def test_each_loader_gets_the_row_it_deserves_and_none_ends_the_run(tmp_path: Path) -> None:
    bad = (known.FLIPPED, known.SHORT, known.TURNED, known.FAILING, known.DYING, known.ABSENT)
    result = run(tmp_path, *bad, known.TALKING, known.RIGHT)
    assert {row.method: row.outcome for row in result.rows} == {
        "flipped": "wrong",
        "short": "wrong",
        "turned": "wrong",
        "failing": "failed",
        "dying": "failed",
        "absent": "missing",
        "talking": "ok",
        "right": "ok",
    }
    assert "model.norm.weight has other bytes" in row_of(result, "flipped").note
    assert "model.norm.weight is missing" in row_of(result, "short").note
    assert "lm_head.weight is BF16" in row_of(result, "turned").note
    assert "out of luck" in row_of(result, "failing").note
    assert "signal 6; the last thing it said" in row_of(result, "dying").note
    assert result.complete
    assert list(tmp_path.iterdir()) == []  # files and checkpoints are gone


def test_a_right_row_has_all_figures_and_is_in_the_output_file_at_once(tmp_path: Path) -> None:
    output, folder = tmp_path / "result.json", tmp_path / "disk"
    folder.mkdir()
    seen: list[dict[str, object]] = []
    wanted = Options(folder, size=SIZE, shards=2, methods=(known.RIGHT,), conditions=("warm", "cold"), output=output)
    result = measure(wanted, Hooks(lambda _text: None, lambda _text: seen.append(json.loads(output.read_text()))))
    assert seen[0]["complete"] is False
    final = json.loads(output.read_text())
    assert final["complete"] is True
    assert [row["outcome"] for row in final["rows"]] == ["ok", "ok"]
    assert [row.condition for row in result.rows] == ["warm", "cold"]
    warm, cold = result.rows
    assert warm.resident_before == 1.0
    assert cold.resident_before is not None
    assert cold.resident_before < 0.05 or not drops(tmp_path)
    for row in result.rows:
        assert row.version == "1.0"
        assert row.plain_bytes == result.plain_bytes
        assert row.seconds is not None
        assert row.bytes_per_second == pytest.approx(row.plain_bytes / row.seconds)
        assert row.cpu_seconds is not None
        assert row.peak_memory is not None
    assert result.tensors > 20
    assert result.files == 2


def drops(folder: Path) -> bool:
    """Whether this file system lets go of cached pages (tmpfs has nothing below it)."""
    file = folder / "probe"
    file.write_bytes(bytes(1 << 20))
    cache.drop([file])
    return cache.resident([file]) < 0.05


def test_a_loader_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "_PATIENCE", 0.0)
    result = run(tmp_path, known.HANGING, known.RIGHT)
    assert row_of(result, "hanging").outcome == "failed"
    assert "it was not done after 2 s" in row_of(result, "hanging").note
    assert row_of(result, "right").outcome == "ok"


def test_rows_that_do_not_fit_into_the_budget_say_so(tmp_path: Path) -> None:
    result = run(tmp_path, known.RIGHT, known.ABSENT, budget=0.5, conditions=("warm", "cold"), lora=SIZE)
    rows = [row for row in result.rows if row.method == "right"]
    assert [row.outcome for row in rows] == ["skipped", "skipped"]
    assert all("of the budget left" in row.note for row in rows)
    assert "of the budget left" in str(result.lora)
    assert row_of(result, "absent").outcome == "missing"


def test_the_command_measures_what_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dormouse.cli", "bench", "load", "--gigabytes", "0.004", "--shards", "2"]
    names = ["safetensors", "instanttensor", "dormouse.load_file", "dormouse.load, raw", "dormouse.load, coded"]
    words = [word for name in names for word in ("--method", name)]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--device", "cpu", *words, "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert done.stderr == ""
    found = {(row["method"], row["condition"]): row["outcome"] for row in result["rows"]}
    assert found.pop(("instanttensor", "warm")) == "missing"
    assert found.pop(("instanttensor", "cold")) == "missing"
    assert set(found) == set(itertools.product(set(names) - {"instanttensor"}, ("warm", "cold")))
    assert set(found.values()) == {"ok"}, result["rows"]
    assert result["stored"]["coded"] < result["plain_bytes"] * 0.75 < result["stored"]["raw"]
    assert set(result["limits"]) == {"link", "host copy", "disk"}
    assert result["limits"]["host copy"]["bytes_per_second"] > 0
    assert result["host"]["python"]


def test_files_of_somebody_else_are_measured_where_they_are(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import arange, bfloat16, float8_e4m3fn, int32

    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": arange(7).to(bfloat16), "b": arange(5, dtype=int32)}, folder / "one.safetensors")
    save_file({"c": arange(3).to(float8_e4m3fn), "d": arange(1).to(bfloat16)[0]}, folder / "two.safetensors")
    (scratch := tmp_path / "scratch").mkdir()
    found = options_of(
        gigabytes=None, shards=4, files=folder, folder=scratch, device="cpu", names=["safetensors"], cold=False,
        repeats=1, lora=False, codec=False, budget_seconds=None, output=None,
    )  # fmt: skip
    result = measure(found, SILENT)
    assert [(row.outcome, row.note) for row in result.rows] == [("ok", "")]
    assert (result.files, result.tensors) == (2, 4)
    assert len(list(folder.iterdir())) == 2


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    asked = {"gigabytes": 1.0, "shards": 1, "files": None, "folder": tmp_path, "device": "cpu", "names": (),
             "cold": True, "repeats": 1, "lora": False, "codec": False, "budget_seconds": None,
             "output": None}  # fmt: skip
    with pytest.raises(ConfigError, match="no method"):
        options_of(**{**asked, "names": ["fastest"]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no"):
        options_of(**{**asked, "files": tmp_path})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is not a folder"):
        measure(options_of(**{**asked, "folder": tmp_path / "nowhere"}), SILENT)  # type: ignore[arg-type]


@pytest.mark.parametrize("shards", [1, 3])
def test_made_weights_are_normal_distributed_and_differ_from_tensor_to_tensor(tmp_path: Path, shards: int) -> None:
    files = weights.make(tmp_path, weights.lay_out(SIZE, shards), threads=2)
    assert len(files) == shards
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    assert sum(tensor.numel() * 2 for tensor in found.values()) == pytest.approx(SIZE, rel=0.3)
    embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert embedding.std().item() == pytest.approx(weights.SIGMA, rel=0.05)
    assert abs(embedding.mean().item()) < 0.001
    assert not embedding.equal(head)
    assert all(math.isfinite(tensor.sum().item()) for tensor in found.values())


@pytest.mark.parametrize("gigabytes", [0.003, 0.1, 1, 16, 40])
def test_layouts_have_about_the_size_asked_for(gigabytes: float) -> None:
    parts = weights.lay_out(int(gigabytes * 1e9), 4)
    sizes = [sum(2 * math.prod(shape) for shape in part.values()) for part in parts]
    assert len(parts) == 4
    assert sum(sizes) == pytest.approx(gigabytes * 1e9, rel=0.3)
    assert max(sizes) < 1.6 * min(sizes) or gigabytes < 0.01


def test_every_method_is_found_where_its_child_looks_for_it() -> None:
    assert [find(method.place) for method in METHODS] == list(METHODS)


def test_an_adapter_in_plain_files_needs_no_imported_model_on_a_gpu_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "_running", lambda _job: "adapters of a model")
    nowhere = str(tmp_path / "nothing is imported here")
    job = Job([], nowhere, nowhere, "weights", "cuda", "warm", nowhere, again=False)
    for method in lora.LORA_METHODS:
        if method.source == "plain":
            method.before(job)


def test_the_share_in_the_page_cache_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(4 << 20))
    assert cache.resident([file]) == 1.0
    cache.drop([file])
    cold = cache.resident([file])
    cache.warm([file], threads=2)
    assert cache.resident([file]) == 1.0
    assert cold < 0.05 or not drops(tmp_path)


def test_the_table_for_documentation_has_a_line_for_each_row_and_limit(tmp_path: Path) -> None:
    result = Result("cpu", {"date": "today"}, rows=[Row("a", "warm", "somehow", outcome="ok", seconds=1.0)])
    result.rows.append(Row("b", "warm", "somehow", outcome="missing", note="not there"))
    result.limits["link"] = "not measured: there is none"
    lines = markdown(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[:5]] == ["method", "---", "a", "b", "limit: link"]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "* b, warm: missing: not there" in lines


def test_of_several_attempts_the_fastest_counts_but_a_wrong_one_in_any_case() -> None:
    row = Row("a", "warm", "somehow")
    for outcome, seconds in (("ok", 2.0), ("ok", 1.0), ("ok", 3.0), ("skipped", None)):
        row.take(Row("a", "warm", "somehow", outcome=outcome, seconds=seconds))
    assert (row.outcome, row.seconds, row.all_seconds) == ("ok", 1.0, [2.0, 1.0, 3.0])
    row.take(Row("a", "warm", "somehow", outcome="wrong", seconds=4.0, note="other bytes"))
    row.take(Row("a", "warm", "somehow", outcome="ok", seconds=0.5))
    assert (row.outcome, row.note, row.all_seconds) == ("wrong", "other bytes", [2.0, 1.0, 3.0, 4.0, 0.5])


def test_documented_tables_are_those_of_the_results() -> None:
    root = Path(__file__).parent.parent
    documented = (root / "docs" / "benchmarks.md").read_text()
    for file in sorted((root / "bench" / "results").glob("load_*.json")):
        result = read_result(file)
        tables = [line for line in markdown(result).splitlines() if line.startswith("|")]
        assert result.complete, file.name
        assert all(line in documented for line in tables), (
            f"{file.name}: run python -m dormouse.bench_load.result on it"
        )
