"""Random models and steps with prompts: pieces of any length behind any context, beside decoding rows, padded.

Unlike `tests.whole_model` any shape that the ops take, in any dtype, with products in any version that may serve them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ostinato.errors import KernelError
from ostinato.kv_cache import KVCache
from ostinato.models.decoder import Decoder, random_decoder
from ostinato.models.registry import spec_from_config
from ostinato.models.shapes import SHAPES
from ostinato.models.spec import ModelSpec
from ostinato.ops import AttentionShape, Linear, OpSet, Scratch
from ostinato.ops.cuda import chain
from ostinato.ops.reference import ReferenceOps
from ostinato.ops.triton import TritonOps
from ostinato.ops.triton.tune import Kind, Table, Version, bucket, candidates, problem_of
from ostinato.types import StepKind
from tests.accuracy import TINY, errors, no_worse
from tests.rows_world import STEP_FACTOR, telling, wide

sys.path.append(str(Path(__file__).parent / "unit"))
from test_triton_ops import Seq, World, make_world

TINIES = {torch.bfloat16: TINY, torch.float16: TINY / 4, torch.float32: 1e-5}
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000, 2048)
"""Tokens of a step, around what products are chosen for."""
HEADS = ((9, 3), (14, 2), (15, 5), (32, 8), (5, 1), (8, 8), (7, 7), (12, 4), (28, 4), (71, 1), (3, 1), (16, 2), (1, 1), (40, 8))  # fmt: skip
SIZES = (576, 896, 960, 1024, 2048, 1000, 520, 97, 321, 64)
INNERS = (1536, 4864, 2560, 1000, 176, 53, 2048)
VOCABS = (49152, 4099, 1001, 640, 151, 32)


@dataclass(frozen=True)
class Case:
    spec: ModelSpec
    dtype: torch.dtype
    quantization: str | None
    block: int
    """Tokens of a KV block"""
    seqs: tuple[Seq, ...]
    pad_tokens: int
    pad_seqs: int
    seed: int

    def model(self, device: str) -> Decoder:
        longest = max(seq.context for seq in self.seqs)
        made = random_decoder(
            self.spec, dtype=self.dtype, device=torch.device(device), positions=longest + 1, seed=self.seed % 1000,
            quantization=self.quantization,
        )  # fmt: skip
        return telling(made, self.seed)


def draw(seed: int, *, tokens: int, small: bool = False) -> Case:
    """A model of two layers and a step of `tokens` tokens, padding included; all of it follows from the arguments, the model from the others alone.

    `small`: what an interpreter can do.
    """
    rng = random.Random(seed)
    heads, kv_heads = rng.choice(HEADS[:8] if small else HEADS)
    most = 64 if small else 256 if heads <= 8 else 128
    head_dim = rng.choice([size for size in (64, 128, 64, 128, 16, 80, 96, 112, 256) if size <= most])
    window = rng.choice((None, None, None, 1, 13, 64, 200, 511))
    attention = AttentionShape(heads, kv_heads, head_dim, window)
    dtype = rng.choice(
        (torch.float16, torch.float32) if small else (*[torch.bfloat16] * 4, torch.float16, torch.float32)
    )
    spec = dataclasses.replace(
        spec_from_config({**SHAPES["smollm2-135m"], "num_hidden_layers": 2}),
        hidden_size=rng.choice((64, 97, 160) if small else SIZES), intermediate_size=rng.choice((53, 176) if small else INNERS),
        vocab_size=rng.choice((151, 32) if small else VOCABS), attention=attention,
        rope_inv_freq=tuple(10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)),
        tied_embeddings=rng.random() < 0.5, qkv_bias=rng.random() < 0.4, output_bias=rng.random() < 0.3, qk_norm=rng.random() < 0.4,
    )  # fmt: skip
    fp8 = "fp8" if rng.random() < 0.25 else None
    block = rng.choice((16, 16, 16, 32, 8, 5, 64))
    return Case(spec, dtype, fp8, block, *schedule(rng, tokens, small), seed)


def schedule(rng: random.Random, tokens: int, small: bool) -> tuple[tuple[Seq, ...], int, int]:
    """Sequences, padded tokens, padded sequences: prompts whole, or a piece behind other pieces or cached blocks, and decoding rows."""
    longest = 100 if small else 1500
    pad = rng.choice((0, 0, rng.randint(0, tokens // 2)))
    left, seqs = max(1, tokens - pad), []
    while left:
        kind = rng.random()
        if kind < 0.4 or len(seqs) > 40:
            length = min(left, rng.choice((left, rng.randint(1, left), rng.randint(1, 40))))
            behind = rng.choice((0, 0, 16 * rng.randint(0, longest // 16), rng.randint(0, longest)))
            seqs.append(Seq(behind + length, length, decode=False, samples=rng.random() < 0.7))
        else:
            length, dead = 1, rng.random()
            context = rng.randint(1, rng.choice((20, longest)))
            seqs.append(Seq(context, active=dead > 0.1, enabled=not 0.1 < dead < 0.15))
        left -= length
    rng.shuffle(seqs)
    return tuple(seqs), pad, rng.choice((0, 1, rng.randint(0, 9)))


class Dice(Table):
    """Any version that a measurement could have chosen; the same for the same problem and seed.

    Seldom one of `linear.cu`, which takes seconds to compile.
    """

    def __init__(self, seed: int, tiles: bool) -> None:
        super().__init__(tiles=tiles)
        self._seed = seed

    def __call__(self, op: str, linear: Linear, rows: int, dtype: torch.dtype) -> Version:
        if (size := bucket(rows)) is not None:
            problem = problem_of(op, linear, size, dtype)
            if problem not in self.decided:
                rng = random.Random(f"{self._seed} {problem}")
                found = candidates(problem, self._tiles)
                others = [version for version in found if version.kind not in (Kind.TILE, Kind.CHAIN)]
                self.decided[problem] = rng.choice(found if rng.random() < 0.3 else others)
        return super().__call__(op, linear, rows, dtype)


@dataclass(frozen=True)
class Step:
    """A case's step, its buffers and its cache."""

    world: World
    cache: KVCache
    scratch: Scratch

    @classmethod
    def of(cls, case: Case, ops: OpSet, dtype: torch.dtype, device: str) -> Step:
        spec = case.spec
        world = make_world(
            case.seed, spec.attention, list(case.seqs), StepKind.MIXED, pad_tokens=case.pad_tokens, pad_seqs=case.pad_seqs,
            device=device, dtype=dtype, block_size=case.block, hidden=spec.hidden_size, intermediate=spec.intermediate_size,
            vocab=spec.vocab_size,
        )  # fmt: skip
        static, state = world.batch.static, world.batch.state
        # Few kinds of tokens: heads that look for their own kind see each earlier one of it, wherever it is.
        kinds = min(spec.vocab_size, 1 + case.seed % 50)
        static.tokens.copy_(torch.where(static.tokens >= 0, static.tokens % kinds, static.tokens))
        state.last_token.remainder_(kinds)
        first = torch.stack(world.cache)
        data = torch.stack([first.roll(layer, -1) for layer in range(spec.num_layers)])
        words = max(1, ops.sampler_words(world.batch.num_seqs, spec.vocab_size))
        sampler = torch.full((words,), -1, dtype=torch.int32, device=device)
        return cls(world, KVCache(data), dataclasses.replace(world.scratch, sampler=sampler))

    def run(self, model: Decoder, ops: OpSet, *, greedy: bool = False) -> Step:
        view = ops.prepare(self.world.batch, self.scratch, model)
        model.forward(view, self.cache, self.scratch, ops, greedy=greedy)
        return self


