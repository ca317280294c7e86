"""What a recorded figure has to say of where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """GPU or CPU, versions, commit."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("ostinato", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        found["cpu"] = _cpu()
        found["threads"] = torch.get_num_threads()
        found["load"] = round(os.getloadavg()[0], 2)  # a busy machine explains a slow figure
    found["commit"] = _commit()
    return found


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no Linux
    return platform.processor()


def _commit() -> str:
    """The commit of the checkout that this package runs from; "unknown" once it is installed."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return "unknown"
    return _said("git", "-C", str(checkout), "describe", "--always", "--dirty") or "unknown"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
