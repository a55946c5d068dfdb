"""Clients that load a server: threads that search one after the other, and time each answer.

It imports nothing but Python's own modules, and runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from multiprocessing.queues import Queue

TEXTS = ("paint the small circle red", "add a large blue square", "remove the green triangle")


@dataclasses.dataclass(frozen=True)
class Load:
    """What the clients do.

    Attributes:
      port: of the server, on this machine.
      ids: of images, of which each search takes one.
      clients: that search at a time.
      seconds: for how long.
      k: images of an answer.
    """

    port: int
    ids: Sequence[str]
    clients: int
    seconds: float
    k: int = 24


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the clients saw.

    Attributes:
      seconds: of each answer.
      errors: of answers, and of those that did not come; counted by what went wrong.
    """

    seconds: list[float]
    errors: dict[str, int]


def run(load: Load, answer: Queue[Measured]) -> None:
    """Searches for some time; puts what was measured into the queue."""
    seconds: list[float] = []
    errors: dict[str, int] = {}
    lock, end = threading.Lock(), time.monotonic() + load.seconds

    def client(number: int) -> None:
        rng = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", load.port, timeout=60)
        while time.monotonic() < end:
            text = rng.choice(TEXTS)
            request = {"references": [{"id": rng.choice(load.ids)}], "text": text, "k": load.k}
            began = time.perf_counter()
            try:
                headers = {"content-type": "application/json"}
                connection.request("POST", "/search", json.dumps(request), headers)
                got = connection.getresponse()
                content = json.loads(got.read())
                wrong = "" if got.status == 200 else f"status {got.status}"
                if not wrong and len(content["results"]) != load.k:
                    wrong = "too few results"
            except (OSError, http.client.HTTPException, ValueError) as error:
                wrong = type(error).__name__
                connection.close()
            took = time.perf_counter() - began
            with lock:
                seconds.append(took)
                if wrong:
                    errors[wrong] = errors.get(wrong, 0) + 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer.put(Measured(seconds, errors))
