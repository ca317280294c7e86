"""Kernels' sources compiled for the CPU by g++, with small stand-ins for CUDA: `host_grid.h`, `host_cuda.h`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")
FOLDER = Path(__file__).parent


def portable(path: Path) -> str:
    """A source without its instructions, which `host_grid.h` has, and without the headers that hold nothing else."""
    source = path.read_text()
    begin, end = source.index("// --- Instructions."), source.index("// --- End of instructions.")
    source = source[:begin] + source[end:]
    for header in ("persistent.cuh", "stream.cuh"):
        line = f'#include "{header}"'
        if line in source:
            source = source.replace(line, portable(path.with_name(header)))
    lines = [line for line in source.splitlines() if not line.startswith("#include")]
    return "\n".join(line for line in lines if "extern __shared__" not in line) + "\n"


def launches(**kernels: str) -> str:
    """C functions that run a kernel's whole grid, threads in an order that follows from a seed; they return whether all ended.

    By name, behind `run_`, what a parameter is and what a thread does: "Params kernel(*p)".
    """
    return "".join(
        f'extern "C" int run_{name}(const {call.partition(" ")[0]} *p, unsigned seed)'
        f" {{ return run_grid(seed, [&] {{ {call.partition(' ')[2]}; }}); }}\n"
        for name, call in kernels.items()
    )


def compiled(
    folder: Path, name: str, headers: Sequence[str], text: str, numbers: Mapping[str, int], *flags: str
) -> ctypes.CDLL:
    """A program with these headers in front."""
    file, library = folder / f"{name}.cpp", folder / f"{name}.so"
    file.write_text("".join(f'#include "{FOLDER / header}"\n' for header in headers) + text)
    defines = [f"-D{key}={int(value)}" for key, value in numbers.items()]
    options = ["-std=c++17", "-O2", "-w", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", *flags, *defines]
    subprocess.run([str(COMPILER), *options, str(file), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
