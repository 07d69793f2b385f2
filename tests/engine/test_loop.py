"""The engine's thread."""

from __future__ import annotations

import threading
import weakref

from dormouse.engine.loop import Loop


class Command:
    """Something that takes memory."""


def test_a_thread_that_sleeps_holds_no_command() -> None:
    def fail(error: Exception) -> None:
        raise error

    loop: Loop[Command] = Loop(lambda commands: False, fail)
    freed = threading.Event()
    try:
        command = Command()
        weakref.finalize(command, freed.set)
        loop.post(command)
        del command
        assert freed.wait(20)
    finally:
        loop.close()
