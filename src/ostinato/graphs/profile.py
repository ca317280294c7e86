"""What traffic used last time, so that the next start captures exactly that.

A small JSON file for each model, GPU and config in the cache folder. A file that cannot be read
is treated as absent: it is only a hint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..types import GraphKey, SamplerVariant, StepKind
from .keys import KeyBook, KeyState

logger = logging.getLogger(__name__)


class Profile:
    """The keys that fired, by hits."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Nothing is read or written yet.

        Args:
            folder: where profiles are kept.
            identity: what the keys depend on: model, GPU, config.
        """
        text = json.dumps(dict(identity), sort_keys=True, default=str)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._identity = dict(identity)

    def load(self) -> list[GraphKey]:
        """Keys of the last run, those for most tokens first: the order in which to capture them."""
        try:
            entries = json.loads(self.path.read_text())["keys"]
            keys = [
                GraphKey(StepKind(e["kind"]), int(e["tokens"]), int(e["seqs"]), SamplerVariant[e["sampler"]])
                for e in entries
            ]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read and is ignored: %r", self.path, error)
            return []
        return sorted(keys, key=lambda k: (k.num_tokens, k.num_seqs), reverse=True)

    def save(self, book: KeyBook[GraphKey]) -> None:
        """Write the keys that were captured; an empty book leaves the old file alone."""
        used = [
            r
            for r in book.records()
            if r.hits and r.state in (KeyState.CAPTURED, KeyState.WAITING) and r.nodes
        ]
        if not used:
            return
        keys = [
            {
                "kind": r.key.kind.value,
                "tokens": r.key.num_tokens,
                "seqs": r.key.num_seqs,
                "sampler": r.key.sampler.name,
                "hits": r.hits,
            }
            for r in sorted(used, key=lambda r: -r.hits)
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}.tmp")
            draft.write_text(json.dumps({"identity": self._identity, "keys": keys}, indent=1, default=str))
            draft.replace(self.path)
        except OSError as error:
            logger.warning("the graph profile cannot be written to %s: %s", self.path, error)
