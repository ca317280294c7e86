"""The ops that every model is written in.

An op is a meaning: a typed function with a plain-torch reference (`reference.py`) beside it
and faster versions behind it. `OpSet` is the list; `select` picks the implementation for a
device, once, when the engine is built. No op allocates on the GPU: results and intermediates
go to tensors that the caller passes (the scratch arena).

T: padded tokens of the step. S: padded sequences. R: rows of the device buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..inputs import Batch, StaticInputs, StepState
from ..types import SamplerVariant


@dataclass(frozen=True)
class AttentionShape:
    """What is constant about attention in one model."""

    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    """A token sees this many tokens, itself included; None: all before it."""

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class Linear:
    """Weights of a linear map: `x @ (weight * scale).T + bias`."""

    weight: torch.Tensor
    """[out, in], as in `nn.Linear`; float8_e4m3fn where there is a scale"""
    bias: torch.Tensor | None = None
    """[out]"""
    scale: torch.Tensor | None = None
    """[out] float32, one for each output channel"""

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer; projections that share an input are fused along their outputs."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Stack(Protocol):
    """A dense decoder as ops see it: what all its layers, its embedding and its head are made of."""

    @property
    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]"""
        ...

    @property
    def layers(self) -> Sequence[LayerWeights]: ...

    @property
    def final_norm(self) -> torch.Tensor: ...

    @property
    def head(self) -> Linear: ...

    @property
    def rope(self) -> torch.Tensor:
        """[positions, 2, head_dim / 2] float32"""
        ...

    @property
    def attention(self) -> AttentionShape: ...

    @property
    def norm_eps(self) -> float: ...


@dataclass(frozen=True)
class StepView:
    """What a step is, in the device's own terms; `prepare` computes it from the static buffers.

    A token or sequence is *live* if it is neither padding nor a row that deactivated itself.
    """

    ids: torch.Tensor
    """[T] int32 token ids; 0 where not live."""
    positions: torch.Tensor
    """[T] int32; 0 where not live."""
    slots: torch.Tensor
    """[T] int32 KV slot to write; -1 where not live."""
    seq_lens: torch.Tensor
    """[S] int32 tokens in the cache once this step has written; 0 where not live."""
    last_index: torch.Tensor
    """[S] int32 index into T of the sequence's last token; 0 where not live."""
    query_start: torch.Tensor
    """[S + 1] int32, a view of the static inputs."""
    rows: torch.Tensor
    """[S] int32 device row of each sequence, -1 for padding; a view of the static inputs."""
    block_table: torch.Tensor
    """[R, max_blocks_per_seq] int32, by device row."""
    decode: bool
    """One token for each sequence: T == S, query_start is 0, 1, 2, ..."""
    begun: NextNorm | None = field(default=None, kw_only=True)
    """The first norm, where `prepare` has embedded the tokens and begun it"""


@dataclass(frozen=True)
class Scratch:
    """Intermediates of a step: views into the arena at padded shapes. Nothing here outlives a step."""

    x: torch.Tensor
    """[T, hidden] residual stream"""
    normed: torch.Tensor
    """[T, hidden]"""
    qkv: torch.Tensor
    """[T, (heads + 2 kv_heads) head_dim]"""
    attn: torch.Tensor
    """[T, heads head_dim]"""
    gate_up: torch.Tensor
    """[T, 2 intermediate]"""
    act: torch.Tensor
    """[T, intermediate]"""
    squares: torch.Tensor
    """float32, `squares_words` of T and hidden: what `NextNorm` keeps"""
    last: torch.Tensor
    """[S, hidden]"""
    logits: torch.Tensor
    """[S, vocab] float32"""
    tokens: torch.Tensor
    """[S] int32 sampled tokens"""
    next_positions: torch.Tensor
    """[S] int32 their positions"""
    ids: torch.Tensor
    """[T] int32"""
    positions: torch.Tensor
    """[T] int32"""
    slots: torch.Tensor
    """[T] int32"""
    seq_lens: torch.Tensor
    """[S] int32"""
    last_index: torch.Tensor
    """[S] int32"""
    attention: torch.Tensor
    """float32 workspace for `rope_paged_attention`; its size is `OpSet.attention_words`"""
    sampler: torch.Tensor
    """int32 workspace for `sample`; its size is `OpSet.sampler_words`"""


