"""Compile kernels ahead of their first launch, several at a time.

Triton compiles a kernel when it is first launched, one after another: half a second each on a
machine that has never seen them. Where its cache on disk has them they are only loaded. Knows
nothing of which kernels there are: whatever is launched inside the block is compiled instead.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import triton
from triton.runtime.jit import JITFunction

from ..cuda.program import compiler_threads

__all__ = ["compile_ahead", "open_cache"]


def open_cache() -> None:
    """What the first look into Triton's cache begins with, a third of a second: a hash of all of Triton.

    For a thread; Triton keeps the hash. Nothing where Triton has no such function.
    """
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        return
    triton_key()


@contextlib.contextmanager
def compile_ahead(threads: int | None = None) -> Iterator[None]:
    """Triton kernels that this thread launches in the block are compiled, not run; done when it ends.

    What the block computes is therefore worthless; anything in it that is no Triton kernel runs.
    A kernel that cannot be compiled is left to its first launch, which says why. Launches by other
    threads run as ever. Without Triton's asynchronous mode (before 3.5) the block simply runs.

    Args:
        threads: at most; None: one for each core, up to 16. Most of the work is done outside the
            interpreter's lock.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        yield
        return
    launch, owner = JITFunction.run, threading.get_ident()

    def compile_only(self, *args, grid, warmup, **kwargs):
        here = threading.get_ident() == owner
        return launch(self, *args, grid=grid, warmup=warmup or here, **kwargs)

    JITFunction.run = compile_only
    try:
        with (
            ThreadPoolExecutor(threads or compiler_threads()) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        JITFunction.run = launch
