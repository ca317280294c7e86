"""The driver is begun early where there is one; nothing that goes wrong there is heard of."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ostinato import wake


def library(monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> list[str]:
    """A stand-in for the driver; returns what will have been called."""
    called: list[str] = []

    def function(name: str) -> object:
        def call(*_args: object) -> int:
            called.append(name)
            return 999 if name == refuses else 0

        return call

    names = ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain")
    driver = SimpleNamespace(**{name: function(name) for name in names})
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    return called


def test_the_context_is_made_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    called = library(monkeypatch)
    thread = wake.wake_driver()
    assert thread is not None
    thread.join(10)
    assert called == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


def test_a_driver_that_refuses_is_left_to_who_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called = library(monkeypatch, refuses="cuInit")
    thread = wake.wake_driver("cuda")
    assert thread is not None
    thread.join(10)
    assert called == ["cuInit"]


def test_no_driver_or_no_need(monkeypatch: pytest.MonkeyPatch) -> None:
    called = library(monkeypatch)
    assert wake.wake_driver("cpu") is None
    assert called == []

    def missing(_name: str) -> object:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert wake.wake_driver() is None


def test_waking_imports_nothing_heavy() -> None:
    script = "import sys, ostinato.wake; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
