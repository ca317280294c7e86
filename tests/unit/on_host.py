"""Kernels' sources compiled for the CPU by g++, with small stand-ins for CUDA: `host_grid.h`, `host_cuda.h`, `host_tiles.h`."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from ostinato.ops.cuda.program import source_text

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


def without_assembler(path: Path) -> str:
    """A source and its headers, in a namespace, without the functions in assembler: the stand-ins have them.

    What lies in shared memory by name stands at its end.
    """
    kept = []
    for piece in re.split(r"(?m)^(?=(?:template <[^>]*> )?__device__ __forceinline__ )", source_text(path)):
        first = piece.partition("\n")[0]
        end = len(first) + 1 if first.endswith("}") else piece.find("\n}\n") + 3
        function = piece[:end]
        kept.append(piece[end:] if "asm" in function or "PRODUCT(" in function else piece)
    kernel = re.sub(r"(?m)^#define (?:.*\\\n)*.*", "", "".join(kept))
    kernel = re.sub(r"(?m)^.*extern __shared__.*$", "", kernel)
    at = iter(range(1, 9))
    kernel = re.sub(
        r"__shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[(.+)\];",
        lambda m: f"auto &{m[2]} = *({m[1]} (*)[{m[3]}])(memory + ::SHARED - {next(at) * 1024});",
        kernel,
    )
    # Copies that are under way read maps even when the thread that asked for them has ended.
    kernel = kernel.replace("const __grid_constant__ Params p", "const Params &p")
    assert "asm" not in kernel
    return kernel


def tiles_launch(path: Path, name: str) -> str:
    """The source, for `host_tiles.h`, and a C function `run` as `launches` has it."""
    return without_assembler(path) + (
        'extern "C" int run(const void *p, unsigned seed) { static Params held; std::memcpy(&held, p, sizeof(Params));'
        f" return run_tiles(seed, [] {{ {name}(held); }}); }}\n"
        'extern "C" unsigned long bytes_of_params() { return sizeof(Params); }\n}\n'
    )


def encoded(address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """A tensor map as `host_tiles.h` reads it, in place of the driver's."""
    parts = ((sizes, 4), (strides, 3), (box, 4))
    words = [
        address,
        len(sizes),
        *(n for values, room in parts for n in (*values, *[1] * (room - len(values)))),
    ]
    return struct.pack("<16Q", *words, *[0] * (16 - len(words)))


def launches(**kernels: str) -> str:
    """C functions that run a kernel's whole grid, threads in an order that follows from a seed; they return whether all ended.

    By name, behind `run_`, what a parameter is and what a thread does: "Params kernel(*p)".
    """
    return "".join(
        f'extern "C" int run_{name}(const {call.partition(" ")[0]} *p, unsigned seed)'
        f" {{ return run_grid(seed, [&] {{ {call.partition(' ')[2]}; }}); }}\n"
        f'extern "C" unsigned long bytes_of_{name}() {{ return sizeof({call.partition(" ")[0]}); }}\n'
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


Written = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""What a kernel in front of the next one writes: where, what stands there until the wait, and what from then on"""


def run_tiles(library: ctypes.CDLL, written: Written, params: bytes, seed: int) -> bool:
    """Run a program of `tiles_launch`; whether all its threads ended."""
    assert len(params) == library.bytes_of_params()
    for now, *both in written:
        places = (ctypes.c_void_p(t.data_ptr()) for t in (now, *both))
        library.write_at_the_wait(*places, ctypes.c_size_t(now.nbytes))
    ended = library.run(ctypes.create_string_buffer(params, len(params)), seed)
    library.forget()
    return bool(ended)
