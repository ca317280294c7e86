"""Where ostinato keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for models, kernels and profiles: $OSTINATO_CACHE, else $XDG_CACHE_HOME/ostinato, else ~/.cache/ostinato."""
    if own := os.environ.get("OSTINATO_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "ostinato"
    return Path.home() / ".cache" / "ostinato"
