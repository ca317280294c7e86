"""One tiny model, and one server of it that most tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.models import save
from tests.serve.servers import Server, serving

os.environ.setdefault("OMP_NUM_THREADS", "1")

LIMITS = ("--max-num-seqs", "8", "--max-num-batched-tokens", "256", "--pipeline-depth", "2")
"""Two steps in flight, as on a GPU."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    folder.mkdir()
    return save(folder)


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Tests that share it leave nothing running in it."""
    with serving(str(model), *LIMITS, folder=tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.process.poll() is None, running.log
        assert "Traceback" not in running.log
        assert running.end() == 0
