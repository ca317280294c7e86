"""Kernels compiled ahead, for a GPU that is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), nothing_of_that_name)
"""

SCRIPT = '''
import sys, threading, time
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ostinato.ops.triton.compile import compile_ahead
import kernels


class Driver:
    """Says that there is an H100; a launch would need one."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Driver())
compiled, threads = [], set()
whole = triton.compiler.compile

def noting(src, *args, **kwargs):
    threads.add(threading.current_thread().name)
    made = whole(src, *args, **kwargs)
    compiled.append(src.constants)
    return made

x = torch.zeros(256)
before = JITFunction.run
with compile_ahead(threads=3):
    for size in (16, 32, 64, 128):
        cache = kernels.add.device_caches[0]
        kernels.add.compile = noting
        kernels.add[(1,)](x, x, x, N=size)
    kernels.add[(1,)](x, x, x, N=16)  # once is enough
    kernels.broken[(1,)](x, N=16)
assert JITFunction.run is before
assert len(compiled) == 4, compiled
assert threading.main_thread().name not in threads, threads
assert len(kernels.add.device_caches[0][0]) == 4
assert not x.any()  # nothing ran
try:
    kernels.broken[(1,)](x, N=16)
except Exception as error:
    assert "nothing_of_that_name" in str(error), error
else:
    raise AssertionError("the broken kernel compiled")
print("done")
'''


@pytest.mark.skipif(sys.platform != "linux", reason="triton")
def test_kernels_compile_in_threads_and_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    cache = tmp_path / "cache"
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "done", done.stderr
    assert len(list(cache.rglob("*.cubin"))) == 4
    shutil.rmtree(cache)
