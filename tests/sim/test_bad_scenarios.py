"""What can't be is refused before anything runs: one sentence with the file, the line, and what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dormouse.cli import cli
from dormouse.errors import ConfigError
from dormouse.sim.scenario import load_scenario

W = "weights: 13GB"
GOOD = """\
name: small
duration: 60s
nodes:
  - {count: 2, gpus: 2, gpu_memory: 30GB, host_memory: 8GB, network: 10Gbps, disk: 5GB/s, pcie: 20GB/s}
models:
  - name: one
    weights: 13GB
requests:
  rate: 0.5
systems:
  it:
    placement: dormouse
"""


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_scenario(path)
    message = caught.value.message
    assert message.startswith(f"{path}") and "\n" not in message
    return message.removeprefix(f"{path}, ")


@pytest.mark.parametrize(
    ("at", "more", "line", "words"),
    [
        (W, "    gpus: 4", 6, "no node can hold one: it needs 4 GPUs"),
        (W, "    min_replicas: 9", 6, "9 replicas of each are more than all nodes can hold"),
        (W, "    min_replicas: 3\n    max_replicas: 2", 6, "3 replicas are to be ready, but max_replicas is"),
        (W, "  - {name: two, weights: 13GB, min_replicas: 8}\n  - {name: six, weights: 13GB, min_replicas: 2}",
         9, "with those of six, the 10 replicas that are always ready need 130 GB of GPU memory, there are 120 GB"),
        (W, "  - {name: big, weights: 20GB, min_replicas: 3}\n  - {name: mid, weights: 16GB, min_replicas: 2}", 9,
         "the 5 replicas that are always ready need 5 places of 16 GB or more on GPUs, there are 4"),
        (W, "  - {name: two, gpus: 2, weights: 32GB, min_replicas: 1}\n  - {name: a, weights: 16GB, min_replicas: 3}",
         9, "the 4 replicas that are always ready need 5 places of 16 GB or more on GPUs, there are 4"),
        (W, "    process: 3GB\n    min_replicas: 3\n  - {name: cpu, gpus: 0, weights: 4GB, min_replicas: 2}",
         6, "with those of one, the 5 replicas that are always ready need 19.1475 GB of host memory, there are 16 GB"),
        (W, '    schedule: [{from: 08:30, to: 09:00, replicas: 8}]\n  - {name: six, weights: 13GB, min_replicas: 2}',
         9, "with those of six, the 10 replicas that are to be ready at 08:30 need 130 GB of GPU memory"),
        ("placement: dormouse", "    scaling: {min_replicas: 9}", 13,
         "the 9 replicas that are always ready need 9 places of 13 GB or more on GPUs, there are 8"),
        (W, "    max_replicas: -1", 8, "max_replicas"),
        (W, "  - {name: one, weights: 1GB}", 8, "two models are called one"),
        (W, '    schedule: [{from: "25:00", to: "08:00", replicas: 1}]', 8, "25:00 is no time of the day"),
        (W, "    schedule: [{from: 23:00, to: 24:30, replicas: 1}]", 8, "24:30 is no time of the day"),
        (W, '    schedule: [{from: "9am", to: "08:00", replicas: 1}]', 8, "9am is no time of the day"),
        (W, '    schedule: [{from: "08:00", to: "08:00", replicas: 1}]', 8, "begins when it ends"),
        (W, '    schedule: [{from: "08:00", to: "09:00", replicas: 4}]\n    max_replicas: 3', 6,
         "4 replicas are to be ready, but max_replicas is 3"),
        ("rate: 0.5", "  speed: 2", 10, "speed is for a trace, and there is none"),
        ("rate: 0.5", "  trace: x.csv", 9, "rate is for requests that are drawn"),
        ("rate: 0.5", "tenants: [{name: a, cap: 0}]", 10, "0 would let none of its requests run"),
        ("rate: 0.5", "tenants: [{name: a, share: 0}]", 10, "share"),
        ("rate: 0.5", "tenants:\n  - {name: a, copies: 2}\n  - {name: a-1}", 12, "two tenants are called a-1"),
        ("rate: 0.5", "events: [{at: 5s, node: n0-2, what: lost}]", 10, "there is no node 'n0-2'"),
        ("rate: 0.5", "events: [{at: 5s, node: n0-0, what: back}]", 10, "n0-0 is not lost at 5 s"),
        ("rate: 0.5", "events:\n  - {at: 5s, node: n0-0, what: lost}\n  - {at: 6s, node: n0-0, what: lost}", 12,
         "n0-0 is lost already at 6 s"),
        ("rate: 0.5", "events: [{at: -1, node: n0-0, what: lost}]", 10, "at"),
        ("rate: 0.5", "begins: 24:01", 10, "24:01 is no time of the day"),
        ("placement: dormouse", "    scaling: {min_replicas: 3, max_replicas: 2}", 13, "max_replicas (2) is less than"),
        ("placement: dormouse", "    scaling: {panic_window: 2m}", 13, "windows or target contradict"),
        ("placement: dormouse", "    scaling: {max_up_rate: 1}", 13, "must be more than 1"),
        ("placement: dormouse", "    scaling: {utilization: 1.5}", 13, "utilization"),
        ("placement: dormouse", "    scaling: {replicas: 3}", 13, "no such setting"),
        ("placement: dormouse", "    loading: {shared: true, keep_in_dram: false}", 13, "shared needs keep_in_dram"),
        ("placement: dormouse", "published: [{system: x, case: '', value: 1, source: y}]", 13, "no system 'x'"),
        ("placement: dormouse", "models: []", 13, "'models' is given twice"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_named_with_its_line(
    tmp_path: Path, at: str, more: str, line: int, words: str
) -> None:
    message = refused(tmp_path, GOOD.replace(at, f"{at}\n{more}", 1))
    assert words in message
    assert message.startswith(f"line {line}: ")


def test_minima_that_just_fit_are_accepted(tmp_path: Path) -> None:
    more = "    min_replicas: 7\n  - {name: two, gpus: 2, weights: 34GB, min_replicas: 1}"
    path = tmp_path / "scenario.yaml"
    path.write_text(GOOD.replace(W, f"{W}\n{more}") + "    scaling: {min_replicas: 1}\n")
    with pytest.raises(ConfigError, match="the 8 replicas that are always ready need 125 GB"):
        load_scenario(path)
    path.write_text(path.read_text().replace("min_replicas: 7", "min_replicas: 6"))
    assert [group.least for group in load_scenario(path).models] == [6, 1]


def test_a_limit_of_a_model_and_one_of_the_system_contradict_each_other(tmp_path: Path) -> None:
    text = GOOD.replace(W, "weights: 13GB\n    min_replicas: 3") + "    scaling: {max_replicas: 2}\n"
    assert refused(tmp_path, text) == (
        "line 14: systems.it.scaling: max_replicas is 2, but 3 replicas of one are to be ready"
    )


def test_a_bad_row_of_a_trace_is_named_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(GOOD.replace("rate: 0.5", "trace: bad.csv"))
    (tmp_path / "bad.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,7,many\n")
    with pytest.raises(ConfigError, match=r"bad\.csv, row 2: GeneratedTokens is 'many'"):
        CliRunner().invoke(cli, ["simulate", str(path)], catch_exceptions=False)
    (tmp_path / "bad.csv").unlink()
    with pytest.raises(ConfigError, match=r"can't read the trace .*bad\.csv"):
        CliRunner().invoke(cli, ["simulate", str(path)], catch_exceptions=False)
