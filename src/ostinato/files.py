"""Files that the user names for what a command finds."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError, OstinatoError


def check_writable(option: str, name: str | None) -> None:
    """Raise now, before anything is loaded, what `write` would raise later; None is no file.

    Raises:
        ConfigError: no file of that name can be written; names the option.
    """
    if name is None:
        return
    path = Path(name)
    if not name:
        raise ConfigError(f"{option} needs the name of a file, got an empty one")
    if path.is_dir():
        raise ConfigError(f"{option}: {name} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: {name} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option}: {name} cannot be written: permission denied")


def write(name: str, text: str) -> None:
    """
    Raises:
        OstinatoError: the file cannot be written.
    """
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OstinatoError(f"{name} cannot be written: {error.strerror}") from error
