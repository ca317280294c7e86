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
from ..ops import AttentionShape, LayerWeights, Linear, NextNorm, OpSet, Peaks, Scratch, StepView
from .checkpoint import Checkpoint
from .quantize import Quantizer, stored_scales
from .spec import ModelSpec
from .staging import Uploader


@dataclass(frozen=True)
class Decoder:
    """A model on a device, ready to run."""

    spec: ModelSpec
    embedding: torch.Tensor
    """[vocab, hidden]"""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Linear
    """Its weight is the embedding itself where the two are tied and nothing is quantised."""
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
    def attention(self) -> AttentionShape:
        return self.spec.attention

    @property
    def norm_eps(self) -> float:
        return self.spec.norm_eps

    @property
    def nbytes(self) -> int:
        distinct = {t.data_ptr(): t.numel() * t.element_size() for t in self.tensors().values()}
        return sum(distinct.values())

    @property
    def step_bytes(self) -> int:
        """Bytes that every step reads, whatever its batch: all but what it looks up row by row."""
        looked_up = {self.embedding.data_ptr(), self.rope.data_ptr()} - {self.head.weight.data_ptr()}
        distinct = {t.data_ptr(): t.numel() * t.element_size() for t in self.tensors().values()}
        return sum(size for address, size in distinct.items() if address not in looked_up)

    def forward(
        self, view: StepView, cache: KVCache, scratch: Scratch, ops: OpSet, *, greedy: bool = False
    ) -> Peaks | None:
        """Run the tokens of a step.

        Leaves float32 logits of each sequence's last token in `scratch.logits` or, greedy, only the best tokens in
        `scratch.tokens`: where the op set `picks`.

        Returns:
            What `OpSet.norm_head` or, greedy, `OpSet.best_token` does.
        """
        spec, s = self.spec, scratch
        eps = spec.norm_eps
        then = NextNorm(self.layers[0].input_norm, s.normed, s.squares)
        begun = view.begun or ops.embed(view.ids, self.embedding, s.x, then)
        chained = False
        for index, layer in enumerate(self.layers):
            if chained or not ops.attend(self, index, view, cache.layer(index), s, begun):
                if not chained:
                    ops.norm_linear(
                        s.x, layer.input_norm, eps, layer.qkv, normed=s.normed, out=s.qkv, begun=begun
                    )
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
            begun = ops.chain(self, index, s)
            chained = begun is not None
            if chained:
                continue
            then = NextNorm(layer.mlp_norm, s.normed, s.squares)
            begun = ops.linear_add(s.attn, layer.output, residual=s.x, then=then)
            ops.norm_gate_up(
                s.x,
                layer.mlp_norm,
                eps,
                layer.gate_up,
                normed=s.normed,
                gate_up=s.gate_up,
                out=s.act,
                begun=begun,
            )
            last = index + 1 == len(self.layers)
            weight = self.final_norm if last else self.layers[index + 1].input_norm
            then = NextNorm(weight, s.normed, s.squares)
            begun = ops.linear_add(s.act, layer.down, residual=s.x, then=then)
        head = (s.x, view.last_index, self.final_norm, eps, self.head)
        begun = begun if view.decode else None
        if greedy:
            return ops.best_token(
                *head, rows=view.rows, last=s.last, workspace=s.sampler, out=s.tokens, begun=begun
            )
        return ops.norm_head(*head, last=s.last, logits=s.logits, begun=begun, workspace=s.sampler)


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


