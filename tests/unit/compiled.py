"""Triton kernels compiled for an H100 where there is no GPU: launches become compilations."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

SHARE = "OSTINATO_TEST_SHARE"


@dataclass(frozen=True)
class Compiled:
    """What became of one launch."""

    name: str
    named: dict[str, Any]
    """Arguments by name"""
    constexprs: dict[str, Any]
    signature: dict[str, str]
    options: dict[str, Any]
    ptx: str
    metadata: Any


def compile_launches(look: Callable[[Compiled], None], aligned: Collection[str] = ()) -> None:
    """From now on a launch compiles its kernel, once for the same arguments, and has `look` see it.

    For a process of its own: launches never run again. One of several (`compiled_here`) takes its share of the kernels.

    Args:
        look: asserts what should hold.
        aligned: integer arguments that are specialised where they are multiples of 16, as at run time.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    seen = set()
    share, shares = map(int, os.environ.get(SHARE, "0/1").split("/"))

    def build(self: JITFunction, *args: object, grid: object, warmup: bool, **options: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        named |= {k: options.pop(k) for k in list(options) if k in self.arg_names}
        constant = {p.name for p in self.params if p.is_constexpr}
        signature = {n: "constexpr" if n in constant else mangle_type(named[n]) for n in self.arg_names}
        constexprs = {n: named[n] for n in constant}
        even = [n for n in aligned if isinstance(v := named.get(n), int) and v % 16 == 0]
        divisible = [n for n in signature if signature[n][0] == "*" or n in even]
        attributes = {(self.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible}
        key = (
            self.__name__, *signature.items(), *even, *sorted(constexprs.items()), *sorted(options.items()),
        )  # fmt: skip
        if key in seen:
            return
        seen.add(key)
        if len(seen) % shares != share:
            return
        source = ASTSource(self, signature, constexprs, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = kernel.asm["ptx"]
        look(Compiled(self.__name__, named, constexprs, signature, options, ptx, kernel.metadata))

    JITFunction.run = build


def compiled_here(file: str, folder: Path) -> list[str]:
    """What a test file prints, a line each, when it runs as a program that compiles its kernels; in a few processes."""
    from triton import knobs

    try:
        ptxas = knobs.nvidia.ptxas.path
    except RuntimeError as error:
        pytest.skip(f"Triton finds no ptxas: {error}")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    shares = min(os.cpu_count() or 1, 4)

    def run(share: int) -> subprocess.CompletedProcess[str]:
        own = {**env, SHARE: f"{share}/{shares}"}
        return subprocess.run([sys.executable, file, ptxas], env=own, capture_output=True, text=True)

    with ThreadPoolExecutor(shares) as pool:
        done = list(pool.map(run, range(shares)))
    for process in done:
        assert process.returncode == 0, process.stdout + process.stderr
        print(process.stdout)
    return [line for process in done for line in process.stdout.splitlines()]


def assembled(ptx: str, ptxas: str) -> tuple[int, list[int]]:
    """Registers of a thread and bytes spilled (stores, loads), as the assembler says."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "-arch=sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    return int(registers), [int(size) for size in re.findall(r"(\d+) bytes spill", said)]


def struct_fields(source: str) -> tuple[list[str], list[str]]:
    """Names of the pointers, and of the rest, of a source's `struct Params`, in order."""
    lines = [
        line.split("//")[0].strip(" ;")
        for line in source.split("struct Params {\n")[1].split("};")[0].splitlines()
        if not line.startswith("#")
    ]
    pointers = [n.strip(" *") for line in lines if "*" in line for n in line[line.index("*") :].split(",")]
    numbers = [n.strip() for line in lines if "*" not in line for n in line.split(" ", 1)[1].split(",")]
    return pointers, numbers


def no_gpu_needed(monkeypatch: pytest.MonkeyPatch, module: Any, kernel: Callable[..., Any]) -> list[Any]:
    """A GPU of 132 multiprocessors that compiles anything: `kernel(macros, options)` of each `build` in `module`; all of them."""
    from ostinato.ops.cuda import linear

    found: list[Any] = []

    def build(source: Any, name: str, macros: dict[str, int], **options: Any) -> Any:
        found.append(kernel(macros, options))
        return found[-1]

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(linear, "_encode", lambda *what: repr(what).encode()[:128].ljust(128))
    return found
