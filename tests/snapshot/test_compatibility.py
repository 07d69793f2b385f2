"""The compatibility key: which differences are borne, and what is said about the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dormouse.snapshot.compatibility import RULES, first_mismatch, gpu_key, host_key, system_key

KEY_OF: dict[str, Any] = {
    "engine": "null",
    "worker": "1.0 code abc",
    "packages": ["msgspec", "no-such-package"],
    "model_digest": "d",
    "options": {"threads": 2},
}


def test_the_same_host_and_model_fit() -> None:
    key = host_key(**KEY_OF)
    assert first_mismatch(key, dict(key)) is None
    assert key["option threads"] == "2"
    assert key["package no-such-package"] == "not installed"


@pytest.mark.parametrize("field", ["kernel", "python", "model", "engine", "package msgspec", "option threads"])
def test_a_mismatch_names_its_field_both_values_and_what_follows(field: str) -> None:
    key = host_key(**KEY_OF)
    reason = first_mismatch(key | {field: "other"}, key)
    assert reason is not None and reason.field == field
    assert str(reason).startswith(f"{field}: captured with other, here is {key[field]}; a restore ")


FIELDS = [*sorted(RULES.keys() - {"canary"}), "package x", "option y", "a field of another version"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_only_one_side_has_is_a_mismatch(field: str) -> None:
    key = {"machine": "x86_64"} if field != "machine" else {}
    for then, now in ((key | {field: "1"}, key), (key, key | {field: "1"})):
        mismatch = first_mismatch(then, now)
        assert mismatch is not None and mismatch.field == field


def test_what_is_ignored_may_differ_or_be_on_one_side_only() -> None:
    assert first_mismatch({"canary": "a"}, {}) is None
    assert first_mismatch({"canary": "a"}, {"canary": "b"}) is None


def test_a_cpu_may_have_more_flags_but_not_fewer() -> None:
    assert first_mismatch({"cpu_flags": "avx sse"}, {"cpu_flags": "avx avx512f sse"}) is None
    reason = first_mismatch({"cpu_flags": "avx avx512f sse"}, {"cpu_flags": "avx sse"})
    assert "avx512f, which this CPU lacks" in str(reason)


@pytest.mark.parametrize(
    ("field", "then", "now", "fits"),
    [
        ("kernel", "6.1.0-18-amd64", "6.1.0-9-amd64", True),
        ("kernel", "6.1.90", "6.12.1", True),
        ("kernel", "6.12.1", "6.1.90", False),
        ("kernel", "7.0.0-rc1", "6.99.0", False),
        ("kernel", "custom", "custom", True),
        ("kernel", "custom", "6.1.0", False),
        ("criu", "4.1", "4.1.1", True),
        ("criu", "4.1.1", "4.1", False),
        ("criu", "4.1", "4.1.0", True),
        ("python", "3.12.1", "3.12.2", False),
        ("gpu_driver", "570.1", "570.2", False),
    ],
)
def test_newer_kernels_and_crius_will_do_and_nothing_else_may_be_newer(
    field: str, then: str, now: str, fits: bool
) -> None:
    mismatch = first_mismatch({field: then}, {field: now})
    assert (mismatch is None) is fits
    assert fits or (then in str(mismatch) and now in str(mismatch))


def test_the_gpu_is_named_by_its_driver(tmp_path: Path) -> None:
    assert gpu_key(tmp_path) == {}
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
        (tmp_path / "gpus" / bus / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   77\n")
    assert gpu_key(tmp_path) == {"gpu": "NVIDIA H200", "gpu_driver": "570.86.15"}


def test_a_process_without_a_gpu_fits_a_host_with_one() -> None:
    assert "gpu" not in system_key(gpu=False)
