"""When a served text is right: the offline greedy text, up to where two tokens are about equally likely."""

from __future__ import annotations

from typing import Any

TOLERANCE = 1e-3
"""Of logits: closer than this, the batch that a request runs in may decide."""


def disagreement(text: str, reference: Any, tokenizer: Any) -> str | None:
    """How a served text differs from an offline completion with `logprobs=2`; None if it is right."""
    ids = reference.token_ids
    sure = len(ids)
    for place, entry in enumerate(reference.logprobs):
        best, second = sorted((p.logprob for p in entry.values()), reverse=True)[:2]
        if best - second < TOLERANCE:
            sure = place
            break
    if sure == len(ids):
        return None if text == reference.text else f"{text!r} instead of {reference.text!r}"
    # The end of what is sure may be part of a character.
    wanted = tokenizer.decode(ids[:sure]).rstrip("\ufffd")
    return None if text.startswith(wanted) else f"{text!r} does not begin with {wanted!r}"
