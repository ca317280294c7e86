"""The other side of `--baseline torch-compile`: a decoder in plain torch with a static KV cache.

What a careful user of torch writes without an engine: fused projections, `scaled_dot_product_attention`
over a preallocated cache, the decode step under `torch.compile(mode="reduce-overhead")`. Prompts
of a batch are padded on the left. Shares no code with the engine's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ..models.decoder import expected_tensors

if TYPE_CHECKING:
    from ..models.spec import ModelSpec

Get = Callable[[str], torch.Tensor]


class PlainDecoder(torch.nn.Module):
    """Logits of the last position, from ids; keeps keys and values of `batch` sequences."""

    def __init__(self, spec: ModelSpec, get: Get, *, batch: int, length: int) -> None:
        """Take weights by Hugging Face name; `length` tokens of cache for each sequence."""
        super().__init__()
        self.spec = spec
        self.embedding = _fixed(get("model.embed_tokens.weight"))
        self.head = self.embedding if spec.tied_embeddings else _fixed(get("lm_head.weight"))
        self.norm = _fixed(get("model.norm.weight"))
        device, dtype = self.embedding.device, self.embedding.dtype
        self.layers = torch.nn.ModuleList(_Layer(spec, get, i, batch, length) for i in range(spec.num_layers))
        angles = torch.arange(length).unsqueeze(1) * torch.tensor(spec.rope_inv_freq)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.pads: torch.Tensor
        self.register_buffer("cos", angles.cos().to(device, dtype))
        self.register_buffer("sin", angles.sin().to(device, dtype))
        self.register_buffer("pads", torch.zeros(batch, dtype=torch.long, device=device))

    def forward(self, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Run ids [batch, tokens] that stand at cache columns [tokens]; float32 logits [batch, vocab].

        A row's first `pads[row]` columns hold nothing: no one looks at them.
        """
        window = self.spec.attention.sliding_window
        keys = torch.arange(self.cos.shape[0], device=ids.device)
        seen = (keys <= columns[:, None]) & (keys >= self.pads[:, None, None])
        if window is not None:
            seen &= keys > columns[:, None] - window
        seen |= keys == columns[:, None]  # padding sees itself: a row of nothing would be NaN
        positions = (columns - self.pads[:, None]).clamp(min=0)
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        x = functional.embedding(ids, self.embedding)
        for layer in self.layers:
            x = layer(x, columns, seen.unsqueeze(1), cos, sin)
        last = _rms(x[:, -1], self.norm, self.spec.norm_eps)
        return functional.linear(last, self.head).float()


class _Layer(torch.nn.Module):
    def __init__(self, spec: ModelSpec, get: Get, index: int, batch: int, length: int) -> None:
        super().__init__()
        self.spec = spec
        a, own = spec.attention, f"model.layers.{index}."
        attn, mlp = own + "self_attn.", own + "mlp."
        self.input_norm = _fixed(get(own + "input_layernorm.weight"))
        self.mlp_norm = _fixed(get(own + "post_attention_layernorm.weight"))
        self.qkv = _fixed(torch.cat([get(f"{attn}{x}_proj.weight") for x in "qkv"]))
        self.qkv_bias = (
            _fixed(torch.cat([get(f"{attn}{x}_proj.bias") for x in "qkv"])) if spec.qkv_bias else None
        )
        self.q_norm = _fixed(get(attn + "q_norm.weight")) if spec.qk_norm else None
        self.k_norm = _fixed(get(attn + "k_norm.weight")) if spec.qk_norm else None
        self.output = _fixed(get(attn + "o_proj.weight"))
        self.output_bias = _fixed(get(attn + "o_proj.bias")) if spec.output_bias else None
        self.gate_up = _fixed(torch.cat([get(mlp + "gate_proj.weight"), get(mlp + "up_proj.weight")]))
        self.down = _fixed(get(mlp + "down_proj.weight"))
        room = torch.zeros(
            2, batch, a.kv_heads, length, a.head_dim, dtype=self.qkv.dtype, device=self.qkv.device
        )
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self.register_buffer("keys", room[0].clone())
        self.register_buffer("values", room[1].clone())

    def forward(
        self, x: torch.Tensor, columns: torch.Tensor, seen: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        spec, a = self.spec, self.spec.attention
        batch, tokens, _ = x.shape
        qkv = functional.linear(_rms(x, self.input_norm, spec.norm_eps), self.qkv, self.qkv_bias)
        q, k, v = (
            t.view(batch, tokens, -1, a.head_dim) for t in qkv.split((a.q_size, a.kv_size, a.kv_size), dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _rms(q, self.q_norm, spec.norm_eps), _rms(k, self.k_norm, spec.norm_eps)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        self.keys[:, :, columns] = k.transpose(1, 2)
        self.values[:, :, columns] = v.transpose(1, 2)
        found = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            self.keys,
            self.values,
            attn_mask=seen,
            scale=a.scale,
            enable_gqa=a.heads != a.kv_heads,
        )
        found = found.transpose(1, 2).reshape(batch, tokens, a.q_size)
        x = x + functional.linear(found, self.output, self.output_bias)
        gate, up = functional.linear(_rms(x, self.mlp_norm, spec.norm_eps), self.gate_up).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, self.down)


def random_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Get:
    """Weights of the right shapes and a sensible scale."""
    shapes = expected_tensors(spec)
    generator = torch.Generator(device=device).manual_seed(0)

    def get(name: str) -> torch.Tensor:
        out = torch.empty(shapes[name], dtype=dtype, device=device)
        return out.fill_(1.0) if name.endswith("norm.weight") else out.normal_(0.0, 0.02, generator=generator)

    return get


class PlainGenerator:
    """Greedy or temperature sampling over a `PlainDecoder`, the decode step compiled."""

    def __init__(self, model: PlainDecoder, temperature: float) -> None:
        self.model, self._temperature = model, temperature
        self._step = torch.compile(self._decode, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def _decode(self, ids: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return self._choose(self.model(ids, column))

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._temperature:
            return logits.argmax(-1, keepdim=True)
        weights = torch.softmax(logits / self._temperature, dim=-1)
        # Exponential noise instead of `multinomial`, which would wait for the device.
        return (weights / torch.empty_like(weights).exponential_(1)).argmax(-1, keepdim=True)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """`tokens` new tokens for each prompt of a full batch."""
        device, longest = self.model.embedding.device, max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self.model.pads.copy_(torch.tensor([longest - len(p) for p in prompts]))
        logits = self.model(padded, torch.arange(longest, device=device))
        found = [self._choose(logits)]
        column = torch.tensor([longest], device=device)
        for _ in range(tokens - 1):
            torch.compiler.cudagraph_mark_step_begin()
            # The next replay overwrites what this one returned: hence the copy.
            found.append(self._step(found[-1], column).clone())
            column += 1
        rows: list[list[int]] = torch.cat(found, dim=1).tolist()
        return rows


def _fixed(weight: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight, requires_grad=False)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
