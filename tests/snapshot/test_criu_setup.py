"""Finding CRIU, and unpacking one from a signed archive: what is taken, what is refused, what is left behind.

`archive/` is a tiny signed Debian archive (archive/make.sh), read by the real apt and dpkg.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.data_dir import default_data_dir
from dormouse.errors import ConfigError, DiskFullError, HostError
from dormouse.snapshot import criu_setup
from dormouse.snapshot.criu_setup import Archive, debian_archives, find_criu, parse_version, setup_criu, unpack_criu

SIGNED = Path(__file__).parent / "archive"

needs_apt = pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None, reason="needs apt and dpkg"
)


def silent(_step: str) -> None:
    pass


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data folder"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def no_system_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first folder of the PATH, empty; no other one has a `criu`. The kernel is one that any version suits."""
    monkeypatch.setattr("platform.release", lambda: "6.12.0")
    folder = tmp_path / "bin"
    folder.mkdir()
    others = [name for name in os.environ["PATH"].split(os.pathsep) if not (Path(name) / "criu").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), *others]))
    monkeypatch.setattr(criu_setup, "_SYSTEM_FOLDERS", ())
    return folder


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def copied_archive(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SIGNED, tmp_path / "archive"))


def archive_at(folder: Path) -> Archive:
    return Archive(f"copy:{folder}", "trixie", folder / "keyring.gpg")


# Finding


def test_a_new_enough_system_criu_is_taken(no_system_criu: Path, data_dir: Path) -> None:
    path = script(no_system_criu / "criu", "echo Version: 4.2; echo GitID: v4.2")
    criu = find_criu(data_dir)
    assert (criu.argv_prefix, criu.version, criu.version_text, criu.source) == ((str(path),), (4, 2), "4.2", "system")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo Version: 3.17.1", "criu is 3.17.1"),
        ("echo no such library >&2; exit 127", "does not run: no such library"),
        ("echo hello", "does not run: hello"),
        ("exit 1", "exit status 1"),
        ("kill -9 $$", "exit status -9"),
    ],
)
def test_a_criu_that_is_no_good_is_named_with_the_reason(
    no_system_criu: Path, data_dir: Path, text: str, words: str
) -> None:
    script(no_system_criu / "criu", text)
    with pytest.raises(HostError, match=words) as caught:
        find_criu(data_dir)
    assert "dormouse setup criu" in caught.value.remedy


