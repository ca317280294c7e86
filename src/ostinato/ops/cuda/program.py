"""CUDA C++ compiled at run time and launched: NVRTC, the driver, and a cache of binaries on disk."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
import re
import struct
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...errors import KernelError
from ...paths import cache_dir

logger = logging.getLogger(__name__)

POINTERS: dict[int, int] = {}
"""How many pointers, 8 bytes each, a launched kernel's parameter begins with, by function handle."""

_MOST_THREADS = 16
_INCLUDE = re.compile(r'#include "(\w+\.cuh)"')


class Kernel:
    """A function of a compiled program, ready to be launched on torch's current stream."""

    def __init__(
        self, function: Any, *, grid: int, block: int, shared_bytes: int, pdl: bool, cluster: int
    ) -> None:
        from cuda.bindings import driver

        self._function, self._driver = function, driver
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        before = _check(driver.cuFuncGetAttribute(attribute, function), "shared memory")
        if shared_bytes > before:  # another `Kernel` may launch the same function with more
            _check(driver.cuFuncSetAttribute(function, attribute, shared_bytes), "shared memory")
        if cluster > 8:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _check(driver.cuFuncSetAttribute(function, attribute, 1), "cluster size")
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        attributes = []
        if pdl:
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            attributes.append(early)
        if cluster > 1:
            together = driver.CUlaunchAttribute()
            together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            together.value.clusterDim.x = cluster
            together.value.clusterDim.y = together.value.clusterDim.z = 1
            attributes.append(together)
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._config = config
        self._param_bytes = _param_bytes(driver, function)

    @property
    def function(self) -> Any:
        """The driver's, for whoever launches it another way."""
        return self._function

    @property
    def handle(self) -> int:
        """The driver's handle of the function, as captured nodes name it."""
        return int(self._function)

    @property
    def spilled_bytes(self) -> int:
        """Of a thread, in local memory: registers that did not suffice."""
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        return int(_check(self._driver.cuFuncGetAttribute(attribute, self._function), "local memory"))

    def clusters_at_once(self) -> int:
        """How many clusters fit on the GPU, where nothing else runs."""
        return int(
            _check(self._driver.cuOccupancyMaxActiveClusters(self._function, self._config), "clusters")
        )

    def launch(self, params: bytes, grid: int | None = None) -> None:
        """Launch with one parameter, a struct passed by value; `grid`: other than it was built with.

        Raises:
            KernelError: the struct has another size. The driver would read what lies behind it.
        """
        if self._param_bytes not in (None, len(params)):
            raise KernelError(
                f"the kernel's parameter has {self._param_bytes} bytes, it was given {len(params)}"
            )
        if grid is not None:
            self._config.gridDimX = grid
        held = ctypes.create_string_buffer(params, len(params))
        slots = (ctypes.c_void_p * 1)(ctypes.addressof(held))
        self._config.hStream = torch.cuda.current_stream().cuda_stream
        status = self._driver.cuLaunchKernelEx(self._config, self._function, ctypes.addressof(slots), 0)
        _check(status, "launch")


def _param_bytes(driver: Any, function: Any) -> int | None:
    """Of a function's only parameter; None where the driver cannot say (before CUDA 12.4)."""
    try:
        _, size = _check(driver.cuFuncGetParamInfo(function, 0), "parameter")
    except (AttributeError, KernelError, RuntimeError):
        return None
    return int(size)


def build(
    source: Path,
    name: str,
    macros: Mapping[str, int],
    *,
    device: torch.device,
    block: int,
    shared_bytes: int,
    grid: int,
    pdl: bool = True,
    cluster: int = 1,
) -> Kernel:
    """Compile a source file for a GPU, or take the binary from the cache.

    Args:
        source: CUDA C++; needs no header.
        name: of an `extern "C"` kernel in it.
        macros: `-D` definitions.
        device: with an index.
        block: threads.
        shared_bytes: of dynamic shared memory.
        grid: blocks.
        pdl: launch before the kernel in front has ended (programmatic dependent launch).
        cluster: blocks that run together and see each other's shared memory.

    Raises:
        KernelError: it does not compile or load; the compiler's log is in the message. Or there is no
            compiler, or no driver. Or others compile it, see `compile_apart`.
    """
    if _apart is not None and _apart.takes(source, macros, device):
        raise KernelError(f"CUDA kernel {name}: it is being compiled")
    try:
        with torch.cuda.device(device):
            module = _module(source, tuple(sorted(macros.items())), device)
            from cuda.bindings import driver

            function = _check(driver.cuModuleGetFunction(module, name.encode()), name)
            return Kernel(
                function, grid=grid, block=block, shared_bytes=shared_bytes, pdl=pdl, cluster=cluster
            )
    except (ImportError, RuntimeError) as error:  # libraries are looked for at their first use
        raise KernelError(f"CUDA kernel {name}: {error}") from error


