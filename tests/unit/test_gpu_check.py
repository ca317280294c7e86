"""`scripts/gpu-check` names tests that are there."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_what_it_sanitizes_is_there() -> None:
    small: list[str] = runpy.run_path(str(ROOT / "scripts" / "gpu-check"), run_name="gpu_check")["SMALL"]
    names = [f"tests/gpu/{name}" for name in small]
    # A name that pytest does not find is an error, which is its status then.
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *names],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