def check_tensors(spec: ModelSpec, checkpoint: Checkpoint, companions: frozenset[str] = frozenset()) -> None:
    """Hold a checkpoint's tensors against its config, before anything is read.

    `companions` are names that may be there besides what the config asks for.

    Raises:
        CheckpointError: names every missing, extra and misshapen tensor (the first few of each).
    """
    expected = expected_tensors(spec)
    found = checkpoint.tensors
    # some files repeat the tied head
    ignored = companions | {"lm_head.weight"} if spec.tied_embeddings else companions
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
    spec: ModelSpec,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    positions: int,
    quantization: str | None = None,
) -> Decoder:
    """Read a checkpoint into a decoder.

    Args:
        spec: what the config says.
        checkpoint: an open checkpoint; its tensors are checked against `spec` first.
        dtype: of all weights that are not quantised.
        device: where they go.
        positions: how many positions the rotary table covers.
        quantization: "fp8" quantises projections and head as they arrive; None leaves them as they
            are stored: wide, or FP8 where the checkpoint has that.

    Raises:
        CheckpointError: see `check_tensors`; or a weight to quantise is not finite.
        UnsupportedModelError: the checkpoint is quantised in a way that cannot be read.
    """
    shapes = expected_tensors(spec)
    stored = stored_scales(checkpoint, shapes)
    check_tensors(spec, checkpoint, stored.companions)
    quantizer = Quantizer(device)

    def read(*names: str) -> torch.Tensor:
        """The tensors stacked along the first dimension, converted once, into one allocation."""
        rows = sum(shapes[name][0] for name in names)
        out = torch.empty((rows, *shapes[names[0]][1:]), dtype=dtype, device=device)
        start = 0
        for name in names:
            end = start + shapes[name][0]
            uploader.copy(out[start:end], stored.dequantized(checkpoint, name))
            start = end
        return out

    def project(*names: str, bias: bool = False) -> Linear:
        weights = [f"{name}.weight" for name in names]
        own = read(*(f"{name}.bias" for name in names)) if bias else None
        if quantization is None and not all(name in stored.scales for name in weights):
            return Linear(read(*weights), own)
        shape = sum(shapes[name][0] for name in weights), shapes[weights[0]][1]
        return quantizer.stacked((stored.part(checkpoint, name) for name in weights), shape, own)

    with Uploader(device) as uploader:
        model = _assemble(spec, read, project, quantizer if quantization else None, positions, device)
    quantizer.check(checkpoint.path)
    return model


def random_decoder(
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    positions: int,
    seed: int = 0,
    quantization: str | None = None,
) -> Decoder:
    """A decoder with random weights of a sensible scale: for benchmarks and tests.

    With quantization="fp8" the same weights are drawn, and then quantised.
    """
    shapes = expected_tensors(spec)
    generator = torch.Generator(device=device).manual_seed(seed)
    quantizer = Quantizer(device) if quantization else None

    def make(*names: str) -> torch.Tensor:
        rows, rest = sum(shapes[name][0] for name in names), shapes[names[0]][1:]
        out = torch.empty((rows, *rest), dtype=dtype, device=device)
        if names[0].endswith("norm.weight"):
            return out.fill_(1.0)
        return out.normal_(0.0, 0.02, generator=generator)

    def project(*names: str, bias: bool = False) -> Linear:
        weight = make(*(f"{name}.weight" for name in names))
        own = make(*(f"{name}.bias" for name in names)) if bias else None
        return quantizer.linear(names[0], weight, own) if quantizer else Linear(weight, own)

    return _assemble(spec, make, project, quantizer, positions, device)


def _assemble(
    spec: ModelSpec,
    get: Callable[..., torch.Tensor],
    project: Callable[..., Linear],
    quantizer: Quantizer | None,
    positions: int,
    device: torch.device,
) -> Decoder:
    """A decoder from two readers: `get` of tensors, `project` of maps by their names without ".weight"."""
    layers = []
    for i in range(spec.num_layers):
        attn, mlp, own = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp.", f"model.layers.{i}."
        layers.append(
            LayerWeights(
                input_norm=get(own + "input_layernorm.weight"),
                qkv=project(*(f"{attn}{x}_proj" for x in "qkv"), bias=spec.qkv_bias),
                q_norm=get(attn + "q_norm.weight") if spec.qk_norm else None,
                k_norm=get(attn + "k_norm.weight") if spec.qk_norm else None,
                output=project(attn + "o_proj", bias=spec.output_bias),
                mlp_norm=get(own + "post_attention_layernorm.weight"),
                gate_up=project(mlp + "gate_proj", mlp + "up_proj"),
                down=project(mlp + "down_proj"),
            )
        )
    embedding = get("model.embed_tokens.weight")
    if not spec.tied_embeddings:
        head = project("lm_head")
    elif quantizer is None:
        head = Linear(embedding)
    else:  # a copy: rows are still looked up in the wide one
        head = quantizer.linear("model.embed_tokens.weight", embedding)
    return Decoder(
        spec=spec,
        embedding=embedding,
        layers=tuple(layers),
        final_norm=get("model.norm.weight"),
        head=head,
        rope=rope_table(spec, positions, device),
    )