@cache
def _module(source: Path, macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    """A loaded program; one for all engines of a process, as modules are never unloaded."""
    from cuda.bindings import driver

    binary = compile_cubin(source_text(source), source.name, dict(macros), arch(device))
    torch.cuda.current_stream()  # there is a context
    return _check(driver.cuModuleLoadData(binary), f"loading {source.name}")


def compiler_threads() -> int:
    """One for each core, up to 16."""
    return min(os.cpu_count() or 1, _MOST_THREADS)


@dataclass
class _Apart:
    """Programs that are compiled by threads of their own."""

    sources: Collection[Path]
    pool: ThreadPoolExecutor
    owner: int = field(default_factory=threading.get_ident)
    begun: set[tuple[Path, tuple[tuple[str, int], ...]]] = field(default_factory=set)

    def takes(self, source: Path, macros: Mapping[str, int], device: torch.device) -> bool:
        """Whether a program is among them; what cannot be compiled says so at its next use."""
        if source not in self.sources or threading.get_ident() != self.owner:
            return False
        key = source, tuple(sorted(macros.items()))
        if key not in self.begun:
            self.begun.add(key)
            self.pool.submit(compile_cubin, source_text(source), source.name, dict(macros), arch(device))
        return True


_apart: _Apart | None = None


@contextlib.contextmanager
def compile_apart(sources: Collection[Path], threads: int | None = None) -> Iterator[None]:
    """Kernels of these sources that this thread asks for in the block are compiled, several at a time, and not to be had.

    `build` raises KernelError for them. When the block ends the cache on disk has all that compile.

    Args:
        sources: as `build` is given them.
        threads: at most; None: one for each core, up to 16. The compiler works outside the interpreter's lock.
    """
    global _apart
    with ThreadPoolExecutor(threads or compiler_threads(), "compile") as pool:
        _apart = _Apart(sources, pool)
        try:
            yield
        finally:
            _apart = None


def addresses(tensors: Sequence[torch.Tensor | None]) -> bytes:
    """The pointers that a parameter begins with; None is a null pointer."""
    return struct.pack(f"<{len(tensors)}Q", *(0 if t is None else t.data_ptr() for t in tensors))


def has_bindings() -> bool:
    """Whether the package is there that compiles and launches."""
    # Looking for a module inside a package that is not there is an error.
    return (
        importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
    )


def source_text(path: Path) -> str:
    """A source file with the files beside it that it includes."""
    lines = path.read_text().splitlines(keepends=True)
    return "".join(
        source_text(path.with_name(m[1])) if (m := _INCLUDE.match(line)) else line for line in lines
    )


def arch(device: torch.device) -> str:
    """A GPU as NVRTC names it; architecture-specific instructions included."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def compile_cubin(text: str, filename: str, macros: Mapping[str, int], arch: str) -> bytes:
    """Machine code of a program, from the cache where it has been compiled before.

    Raises:
        KernelError: it does not compile.
    """
    from cuda.bindings import nvrtc

    version = _check(nvrtc.nvrtcVersion(), "version")
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device"]
    options += [f"-D{key}={int(value)}" for key, value in sorted(macros.items())]
    digest = hashlib.sha256("\0".join([text, *options, str(version)]).encode()).hexdigest()[:32]
    cached = cache_dir() / "kernels" / f"{Path(filename).stem}-{digest}.cubin"
    with contextlib.suppress(OSError):
        return cached.read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(text.encode(), filename.encode(), 0, [], []), "program")
    try:
        encoded = [option.encode() for option in options]
        status = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "log")
            nvrtc.nvrtcGetProgramLog(program, log)
            said = log.decode(errors="replace").strip("\0 \n")
            raise KernelError(f"{filename} does not compile for {arch}: {said}")
        binary: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "size")
        _check(nvrtc.nvrtcGetCUBIN(program, binary), "binary")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    _keep(cached, binary)
    return binary


def _keep(path: Path, binary: bytes) -> None:
    """Write a binary to the cache, whole or not at all, whoever else compiles the same."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(binary)
        draft.replace(path)
    except OSError as error:
        logger.warning("a compiled kernel cannot be kept in %s: %s", path.parent, error)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _check(result: Any, what: str) -> Any:
    """The value of a driver or NVRTC call."""
    status, *values = result
    if int(status) != 0:
        raise KernelError(f"CUDA kernel, {what}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
