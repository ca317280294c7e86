"""The small Triton kernels: everything but attention and sampling.

Model constants (widths, head counts, block size) are `constexpr`; what a key fixes (T, S) is a
run-time integer that is never specialized, so one compiled kernel serves every key. Rows of
all tensors are contiguous. Grids depend on shapes alone.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def enter(PDL: tl.constexpr):
    """First line of every kernel: let the next one be launched, wait for the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _next_number(number, CYCLE: tl.constexpr):
    """The step's number, by one program: see `StepState.number`."""
    if tl.program_id(0) == 0:
        n = tl.load(number)
        tl.store(number, n % CYCLE + 1, mask=n > 0)


@triton.jit
def _decode_row(
    row, enabled, active, last_token, position, block_table, TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """(live, token, position, slot) of device rows; zeros, and slot -1, of those that are not live."""
    live = row >= 0
    on = tl.load(enabled + row, mask=live, other=0)  # no load waits for another one
    awake = tl.load(active + row, mask=live, other=0)
    at = tl.load(position + row, mask=live, other=0)
    token = tl.load(last_token + row, mask=live, other=0)
    live &= (on != 0) & (awake != 0)
    token = tl.where(live, token, 0)
    at = tl.where(live, at, 0)
    entry = row.to(tl.int64) * TABLE_WIDTH + at // BLOCK_SIZE
    block = tl.load(block_table + entry, mask=live, other=0)
    return live, token, at, tl.where(live, block * BLOCK_SIZE + at % BLOCK_SIZE, -1)


@triton.jit(do_not_specialize=["num_seqs"])
def prepare_decode(
    rows, enabled, active, last_token, position, block_table, number,
    ids, positions, slots, seq_lens, last_index,
    num_seqs,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, CYCLE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token for each sequence, from the state of its row. Grid: (S / BLOCK)."""
    enter(PDL)
    _next_number(number, CYCLE)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = s < num_seqs
    row = tl.load(rows + s, mask=inside, other=-1)
    live, token, at, slot = _decode_row(
        row, enabled, active, last_token, position, block_table, TABLE_WIDTH, BLOCK_SIZE
    )
    tl.store(ids + s, token, mask=inside)
    tl.store(positions + s, at, mask=inside)
    tl.store(slots + s, slot, mask=inside)
    tl.store(seq_lens + s, tl.where(live, at + 1, 0), mask=inside)
    tl.store(last_index + s, s, mask=inside)


@triton.jit
def _token_live(t, inside, tokens, token_rows, enabled, active):
    """(live, token id or -1, device row) of tokens; one that comes from the state needs its row awake."""
    token = tl.load(tokens + t, mask=inside, other=0)
    row = tl.load(token_rows + t, mask=inside, other=-1)
    live = row >= 0
    from_state = live & (token < 0)
    awake = tl.load(enabled + row, mask=from_state, other=0) != 0
    awake &= tl.load(active + row, mask=from_state, other=0) != 0
    return live & ((token >= 0) | awake), token, row


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def prepare_mixed(
    rows, query_start, step_seq_lens, tokens, token_positions, token_rows,
    enabled, active, last_token, block_table, number,
    ids, positions, slots, seq_lens, last_index,
    num_tokens, num_seqs,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, CYCLE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Tokens and sequences as the host laid them out. Grid: (max(T, S) / BLOCK)."""
    enter(PDL)
    _next_number(number, CYCLE)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < num_tokens
    live, token, row = _token_live(t, inside, tokens, token_rows, enabled, active)
    own = tl.load(last_token + row, mask=live & (token < 0), other=0)
    at = tl.load(token_positions + t, mask=live, other=0)
    entry = row.to(tl.int64) * TABLE_WIDTH + at // BLOCK_SIZE
    block = tl.load(block_table + entry, mask=live, other=0)
    tl.store(ids + t, tl.where(live, tl.where(token < 0, own, token), 0), mask=inside)
    tl.store(positions + t, at, mask=inside)
    tl.store(slots + t, tl.where(live, block * BLOCK_SIZE + at % BLOCK_SIZE, -1), mask=inside)

    s = t  # the same lanes, now as sequences
    inside = s < num_seqs
    real = tl.load(rows + s, mask=inside, other=-1) >= 0
    last = tl.maximum(tl.load(query_start + s + 1, mask=inside, other=0) - 1, 0)
    live, token, row = _token_live(last, real, tokens, token_rows, enabled, active)
    length = tl.load(step_seq_lens + s, mask=live, other=0)
    tl.store(seq_lens + s, length, mask=inside)
    tl.store(last_index + s, tl.where(length > 0, last, 0), mask=inside)


@triton.jit
def embed(ids, table, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[t] = table[ids[t]]. Grid: (T, WIDTH / BLOCK)."""
    enter(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + t).to(tl.int64)
    tl.store(out + t * WIDTH + i, tl.load(table + token * WIDTH + i, mask=i < WIDTH), mask=i < WIDTH)


@triton.jit
def _embed_row(
    t, token, table, gain, out, scaled, squares, num_tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Row t of the stream, times the norm's weight, and its sums of squares over 64 columns."""
    i = tl.arange(0, BLOCK)
    value = tl.load(table + token.to(tl.int64) * WIDTH + i, mask=i < WIDTH, other=0.0)
    to = t.to(tl.int64) * WIDTH + i
    tl.store(out + to, value, mask=i < WIDTH)
    value = value.to(tl.float32)
    tl.store(scaled + to, (value * gain).to(scaled.dtype.element_ty), mask=i < WIDTH)
    part = tl.arange(0, BLOCK // 64)
    sums = tl.sum(tl.reshape(value * value, (BLOCK // 64, 64)), 1)
    tl.store(squares + part * num_tokens + t, sums, mask=part < WIDTH // 64)


@triton.jit(do_not_specialize=["num_seqs"])
def begin_decode(
    rows, enabled, active, last_token, position, block_table, number,
    ids, positions, slots, seq_lens, last_index,
    table, weight, out, scaled, squares,
    num_seqs,
    TABLE_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, CYCLE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`prepare_decode` and `embed_norm` in one. Grid: (S)."""
    enter(PDL)
    _next_number(number, CYCLE)
    s = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    gain = tl.load(weight + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    live, token, at, slot = _decode_row(
        tl.load(rows + s), enabled, active, last_token, position, block_table, TABLE_WIDTH, BLOCK_SIZE
    )
    tl.store(ids + s, token)
    tl.store(positions + s, at)
    tl.store(seq_lens + s, tl.where(live, at + 1, 0))
    tl.store(last_index + s, s)
    _embed_row(s, token, table, gain, out, scaled, squares, num_seqs, WIDTH, BLOCK)
    tl.store(slots + s, slot)


@triton.jit(do_not_specialize=["num_tokens"])
def embed_norm(
    ids, table, weight, out, scaled, squares, num_tokens,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`embed`, and the first norm begun as `NextNorm` has it. Grid: (T). BLOCK >= WIDTH, a multiple of 64."""
    if PDL:
        gdc_launch_dependents()
    t = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    gain = tl.load(weight + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    _embed_row(t, tl.load(ids + t), table, gain, out, scaled, squares, num_tokens, WIDTH, BLOCK)


@triton.jit
def rms_norm(
    x,
    index,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[r] = weight * norm(x[r]), or of x[index[r]] with GATHER. Grid: (rows). BLOCK >= WIDTH."""
    enter(PDL)
    r = tl.program_id(0).to(tl.int64)
    source = tl.load(index + r).to(tl.int64) if GATHER else r
    i = tl.arange(0, BLOCK)
    value = tl.load(x + source * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    scaled = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    # Rounded before the weight, as Hugging Face models do.
    scaled = scaled.to(x.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + r * WIDTH + i, (gain * scaled).to(out.dtype.element_ty), mask=i < WIDTH)


@triton.jit
def add_bias(out, bias, WIDTH: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[t] = bias, or out[t] += bias with ADD. Grid: (T, WIDTH / BLOCK)."""
    enter(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(bias + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(out + t * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + t * WIDTH + i, value.to(out.dtype.element_ty), mask=i < WIDTH)


@triton.jit
def silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[t] = silu(gate_up[t, :WIDTH]) * gate_up[t, WIDTH:]. Grid: (T, WIDTH / BLOCK)."""
    enter(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = gate_up + t * 2 * WIDTH
    gate = tl.load(row + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(row + WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    act = (gate / (1.0 + tl.exp(-gate))).to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(out + t * WIDTH + i, (act * up).to(out.dtype.element_ty), mask=i < WIDTH)


@triton.jit
def _norm_heads(low, high, weight, i, inside, eps, dtype: tl.constexpr, HALF: tl.constexpr):
    """RMS norm of heads given as two halves, each [heads, HALF padded] float32."""
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
    factor = tl.rsqrt(mean + eps)[:, None]
    gain_low = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    gain_high = tl.load(weight + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    low = gain_low * (low * factor).to(dtype).to(tl.float32)
    high = gain_high * (high * factor).to(dtype).to(tl.float32)
    return low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)


@triton.jit
def rope_kv_write(
    qkv, positions, slots, rope, q_norm, k_norm, keys, values, out, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    GROUP_PAD: tl.constexpr, HALF_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm and rotate q in place and k into the cache, v into the cache. Grid: (T, KV_HEADS).

    A token that is not live writes no KV: it zeroes its rows of `out`, which attention leaves
    alone.
    """
    enter(PDL)
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DIM: tl.constexpr = 2 * HALF
    dtype: tl.constexpr = qkv.dtype.element_ty
    g = tl.arange(0, GROUP_PAD)[:, None]
    i = tl.arange(0, HALF_PAD)
    inside = i < HALF
    many = (g < GROUP) & inside[None, :]
    head = (h * GROUP + g) * DIM + i[None, :]
    slot = tl.load(slots + t).to(tl.int64)
    if slot < 0:
        zero = tl.zeros((GROUP_PAD, HALF_PAD), out.dtype.element_ty)
        tl.store(out + t * (HEADS * DIM) + head, zero, mask=many)
        tl.store(out + t * (HEADS * DIM) + HALF + head, zero, mask=many)
    else:
        row = qkv + t * ((HEADS + 2 * KV_HEADS) * DIM)
        angles = rope + tl.load(positions + t).to(tl.int64) * DIM
        cos = tl.load(angles + i, mask=inside, other=0.0)[None, :]
        sin = tl.load(angles + HALF + i, mask=inside, other=0.0)[None, :]

        low = tl.load(row + head, mask=many, other=0.0).to(tl.float32)
        high = tl.load(row + HALF + head, mask=many, other=0.0).to(tl.float32)
        if NORM:
            low, high = _norm_heads(low, high, q_norm, i, inside, eps, dtype, HALF)
        tl.store(row + head, (low * cos - high * sin).to(dtype), mask=many)
        tl.store(row + HALF + head, (high * cos + low * sin).to(dtype), mask=many)

        one = inside[None, :]
        key = row + (HEADS + h) * DIM + i[None, :]
        low = tl.load(key, mask=one, other=0.0).to(tl.float32)
        high = tl.load(key + HALF, mask=one, other=0.0).to(tl.float32)
        if NORM:
            low, high = _norm_heads(low, high, k_norm, i, inside, eps, dtype, HALF)
        place = slot * (KV_HEADS * DIM) + h * DIM + i[None, :]
        kind = keys.dtype.element_ty
        tl.store(keys + place, (low * cos - high * sin).to(dtype).to(kind), mask=one)
        tl.store(keys + place + HALF, (high * cos + low * sin).to(dtype).to(kind), mask=one)

        value = key + KV_HEADS * DIM
        tl.store(values + place, tl.load(value, mask=one).to(kind), mask=one)
        tl.store(values + place + HALF, tl.load(value + HALF, mask=one).to(kind), mask=one)


@triton.jit
def _pick(values, places, tokens, s, inside, real, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr):
    """The first token among the largest of PARTS, 0 for padding; also to `tokens`."""
    part = tl.arange(0, PARTS_PADDED)[None, :]
    known = inside[:, None] & (part < PARTS)
    value = tl.load(values + s[:, None] * PARTS + part, mask=known, other=float("-inf"))
    place = tl.load(places + s[:, None] * PARTS + part, mask=known, other=0x7FFFFFFF)
    value = tl.where(value == value, value, float("-inf"))  # NaN is less than any number
    largest = known & (value == tl.max(value, 1)[:, None])
    best = tl.where(real, tl.min(tl.where(largest, place, 0x7FFFFFFF), 1), 0)
    tl.store(tokens + s, best, mask=inside)
    return best


@triton.jit(do_not_specialize=["num_seqs"])
def advance(
    rows, seq_lens, samples, tokens, peak_values, peak_tokens,
    emitted, last_token, position, active, output_counts, number, posted,
    stop_ids, num_stop_ids, min_position, last_position, flags,
    num_seqs,
    DECODE: tl.constexpr, VOCAB: tl.constexpr, STOP_IDS: tl.constexpr, COUNT_FLAG: tl.constexpr,
    PLACES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Make sampled tokens, or the best of PARTS peaks, the next inputs, and post them; see `OpSet.advance`. Grid: (S / BLOCK)."""
    if PDL:
        gdc_launch_dependents()
    # What the host wrote for these rows, no step does: it is there before the token is.
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = s < num_seqs
    row = tl.load(rows + s, mask=inside, other=-1)
    real = row >= 0
    row = tl.where(real, row, 0)
    j = tl.arange(0, STOP_IDS)[None, :]
    counted = real[:, None] & (j < tl.load(num_stop_ids + row, mask=real, other=0)[:, None])
    stop = tl.load(stop_ids + row[:, None] * STOP_IDS + j, mask=counted, other=0)
    first = tl.load(min_position + row, mask=real, other=0)
    last = tl.load(last_position + row, mask=real, other=0)
    counts = (tl.load(flags + row, mask=real, other=0) & COUNT_FLAG) != 0
    if PDL:
        gdc_wait()
    at = tl.load(seq_lens + s, mask=inside, other=0)  # the new token stands right after the context
    live = at > 0
    if not DECODE:
        live &= tl.load(samples + s, mask=inside, other=0) != 0
    if PARTS:
        token = tl.where(
            live, _pick(peak_values, peak_tokens, tokens, s, inside, real, PARTS, PARTS_PADDED), -1
        )
    else:
        token = tl.load(tokens + s, mask=live, other=-1)
    tl.store(emitted + s, token, mask=inside)
    n = tl.load(number)
    place = posted + tl.where(n > 0, 1 + (n - 1) % (PLACES - 1), 0) * WIDTH
    tl.store(place + 1 + s, token, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(place, n)
    tl.store(last_token + row, token, mask=live)
    tl.store(position + row, at, mask=live)

    hit = (tl.max((counted & (stop == token[:, None])).to(tl.int32), 1) != 0) & (at >= first)
    goes_on = (hit == 0) & (at < last)
    tl.store(active + row, goes_on.to(tl.int32), mask=live)

    counts &= live
    count = output_counts + row.to(tl.int64) * VOCAB + token
    often = tl.load(count, mask=counts, other=0).to(tl.int32) + 1
    tl.store(count, tl.minimum(often, 32767).to(tl.int16), mask=counts)


@triton.jit(do_not_specialize=["num_rows"])
def matmul_float32(
    x, weight, out, num_rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = x @ weight.T in float32, where torch has no such product. Grid: (rows, columns) / BLOCK."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        at = start + k
        a = tl.load(x + m * WIDTH + at[None, :], mask=(m < num_rows) & (at < WIDTH)[None, :], other=0.0)
        b = tl.load(weight + n * WIDTH + at[:, None], mask=(n < COLUMNS) & (at < WIDTH)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + m * COLUMNS + n, total, mask=(m < num_rows) & (n < COLUMNS))
