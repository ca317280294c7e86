"""What a soak says of itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.soak import whole_layers
from ostinato.graphs import survey
from ostinato.ops import VersionLine


def test_kernels_of_more_than_one_op_and_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def versions(stack: Any, rows: int, *, decode: bool) -> list[VersionLine]:
        both = VersionLine("attend", "", "attend.cu", "measured")
        return [both if decode and 2 <= rows <= 5 else VersionLine("norm_linear", "8x8", "linear.cu")]

    engine: Any = SimpleNamespace(
        program=SimpleNamespace(ops=SimpleNamespace(versions=versions), model=None),
        config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=7),
    )
    report = SimpleNamespace(kernels=survey._kernel_uses(engine))
    monkeypatch.setattr(survey, "survey", lambda engine: report)
    assert whole_layers(engine) == ["attend: attend.cu (measured), decode steps of 2 to 5 rows"]
