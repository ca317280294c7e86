"""The garbage collector does not look at what was there when serving began."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ostinato.serve import worker
from ostinato.serve.messages import Start

LATER = """
import gc, ostinato.serve.worker
from ostinato.serve.pauses import spare_what_is_there
before = len(gc.get_objects())
spare_what_is_there()
class Node: pass
for _ in range(50):
    node = Node(); node.itself = node
del node
print(before, gc.get_freeze_count(), len(gc.get_objects()), gc.collect())
"""


def test_what_is_there_is_spared_and_later_garbage_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=True)
    before, frozen, looked_at, found = map(int, done.stdout.split())
    assert frozen > 0.9 * before
    assert looked_at < 0.1 * before
    assert found >= 50


def test_the_engine_process_does_so_once_its_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    start = Start({}, "info", "text", 1.0)
    channel: Any = SimpleNamespace(
        closed=False, receive=lambda _: [start], send=lambda _: order.append("ready"), flush=lambda _: None
    )
    monkeypatch.setattr(worker, "_build", lambda _: order.append("built"))
    monkeypatch.setattr(worker, "spare_what_is_there", lambda: order.append("spared"))
    monkeypatch.setattr(worker, "ready", lambda _: None)
    monkeypatch.setattr(worker.logs, "set_up", lambda *_: None)
    monkeypatch.setattr(worker, "Worker", lambda *_: SimpleNamespace(run=lambda: order.append("ran")))
    assert worker.serve(channel) == 0
    assert order == ["built", "spared", "ready", "ran"]
