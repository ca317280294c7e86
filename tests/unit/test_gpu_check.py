"""`scripts/gpu-check` names tests that are there."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "gpu-check"), run_name="gpu_check")


def test_races_within_a_library_are_not_ours() -> None:
    theirs = "========= Error: Race reported between Read access at cudnn_generated_sdpa_kernel0_0+0x300\n"
    ours = "========= Error: Race reported between Read access at attention+0x300\n"
    end = ".   [100%]\n1 passed in 12.36s\n========= RACECHECK SUMMARY: 1 hazard displayed\n"
    only_libraries = script()["only_libraries"]
    assert only_libraries(9, theirs + end)
    assert not only_libraries(9, theirs + ours + end)
    assert not only_libraries(9, ours + end)
    assert not only_libraries(9, end)
    assert not only_libraries(1, theirs + end)
    assert not only_libraries(9, theirs + end.replace("1 passed", "1 failed"))


def test_what_it_sanitizes_is_there() -> None:
    small: list[str] = script()["SMALL"]
    names = [f"tests/gpu/{name}" for name in small]
    # A name that pytest does not find is an error, which is its status then.
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *names],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
