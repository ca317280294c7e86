"""`ostinato serve` whose engine process fails as $FAULT says: `python -m tests.serve.faulty ...`.

Faults: "raise" in a step, after $AFTER steps with tokens; "slow": each step takes $SLOW seconds longer; "start": the
engine takes long to build; "compile": a grammar breaks its compiler; "nonsense": the engine sends bytes that are no message.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any


def _break_engine() -> None:
    from ostinato.engine import Engine
    from ostinato.serve import worker

    fault, after = os.environ["FAULT"], int(os.environ.get("AFTER", "3"))
    advance, build = Engine.advance, worker._build
    steps = 0

    def advanced(engine: Any) -> Any:
        nonlocal steps
        changed = advance(engine)
        steps += bool(changed)
        if fault == "raise" and steps > after:
            raise RuntimeError("the device fell out of the rack")
        if fault == "slow":
            time.sleep(float(os.environ.get("SLOW", "0.05")))
        return changed

    def built(options: dict[str, Any]) -> Any:
        if fault == "start":
            time.sleep(60)
        return build(options)

    Engine.advance = advanced  # type: ignore[method-assign]
    worker._build = built
    if fault == "compile":
        from ostinato.serve import grammar

        class PanicException(BaseException):
            """What a panic of a Rust library looks like: no Exception."""

        def compiled(self: Any, text: str) -> Any:
            raise PanicException("called unwrap on a None")

        grammar.Compiler.compile = compiled  # type: ignore[method-assign]
    if fault == "nonsense":
        run = worker.Worker._tell

        def tell(self: Any, changed: Any) -> None:
            self._channel._out += b"\xff" * 64
            run(self, changed)

        worker.Worker._tell = tell  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1].isdigit():  # started by the server, with the descriptor of its socket
        _break_engine()
        from ostinato.serve.worker import main

        sys.exit(main())
    from ostinato import cli
    from ostinato.serve import client

    client.WORKER = (sys.executable, "-m", "tests.serve.faulty")
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
