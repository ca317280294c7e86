"""The wire between the two processes."""

from __future__ import annotations

import socket
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.serve.app import HostCheck
from ostinato.serve.messages import Abort, Add, Channel, Failed, Frames, Step, Stop, pack, read_from_engine


@given(st.lists(st.integers(0, 300), max_size=8), st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_frames_do_not_depend_on_how_the_bytes_come(sizes: list[int], cuts: list[int]) -> None:
    messages = [Step([n] * size, list(range(size)), {}, [], []) for n, size in enumerate(sizes)]
    data = b"".join(map(pack, messages))
    frames, found, at, turn = Frames(), [], 0, 0
    while at < len(data):
        step = cuts[turn % len(cuts)]
        found += frames.feed(data[at : at + step])
        at, turn = at + step, turn + 1
    assert [read_from_engine(body) for body in found] == messages


def test_a_stream_that_lost_its_place_is_noticed() -> None:
    with pytest.raises(ValueError, match="4294967295 bytes"):
        Frames().feed(b"\xff" * 8)
    for body in (b"", b"\x00", b"\x91\xa4Exec", pack(Stop())[4:]):  # the last is for the other direction
        with pytest.raises(msgspec.MsgspecError):
            read_from_engine(body)


def test_sending_to_somebody_who_does_not_read_does_not_wait() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs)
        message = Step(list(range(50_000)), [7] * 50_000, {}, [], [])
        begin = time.monotonic()
        for _ in range(40):
            channel.send(message)
        assert time.monotonic() - begin < 5
        ours.settimeout(5)
        frames, found = Frames(), 0
        while found < 40:
            found += len(frames.feed(ours.recv(1 << 20)))
            channel.receive(0)  # sends on what was kept
        ours.sendall(pack(Add(3, [1, 2], {"temperature": 0.0})) + pack(Abort([3])))
        assert channel.receive(5) == [Add(3, [1, 2], {"temperature": 0.0}), Abort([3])]
        assert channel.receive(0) == []


def test_an_end_that_went_away_is_noticed() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(theirs)
        ours.close()
        channel.send(Failed("nobody hears this"))
        assert channel.receive(None) == []
        assert channel.closed
        channel.flush(1.0)


def test_names_that_were_allowed() -> None:
    check = HostCheck(None, ("Proxy.example",))  # type: ignore[arg-type]

    def known(host: bytes) -> bool:
        return check._known({"headers": [(b"host", host)]})

    assert known(b"proxy.EXAMPLE:80")
    assert known(b"")
    assert not known(b"other.example")
