"""`scripts/gpu-check` names tests that are there, and each kernel; it holds bounds, and writes what it saw."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "src" / "ostinato" / "ops"


def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "gpu-check"), run_name="gpu_check")


def test_races_within_a_library_are_not_ours() -> None:
    theirs = "========= Error: Race reported between Read access at cudnn_generated_sdpa_kernel0_0+0x300\n"
    ours = "========= Error: Race reported between Read access at attention+0x300\n"
    product = "========= Error: Race reported between Read access at nvjet_sm90_tst_8x64+0x2800\n"
    product += "=========     and Write access at nvjet_sm90_tst_8x64+0x2800 [288 hazards]\n"
    both = product.replace("and Write access at nvjet_", "and Write access at stream_")
    end = ".   [100%]\n1 passed in 12.36s\n========= RACECHECK SUMMARY: 1 hazard displayed\n"
    only_libraries = script()["only_libraries"]
    assert only_libraries(9, theirs + end)
    assert only_libraries(9, product + end)
    assert only_libraries(9, theirs + product + end)
    assert not only_libraries(9, product + both + end)
    assert not only_libraries(9, product + "========= Error: Invalid read\n" + end)
    assert not only_libraries(9, theirs + ours + end)
    assert not only_libraries(9, ours + end)
    assert not only_libraries(9, end)
    assert not only_libraries(1, theirs + end)
    assert not only_libraries(9, theirs + end.replace("1 passed", "1 failed"))


def launched() -> set[str]:
    """Kernels as `SMALL` names them: all that a source of ours launches by `kernel[grid](...)`, and CUDA sources."""
    found = {path.name for path in OPS.glob("cuda/*.cu")}
    defined, called = set(), set()
    for path in OPS.glob("triton/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(d) for d in node.decorator_list
            ):
                defined.add((path.stem, node.name))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                called.add(ast.unparse(node.func.value).rpartition(".")[2])
    return found | {f"{module}.{name}" for module, name in defined if name in called}


def unnamed(kernels: set[str]) -> set[str]:
    return kernels - {kernel for named in script()["SMALL"].values() for kernel in named}


def test_each_kernel_has_a_test_that_is_sanitized() -> None:
    """A new kernel needs an entry of `SMALL` in scripts/gpu-check."""
    kernels = launched()
    assert {"decode.gemv", "sampling._draw", "attention.varlen", "decode.cu", "bandwidth.read_sum"} <= kernels
    assert "decode._rotate" not in kernels, "it is part of others"
    assert not unnamed(kernels)
    assert unnamed(kernels | {"decode.new", "new.cu"}) == {"decode.new", "new.cu"}
    names = {kernel for named in script()["SMALL"].values() for kernel in named}
    assert not names - kernels, "of kernels that are gone"


def test_a_source_has_its_functions() -> None:
    functions = script()["functions"]
    assert functions("rows.cu") == {"decode_rows", "finish_rows"}
    assert all(functions(path.name) for path in OPS.glob("cuda/*.cu"))
    assert functions("decode.gemv") == {"gemv"}


def test_racecheck_leaves_out_what_mbarriers_order() -> None:
    found = script()
    for test, kernels in found["SMALL"].items():
        sources = [OPS / "cuda" / kernel for kernel in kernels if kernel.endswith(".cu")]
        has = any("mbarrier" in text for source in sources for text in with_includes(source))
        assert test.startswith(found["BARRIERS"]) == has, test


def with_includes(source: Path) -> list[str]:
    text = source.read_text()
    parts = re.findall(r'^#include "(\S+)"', text, re.MULTILINE)
    return [text, *(t for part in parts for t in with_includes(source.parent / part))]


def point(**changes: float | None) -> dict[str, float | None]:
    figures = {
        "gpu_idle_share": 0.0,
        "gpu_idle_share_by_events": -0.002,
        "launch_us": 5.0,
        "commit_us_per_row": 0.7,
    }
    return figures | {"time_per_output_token_us": 600.0} | changes


@pytest.mark.parametrize(
    ("where", "changes", "missed"),
    [
        (("greedy", 1), {}, set()),
        (("greedy", 1), {"gpu_idle_share": 0.02}, {"gpu_idle_share, batch 1"}),
        (("greedy", 1), {"gpu_idle_share_by_events": None}, {"gpu_idle_share_by_events, batch 1"}),
        (("greedy", 64), {"launch_us": 20.0, "gpu_idle_share": 0.5}, set()),
        (("greedy", 64), {"launch_us": 20.1}, {"launch_us, batch 64"}),
        (("greedy", 8), {"commit_us_per_row": 2.1}, {"commit_us_per_row, batch 8"}),
        (("sampled", 1), {"time_per_output_token_us": 619.0}, {"sampling over greedy, batch 1"}),
        (("sampled", 64), {"time_per_output_token_us": 619.0}, set()),
        (("sampled", 64), {"time_per_output_token_us": 661.0}, {"sampling over greedy, batch 64"}),
    ],
)
def test_bounds_of_a_step(
    capsys: pytest.CaptureFixture[str],
    where: tuple[str, int],
    changes: dict[str, float | None],
    missed: set[str],
) -> None:
    found = script()
    points = {sampler: {batch: point() for batch in batches} for sampler, batches in found["BATCHES"].items()}
    points[where[0]][where[1]] = point(**changes)
    bounds = found["bounds"](points)
    assert {bound["figure"] for bound in bounds if not bound["held"]} == missed
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(bounds) == 12
    assert sum(line.startswith("MISSED") for line in said) == len(missed)


def test_what_was_sanitized_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--json`, for the record; one test under each tool, by a compute-sanitizer that finds nothing, or something."""
    file, tool = tmp_path / "out.json", tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    command = [sys.executable, str(ROOT / "scripts" / "gpu-check"), "--sanitize", "--json", str(file)]
    command += ["--tools", "memcheck,racecheck", "--only", "own_product", "[one launch-132"]
    for said, status in (("1 passed", 0), ("1 skipped", 1), ("1 failed", 1)):
        tool.write_text(f"#!/bin/sh\necho '{said} in 1 s'\n")
        tool.chmod(0o755)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        found = json.loads(file.read_text())
        assert json.loads(done.stdout) == found
        assert found["ok"] == (status == 0)
        assert found["environment"]["torch"]
        assert [len(found["sanitize"][name]["tests"]) for name in ("memcheck", "racecheck")] == [2, 1]


def test_what_it_sanitizes_is_there() -> None:
    small: dict[str, tuple[str, ...]] = script()["SMALL"]
    names = [f"tests/gpu/{name}" for name in small]
    # A name that pytest does not find is an error, which is its status then.
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *names],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
