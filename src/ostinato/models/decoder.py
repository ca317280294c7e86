"""The dense decoder that all families share: five ops a layer.

It knows weights and the order of ops. It does not know devices, graphs, schedules or
sampling; whatever a forward pass needs is passed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..kv_cache import KVCache
from ..ops import Linear, OpSet, Scratch, StepView
from .checkpoint import Checkpoint
from .spec import ModelSpec
from .staging import Uploader


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


@dataclass(frozen=True)
class Decoder:
    """A model on a device, ready to run."""

    spec: ModelSpec
    embedding: torch.Tensor
    """[vocab, hidden]"""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Linear
    """Its weight is the embedding itself where the two are tied."""
    rope: torch.Tensor
    """[positions, 2, head_dim / 2] float32 cosines and sines"""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every weight and table by name."""
        found = {"embedding": self.embedding, "final_norm": self.final_norm, "rope": self.rope}
        parts: list[tuple[str, torch.Tensor | Linear | None]] = [("head", self.head)]
        for index, layer in enumerate(self.layers):
            parts += [(f"layers.{index}.{name}", part) for name, part in vars(layer).items()]
        for name, part in parts:
            if isinstance(part, Linear):
                found |= {f"{name}.{field}": t for field, t in vars(part).items() if t is not None}
            elif part is not None:
                found[name] = part
        return found

    @property
    def nbytes(self) -> int:
        distinct = {t.data_ptr(): t.numel() * t.element_size() for t in self.tensors().values()}
        return sum(distinct.values())

    def forward(self, view: StepView, cache: KVCache, scratch: Scratch, ops: OpSet) -> None:
        """Run the tokens of a step; leaves float32 logits of each sequence's last in `scratch.logits`."""
        spec, s = self.spec, scratch
        eps = spec.norm_eps
        ops.embed(view.ids, self.embedding, s.x)
        for index, layer in enumerate(self.layers):
            ops.norm_linear(s.x, layer.input_norm, eps, layer.qkv, normed=s.normed, out=s.qkv)
            ops.rope_paged_attention(
                s.qkv,
                view,
                cache.layer(index),
                self.rope,
                layer.q_norm,
                layer.k_norm,
                eps,
                spec.attention,
                workspace=s.attention,
                out=s.attn,
            )
            ops.linear_add(s.attn, layer.output, residual=s.x)
            ops.norm_gate_up(
                s.x, layer.mlp_norm, eps, layer.gate_up, normed=s.normed, gate_up=s.gate_up, out=s.act
            )
            ops.linear_add(s.act, layer.down, residual=s.x)
        ops.norm_head(s.x, view.last_index, self.final_norm, eps, self.head, last=s.last, logits=s.logits)


def rope_table(spec: ModelSpec, positions: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of every position, [positions, 2, head_dim / 2] float32."""
    inv_freq = torch.tensor(spec.rope_inv_freq, dtype=torch.float32)
    angles = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * inv_freq
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint must hold, by Hugging Face name."""
    h, a, m = spec.hidden_size, spec.attention, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, h)}
    for i in range(spec.num_layers):
        own = f"model.layers.{i}."
        shapes[own + "input_layernorm.weight"] = (h,)
        for name, size in (("q", a.q_size), ("k", a.kv_size), ("v", a.kv_size)):
            shapes[own + f"self_attn.{name}_proj.weight"] = (size, h)
            if spec.qkv_bias:
                shapes[own + f"self_attn.{name}_proj.bias"] = (size,)
        if spec.qk_norm:
            shapes[own + "self_attn.q_norm.weight"] = (a.head_dim,)
            shapes[own + "self_attn.k_norm.weight"] = (a.head_dim,)
        shapes[own + "self_attn.o_proj.weight"] = (h, a.q_size)
        if spec.output_bias:
            shapes[own + "self_attn.o_proj.bias"] = (h,)
        shapes[own + "post_attention_layernorm.weight"] = (h,)
        for name in ("gate", "up"):
            shapes[own + f"mlp.{name}_proj.weight"] = (m, h)
        shapes[own + "mlp.down_proj.weight"] = (h, m)
    shapes["model.norm.weight"] = (h,)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, h)
    return shapes


