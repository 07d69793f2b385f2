"""The doctor: what it concludes from what a machine shows, that it finds what is there, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dormouse import disk_speed, doctor
from dormouse.data_dir import default_data_dir
from dormouse.doctor import Check
from dormouse.store.key import open_key

ALL_CAPABILITIES = "Name:\tx\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n"
NO_NET_ADMIN = "CapEff:\t000001ffffffefff\n"


def shown(checks: list[Check]) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115 - closed with it
    with console.file:
        console.print(doctor.render(checks))
        return console.export_text()


@pytest.mark.parametrize(
    ("uid", "status", "ok", "value"),
    [
        (0, ALL_CAPABILITIES, True, "root"),
        (0, NO_NET_ADMIN, False, "root without CAP_NET_ADMIN"),
        (0, "", False, "root without CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN"),
        (1000, ALL_CAPABILITIES, False, "user 1000, not root"),
    ],
)
def test_root_with_its_capabilities_is_asked_for(uid: int, status: str, ok: bool, value: str) -> None:
    check = doctor.privileges(uid, status)
    assert (check.ok, check.value, check.needed) == (ok, value, True)
    assert ok or "root" in check.remedy


@pytest.mark.parametrize(
    ("available", "room", "ok", "value"),
    [
        (8 << 20, None, True, "8.0 GiB"),
        (8 << 20, 1 << 30, False, "1.0 GiB (limited by the cgroup)"),
        (1 << 20, 9 << 30, False, "1.0 GiB"),
    ],
)
def test_a_cgroup_limit_counts_as_memory_that_is_not_there(
    available: int, room: int | None, ok: bool, value: str
) -> None:
    check = doctor.memory(f"MemTotal: 1 kB\nMemAvailable:   {available} kB\n", room)
    assert (check.ok, check.value, bool(check.remedy)) == (ok, value, not ok)


@pytest.mark.parametrize(("scope", "ok"), [(None, True), ("0", True), ("1", True), ("2", True), ("3", False)])
def test_only_a_full_ban_of_ptrace_stops_root(scope: str | None, ok: bool) -> None:
    assert doctor.ptrace_scope(scope).ok is ok


def test_huge_pages_and_seccomp_are_information() -> None:
    checks = [
        doctor.huge_pages("always [madvise] never"),
        doctor.huge_pages("[always] madvise never"),
        doctor.huge_pages(None),
        doctor.shared_huge_pages("always within_size advise [never] deny force"),
        doctor.shared_huge_pages("always within_size [advise] never deny force"),
        doctor.seccomp("Seccomp:\t2\n"),
    ]
    assert [(check.value, bool(check.remedy)) for check in checks] == [
        ("madvise", True),
        ("always", False),
        ("not supported", False),
        ("never", True),
        ("advise", False),
        ("a filter is active", True),
    ]
    assert doctor.main_job_possible(checks) and all(check.ok is None for check in checks)


def test_the_signing_key_is_named_missing_or_wrong_but_never_made(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert (doctor.signing_key(path).ok, path.exists()) == (None, False)
    key = open_key(path, needed=False)
    assert doctor.signing_key(path).value.startswith(key.id.hex())
    assert key.secret.hex() not in doctor.signing_key(path).value
    path.chmod(0o644)
    check = doctor.signing_key(path)
    assert check.ok is False and check.remedy and str(path) in check.value


def test_start_paths_follow_from_the_checks() -> None:
    fine = [Check(name, True, "", True) for name in ("cell", "criu", "criu check", "process snapshot")]
    assert doctor.start_paths(fine).value == "hot, cold, snapshot, template"
    unrestorable = [*fine[:3], replace(fine[3], ok=False)]
    assert doctor.start_paths(unrestorable).value == "hot, cold"
    assert doctor.start_paths([replace(fine[0], ok=False)]).value == "none"


@given(
    st.lists(
        st.builds(Check, st.text(), st.sampled_from([True, False, None]), st.text(), st.booleans(), st.text()),
        max_size=8,
    )
)
def test_the_verdict_is_what_the_needed_checks_say(checks: list[Check]) -> None:
    possible = doctor.main_job_possible(checks)
    assert possible == all(check.ok is not False for check in checks if check.needed)
    assert json.loads(json.dumps(doctor.as_json(checks)))[:1] == [vars(check) for check in checks][:1]
    assert ("cannot sleep and wake" in shown(checks)) is not possible


def test_markup_in_what_was_found_is_shown_as_it_is() -> None:
    assert "[red]name[/]" in shown([Check("gpu", None, "[red]name[/]")])


def test_this_machine_is_described_and_left_as_it_was(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet"
    checks = {check.name: check for check in doctor.examine(missing)}
    assert list(tmp_path.iterdir()) == []
    assert {"operating system", "privileges", "cell", "criu", "free memory", "disk read", "start paths open"} <= set(
        checks
    )
    assert checks["operating system"].ok
    assert checks["engine packages"].value.startswith("torch ")
    assert str(tmp_path) in checks["free disk"].value and "GB/s" in checks["disk read"].value
    for check in checks.values():
        assert check.remedy or check.ok is not False, f"{check.name} is missing and nothing says what to do"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, and setpriv to lose it")
def test_like_in_a_container_without_capabilities(tmp_path: Path) -> None:
    program = (
        "import json; from pathlib import Path; from dormouse import doctor\n"
        f"print(json.dumps(doctor.as_json(doctor.examine(Path({str(tmp_path)!r})))))"
    )
    command = ["setpriv", "--bounding-set", "-sys_admin,-sys_ptrace", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    checks = {check["name"]: Check(**check) for check in json.loads(done.stdout)}
    assert checks["privileges"].value == "root without CAP_SYS_PTRACE, CAP_SYS_ADMIN"
    assert checks["cell"].ok is False and "Operation not permitted" in checks["cell"].value
    assert all("privileged" in checks[name].remedy for name in ("privileges", "cell"))
    assert not doctor.main_job_possible(checks.values())


@pytest.mark.root
def test_a_process_is_really_dumped_and_restored_here() -> None:
    checks = {check.name: check for check in doctor.examine(default_data_dir(os.environ))}
    assert checks["process snapshot"].ok, checks["process snapshot"]
    assert checks["criu check"].ok and checks["cell"].ok


def test_a_criu_that_cannot_dump_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    criu = tmp_path / "criu"
    criu.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo Version: 4.2;;\n"
        'check) echo "Error (criu/cr-check.c:1): No way here" >&2; exit 1;;\n'
        "*) exit 1;;\n"
        "esac\n"
    )
    criu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    checks = {check.name: check for check in doctor.examine(tmp_path)}
    assert checks["criu"].value == "4.2, the system's"
    assert "No way here" in checks["criu check"].value
    assert checks["process snapshot"].ok is False
    assert not doctor.main_job_possible(checks.values())


def test_the_disk_measurement_leaves_no_file(tmp_path: Path) -> None:
    assert disk_speed.measure(tmp_path, 16 << 20).bytes_per_second > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_finding(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        disk_speed.measure(Path("/proc"), 8 << 20)