def test_an_old_criu_does_not_hide_a_newer_one_further_on_the_path(
    no_system_criu: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(no_system_criu / "criu", "echo Version: 3.17.1")
    later = tmp_path / "later"
    later.mkdir()
    script(later / "criu", "echo Version: 4.1")
    monkeypatch.setenv("PATH", f"{no_system_criu}:{later}")
    assert find_criu(data_dir).argv_prefix == (str(later / "criu"),)


def test_one_that_captures_tcp_sockets_here_goes_before_one_that_does_not(
    no_system_criu: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(no_system_criu / "criu", "echo Version: 4.1.1")
    later = tmp_path / "later"
    later.mkdir()
    script(later / "criu", "echo Version: 4.2")
    monkeypatch.setenv("PATH", f"{no_system_criu}:{later}")
    monkeypatch.setattr("platform.release", lambda: "6.16.1-cloud")
    assert find_criu(data_dir).version == (4, 2)
    monkeypatch.setattr("platform.release", lambda: "6.12.0")
    assert find_criu(data_dir).version == (4, 1, 1)


def test_an_older_one_stays_when_no_newer_can_be_had(
    no_system_criu: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(no_system_criu / "criu", "echo Version: 4.1.1")
    monkeypatch.setattr("platform.release", lambda: "6.16.1-cloud")
    monkeypatch.setattr(criu_setup, "debian_archives", lambda _suite: [])
    said: list[str] = []
    assert setup_criu(data_dir, progress=said.append).version == (4, 1, 1)
    assert "can't capture TCP sockets" in said[0] and "stays" in said[-1]


def test_none_at_all(no_system_criu: Path, data_dir: Path) -> None:
    with pytest.raises(HostError, match="none was found"):
        find_criu(data_dir)


def test_versions_are_compared_as_numbers() -> None:
    assert parse_version("Version: 4.10.1\nGitID: v4.10.1\n") == (4, 10, 1)
    assert (4, 10, 1) > criu_setup.MIN_VERSION > (3, 17, 1)


@given(st.lists(st.integers(0, 9999), min_size=2, max_size=4))
def test_every_version_is_read_back(numbers: list[int]) -> None:
    assert parse_version(f"warning\nVersion: {'.'.join(map(str, numbers))}\nGitID: x\n") == tuple(numbers)


@given(st.text())
def test_any_text_is_a_version_or_none(text: str) -> None:
    version = parse_version(f"Version: {text}")
    assert version is None or all(number >= 0 for number in version)


# Unpacking


@needs_apt
def test_what_is_unpacked_is_found_again_and_is_private(no_system_criu: Path, data_dir: Path) -> None:
    steps: list[str] = []
    unpacked = unpack_criu(archive_at(SIGNED), data_dir, progress=steps.append)
    assert unpacked == find_criu(data_dir)
    assert (unpacked.version, unpacked.source) == ((4, 1, 1), "prefix")
    assert all(Path(word).is_absolute() for word in unpacked.argv_prefix if not word.startswith("--"))
    assert (data_dir / "criu").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in data_dir.iterdir()] == ["criu"]
    kept = sorted(path.name for path in data_dir.rglob("*") if path.is_file())
    assert kept[:3] == ["copyright", "copyright", "criu"] and len(kept) == 4
    assert len(steps) == 3


@needs_apt
def test_set_up_keeps_what_works(no_system_criu: Path, data_dir: Path) -> None:
    unpack_criu(archive_at(SIGNED), data_dir, progress=silent)
    before = (data_dir / "criu").stat().st_ino
    assert setup_criu(data_dir, progress=silent) == find_criu(data_dir)
    assert (data_dir / "criu").stat().st_ino == before


@needs_apt
def test_a_broken_prefix_is_replaced(no_system_criu: Path, data_dir: Path) -> None:
    (data_dir / "criu").mkdir()
    with pytest.raises(HostError, match="does not run"):
        find_criu(data_dir)
    unpack_criu(archive_at(SIGNED), data_dir, progress=silent)
    assert find_criu(data_dir).source == "prefix"


def other_bytes(archive: Path) -> None:
    package = next(archive.glob("pool/criu_*.deb"))
    data = bytearray(package.read_bytes())
    data[-100] ^= 1
    package.write_bytes(data)


def another_list(archive: Path) -> None:
    for packages in archive.glob("dists/trixie/main/*/Packages"):
        packages.write_text(packages.read_text().replace("4.1.1-1", "9.9.9-9"))


def another_release(archive: Path) -> None:
    release = archive / "dists/trixie/InRelease"
    release.write_text(release.read_text().replace("Origin: Tests", "Origin: Other"))


def no_signature(archive: Path) -> None:
    signed = archive / "dists/trixie/InRelease"
    body = signed.read_text().split("\n\n", 1)[1].split("-----BEGIN PGP SIGNATURE", 1)[0]
    (archive / "dists/trixie/Release").write_text(body)
    signed.unlink()


def another_key(archive: Path) -> None:
    # A well-formed key of somebody else: the point of the ed25519 key, and with it the fingerprint, differs.
    key = archive / "keyring.gpg"
    data = bytearray(key.read_bytes())
    data[25] ^= 1
    key.write_bytes(data)


def no_key(archive: Path) -> None:
    (archive / "keyring.gpg").unlink()


def no_package(archive: Path) -> None:
    next(archive.glob("pool/libc6_*.deb")).unlink()


def nothing(archive: Path) -> None:
    shutil.rmtree(archive / "dists")


@needs_apt
@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        (other_bytes, "not what its signed list says"),
        (another_list, "not what its signed list says"),
        (another_release, "debian-archive-keyring"),
        (no_signature, "debian-archive-keyring"),
        (another_key, "debian-archive-keyring"),
        (no_key, "debian-archive-keyring"),
        (no_package, "CRIU 4.1 or newer"),
        (nothing, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_archive_that_is_not_as_signed_is_refused(
    no_system_criu: Path, data_dir: Path, tmp_path: Path, damage: Callable[[Path], None], remedy: str
) -> None:
    archive = copied_archive(tmp_path)
    damage(archive)
    with pytest.raises(HostError, match="could not") as caught:
        unpack_criu(archive_at(archive), data_dir, progress=silent)
    assert remedy in caught.value.remedy and caught.value.remedy
    assert list(data_dir.iterdir()) == []


@needs_apt
def test_a_system_that_allows_unsigned_packages_changes_nothing(
    no_system_criu: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, hook = copied_archive(tmp_path), tmp_path / "hook ran"
    careless = tmp_path / "careless.conf"
    careless.write_text(
        'APT::Get::AllowUnauthenticated "true"; Acquire::AllowInsecureRepositories "true";\n'
        f"APT::Update::Post-Invoke {{ \"touch '{hook}'\"; }};\n"
    )
    monkeypatch.setenv("APT_CONFIG", str(careless))
    unpack_criu(archive_at(archive), data_dir, progress=silent)
    assert not hook.exists(), "the system's hooks are not ours to run"
    no_signature(archive)
    with pytest.raises(HostError, match="not signed"):
        unpack_criu(archive_at(archive), data_dir, progress=silent)


@needs_apt
def test_a_kill_while_unpacking_leaves_nothing_that_counts(no_system_criu: Path, data_dir: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from dormouse.snapshot.criu_setup import Archive, unpack_criu\n"
        "def step(text):\n    text.startswith('unpacking') and os.kill(os.getpid(), 9)\n"
        "unpack_criu(Archive(sys.argv[1], 'trixie', Path(sys.argv[2])), Path(sys.argv[3]), progress=step)"
    )
    archive = archive_at(SIGNED)
    killed = subprocess.run([sys.executable, "-c", program, archive.uri, str(archive.keyring), str(data_dir)])
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in data_dir.iterdir()] == ["criu.partial"]
    with pytest.raises(HostError, match="none was found"):
        find_criu(data_dir)
    unpack_criu(archive, data_dir, progress=silent)
    assert [path.name for path in data_dir.iterdir()] == ["criu"]


@needs_apt
def test_a_failed_set_up_keeps_the_prefix_that_was_there(no_system_criu: Path, data_dir: Path, tmp_path: Path) -> None:
    unpack_criu(archive_at(SIGNED), data_dir, progress=silent)
    archive = copied_archive(tmp_path)
    other_bytes(archive)
    with pytest.raises(HostError):
        unpack_criu(archive_at(archive), data_dir, progress=silent)
    assert find_criu(data_dir).source == "prefix"


@needs_apt
@pytest.mark.root
def test_a_disk_without_room_is_told_before_the_download(no_system_criu: Path, data_dir: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", str(data_dir)], check=True)
    try:
        with pytest.raises(DiskFullError, match="4 MiB free"):
            unpack_criu(archive_at(SIGNED), data_dir, progress=silent)
        assert list(data_dir.iterdir()) == []
    finally:
        subprocess.run(["umount", str(data_dir)], check=True)


@needs_apt
def test_the_systems_own_mirror_is_asked_and_security_archives_are_not() -> None:
    for archive in debian_archives():
        assert archive.suite == "trixie" and archive.keyring == criu_setup.KEYRING
        assert not archive.uri.endswith("security")


# Where it cannot work


def test_elsewhere_than_on_debian(data_dir: Path, no_system_criu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(no_system_criu))
    with pytest.raises(HostError, match="Debian and Ubuntu only") as caught:
        setup_criu(data_dir, progress=silent)
    assert "CRIU 4.1 or newer" in caught.value.remedy


@needs_apt
def test_without_debians_keys(
    data_dir: Path, no_system_criu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criu_setup, "KEYRING", tmp_path / "missing.gpg")
    with pytest.raises(HostError) as caught:
        setup_criu(data_dir, progress=silent)
    assert "debian-archive-keyring" in caught.value.remedy


def test_on_a_processor_without_a_build(data_dir: Path, no_system_criu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(HostError, match="riscv64"):
        setup_criu(data_dir, progress=silent)


def test_a_data_folder_that_cannot_be_made(tmp_path: Path, no_system_criu: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        setup_criu(tmp_path / "file" / "data", progress=silent)


def test_a_second_set_up_waits_for_the_first(data_dir: Path, no_system_criu: Path) -> None:
    script(no_system_criu / "criu", "echo Version: 4.2")
    done = threading.Event()

    def second() -> None:
        setup_criu(data_dir, progress=silent)
        done.set()

    with criu_setup._locked(data_dir):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not done.wait(0.2)
    waiting.join(10)
    assert done.is_set()


@pytest.mark.root
def test_the_criu_of_this_machine_can_check_the_kernel() -> None:
    criu = find_criu(default_data_dir(os.environ))
    done = subprocess.run([*criu.argv_prefix, "check"], capture_output=True, text=True)
    assert "Looks good" in done.stdout
