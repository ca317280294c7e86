"""What a recorded figure has to say of where it was measured: the package's own description."""

from ostinato.bench.environment import describe

__all__ = ["describe"]
