"""Checking grammars in processes of their own: a short schema can keep llguidance busy for hours.

`python -m ostinato.serve.checker` is such a process: it reads grammars from standard input and says what is
wrong with them. One that takes too long is killed, which a thread cannot be.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import struct
import sys

from .errors import shutting_down

_LENGTH = struct.Struct(">I")
_PROCESSES = 2
"""Checks at once; the others wait."""
_START_SECONDS = 60.0
_SECONDS = 10.0
"""For one check."""
_MEMORY = 4 << 30
"""Bytes of address space of a process."""


class Checker:
    """Asks the processes, which start when they are needed. Everything runs on one event loop."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._turns = asyncio.Semaphore(_PROCESSES)
        self._idle: list[asyncio.subprocess.Process] = []
        self._busy: set[asyncio.subprocess.Process] = set()
        self._closed = False

    async def check(self, grammar: str) -> str | None:
        """Why a grammar cannot be used; None if it can.

        Raises:
            ApiError: 503, the server ends.
        """
        async with self._turns:
            if self._closed:
                raise shutting_down()
            process = self._idle.pop() if self._idle else await self._start()
            self._busy.add(process)
            try:
                async with asyncio.timeout(self._seconds):
                    problem = await _ask(process, grammar)
                self._idle.append(process)
                return problem
            except TimeoutError:
                return f"it is too complex: checking it takes longer than {self._seconds:g} s"
            except (OSError, asyncio.IncompleteReadError):
                if self._closed:
                    raise shutting_down() from None
                return "it is too complex: checking it takes too much time or memory"
            finally:
                self._busy.discard(process)
                if self._closed or process not in self._idle:
                    await _kill(process)

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ostinato.serve.checker", str(self._seconds)), stdin=pipe, stdout=pipe
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(_START_SECONDS):
                await process.stdout.readexactly(1)
        except BaseException:
            await _kill(process)
            raise
        return process

    async def close(self) -> None:
        """End the processes, and whoever waits for one with an error."""
        self._closed = True
        for process in (*self._idle, *self._busy):
            await _kill(process)
        self._idle.clear()


async def _ask(process: asyncio.subprocess.Process, grammar: str) -> str | None:
    assert process.stdin is not None
    assert process.stdout is not None
    data = grammar.encode()
    process.stdin.write(_LENGTH.pack(len(data)) + data)
    await process.stdin.drain()
    (length,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
    return (await process.stdout.readexactly(length)).decode() or None


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def main() -> int:
    import resource

    from .grammar import check

    # Ctrl-C and a supervisor's SIGTERM reach the whole group; this one ends with its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = float(sys.argv[1])
    source, target = sys.stdin.buffer, sys.stdout.buffer
    target.write(b"!")
    target.flush()
    while len(head := source.read(_LENGTH.size)) == _LENGTH.size:
        # Nobody may be left to kill it.
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + 2 * seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        data = source.read(_LENGTH.unpack(head)[0])
        answer = (check(data.decode()) or "").encode()
        target.write(_LENGTH.pack(len(answer)) + answer)
        target.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
