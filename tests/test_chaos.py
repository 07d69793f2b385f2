"""Random kills under load: every request is answered rightly or with a clear error, and nothing hangs or is left."""

from __future__ import annotations

import collections
import random
import shutil
import threading
import time

import httpx
import psutil
import pytest

from dormouse.data_dir import DataDir
from dormouse.store.store import Store
from tests.serving import QUESTION, Server, command_of, data_dir, serve

__all__ = ["data_dir"]
pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

VICTIMS = ("service_main", "engine.worker", "cell_init", "criu dump", "criu restore")
SECONDS = 10.0
LONGEST = 30.0
ENOUGH_KILLS, ENOUGH_ANSWERS = 6, 51
MOST_SECONDS = 100.0


@pytest.mark.parametrize(("seed", "sleep_memory"), [(20261121, "0"), (20261122, "1GiB")])
def test_requests_survive_random_kills_of_everything_but_the_node(
    data_dir: DataDir, seed: int, sleep_memory: str
) -> None:
    shutil.copytree(data_dir.models / "null", data_dir.models / "two")
    outcomes: collections.Counter[str] = collections.Counter()
    stop = threading.Event()
    with serve(data_dir, "null", "two", keep_alive="100ms", sleep_memory=sleep_memory) as server:
        texts = {model: text_of(server.ask(model)) for model in ("null", "two")}
        clients = [
            threading.Thread(target=ask_on, args=(server, random.Random(seed + i), texts, outcomes, stop))
            for i in range(5)
        ]
        for client in clients:
            client.start()
        kills = kill_at_random(server, random.Random(seed), outcomes)
        stop.set()
        for client in clients:
            client.join()
        assert kills >= ENOUGH_KILLS
        assert outcomes["right"] >= ENOUGH_ANSWERS, outcomes
        assert set(outcomes) <= {"right", "clear error"}, outcomes
        assert {model: text_of(server.ask(model)) for model in texts} == texts
    with Store.open(data_dir.store) as store:
        assert store.verify().ok


def text_of(answer: httpx.Response) -> str:
    return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])


def ask_on(
    server: Server,
    choice: random.Random,
    texts: dict[str, str],
    outcomes: collections.Counter[str],
    stop: threading.Event,
) -> None:
    """Ask again and again and sort what comes back."""
    with httpx.Client(timeout=LONGEST) as client:
        while not stop.is_set():
            model = choice.choice(sorted(texts))
            body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 20}
            try:
                answer = client.post(f"{server.address}/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                outcomes[f"no answer: {error!r}"] += 1
                continue
            if answer.status_code == 200:
                outcomes["right" if text_of(answer) == texts[model] else "wrong"] += 1
            else:
                outcomes["clear error" if answer.json()["error"]["message"] else "unclear error"] += 1
            time.sleep(choice.random() * 0.5)


def kill_at_random(server: Server, choice: random.Random, outcomes: collections.Counter[str]) -> int:
    """kill -9 one process below the node every now and then; how many were killed. A slow machine has more time."""
    kills = 0
    begin = time.monotonic()
    while (took := time.monotonic() - begin) < SECONDS or (
        took < MOST_SECONDS and (kills < ENOUGH_KILLS or outcomes["right"] < ENOUGH_ANSWERS)
    ):
        time.sleep(choice.random() * 0.8)
        family = server.family()
        victim = choice.choice(family) if family else None
        if victim is not None and any(word in command_of(victim) for word in VICTIMS):
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
            kills += 1
    return kills