def check_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Hold a checkpoint's tensors against its config, before anything is read.

    Raises:
        CheckpointError: names every missing, extra and misshapen tensor (the first few of each).
    """
    expected = expected_tensors(spec)
    found = checkpoint.tensors
    ignored = {"lm_head.weight"} if spec.tied_embeddings else set()  # some files repeat the tied head
    extra = [
        n for n in found if n not in expected and n not in ignored and not n.endswith("rotary_emb.inv_freq")
    ]
    problems = []
    for what, names in (("missing", [n for n in expected if n not in found]), ("unexpected", extra)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{what} tensors: {', '.join(names[:5])}{more}")
    misshapen = [
        f"{name} is {list(found[name].shape)}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if misshapen:
        more = f" and {len(misshapen) - 5} more" if len(misshapen) > 5 else ""
        problems.append(f"misshapen tensors: {'; '.join(misshapen[:5])}{more}")
    if problems:
        raise CheckpointError(f"{checkpoint.path}: weights do not match config.json: " + ". ".join(problems))


def load(
    spec: ModelSpec, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, positions: int
) -> Decoder:
    """Read a checkpoint into a decoder.

    Args:
        spec: what the config says.
        checkpoint: an open checkpoint; its tensors are checked against `spec` first.
        dtype: of all weights.
        device: where they go.
        positions: how many positions the rotary table covers.

    Raises:
        CheckpointError: see `check_tensors`.
    """
    check_tensors(spec, checkpoint)
    shapes = expected_tensors(spec)

    def read(*names: str) -> torch.Tensor:
        """The tensors stacked along the first dimension, converted once, into one allocation."""
        rows = sum(shapes[name][0] for name in names)
        out = torch.empty((rows, *shapes[names[0]][1:]), dtype=dtype, device=device)
        start = 0
        for name in names:
            end = start + shapes[name][0]
            uploader.copy(out[start:end], checkpoint.read(name))
            start = end
        return out

    with Uploader(device) as uploader:
        return _assemble(spec, read, positions, device)


def random_decoder(
    spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, positions: int, seed: int = 0
) -> Decoder:
    """A decoder with random weights of a sensible scale: for benchmarks and tests."""
    shapes = expected_tensors(spec)
    generator = torch.Generator(device=device).manual_seed(seed)

    def make(*names: str) -> torch.Tensor:
        rows, rest = sum(shapes[name][0] for name in names), shapes[names[0]][1:]
        out = torch.empty((rows, *rest), dtype=dtype, device=device)
        if names[0].endswith("norm.weight"):
            return out.fill_(1.0)
        return out.normal_(0.0, 0.02, generator=generator)

    return _assemble(spec, make, positions, device)


def _assemble(
    spec: ModelSpec, get: Callable[..., torch.Tensor], positions: int, device: torch.device
) -> Decoder:
    layers = []
    for i in range(spec.num_layers):
        attn, mlp, own = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp.", f"model.layers.{i}."
        layers.append(
            LayerWeights(
                input_norm=get(own + "input_layernorm.weight"),
                qkv=Linear(
                    get(*(f"{attn}{x}_proj.weight" for x in "qkv")),
                    get(*(f"{attn}{x}_proj.bias" for x in "qkv")) if spec.qkv_bias else None,
                ),
                q_norm=get(attn + "q_norm.weight") if spec.qk_norm else None,
                k_norm=get(attn + "k_norm.weight") if spec.qk_norm else None,
                output=Linear(
                    get(attn + "o_proj.weight"), get(attn + "o_proj.bias") if spec.output_bias else None
                ),
                mlp_norm=get(own + "post_attention_layernorm.weight"),
                gate_up=Linear(get(mlp + "gate_proj.weight", mlp + "up_proj.weight")),
                down=Linear(get(mlp + "down_proj.weight")),
            )
        )
    embedding = get("model.embed_tokens.weight")
    return Decoder(
        spec=spec,
        embedding=embedding,
        layers=tuple(layers),
        final_norm=get("model.norm.weight"),
        head=Linear(embedding if spec.tied_embeddings else get("lm_head.weight")),
        rope=rope_table(spec, positions, device),
    )
