"""Environment variables that turn a kernel off, each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import ostinato.ops.triton as ours
from ostinato.ops.cuda import attend, chain, fused, rows
from ostinato.ops.triton import TritonOps
from tests.unit.test_fused import hopper, model, ops_with_the_kernel

__all__ = ["hopper"]

SWITCHES = {"OSTINATO_CHAIN": "_chain", "OSTINATO_ATTEND": "_attend", "OSTINATO_FUSED_ROWS": "_rows"}


@pytest.fixture
def ops(hopper: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Of a Hopper on which everything can be built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # nor is there one elsewhere
    for module in (fused, rows):
        monkeypatch.setattr(module, "build", lambda *args, **more: SimpleNamespace(handle=1))
    monkeypatch.setattr(chain, "Chain", lambda *args: "chain")
    monkeypatch.setattr(attend, "Attend", lambda *args: "attend")
    for name in ("OSTINATO_FUSED", *SWITCHES):
        monkeypatch.delenv(name, raising=False)
    made = ops_with_the_kernel()
    made._products = made._attention = SimpleNamespace()
    yield made
    made._fused = made._claim = None  # a failed test's traceback would keep it from the next one


def found(ops: Any) -> dict[str, bool]:
    """Which kernels an engine of 128 sequences has."""
    m = model()
    ops.load(m, 16, 4, 128)
    assert ops.fuses(m, 1)
    assert ops.fuses(m, 8) == (ops._rows is not None)
    return {name: getattr(ops, kernel) is not None for name, kernel in SWITCHES.items()}


def test_all_are_on_by_default(ops: Any) -> None:
    assert found(ops) == dict.fromkeys(SWITCHES, True)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("value", ["0", "1"])
def test_each_turns_its_own_kernel_off(
    ops: Any, monkeypatch: pytest.MonkeyPatch, switch: str, value: str
) -> None:
    monkeypatch.setenv(switch, value)
    assert found(ops) == dict.fromkeys(SWITCHES, True) | {switch: value == "1"}


@pytest.mark.parametrize("value", ["0", "1"])
def test_without_the_one_kernel_step_none_is_there(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """OSTINATO_FUSED=0 turns all of them off: their blocks wait for each other, and nobody holds the claim."""
    monkeypatch.setenv("OSTINATO_FUSED", value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(ours, "has_bindings", lambda: True)
    assert ours._has_fused(torch.device("cuda", 0)) == (value == "1")
    if value == "0":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        ops = TritonOps()
        assert ops._fused is None
        ops.load(model(), 16, 4, 128)
        assert (ops._rows, ops._chain, ops._attend) == (None, None, None)
