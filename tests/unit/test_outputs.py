"""What is made of requests that got a token: nothing where nobody waits for one, and always an end."""

from __future__ import annotations

from typing import Any

import pytest

from ostinato.graphs.keys import KeyBook
from ostinato.graphs.plan import CudaGraphMode, Plan
from ostinato.outputs import OutputAssembler
from ostinato.types import FinishReason, Request, RequestOutputKind, RequestStatus, SamplingParams


def under_way(*kinds: RequestOutputKind) -> tuple[OutputAssembler, list[Request]]:
    """An assembler with one running request of each kind, which has a token."""
    book: Any = KeyBook()
    outputs = OutputAssembler(Plan(mode=CudaGraphMode.NONE, capture_sizes=(), book=book, pad=False))
    requests = []
    for number, kind in enumerate(kinds):
        name, params = str(number), SamplingParams(max_tokens=9, output_kind=kind)
        request = Request(name, name, (3, 4), params, frozenset(), 11, 0)
        request.status = RequestStatus.RUNNING
        request.output_token_ids.append(5)
        outputs.add(name, None, [request], params, lambda token: None)
        requests.append(request)
    return outputs, requests


def end(request: Request) -> None:
    request.status, request.finish_reason = RequestStatus.FINISHED, FinishReason.LENGTH


def test_a_tuple_that_comes_again_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, requests = under_way(*[RequestOutputKind.FINAL_ONLY] * 3)
    changed = tuple(requests)
    assert outputs.make(changed) == []  # the first tokens
    assert outputs.make(changed) == []
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "_prompts", {})  # looking would fail
        assert outputs.make(changed) == []
        assert outputs.make([]) == []
        assert outputs.make(changed) == [], "nothing in between is nothing"
    end(requests[1])
    assert [o.request_id for o in outputs.make(requests)] == ["1"]
    assert [o.finished for o in outputs.make([requests[0]])] == []


def test_after_an_end_the_same_tuple_is_looked_through_again() -> None:
    outputs, requests = under_way(*[RequestOutputKind.FINAL_ONLY] * 2)
    changed = (requests[0],)
    for _ in range(3):
        assert outputs.make(changed) == []
    end(requests[1])
    assert [o.request_id for o in outputs.make([requests[1]])] == ["1"]
    end(requests[0])
    assert [o.request_id for o in outputs.make(changed)] == ["0"]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_whoever_wants_every_token_gets_every_token(kind: RequestOutputKind) -> None:
    outputs, requests = under_way(RequestOutputKind.FINAL_ONLY, kind)
    changed = tuple(requests)
    for _ in range(4):
        assert [o.request_id for o in outputs.make(changed)] == ["1"]


class Letters:
    """Token 1 is "a"; counts how often it was asked to make text."""

    watches = False

    def __init__(self) -> None:
        self.text, self.times, self._seen = "", 0, 0

    def catch_up(self, token_ids: list[int]) -> None:
        self.text += "".join(chr(96 + token) for token in token_ids[self._seen :])
        self._seen, self.times = len(token_ids), self.times + 1

    def push(self, token_id: int) -> None:
        raise AssertionError("it does not watch for stop strings")

    def finish(self) -> str:
        return self.text + "."


@pytest.mark.parametrize("stopped", [False, True], ids=["length", "stop token"])
def test_text_is_made_when_it_is_wanted(stopped: bool) -> None:
    kinds = (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE)
    outputs, requests = under_way(*kinds)
    for request in requests:
        request.sink = Letters()
    seen: dict[str, list[str]] = {request.request_id: [] for request in requests}

    def made(changed: Any) -> None:
        for output in outputs.make(changed):
            seen[output.request_id].append(output.outputs[0].text)

    for token in (2, 3, 4):
        made(tuple(requests))
        for request in requests:
            request.output_token_ids.append(token)
    for request in requests:
        request.silent_end = stopped
        end(request)
    made(requests)
    whole = "ebc." if stopped else "ebcd."
    assert seen == {
        "0": [whole],
        "1": ["e", "b", "c", "." if stopped else "d."],
        "2": ["e", "eb", "ebc", whole],
    }
    assert requests[0].sink.times == 1, "once, at its end"  # type: ignore[union-attr]
