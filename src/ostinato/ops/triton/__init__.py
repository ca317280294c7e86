"""`OpSet` for NVIDIA GPUs: fused Triton kernels for few rows, cuBLAS where that is faster.

Nothing here synchronises or looks at device data, and nothing is allocated but the workspace of
the fused kernels, once for each device: results and intermediates go to tensors that the caller
passes, grids follow from padded shapes, kernels from a table that is fixed before the first step.
The same code runs eagerly and under capture.

All tensors have contiguous rows; an activation's leading dimension is the padded T or S.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from triton import cdiv, next_power_of_2

from ...errors import KernelError
from ...inputs import FLAG_PENALTIES, POST_CYCLE, Batch, StaticInputs, StepState
from ...types import SamplerVariant
from .. import (
    AttentionShape,
    LayerWeights,
    Linear,
    NextNorm,
    Peaks,
    Scratch,
    Stack,
    StepView,
    VersionLine,
    squares_words,
)
from ..cuda import attend, chain
from ..cuda.attention import DecodeAttention
from ..cuda.fused import MOST_TOKENS, FusedDecode, unsupported
from ..cuda.linear import Product, Products
from ..cuda.program import has_bindings
from ..cuda.rows import MOST_TOKENS as MOST_ROWS
from ..cuda.rows import RowsDecode
from ..cuda.rows import unsupported as unsupported_rows
from ..cuda.sample import ClusterSampler
from . import attention, decode, pointwise
from .matmul import matmul_scaled
from .tune import BUCKETS, SEMAPHORES, Kind, Launch, Problem, Store, Table, Version, choose, problem_of

logger = logging.getLogger(__name__)

SPLITS = 16
"""Most chunks that a decode row's context is cut into."""
MIN_CHUNK = 16
"""Fewest tokens in a chunk; a longer one is a multiple of it."""
DECODE_KEYS = 16
"""Cached tokens that decode attention looks at at a time."""
PROGRAMS = 8
"""Of decode attention on a multiprocessor, at most."""
ROWS_BLOCK = 128
ADVANCE_BLOCK = 16
COLUMNS_BLOCK = 1024
HEAD_TILE = (16, 64, 64)
SOURCES = {
    Kind.GEMV: "Triton", Kind.STREAM: "Triton", Kind.TILE: "linear.cu", Kind.CHAIN: "chain.cu",
    Kind.ATTEND: "attend.cu",
}  # fmt: skip
"""What `OpSet.versions` calls them"""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the attention kernels' tiles; they follow from the model's shape and dtype alone."""

    group: int
    """Query heads of a KV head, padded to a power of two."""
    decode_group: int
    """The same, at least the 16 rows of a tensor-core tile."""
    dim: int
    """Head dimension, padded to a power of two of at least 16."""
    half: int
    """Half the head dimension, padded to a power of two."""
    decode_half: int
    """The same, at least the 16 of a tensor-core tile."""
    decode_warps: int
    """Of `decode.attention`."""
    queries: int
    """Tokens in a tile of `attention.varlen`."""
    rows: int
    """Rows in that tile: `queries * group`."""
    keys: int
    """Cached tokens at a time."""
    warps: int
    """Of `attention.varlen`."""


@lru_cache
def tiles(shape: AttentionShape, dtype: torch.dtype) -> Tiles:
    """Tiles for a model."""
    group = next_power_of_2(shape.heads // shape.kv_heads)
    dim = max(16, next_power_of_2(shape.head_dim))
    rows = max(64, group)
    return Tiles(
        group=group,
        decode_group=max(16, group),
        dim=dim,
        half=next_power_of_2(shape.head_dim // 2),
        decode_half=max(16, next_power_of_2(shape.head_dim // 2)),
        # A program's queries and sums in 32 registers a thread, and no tensor cores for float32.
        decode_warps=4 if dtype is torch.float32 else max(1, min(8, max(16, group) * dim // 1024)),
        queries=rows // group,
        rows=rows,
        # 16 KiB of keys, and of values, so that two stages fit into shared memory.
        keys=min(64, max(16, 16384 // (dim * dtype.itemsize))),
        warps=4 if dim <= 128 else 8,
    )


class TritonOps:
    """`OpSet` for NVIDIA GPUs; on CPU tensors it runs in Triton's interpreter."""

    name = "triton"

    def __init__(self, table: Table | None = None, device: torch.device | None = None) -> None:
        """Nothing is chosen for a model yet.

        Args:
            table: in place of the rules for which version serves which shape.
            device: where the tensors will be; None: the current GPU, where there is one.
        """
        gpu = torch.cuda.is_available()
        if gpu and (device is None or device.index is None):
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device or torch.device("cpu")
        self._fused = FusedDecode.claim(self._device) if _has_fused(self._device) else None
        self._whole: Stack | None = None
        """The model that the one kernel was loaded for."""
        self._rows: RowsDecode | None = None
        """The same for a few rows, where the model allows it."""
        self._chain: chain.Chain | None = None
        """All products between two attentions, for the model that it was made for"""
        self._attend: attend.Attend | None = None
        """QKV and attention in one kernel, for that model"""
        self._claim: FusedDecode | None = None
        """While `_chain` or `_attend` is there: their blocks wait for each other too."""
        self._attention = DecodeAttention.claim(self._device) if gpu else None
        self._sampler = ClusterSampler.on(self._device) if gpu else None
        self._wide_mm = gpu and _mm_widens(self._device)
        self._pdl = gpu and torch.cuda.get_device_capability(self._device) >= (9, 0)
        # Few in the interpreter, so that programs have several pieces of work there too.
        self._programs = (
            PROGRAMS * torch.cuda.get_device_properties(self._device).multi_processor_count if gpu else 24
        )
        self._launch = {"PDL": self._pdl, "launch_pdl": self._pdl}
        self._products = Products.on(self._device) if gpu else None
        self._table = table or Table(tiles=self._products is not None)
        self._workspaces: dict[torch.device, decode.Workspace] = {}

    def load(self, stack: Stack, block_size: int, table_width: int, max_seqs: int) -> None:
        if self._fused is None:
            return
        claim = self._fused
        self._load_whole(stack, block_size, table_width, max_seqs)
        if max_seqs > chain.ROWS[0] // 2 and self._products is not None:
            self._chain = self._load_chain(stack)
        if max_seqs >= attend.LEAST_ROWS and self._products is not None:
            self._attend = self._load_attend(stack, block_size, table_width)
        self._claim = claim if self._chain is not None or self._attend is not None else None

    def _load_whole(self, stack: Stack, block_size: int, table_width: int, max_seqs: int) -> None:
        assert self._fused is not None
        why = unsupported(stack)
        if why is not None:
            logger.info("no one-kernel decode step for this model: %s", why)
        else:
            try:
                self._fused.load(stack, block_size, table_width)
                self._whole = stack
                if max_seqs > MOST_TOKENS:
                    self._rows = self._load_rows(stack, block_size, table_width)
                return
            except KernelError as error:
                logger.warning(
                    "decode steps of one sequence run op by op, as their kernel cannot be built; "
                    "OSTINATO_FUSED=0 does without it and this warning: %s",
                    str(error),  # an error in a log record would keep the frames that it came through
                )
        self._fused = None  # another engine may have it

    def _load_rows(self, stack: Stack, block_size: int, table_width: int) -> RowsDecode | None:
        if os.environ.get("OSTINATO_FUSED_ROWS") == "0":
            return None
        why = unsupported_rows(stack, block_size)
        if why is not None:
            logger.info("no one-kernel decode step of several rows for this model: %s", why)
            return None
        rows = RowsDecode(self._device)
        try:
            rows.load(stack, block_size, table_width)
        except KernelError as error:
            logger.warning(
                "decode steps of a few sequences run op by op, as their kernel cannot be built; "
                "OSTINATO_FUSED_ROWS=0 does without it and this warning: %s",
                str(error),
            )
            return None
        return rows

    def _load_chain(self, stack: Stack) -> chain.Chain | None:
        if os.environ.get("OSTINATO_CHAIN") == "0":
            return None
        try:
            return chain.Chain(self._device, stack)
        except KernelError as error:
            logger.info("products between two attentions run one by one: %s", str(error))
            return None

    def _load_attend(self, stack: Stack, block_size: int, table_width: int) -> attend.Attend | None:
        if os.environ.get("OSTINATO_ATTEND") == "0" or self._attention is None:
            return None
        try:
            return attend.Attend(self._device, stack, block_size, table_width)
        except KernelError as error:
            logger.info("queries, keys and values and attention run one by one: %s", str(error))
            return None

    def _whole_steps(self) -> list[tuple[str, FusedDecode | RowsDecode, int]]:
        """Kernels that run a whole model: name, kernel, most sequences."""
        both = (("fused", self._fused, MOST_TOKENS), ("rows", self._rows, MOST_ROWS))
        return [(name, kernel, most) for name, kernel, most in both if kernel is not None]

    def tune(self, stack: Stack, max_rows: int) -> None:
        """Measured once for each GPU, kept in the cache folder; OSTINATO_TUNE=0 leaves it to the rules."""
        if os.environ.get("OSTINATO_TUNE") == "0" or not torch.cuda.is_available():
            return
        whole = self.fuses(stack, 1)
        linears = [("norm_head", stack.head)]
        for layer in stack.layers:
            linears += [("norm_linear", layer.qkv), ("linear_add", layer.output)]
            linears += [("norm_gate_up", layer.gate_up), ("linear_add", layer.down)]
        work: dict[Problem, list[Linear]] = {}
        largest = next((i for i, size in enumerate(BUCKETS) if size >= max_rows), len(BUCKETS) - 1)
        for rows in BUCKETS[: largest + 1]:
            for op, linear in linears:
                # One row has a kernel for all layers; the head alone is left, behind prompts.
                if rows > MOST_TOKENS or not whole or op == "norm_head":
                    problem = problem_of(op, linear, rows, stack.embedding.dtype)
                    work.setdefault(problem, []).append(linear)
        has_tiles = self._products is not None
        store = Store.here(tiles=has_tiles)
        self._table = choose(work, self.launcher, store, tiles=has_tiles)
        whole_layers: dict[Problem, list[Linear]] = {}
        for rows in BUCKETS[: largest + 1]:
            for op, kernel, served, told_by in (
                ("chain", self._chain, chain.ROWS, [layer.down for layer in stack.layers]),
                ("attend", self._attend, (attend.ROWS,), [layer.qkv for layer in stack.layers]),
            ):
                if kernel is not None and rows in served:
                    whole_layers[problem_of(op, told_by[0], rows, stack.embedding.dtype)] = told_by
        if whole_layers:
            self._table.add(
                choose(whole_layers, lambda problem: self._layers(stack, problem), store, tiles=has_tiles)
            )
        torch.cuda.empty_cache()  # what is cached would be missing from the KV cache

    def versions(self, stack: Stack, rows: int, *, decode: bool) -> list[VersionLine]:
        dtype, lines = stack.embedding.dtype, []

        def note(op: str, version: str, shape: str = "", why: str = "") -> None:
            lines.append(VersionLine(op, shape, version, why))

        def product(op: str, linear: Linear) -> Version:
            version = self._table(op, linear, rows, dtype)
            library = "library (cuBLAS)" if linear.scale is None else "Triton: tiles for FP8 weights"
            kernel = library if version.kind is Kind.LIBRARY else f"{SOURCES[version.kind]}: {version}"
            columns = linear.out_features // (2 if op == "norm_gate_up" else 1)
            shape = "" if op in ("attend", "chain") else f"{columns}x{linear.in_features}"
            note(op, kernel, shape, self._table.why(op, linear, rows, dtype))
            return version

        best = "Triton"
        if decode and self.fuses(stack, rows):
            source = "decode.cu" if rows <= MOST_TOKENS else "rows.cu"
            note("fused", f"{source}: the whole model in one kernel")
            best = f"{source}: in that kernel, without logits"
        else:
            # As `Decoder.forward` goes; all layers behind the second are like it.
            begun = self._begins_norms(stack.embedding[:1].expand(rows, -1))
            chained = False
            for layer in stack.layers[:2]:
                if not chained and decode and begun and self._attends(stack, layer, rows, dtype):
                    product("attend", layer.qkv)
                else:
                    if not chained:
                        product("norm_linear", layer.qkv)
                    note("rope_paged_attention", self._attention_kernel(stack, decode))
                chained = self._chains(stack, layer, rows, dtype)
                if chained:
                    product("chain", layer.down)
                    continue
                product("linear_add", layer.output)
                product("norm_gate_up", layer.gate_up)
                begun = product("linear_add", layer.down).kind is Kind.TILE
            product("norm_head", stack.head)
            if self.picks(stack.head, rows, dtype):
                best = "linear.cu: in the head's kernel, without logits"
        note("best_token", best)
        draws = self._sampler is not None and self._sampler.serves(stack.head.out_features)
        note("sample", "sample.cu; masks, penalties and logprobs: Triton" if draws else "Triton")
        note("prepare, embed, advance", "Triton")
        return list(dict.fromkeys(lines))

    def _attention_kernel(self, stack: Stack, decode: bool) -> str:
        dtype = stack.embedding.dtype
        if decode and self._attention is not None and self._attention.serves(dtype, dtype, stack.attention):
            return "attention.cu"
        return "Triton"

    def reset(self) -> None:
        for workspace in self._workspaces.values():
            workspace.semaphores.zero_()
        if self._chain is not None:
            self._chain.reset()
        if self._attend is not None:
            self._attend.reset()
        for _, kernel, _ in self._whole_steps():
            kernel.reset()

    def launcher(self, problem: Problem, rows: int | None = None) -> Launch:
        """What launches any version of a problem, on operands of its own: for measuring.

        `rows`: other than the most that the problem's versions serve.
        """
        from .sampling import greedy, pick, scratch_words

        device, rows, dtype = self._device, rows or problem.rows, problem.dtype

        def make(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(size, device=device).to(dtype)

        x, norm = make(rows, problem.depth), make(problem.depth)
        out = make(rows, problem.columns, dtype=torch.float32 if problem.op == "norm_head" else dtype)
        normed, wide = torch.empty_like(x), make(rows, 2 * problem.columns) if problem.gate else None
        index: torch.Tensor | None = None
        if problem.op == "norm_head":
            index = torch.arange(rows, dtype=torch.int32, device=device)
            tokens = torch.empty_like(index)
            workspace = torch.empty(scratch_words(rows, problem.columns), dtype=torch.int32, device=device)
        # Norms are begun by the product in front, where a version can use that.
        stream = problem.depth if problem.has_norm else problem.columns
        then = NextNorm(
            make(stream), make(rows, stream), torch.ones(squares_words(rows, stream), device=device)
        )

        def launch(version: Version, linear: Linear) -> None:
            if problem.op == "linear_add":
                if self._linear_add(version, x, linear, out, then) is None:
                    # Then whoever reads the stream norms it first: that is part of this version's price.
                    self._rms_norm(out, None, then.weight, 1e-5, then.scaled)
            elif problem.op == "norm_gate_up":
                assert wide is not None
                self._norm_gate_up(version, x, norm, 1e-5, linear, normed, wide, out, then)
            elif index is not None:  # what a greedy step does
                if version.kind is Kind.TILE:
                    peaks = self._best_token(version, x, index, norm, 1e-5, linear, normed, workspace, then)
                    assert peaks.tokens is not None
                    pick(
                        peaks.values,
                        peaks.tokens,
                        index,
                        parts=peaks.values.shape[1],
                        out=tokens,
                        pdl=self._pdl,
                    )
                    return
                self._norm_linear(version, x, index, norm, 1e-5, linear, normed, out, then)
                greedy(out, index, out=tokens, scratch=workspace, pdl=self._pdl)
            else:
                self._norm_linear(version, x, index, norm, 1e-5, linear, normed, out, then)

        return launch

    def _layers(self, stack: Stack, problem: Problem) -> Launch:
        """What launches all of a layer but what is in front of attention, told by its down projection; or, `attend`, all of it, told by QKV."""
        a, rows, hidden = stack.attention, problem.rows, stack.embedding.shape[1]
        whole = problem.op == "attend"
        size = self._attend.block_size if whole and self._attend is not None else 16
        context = min(256, max(len(stack.rope) // size, 1) * size)
        each = cdiv(context, size)
        width = self._attend.table_width if whole and self._attend is not None else each

        def make(columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=self._device).to(problem.dtype)

        def numbers(count: int) -> torch.Tensor:
            return torch.arange(count, dtype=torch.int32, device=self._device)

        lengths = torch.full((rows,), context, dtype=torch.int32, device=self._device)
        table = torch.zeros(rows, max(width, each), dtype=torch.int32, device=self._device)
        table[:, :each] = numbers(rows * each).view(rows, -1)
        slots = table[:, each - 1] * size + (context - 1) % size
        index = numbers(rows)
        view = StepView(index, lengths - 1, slots, lengths, index, numbers(rows + 1), index, table, True)
        blocks = (2, rows * each, size, a.kv_heads, a.head_dim)
        caches = [torch.randn(blocks, device=self._device).to(problem.dtype) for _ in range(2)]
        words, inner = self.attention_words(a, rows), stack.layers[0].down.in_features
        x, normed, qkv, attn = make(hidden), make(hidden), make(a.qkv_size), make(a.q_size)
        wide, act = make(2 * inner), make(inner)
        squares, workspace = (
            torch.ones(squares_words(rows, hidden), device=self._device),
            torch.empty(words, device=self._device),
        )
        scratch = Scratch(
            x, normed, qkv, attn, wide, act, squares, x, squares, index, index, index, index, index, index, index, workspace,
            workspace,
        )  # fmt: skip
        places = {id(layer.qkv if whole else layer.down): index for index, layer in enumerate(stack.layers)}
        eps = stack.norm_eps

        def multiply(layer: LayerWeights, begun: NextNorm | None) -> None:
            self.norm_linear(x, layer.input_norm, eps, layer.qkv, normed=normed, out=qkv, begun=begun)

        def launch(version: Version, linear: Linear) -> None:
            at = places[id(linear)]
            layer, following = stack.layers[at], stack.layers[(at + 1) % len(stack.layers)]
            cache = caches[at % 2][0], caches[at % 2][1]
            if version.kind is Kind.ATTEND:
                assert self._attend is not None
                semaphores = self._workspace(self._device).semaphores
                norm = NextNorm(layer.input_norm, normed, squares)
                self._attend.run(
                    layer, norm, view, cache, workspace=workspace, semaphores=semaphores, out=attn
                )
            else:
                if whole:
                    multiply(layer, NextNorm(layer.input_norm, normed, squares))
                self.rope_paged_attention(
                    qkv, view, cache, stack.rope[:context], layer.q_norm, layer.k_norm, eps, a,
                    workspace=workspace, out=attn,
                )  # fmt: skip
            if version.kind is Kind.CHAIN:
                assert self._chain is not None
                self._chain.run(at, scratch)
                return
            begun = self.linear_add(
                attn, layer.output, residual=x, then=NextNorm(layer.mlp_norm, normed, squares)
            )
            self.norm_gate_up(
                x, layer.mlp_norm, eps, layer.gate_up, normed=normed, gate_up=wide, out=act, begun=begun
            )
            begun = self.linear_add(
                act, layer.down, residual=x, then=NextNorm(following.input_norm, normed, squares)
            )
            if not whole:
                multiply(following, begun)

        return launch

    def _workspace(self, device: torch.device) -> decode.Workspace:
        """Made at the first use, which is no capture: kernels run once before they are captured."""
        found = self._workspaces.get(device)
        if found is None:
            found = self._workspaces[device] = decode.Workspace.on(device)
        return found

    def workspaces(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for workspace in self._workspaces.values():
            found |= {"ops.semaphores": workspace.semaphores, "ops.partials": workspace.partials}
        for prefix, kernel, _ in self._whole_steps():
            found |= {f"{prefix}.{name}": cells for name, cells in kernel.workspaces().items()}
        if self._chain is not None:
            found |= {f"chain.{name}": cells for name, cells in self._chain.workspaces().items()}
        if self._attend is not None:
            found |= {f"attend.{name}": cells for name, cells in self._attend.workspaces().items()}
        return found

    def attention_words(self, shape: AttentionShape, max_seqs: int) -> int:
        return max_seqs * shape.heads * SPLITS * (shape.head_dim + 2)

    def sampler_words(self, max_seqs: int, vocab_size: int) -> int:
        from .sampling import scratch_words

        return scratch_words(max_seqs, vocab_size)

    def prepare(self, batch: Batch, scratch: Scratch, stack: Stack | None = None) -> StepView:
        # The one kernel of a step that is not launched early: what was written before the step is complete for all
        # others, also for what decode attention loads before it waits.
        static, state = batch.static, batch.state
        table, cycle = static.block_table, (len(state.posted) - 1) * POST_CYCLE
        begun: NextNorm | None = None
        if batch.decode and stack is not None and self._begins_norms(scratch.x):
            begun = NextNorm(stack.layers[0].input_norm, scratch.normed, scratch.squares)
            width = scratch.x.shape[1]
            block = next_power_of_2(width)
            pointwise.begin_decode[(batch.num_seqs,)](
                batch.rows, static.enabled, state.active, state.last_token, state.position, table, state.number,
                scratch.ids, scratch.positions, scratch.slots, scratch.seq_lens, scratch.last_index,
                stack.embedding, begun.weight, scratch.x, begun.scaled, begun.squares,
                batch.num_seqs,
                TABLE_WIDTH=table.shape[1], BLOCK_SIZE=batch.block_size, CYCLE=cycle,
                WIDTH=width, BLOCK=block, num_warps=4 if block <= 2048 else 8, PDL=self._pdl,
            )  # fmt: skip
        elif batch.decode:
            pointwise.prepare_decode[(cdiv(batch.num_seqs, ROWS_BLOCK),)](
                batch.rows, static.enabled, state.active, state.last_token, state.position, table, state.number,
                scratch.ids, scratch.positions, scratch.slots, scratch.seq_lens, scratch.last_index,
                batch.num_seqs,
                TABLE_WIDTH=table.shape[1], BLOCK_SIZE=batch.block_size, CYCLE=cycle, BLOCK=ROWS_BLOCK, num_warps=4,
                PDL=self._pdl,
            )  # fmt: skip
        else:
            pointwise.prepare_mixed[(cdiv(max(batch.num_tokens, batch.num_seqs), ROWS_BLOCK),)](
                batch.rows, batch.query_start, batch.seq_lens,
                batch.tokens, batch.token_positions, batch.token_rows,
                static.enabled, state.active, state.last_token, table, state.number,
                scratch.ids, scratch.positions, scratch.slots, scratch.seq_lens, scratch.last_index,
                batch.num_tokens, batch.num_seqs,
                TABLE_WIDTH=table.shape[1], BLOCK_SIZE=batch.block_size, CYCLE=cycle, BLOCK=ROWS_BLOCK, num_warps=4,
                PDL=self._pdl,
            )  # fmt: skip
        return StepView(
            ids=scratch.ids,
            positions=scratch.positions,
            slots=scratch.slots,
            seq_lens=scratch.seq_lens,
            last_index=scratch.last_index,
            query_start=batch.query_start,
            rows=batch.rows,
            block_table=table,
            decode=batch.decode,
            begun=begun,
        )

    def fuses(self, stack: Stack, seqs: int) -> bool:
        if stack is not self._whole:
            return False
        return seqs <= MOST_TOKENS or (self._rows is not None and self._rows.serves(stack, seqs))

    def fused(
        self,
        stack: Stack,
        view: StepView,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        scratch: Scratch,
        *,
        greedy: bool,
    ) -> Peaks | None:
        if view.seq_lens.shape[0] > MOST_TOKENS:
            assert self._rows is not None
            self._rows.run(stack, view, caches, scratch, greedy=greedy)
            return None
        assert self._fused is not None
        largest = self._fused.run(stack, view, caches, scratch, greedy=greedy)
        return None if greedy else Peaks(largest[None])

    def embed(
        self, ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor, then: NextNorm | None = None
    ) -> NextNorm | None:
        tokens, width = out.shape
        if then is not None and self._begins_norms(out):
            block = next_power_of_2(width)
            pointwise.embed_norm[(tokens,)](
                ids, table, then.weight, out, then.scaled, then.squares, tokens,
                WIDTH=width, BLOCK=block, num_warps=4 if block <= 2048 else 8, **self._launch,
            )  # fmt: skip
            return then
        grid = (tokens, cdiv(width, COLUMNS_BLOCK))
        pointwise.embed[grid](ids, table, out, WIDTH=width, BLOCK=COLUMNS_BLOCK, num_warps=4, **self._launch)
        return None

    def _begins_norms(self, x: torch.Tensor) -> bool:
        """Whether tiles may read this stream next: nobody else wants its norm in two halves."""
        tokens, width = x.shape
        fits = tokens <= BUCKETS[-1] and x.dtype is torch.bfloat16 and width % 64 == 0
        return self._products is not None and fits

    def norm_linear(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        normed: torch.Tensor,
        out: torch.Tensor,
        begun: NextNorm | None = None,
    ) -> None:
        version = self._table("norm_linear", linear, len(x), x.dtype)
        self._norm_linear(version, x, None, norm, eps, linear, normed, out, begun)

    def rope_paged_attention(
        self,
        qkv: torch.Tensor,
        view: StepView,
        cache: tuple[torch.Tensor, torch.Tensor],
        rope: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        shape: AttentionShape,
        *,
        workspace: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        tile = tiles(shape, qkv.dtype)
        keys, values = cache
        tokens, seqs = qkv.shape[0], view.seq_lens.shape[0]
        has_norm = q_norm is not None and k_norm is not None
        norms = (q_norm, k_norm) if has_norm else (qkv, qkv)
        scale = shape.scale * 1.4426950408889634  # the softmax is in powers of two
        window = shape.sliding_window or 0
        table_width, block_size = view.block_table.shape[1], keys.shape[1]
        if view.decode:
            if seqs * shape.kv_heads > SEMAPHORES:
                raise KernelError(f"{seqs} rows of {shape.kv_heads} KV heads are more than {SEMAPHORES}")
            if self._attention is not None and self._attention.run(
                qkv, view, cache, rope, q_norm, k_norm, eps, shape,
                workspace=workspace, semaphores=self._workspace(qkv.device).semaphores, out=out,
            ):  # fmt: skip
                return
            grid = min(seqs * shape.kv_heads * SPLITS, self._programs)
            decode.attention[(grid,)](
                qkv, view.positions, view.slots, rope, *norms,
                keys, values, view.block_table, view.rows, view.seq_lens,
                workspace, self._workspace(qkv.device).semaphores, out, eps, scale, seqs,
                HEADS=shape.heads, KV_HEADS=shape.kv_heads, HALF=shape.head_dim // 2, WINDOW=window,
                TABLE_WIDTH=table_width, BLOCK_SIZE=block_size, SPLITS=SPLITS, MIN_CHUNK=MIN_CHUNK,
                SEQS_PAD=max(16, next_power_of_2(seqs)), GROUP_PAD=tile.decode_group,
                HALF_PAD=tile.decode_half, DIM_PAD=tile.dim, BLOCK_N=DECODE_KEYS, NORM=has_norm,
                num_warps=tile.decode_warps, **self._launch,
            )  # fmt: skip
            return
        pointwise.rope_kv_write[(tokens, shape.kv_heads)](
            qkv, view.positions, view.slots, rope, *norms, keys, values, out, eps,
            HEADS=shape.heads, KV_HEADS=shape.kv_heads, HALF=shape.head_dim // 2, NORM=has_norm,
            GROUP_PAD=tile.group, HALF_PAD=tile.half, num_warps=2, **self._launch,
        )  # fmt: skip
        attention.varlen[(cdiv(tokens, tile.queries) + seqs, shape.kv_heads)](
            qkv, keys, values, view.block_table, view.rows, view.query_start, view.seq_lens, out,
            scale, seqs,
            HEADS=shape.heads, KV_HEADS=shape.kv_heads, DIM=shape.head_dim, WINDOW=window,
            TABLE_WIDTH=table_width, BLOCK_SIZE=block_size,
            GROUP_PAD=tile.group, DIM_PAD=tile.dim, BLOCK_M=tile.rows, BLOCK_N=tile.keys,
            num_warps=tile.warps, num_stages=2, **self._launch,
        )  # fmt: skip

    def linear_add(
        self, x: torch.Tensor, linear: Linear, *, residual: torch.Tensor, then: NextNorm | None = None
    ) -> NextNorm | None:
        version = self._table("linear_add", linear, len(x), x.dtype)
        return self._linear_add(version, x, linear, residual, then)

    def attend(
        self,
        stack: Stack,
        index: int,
        view: StepView,
        cache: tuple[torch.Tensor, torch.Tensor],
        scratch: Scratch,
        begun: NextNorm | None,
    ) -> bool:
        rows, layer = len(scratch.x), stack.layers[index]
        if begun is None or not view.decode or not self._attends(stack, layer, rows, scratch.x.dtype):
            return False
        assert self._attend is not None
        self._attend.run(
            layer, begun, view, cache,
            workspace=scratch.attention, semaphores=self._workspace(scratch.x.device).semaphores, out=scratch.attn,
        )  # fmt: skip
        return True

    def _attends(self, stack: Stack, layer: LayerWeights, rows: int, dtype: torch.dtype) -> bool:
        """Whether `attend` does a decode step's layer whose norm is begun."""
        if self._attend is None or not self._attend.serves(stack, rows):
            return False
        return self._table("attend", layer.qkv, rows, dtype).kind is Kind.ATTEND

    def chain(self, stack: Stack, index: int, scratch: Scratch) -> NextNorm | None:
        x = scratch.x
        if not self._chains(stack, stack.layers[index], len(x), x.dtype):
            return None
        assert self._chain is not None
        return self._chain.run(index, scratch)

    def _chains(self, stack: Stack, layer: LayerWeights, rows: int, dtype: torch.dtype) -> bool:
        """Whether `chain` does what is behind a layer's attention."""
        if self._chain is None or not self._chain.serves(stack, rows):
            return False
        return self._table("chain", layer.down, rows, dtype).kind is Kind.CHAIN

    def norm_gate_up(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        normed: torch.Tensor,
        gate_up: torch.Tensor,
        out: torch.Tensor,
        begun: NextNorm | None = None,
    ) -> None:
        version = self._table("norm_gate_up", linear, len(x), x.dtype)
        self._norm_gate_up(version, x, norm, eps, linear, normed, gate_up, out, begun)

    def norm_head(
        self,
        x: torch.Tensor,
        last_index: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        last: torch.Tensor,
        logits: torch.Tensor,
        begun: NextNorm | None = None,
        workspace: torch.Tensor | None = None,
    ) -> Peaks | None:
        version, seqs = self._table("norm_head", linear, len(last_index), x.dtype), len(last_index)
        if version.kind is not Kind.TILE or workspace is None:
            self._norm_linear(version, x, last_index, norm, eps, linear, last, logits, begun)
            return None
        peaks = Peaks(self._peaks(version, workspace, linear, seqs).values)
        self._tile(Product.WIDE, version, x, last_index, norm, eps, linear, last, logits, begun, peaks)
        return peaks

    def picks(self, linear: Linear, seqs: int, dtype: torch.dtype) -> bool:
        return self._table("norm_head", linear, seqs, dtype).kind is Kind.TILE

    def best_token(
        self,
        x: torch.Tensor,
        last_index: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        *,
        rows: torch.Tensor,
        last: torch.Tensor,
        workspace: torch.Tensor,
        out: torch.Tensor,
        begun: NextNorm | None = None,
    ) -> Peaks | None:
        version = self._table("norm_head", linear, len(rows), x.dtype)
        return self._best_token(version, x, last_index, norm, eps, linear, last, workspace, begun)

    def sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        inputs: StaticInputs,
        state: StepState,
        *,
        variant: SamplerVariant,
        workspace: torch.Tensor,
        out: torch.Tensor,
        largest: torch.Tensor | None = None,
    ) -> None:
        from .sampling import sample

        sample(
            logits, rows, positions, inputs, state,
            variant=variant, out=out, scratch=workspace, pdl=self._pdl, draw=self._sampler, largest=largest,
        )  # fmt: skip

    def advance(self, batch: Batch, view: StepView, tokens: torch.Tensor, peaks: Peaks | None = None) -> None:
        static, state = batch.static, batch.state
        block, parts = (1, peaks.values.shape[1]) if peaks is not None else (ADVANCE_BLOCK, 0)
        values, places = (peaks.values, peaks.tokens) if peaks is not None else (tokens, tokens)
        pointwise.advance[(cdiv(batch.num_seqs, block),)](
            batch.rows, view.seq_lens, batch.samples, tokens, values, places,
            state.emitted, state.last_token, state.position, state.active, state.output_counts,
            state.number, state.posted,
            static.stop_ids, static.num_stop_ids, static.min_position, static.last_position, static.flags,
            batch.num_seqs,
            DECODE=batch.decode, VOCAB=state.output_counts.shape[1], STOP_IDS=static.stop_ids.shape[1],
            COUNT_FLAG=FLAG_PENALTIES, PLACES=state.posted.shape[0], WIDTH=state.posted.shape[1],
            BLOCK=block, PARTS=parts, PARTS_PADDED=next_power_of_2(max(parts, 1)), num_warps=4, **self._launch,
        )  # fmt: skip

    # --- products, in a given version ------------------------------------------------------

    def _norm_linear(
        self,
        version: Version,
        x: torch.Tensor,
        index: torch.Tensor | None,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        normed: torch.Tensor,
        out: torch.Tensor,
        begun: NextNorm | None,
    ) -> None:
        """out = linear(rms_norm(x)), or of rows `index` of x; `normed` is what the norm may be written to."""
        if version.kind is Kind.TILE:
            kind = Product.WIDE if out.dtype is torch.float32 else Product.STORE
            self._tile(kind, version, x, index, norm, eps, linear, normed, out, begun)
            return
        if version.norms:
            workspace = self._workspace(x.device)
            decode.multiply(
                version, x, linear, out, workspace, norm=norm, eps=eps, index=index, pdl=self._pdl
            )
            return
        self._rms_norm(x, index, norm, eps, normed)
        if version.kind is not Kind.LIBRARY:
            decode.multiply(version, normed, linear, out, self._workspace(x.device), pdl=self._pdl)
        elif linear.scale is not None:
            matmul_scaled(normed, linear, out, pdl=self._pdl)
        elif out.dtype != normed.dtype:
            self._wide_product(normed, linear.weight, out)
        elif linear.bias is None:
            torch.mm(normed, linear.weight.t(), out=out)
        else:
            # The bias first and the product onto it: one rounding, as in `addmm`, and no temporary.
            self._add_bias(out, linear.bias, add=False)
            out.addmm_(normed, linear.weight.t())

    def _wide_product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """out = x @ weight.T in float32."""
        if self._wide_mm:
            torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
            return
        (rows, columns), (m, n, k) = out.shape, HEAD_TILE
        pointwise.matmul_float32[(cdiv(rows, m), cdiv(columns, n))](
            x, weight, out, rows,
            WIDTH=weight.shape[1], COLUMNS=columns, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k,
            num_warps=4, num_stages=3,
        )  # fmt: skip

    def _tile(
        self,
        kind: Product,
        version: Version,
        x: torch.Tensor,
        index: torch.Tensor | None,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        normed: torch.Tensor,
        out: torch.Tensor | None,
        begun: NextNorm | None,
        peaks: Peaks | None = None,
    ) -> None:
        assert self._products is not None
        if begun is None:
            self._rms_norm(x, index, norm, eps, normed)
            self._products.run(kind, version, normed, linear, out, peaks=peaks)
        else:
            self._products.run(
                kind, version, begun.scaled, linear, out,
                squares=begun.squares, sums=begun.sums, eps=eps, peaks=peaks,
            )  # fmt: skip

    def _best_token(
        self,
        version: Version,
        x: torch.Tensor,
        index: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        normed: torch.Tensor,
        workspace: torch.Tensor,
        begun: NextNorm | None,
    ) -> Peaks:
        peaks = self._peaks(version, workspace, linear, len(index))
        self._tile(Product.BEST, version, x, index, norm, eps, linear, normed, None, begun, peaks)
        return peaks

    def _peaks(self, version: Version, workspace: torch.Tensor, linear: Linear, seqs: int) -> Peaks:
        from .sampling import peaks_in

        assert self._products is not None
        return peaks_in(workspace, seqs, self._products.blocks(version, seqs, linear))

    def _linear_add(
        self,
        version: Version,
        x: torch.Tensor,
        linear: Linear,
        residual: torch.Tensor,
        then: NextNorm | None = None,
    ) -> NextNorm | None:
        """residual += linear(x)."""
        if version.kind is Kind.TILE:
            assert self._products is not None
            self._products.run(Product.ADD, version, x, linear, residual, then=then)
            return then
        if version.kind is not Kind.LIBRARY:
            decode.multiply(version, x, linear, residual, self._workspace(x.device), add=True, pdl=self._pdl)
        elif linear.scale is not None:
            matmul_scaled(x, linear, residual, add=True, pdl=self._pdl)
        else:
            residual.addmm_(x, linear.weight.t())
            if linear.bias is not None:
                self._add_bias(residual, linear.bias, add=True)
        return None

    def _norm_gate_up(
        self,
        version: Version,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        linear: Linear,
        normed: torch.Tensor,
        gate_up: torch.Tensor,
        out: torch.Tensor,
        begun: NextNorm | None,
    ) -> None:
        """out = silu(g) * u with [g, u] = linear(rms_norm(x))."""
        if version.kind is Kind.TILE:
            self._tile(Product.GATE, version, x, None, norm, eps, linear, normed, out, begun)
            return
        workspace = self._workspace(x.device)
        if version.norms:
            decode.multiply(version, x, linear, out, workspace, norm=norm, eps=eps, gate=True, pdl=self._pdl)
            return
        self._rms_norm(x, None, norm, eps, normed)
        if version.kind is not Kind.LIBRARY:
            decode.multiply(version, normed, linear, out, workspace, gate=True, pdl=self._pdl)
            return
        if linear.scale is not None:
            matmul_scaled(normed, linear, gate_up, pdl=self._pdl)
        else:
            torch.mm(normed, linear.weight.t(), out=gate_up)
        tokens, width = out.shape
        grid = (tokens, cdiv(width, COLUMNS_BLOCK))
        pointwise.silu_mul[grid](gate_up, out, WIDTH=width, BLOCK=COLUMNS_BLOCK, num_warps=4, **self._launch)

    def _rms_norm(
        self, x: torch.Tensor, index: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """out[r] = rms_norm(x[r]), or of x[index[r]]; x [T, hidden], out [rows, hidden]."""
        rows, width = out.shape
        block = next_power_of_2(width)
        pointwise.rms_norm[(rows,)](
            x, x if index is None else index, weight, out, eps,
            WIDTH=width, GATHER=index is not None, BLOCK=block,
            num_warps=4 if block <= 1024 else 8 if block <= 4096 else 16, **self._launch,
        )  # fmt: skip

    def _add_bias(self, out: torch.Tensor, bias: torch.Tensor, *, add: bool) -> None:
        """out = bias, or out += bias; out [T, n], bias [n]."""
        tokens, width = out.shape
        grid = (tokens, cdiv(width, COLUMNS_BLOCK))
        pointwise.add_bias[grid](
            out, bias, WIDTH=width, ADD=add, BLOCK=COLUMNS_BLOCK, num_warps=4, **self._launch
        )


def _has_fused(device: torch.device) -> bool:
    """Whether the one-kernel decode step runs here: Hopper's bulk copies, and NVRTC to compile it."""
    if os.environ.get("OSTINATO_FUSED") == "0":
        return False
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return has_bindings()


def _mm_widens(device: torch.device) -> bool:
    """Whether `torch.mm` multiplies bfloat16 into float32 without a temporary."""
    x = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    out = torch.zeros(8, 8, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32, out=out)
    except (TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    return True
