"""What the command line says when something is wrong, to people and to programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import pytest

from dormouse import catalogue, cli


def run(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["dormouse", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["ls", "--json", "--frobnicate"], 2, "usage"),
        (["frobnicate", "--json"], 2, "usage"),
        (["inspect", "nothing", "--json"], 3, "not_found"),
        (["wake", "mouse", "--json"], 4, "host_not_capable"),
        (["ls", "--json"], cli.INTERNAL_ERROR, "internal_error"),
    ],
)
def test_programs_get_every_error_as_json(
    arguments: list[str],
    status: int,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setenv("DORMOUSE_HOME", str(tmp_path_factory.mktemp("home")))
    if code == "internal_error":
        monkeypatch.setattr(catalogue, "listing", lambda _folder: 1 / 0)
    assert run(arguments, monkeypatch) == status
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert error["code"] == code and error["message"] and error["remedy"]
    assert shown.err == ""


def test_the_command_keeps_freed_memory_for_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append(True))
    assert run(["frobnicate"], monkeypatch) == 2
    assert called == [True]


def test_people_get_a_sentence_and_a_hint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(catalogue, "listing", lambda _folder: 1 / 0)
    assert run(["ls"], monkeypatch) == cli.INTERNAL_ERROR
    shown = capsys.readouterr()
    assert shown.out == "" and "error: unexpected ZeroDivisionError" in shown.err and "hint:" in shown.err
    assert run(["frobnicate"], monkeypatch) == 2
    assert "frobnicate" in capsys.readouterr().err