@dataclass(frozen=True)
class NextNorm:
    """The RMS norm that reads the residual stream next; whoever writes the stream may begin it.

    Begun: `scaled` is the stream times `weight`, and what is missing is each token's factor,
    which follows from `squares`.
    """

    weight: torch.Tensor
    """[hidden]"""
    scaled: torch.Tensor
    """[T, hidden]"""
    squares: torch.Tensor
    """[sums, T] float32, flat: each token's sums of squares over parts of the stream"""
    sums: int | None = None
    """hidden / 64 where nothing is said: sums over 64 columns"""


@dataclass(frozen=True)
class Peaks:
    """The largest logits of parts of each row, whatever the cut; NaN counts as -inf."""

    values: torch.Tensor
    """[S, parts] float32"""
    tokens: torch.Tensor | None = None
    """[S, parts] int32: the first token that has it, where it is known"""


def squares_words(tokens: int, hidden: int) -> int:
    """float32 words of `NextNorm.squares`."""
    return tokens * -(-hidden // 64)


@dataclass(frozen=True)
class VersionLine:
    """What an op of a step runs, for people."""

    op: str
    shape: str
    """Outputs x inputs of a product; empty for the rest"""
    version: str
    """Its kernel"""
    why: str = ""
    """Where there was a choice: "measured", or "by rule" and why"""


class OpSet(Protocol):
    """One implementation of every op."""

    name: str

    def load(self, stack: Stack, block_size: int, table_width: int, max_seqs: int) -> None:
        """Make what `fused` needs for a model, or decide that it goes op by op; only before `tune`.

        Args:
            stack: the model; `fuses` is false of every other.
            block_size: tokens in a KV block.
            table_width: KV blocks of a sequence, at most.
            max_seqs: sequences of a step, at most.
        """
        ...

    def tune(self, stack: Stack, max_rows: int) -> None:
        """Choose versions of products for a model's weights; only before the first step.

        Args:
            stack: the model.
            max_rows: of a decode step.
        """
        ...

    def versions(self, stack: Stack, rows: int, *, decode: bool) -> list[VersionLine]:
        """What a step of so many rows runs, each op once, in the order of a step; asks whatever the ops ask.

        Args:
            stack: the model.
            rows: tokens, padding included; of head and sampling, as many sequences.
            decode: one token for each sequence.
        """
        ...

    def reset(self) -> None:
        """Put right what a step that failed halfway may have left behind on the device."""
        ...

    def workspaces(self) -> dict[str, torch.Tensor]:
        """Device memory that the op set holds beyond what it is passed, by name; made by the engine's warm-up."""
        ...

    def attention_words(self, shape: AttentionShape, max_seqs: int) -> int:
        """4-byte words of workspace that attention needs."""
        ...

    def sampler_words(self, max_seqs: int, vocab_size: int) -> int:
        """4-byte words of workspace that sampling needs."""
        ...

    def prepare(self, batch: Batch, scratch: Scratch, stack: Stack | None = None) -> StepView:
        """Work out ids, positions, slots and lengths from the static buffers, and the step's number.

        With a `stack` it may embed the tokens too, and begin the first layer's norm: then the view has it.
        """
        ...

    def fuses(self, stack: Stack, seqs: int) -> bool:
        """Whether decode steps of `seqs` sequences, padding included, are done by `fused`."""
        ...

    def fused(
        self,
        stack: Stack,
        view: StepView,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        scratch: Scratch,
        *,
        greedy: bool,
    ) -> Peaks | None:
        """The whole model in one go, for a decode step that it `fuses`.

        Leaves float32 logits in `scratch.logits` or, greedy, only the best tokens in
        `scratch.tokens`.

        Returns:
            Where they are known, for `sample`, until the next step. Greedy: nothing.
        """
        ...

    def embed(
        self, ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor, then: NextNorm | None = None
    ) -> NextNorm | None:
        """out[t] = table[ids[t]]; table [vocab, hidden], out [T, hidden].

        Returns `then` if it has been begun, for the op that needs this norm.
        """
        ...

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
        """out = linear(rms_norm(x)); x [T, hidden], out [T, n]. `begun`: this very norm, where it is."""
        ...

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
        """Per-head norm (where the model has one), rotary embedding, KV write, causal attention.

        qkv [T, qkv_size] is overwritten. cache: keys and values, each
        [num_blocks, block_size, kv_heads, head_dim]. rope [max_positions, 2, head_dim / 2]
        float32: cosines, then sines; the halves of a head rotate against each other, as in
        Hugging Face models. out [T, q_size]; zero where not live.
        """
        ...

    def attend(
        self,
        stack: Stack,
        index: int,
        view: StepView,
        cache: tuple[torch.Tensor, torch.Tensor],
        scratch: Scratch,
        begun: NextNorm | None,
    ) -> bool:
        """A layer up to its attention in one go: `norm_linear` and `rope_paged_attention`.

        From `scratch.x`, or the norm that is begun, to `scratch.attn` and the cache.

        Args:
            stack: the model.
            index: of the layer.
            view: of the step.
            cache: keys and values of the layer, as above.
            scratch: of the step.
            begun: the norm in front of the layer.

        Returns:
            False: nothing was done, it goes op by op.
        """
        ...

    def linear_add(
        self, x: torch.Tensor, linear: Linear, *, residual: torch.Tensor, then: NextNorm | None = None
    ) -> NextNorm | None:
        """residual += linear(x); x [T, k], residual [T, hidden].

        Returns `then` if it has been begun, for the op that needs this norm.
        """
        ...

    def chain(self, stack: Stack, index: int, scratch: Scratch) -> NextNorm | None:
        """Everything from a layer's attention to the next layer's queries, keys and values, in one go.

        Four ops: from `scratch.attn` and `scratch.x` to `scratch.x` and `scratch.qkv`. Behind the last layer three, without
        `scratch.qkv`.

        Args:
            stack: the model.
            index: of the layer.
            scratch: of the step.

        Returns:
            The norm behind the layer, begun, for `norm_head`; None: nothing was done, it goes op by op.
        """
        ...

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
        """out = silu(g) * u with [g, u] = linear(rms_norm(x)), without bias; out [T, intermediate]."""
        ...

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
        """logits[s] = linear(rms_norm(x[last_index[s]])), float32, without bias; logits [S, vocab].

        `begun` only where every token is a sequence's last: `last_index` is then not looked at. `workspace`, that
        of `sample`: for what is returned.

        Returns:
            What `fused` returns.
        """
        ...

    def picks(self, linear: Linear, seqs: int, dtype: torch.dtype) -> bool:
        """Whether `best_token` does without logits, with the head `linear`, activations in `dtype` and `seqs` sequences, padding included."""
        ...

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
        """out[s] = what a greedy `sample` makes of the logits of `norm_head`; only where it `picks`.

        rows [S] int32, -1 for padding; `workspace`, that of `sample`; out [S] int32; the rest as in `norm_head`.

        Returns:
            Peaks with tokens, in the workspace: `out` is not written yet, `advance` does it. None: it is.
        """
        ...

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
        """Choose a token for each sequence; see `ostinato.sampling.sample`. `largest`: values of the peaks that `fused` or `norm_head` returned."""
        ...

    def advance(self, batch: Batch, view: StepView, tokens: torch.Tensor, peaks: Peaks | None = None) -> None:
        """Store sampled tokens as the next inputs, move positions, deactivate rows that ended, post what was emitted.

        `peaks`: what `best_token` returned; `tokens` are the best of them, 0 for padding, and written here.

        A live sequence with `samples` set writes `emitted` by column and, by row, `last_token`,
        `position`, `active` and (with FLAG_PENALTIES) its count; the rest only emit -1. What was emitted
        also goes to the step's place in `posted`, with the step's number.
        """
        ...


def select(device: torch.device) -> OpSet:
    """The implementation for a device."""
    if device.type == "cuda":
        from .triton import TritonOps

        return TritonOps(device=device)
    from .reference import ReferenceOps

    return ReferenceOps()
