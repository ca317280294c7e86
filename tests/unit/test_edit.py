"""What the host changed, in one launch: what the kernel is given, and when its memory may be written again."""

from __future__ import annotations

import ctypes
import struct
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ostinato.errors import KernelError
from ostinato.inputs import _Staging
from ostinato.ops.cuda import edit
from ostinato.ops.cuda.edit import SOURCE, THREADS, Editor


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A driver that reads parameters as it is called, as the real one does."""
    found: list[tuple[Any, ...]] = []

    def launch(function: Any, *rest: Any) -> tuple[int]:
        *sizes, stream, slots, extra = rest
        (params,) = (ctypes.c_void_p * 1).from_address(slots)
        found.append((function, sizes, stream, ctypes.string_at(params, 32), extra))
        return (0,)

    driver = ModuleType("cuda.bindings.driver")
    driver.cuLaunchKernel, driver.CUstream = launch, lambda raw: ("stream", raw)  # type: ignore[attr-defined]
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(edit, "has_bindings", lambda: True)
    monkeypatch.setattr(edit, "build", lambda *args, **options: SimpleNamespace(function="edit"))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return found


def test_a_launch_is_given_what_the_source_reads(launches: list[tuple[Any, ...]]) -> None:
    fields = SOURCE.read_text().split("struct Params {\n")[1].split("};")[0]
    names = [line.split("//")[0].strip(" ;").split()[-1].strip("*") for line in fields.splitlines()]
    assert names == ["to", "index", "values", "narrow"], "and `count` before the last"
    editor = Editor(torch.device("cpu"))
    words, counts = torch.zeros(10, dtype=torch.int32), torch.zeros(10, dtype=torch.int16)
    editor(words, 1000, 2000, THREADS + 1)
    editor(counts, 3000, 4000, 2)
    (function, sizes, stream, params, extra), narrow = launches
    assert (function, sizes, stream, extra) == ("edit", [2, 1, 1, THREADS, 1, 1, 0], ("stream", 7), 0)
    assert struct.unpack("<QQQii", params) == (words.data_ptr(), 1000, 2000, THREADS + 1, 0)
    assert narrow[1][0] == 1
    assert struct.unpack("<QQQii", narrow[3]) == (counts.data_ptr(), 3000, 4000, 2, 1)
    assert editor.stream == 7


def test_targets_lie_one_behind_the_other(
    launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indices of all, then values of all; the event of a slot is made once and waited for before the next use."""
    calls: list[str] = []

    class Event:
        def __init__(self, stream: Any) -> None:
            calls.append("made")

        def on(self, raw: int) -> bool:
            return raw == 7

        def record(self) -> None:
            calls.append("recorded")

        def synchronize(self) -> None:
            calls.append("waited for")

    monkeypatch.setattr("ostinato.graphs.driver.Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(_Staging, "_room", lambda self, nbytes: torch.empty(nbytes, dtype=torch.uint8))
    staging = _Staging(torch.device("meta"), Editor(torch.device("cpu")))
    words, counts = torch.zeros(50, dtype=torch.int32), torch.zeros(50, dtype=torch.int16)
    for _ in range(2):
        first = words, np.array([3, 40, 5]), np.array([1, 2, 3], np.int32)
        staging.apply([first, (counts, np.array([9, 8]), np.array([7, 6], np.int32))])
    assert calls == ["made", "waited for", "recorded"]
    for (to, count), (*_, params, _) in zip(((words, 3), (counts, 2)) * 2, launches, strict=True):
        address, index, values, found, _ = struct.unpack("<QQQii", params)
        assert (address, found) == (to.data_ptr(), count)
        wanted = ([3, 40, 5], [1, 2, 3]) if count == 3 else ([9, 8], [7, 6])
        assert list((ctypes.c_int64 * count).from_address(index)) == wanted[0]
        assert list((ctypes.c_int32 * count).from_address(values)) == wanted[1]


def test_without_a_compiler_changes_are_copied(
    launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise KernelError("libnvrtc cannot be found")

    assert Editor.on(torch.device("cpu")) is not None
    monkeypatch.setattr(edit, "build", broken)
    assert Editor.on(torch.device("cpu")) is None
    monkeypatch.setattr(edit, "has_bindings", lambda: False)
    monkeypatch.setattr(edit, "build", lambda *a, **m: pytest.fail("compiled"))
    assert Editor.on(torch.device("cpu")) is None