def ops_for(case: Case, model: Decoder, device: str) -> TritonOps:
    """Ops with versions at random, and with `chain.cu` where that takes the model."""
    ops = TritonOps(device=None if device == "cpu" else torch.device(device, torch.cuda.current_device()))
    ops._table = Dice(case.seed, ops._products is not None)
    if ops._products is not None and case.dtype is torch.bfloat16 and case.seed % 4 == 0:
        with contextlib.suppress(KernelError):
            ops._chain = chain.Chain(ops._device, model)
    return ops


def check(case: Case, device: str) -> TritonOps:
    """One step of the case: every token's last hidden state, logits, keys and values, and what must stay."""
    model = case.model(device)
    ops, plain_ops = ops_for(case, model, device), ReferenceOps()
    ours, before = (Step.of(case, ops, case.dtype, device) for _ in range(2))
    ours.run(model, ops)
    plain = Step.of(case, plain_ops, case.dtype, device).run(model, plain_ops)
    exact = Step.of(case, plain_ops, torch.float32, device).run(wide(model), plain_ops)
    steps, tiny = (ours, plain, exact), TINIES[case.dtype]

    def beside(what: str, *parts: torch.Tensor) -> None:
        """Row by row; and all of many together, whose chances even out."""
        no_worse(*parts, STEP_FACTOR, what=what, tiny=tiny)  # type: ignore[misc]
        mine, theirs = (float(errors(part, parts[2]).mean()) for part in parts[:2])
        if len(parts[0]) >= 64 and theirs:  # none where the plain ones are the exact ones
            assert mine <= 1.1 * theirs + tiny / 8, f"{what}: {mine:.4%} off, plain {theirs:.4%}"

    s = ours.scratch
    for name in ("ids", "positions", "slots", "seq_lens", "last_index"):
        assert torch.equal(getattr(s, name), getattr(exact.scratch, name)), name
    tokens, seqs = s.slots >= 0, s.seq_lens > 0
    if tokens.any():
        slots = s.slots[tokens].long()
        for layer in range(case.spec.num_layers):
            for which, name in enumerate(("keys", "values")):
                beside(f"{name} {layer}", *(t.cache.data[layer, which].flatten(0, 1)[slots] for t in steps))
        beside("x", *(t.scratch.x[tokens] for t in steps))
    if seqs.any():
        beside("logits", *(t.scratch.logits[seqs] for t in steps))
    mine, old = (t.cache.data.flatten(2, 3).clone() for t in (ours, before))
    mine[:, :, s.slots[tokens].long()] = old[:, :, s.slots[tokens].long()] = 0
    assert torch.equal(mine.view(torch.uint8), old.view(torch.uint8)), "the rest of the cache"
    if ops.picks(model.head, len(seqs), model.embedding.dtype):
        logits = s.logits
        Step(before.world, before.cache, before.scratch).run(model, ops, greedy=True)
        chosen = logits.gather(
            1, before.scratch.tokens.long().clamp(0, case.spec.vocab_size - 1).unsqueeze(1)
        )[seqs, 0]
        assert torch.equal(chosen, logits[seqs].amax(1))
        assert (before.scratch.tokens[before.world.batch.rows < 0] == 0).all()
    return ops


def replayed(case: Case, device: str) -> None:
    """A captured step has the bits of an eager one: hidden states, logits, keys and values."""
    model = case.model(device)
    ops = ops_for(case, model, device)
    eager, other = (Step.of(case, ops, case.dtype, device) for _ in range(2))
    eager.run(model, ops)
    old = other.cache.data.clone()
    stream: Any = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        other.run(model, ops)  # cuBLAS makes a workspace for each stream
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        other.run(model, ops)
    for _ in range(2):
        other.cache.data.copy_(old)
        for name in ("x", "normed", "qkv", "attn", "gate_up", "act", "squares", "logits", "last"):
            getattr(other.scratch, name).fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        tokens, seqs = eager.scratch.slots >= 0, eager.scratch.seq_lens > 0
        assert torch.equal(other.scratch.x[tokens], eager.scratch.x[tokens])
        assert torch.equal(other.scratch.logits[seqs], eager.scratch.logits[seqs])
        assert torch.equal(other.cache.data.view(torch.uint8), eager.cache.data.view(torch.uint8))
