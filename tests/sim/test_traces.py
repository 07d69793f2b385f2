"""Traces: what is read from each format, what is drawn, and what a bad row says."""

from pathlib import Path

import numpy as np
import pytest

from dormouse.errors import ConfigError
from dormouse.sim.traces import drawn, drawn_lengths, drawn_models, gamma_times, popularity, read_trace

GOOD = {
    "azure_llm": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.0319600,3180,8\n"
    "2023-11-16 18:17:03.9799600,4808,10\n",
    "functions": "app,func,end_timestamp,duration\na,f,12.0,2.0\nb,g,11.0,0.5\n",
    "mooncake": '{"timestamp": 1000, "input_length": 7, "output_length": 3, "hash_ids": [0]}\n\n'
    '{"timestamp": 0, "input_length": 6, "output_length": 2}\n',
}


def trace(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_every_format_comes_out_in_order_of_arrival_from_zero(tmp_path: Path) -> None:
    azure = read_trace(trace(tmp_path, GOOD["azure_llm"]))
    assert azure.time.tolist() == pytest.approx([0, 0.052], abs=1e-5)
    assert azure.tokens_in.tolist() == [4808, 3180]
    functions = read_trace(trace(tmp_path, GOOD["functions"]))
    assert functions.names == ("a/f", "b/g")
    assert functions.time.tolist() == [0.0, 0.5]
    assert functions.tokens_out.tolist() == [40, 10]
    mooncake = read_trace(trace(tmp_path, GOOD["mooncake"]))
    assert mooncake.time.tolist() == [0.0, 1.0]
    assert mooncake.tokens_out.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("text", "row", "word"),
    [
        (GOOD["azure_llm"] + "yesterday,1,2\n", 4, "TIMESTAMP"),
        (GOOD["azure_llm"] + "2023-11-16 18:17:04,-1,2\n", 4, "ContextTokens"),
        (GOOD["azure_llm"] + "2023-11-16 18:17:04,1\n", 4, "columns"),
        (GOOD["azure_llm"] + f"2023-11-16 18:17:04,1,{'9' * 40}\n", 4, "GeneratedTokens"),
        (GOOD["functions"] + "a,f,nan,1\n", 4, "end_timestamp"),
        (GOOD["mooncake"] + "{oops\n", 4, "JSON"),
        (GOOD["mooncake"] + '{"timestamp": 1}\n', 4, "input_length"),
        (GOOD["mooncake"] + '{"timestamp": 1, "input_length": true, "output_length": 1}\n', 4, "input_length"),
        ("a,b\n1,2\n", 1, "no trace"),
        ("", 1, ""),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", 1, "no requests"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path: Path, text: str, row: int, word: str) -> None:
    path = trace(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert f"{path}, row {row}: " in caught.value.message
    assert word in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_is_missing_or_no_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 10)
    with pytest.raises(ConfigError, match="not text"):
        read_trace(tmp_path / "binary")


def test_drawn_requests_have_the_rate_the_burstiness_and_the_popularity_asked_for() -> None:
    random = np.random.default_rng(1)
    for cv in (0.0, 1.0, 4.0):
        gaps = np.diff(gamma_times(20_000, 1000.0, cv, random))
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.15, abs=0.05)
    lengths = drawn_lengths(500, 100, 1, random)
    assert lengths[0].mean() == pytest.approx(500, rel=0.1)
    made = drawn(popularity(100, 1.0), rate=50, duration=200, cv=2, lengths=lengths, random=random)
    assert len(made) == 10_000
    assert (np.diff(made.time) >= 0).all() and made.time[-1] < 200
    counts = np.bincount(made.model, minlength=100)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)


def test_models_of_a_trace_come_in_bursts_by_their_cv() -> None:
    shares = popularity(20, 1.0)
    gaps = {}
    for cv in (1.0, 6.0):
        models = drawn_models(20_000, shares, cv, np.random.default_rng(1))
        assert np.bincount(models, minlength=20) / 20_000 == pytest.approx(shares, abs=0.02)
        between = np.diff(np.flatnonzero(models == 5))
        gaps[cv] = between.std() / between.mean()
    assert gaps[1.0] == pytest.approx(1.0, abs=0.15)
    assert gaps[6.0] > 3.0
