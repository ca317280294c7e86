"""Who owns which KV block, and which blocks can be shared. Integers only.

Knows: reference counts, the free blocks, and the hash of every full block whose content is
known. Does not know what is in a block: a block must be registered only once its tokens are
committed, and never written again until it comes back from `allocate`.

A block that nobody uses but that has a hash stays findable until its space is needed; the
one unused for longest goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from .types import Request

GUARD_BLOCK = 0
"""Never handed out: what an unused entry of a block table points to."""


def hash_block(parent: int, token_ids: Sequence[int], salt: bytes = b"") -> int:
    """128-bit hash of a full block after the blocks that `parent` stands for (0: none).

    A collision would silently share wrong KV, so this is a cryptographic hash.
    """
    data = parent.to_bytes(16, "little") + array("q", token_ids).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=16, salt=salt).digest(), "little")


def extend_hashes(request: Request, block_size: int, count: int, salt: bytes = b"") -> None:
    """Bring `request.block_hashes` to `count` entries at least; its first `count` blocks must be known."""
    hashes = request.block_hashes
    for i in range(len(hashes), count):
        token_ids = request.token_ids(i * block_size, (i + 1) * block_size)
        if len(token_ids) != block_size:
            raise ValueError(
                f"request {request.request_id}: block {i} needs {block_size} known tokens, "
                f"has {len(token_ids)} (a hash of unknown tokens would share wrong KV)"
            )
        hashes.append(hash_block(hashes[-1] if hashes else 0, token_ids, salt))


class BlockAllocator:
    """Blocks 1 ... num_blocks - 1, reference counted, findable by hash.

    Args:
        num_blocks: blocks of the KV tensors, the guard block included; at least 2.
        block_size: tokens in a block.
        enable_prefix_caching: False: `register` and `lookup` do nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"expected num_blocks >= 2 (one is the guard block) and block_size >= 1, "
                f"got {num_blocks} and {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_releases = 0
        """Rises whenever a block may have become free: nothing fits better before that."""
        self.num_evictions = 0
        self._refs = [0] * num_blocks
        self._blank: list[int] = []  # a stack; low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free but findable, oldest first
        self._block_of: dict[int, int] = {}
        self._hash_of: dict[int, int] = {}
        self.reset()

    @property
    def num_usable(self) -> int:
        """Blocks that can be in use at once."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now, findable ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that have a hash, in use or not."""
        return len(self._hash_of)

    @property
    def usage(self) -> float:
        """Fraction of the blocks in use."""
        return 1.0 - self.num_free / self.num_usable

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody uses: acquiring them takes as many from `num_free`."""
        return sum(self._refs[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None and no change if there are not enough."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
                self.num_evictions += 1
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def lookup(self, hashes: Sequence[int], limit: int) -> list[int]:
        """Blocks of the longest cached prefix of a hash chain, at most `limit`. Takes no reference."""
        blocks = []
        for i in range(min(limit, len(hashes))):
            block = self._block_of.get(hashes[i])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take one more reference to blocks that `lookup` found."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def register(self, block: int, block_hash: int) -> None:
        """Make a block in use findable: it is full, and its tokens are committed.

        Where another block already has this hash, that one stays the findable one.
        """
        if not self.enable_prefix_caching or block_hash in self._block_of:
            return
        if self._refs[block] == 0 or block in self._hash_of:
            raise ValueError(f"block {block} cannot be registered: it is not in use, or has a hash")
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a request's table.

        In order of the table: its end is evicted first, as a prefix is of use without it.
        """
        for block in reversed(blocks):
            refs = self._refs[block] - 1
            if refs < 0 or block == GUARD_BLOCK:
                raise ValueError(f"block {block} released more often than taken")
            self._refs[block] = refs
            if refs == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._blank.append(block)
        self.num_releases += 1

    def reset_cache(self) -> None:
        """Forget every hash, for instance because the weights changed. Blocks in use stay in use."""
        self._block_of.clear()
        self._hash_of.clear()
        self._blank.extend(reversed(self._cached))
        self._cached.clear()
        self.num_releases += 1

    def reset(self) -> None:
        """Everything is free and nothing is cached, whoever uses it."""
        self._refs = [0] * self.num_blocks
        self._blank = list(range(self.num_blocks - 1, GUARD_BLOCK, -1))
        self._cached.clear()
        self._block_of.clear()
        self._hash_of.clear()
        self.num_releases += 1

    def check(self, live: Iterable[Sequence[int]]) -> None:
        """Compare with the block tables in use. For tests, and for when the engine is idle.

        Raises:
            AssertionError: a block leaked, is used twice, or its hash is inconsistent.
        """
        expected = [0] * self.num_blocks
        for blocks in live:
            _require(len(set(blocks)) == len(blocks), f"a block stands twice in one table: {list(blocks)}")
            for block in blocks:
                expected[block] += 1
        _require(expected[GUARD_BLOCK] == 0, "the guard block is in use")
        for block, (want, have) in enumerate(zip(expected, self._refs, strict=True)):
            _require(want == have, f"block {block}: {want} tables use it, reference count is {have}")
        free = [*self._blank, *self._cached]
        idle = [block for block in range(1, self.num_blocks) if expected[block] == 0]
        _require(sorted(free) == idle, f"free blocks are {sorted(free)}, unused ones {idle}")
        _require(all(b not in self._hash_of for b in self._blank), "a block without content has a hash")
        _require(all(b in self._hash_of for b in self._cached), "a findable free block has no hash")
        _require({h: b for b, h in self._hash_of.items()} == self._block_of, "the two hash maps differ")


def _require(condition: bool, message: str) -> None:
    # Not `assert`: the check must hold under python -O too.
    if not condition:
        raise AssertionError(message)
