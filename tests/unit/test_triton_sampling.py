"""The sampling kernels against the CPU implementation: in Triton's interpreter here, on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
pytest.importorskip("triton")

from ostinato import sampling
from ostinato.inputs import FLAG_LOGPROBS
from ostinato.ops.triton import sampling as kernels
from ostinato.types import SamplerVariant

if __name__ == "__main__":  # see test_launches_compile_for_a_gpu
    sys.path.insert(0, str(Path(__file__).parent))
    from compiled import Compiled, compile_launches
    from test_sampling import extreme_case, full_case, make_inputs, make_state, run
else:
    from .compiled import Compiled, compile_launches
    from .test_sampling import extreme_case, full_case, make_inputs, make_state, run

GREEDY, SAMPLE, FULL = SamplerVariant.GREEDY, SamplerVariant.SAMPLE, SamplerVariant.FULL
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_kernels(
    logits: torch.Tensor,
    inputs: SimpleNamespace,
    *,
    rows: Any = None,
    positions: Any = None,
    state: SimpleNamespace | None = None,
    variant: SamplerVariant = SAMPLE,
) -> list[int]:
    """`run` of test_sampling, through the kernels; scratch starts as garbage."""
    num, vocab = logits.shape
    rows = torch.zeros(num) if rows is None else torch.as_tensor(rows)
    positions = torch.arange(num) if positions is None else torch.as_tensor(positions)
    state = state or make_state(max(num, len(inputs.seed)), vocab)
    on_device = SimpleNamespace(**{k: v.to(DEVICE) for k, v in vars(state).items()})
    out = torch.full((num,), -9, dtype=torch.int32, device=DEVICE)
    words = kernels.scratch_words(num, vocab, variant)
    scratch = torch.full((words + 8,), -1431655766, dtype=torch.int32, device=DEVICE)
    kernels.sample(
        logits.clone().to(DEVICE),
        rows.to(DEVICE, torch.int32),
        positions.to(DEVICE, torch.int32),
        SimpleNamespace(**{k: v.to(DEVICE) for k, v in vars(inputs).items()}),  # type: ignore[arg-type]
        on_device,  # type: ignore[arg-type]
        variant=variant,
        out=out,
        scratch=scratch[:words],
    )
    assert (scratch[words:] == -1431655766).all(), "wrote beyond scratch_words"
    for name, value in vars(on_device).items():
        getattr(state, name).copy_(value)
    return out.tolist()


def assert_same(
    logits: torch.Tensor, inputs: SimpleNamespace, state: SimpleNamespace | None = None, **how: Any
) -> list[int]:
    """Tokens and everything written to the state are those of the CPU."""
    num, vocab = logits.shape
    ours = state or make_state(max(num, len(inputs.seed)), vocab)
    theirs = SimpleNamespace(**{k: v.clone() for k, v in vars(ours).items()})
    expected = run(logits, inputs, state=theirs, **how)
    assert run_kernels(logits, inputs, state=ours, **how) == expected
    assert torch.equal(ours.logprob_ids, theirs.logprob_ids)
    assert torch.equal(ours.logprob_rank, theirs.logprob_rank)
    torch.testing.assert_close(
        ours.logprob_values, theirs.logprob_values, rtol=1e-5, atol=1e-5, equal_nan=True
    )
    assert torch.equal(ours.output_counts, theirs.output_counts)
    assert torch.equal(ours.prompt_mask, theirs.prompt_mask)
    return expected


@pytest.mark.parametrize("vocab", [1, 33, 1000, 1024, 2501])
def test_greedy(vocab: int) -> None:
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-9, 10, (5, vocab), generator=g).float()
    logits[1, : vocab // 2] = float("nan")
    logits[2] = -torch.inf
    logits[3] = float("nan")
    assert_same(logits, make_inputs(1, vocab), rows=[0, 0, 0, 0, -1], variant=GREEDY)


@pytest.mark.parametrize(("vocab", "scale"), [(1, 1.0), (33, 0.0), (33, 3.0), (2501, 0.1), (1025, 3.0)])
def test_sample(vocab: int, scale: float) -> None:
    cases = [
        {"temperature": 0.8},
        {"temperature": 0.0, "top_p": 0.5},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 1.0, "top_k": max(vocab // 2, 1), "top_p": 0.95},
        {"temperature": 2.0, "top_k": max(vocab // 3, 1), "top_p": 0.5, "min_p": 0.02},
        {"temperature": 1e-30, "top_k": vocab + 1, "min_p": 0.3},
    ]
    n = len(cases)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    inputs = make_inputs(n, vocab, **{k: [(defaults | c)[k] for c in cases] for k in defaults})
    g = torch.Generator().manual_seed(vocab)
    inputs.seed[:] = torch.randint(-(2**31), 2**31, (n, 2), generator=g)
    logits = torch.randn(n, vocab, generator=g) * scale
    logits[:, ::7] = logits[:, :1].clone()  # ties
    logits[3, 1::2] = -torch.inf
    assert_same(logits, inputs, rows=range(n), positions=torch.arange(n) * 1000)


def test_one_token_more_or_less_would_show() -> None:
    """Few nearly equal tokens are kept, so that a threshold one off changes most draws."""
    vocab, n = 40, 16
    g = torch.Generator().manual_seed(1)
    i = torch.arange(n)
    inputs = make_inputs(
        n,
        vocab,
        top_k=torch.where(i % 2 == 0, 1 + i // 2, 0),
        top_p=torch.where(i % 2 == 1, 0.01 + 0.025 * (i // 2), 1.0),
        seed=torch.randint(-(2**31), 2**31, (n, 2), generator=g),
    )
    assert_same(torch.randn(n, vocab, generator=g) * 0.01, inputs, rows=range(n))


def test_sample_ties_at_every_threshold() -> None:
    vocab, n = 1500, 4
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, vocab, generator=g) * 2).round()
    logits[:, ::5] *= -0.0
    inputs = make_inputs(n, vocab, top_k=torch.arange(n) * 200, top_p=torch.linspace(0.3, 1, n))
    inputs.min_p[n - 1] = 1.0  # only the largest, at exactly this share
    assert_same(logits, inputs, rows=range(n))


def test_broken_logits() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(6, 1100)
    logits[0, :] = nan
    logits[1, :] = -inf
    logits[2, 1050:1060] = inf
    logits[3, ::2] = nan
    logits[4, :1099] = -inf
    logits[5, :] = nan
    inputs = make_inputs(1, 1100, top_k=30, top_p=0.9, flags=FLAG_LOGPROBS)
    for variant in (GREEDY, FULL):
        state = make_state(6, 1100)
        plain = make_state(6, 1100)
        ours = run_kernels(logits, inputs, rows=[0] * 5 + [-1], state=state, variant=variant)
        assert ours == run(logits, inputs, rows=[0] * 5 + [-1], state=plain, variant=variant)
        torch.testing.assert_close(state.logprob_values, plain.logprob_values, equal_nan=True)
        assert (state.logprob_rank[5] == -77).all()


@pytest.mark.parametrize(("vocab", "n"), [(15, 8), (1000, 12), (1025, 6)])
def test_full(vocab: int, n: int) -> None:
    logits, rows, positions, inputs, state = full_case(n, vocab, vocab)
    assert_same(logits, inputs, state, rows=rows, positions=positions, variant=FULL)


@pytest.mark.parametrize("vocab", [41, 1100])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers overflow, as they do on a GPU
def test_extremes(vocab: int) -> None:
    seed = torch.seed() % 2**31
    print("seed", seed)
    logits, rows, positions, inputs, state = extreme_case(6, vocab, seed)
    assert_same(logits, inputs, state, rows=rows, positions=positions, variant=FULL)
    assert_same(logits, inputs, rows=rows, positions=positions, variant=SAMPLE)


def test_padding_changes_nothing() -> None:
    vocab, n = 1030, 6
    logits, rows, positions, inputs, state = full_case(n, vocab, 3)
    inputs.flags |= FLAG_LOGPROBS
    rows[1::2] = -1
    logits[1::2] = float("nan")
    before = state.logprob_values.clone()
    tokens = assert_same(logits, inputs, state, rows=rows, positions=positions, variant=FULL)
    assert tokens[1::2] == [0, 0, 0]
    assert torch.equal(state.logprob_values[1::2], before[1::2])
    assert (state.logprob_values[::2, 0] != 77).all()
    assert run_kernels(logits, inputs, rows=[-1] * n, variant=SAMPLE) == [0] * n


def test_scratch_too_small_is_refused() -> None:
    logits = torch.zeros(2, 50, device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    words = kernels.scratch_words(2, 50, SAMPLE)
    assert words < kernels.scratch_words(2, 50) == kernels.scratch_words(2, 50, FULL)
    with pytest.raises(ValueError, match=f"scratch must have {words} 32-bit words, got {words - 1}"):
        kernels.sample(
            logits,
            zeros,
            zeros,
            make_inputs(1, 50, DEVICE),  # type: ignore[arg-type]
            make_state(2, 50, DEVICE),  # type: ignore[arg-type]
            variant=SAMPLE,
            out=zeros.clone(),
            scratch=torch.zeros(words - 1, dtype=torch.int32, device=DEVICE),
        )


# --- narrowing ---------------------------------------------------------------------------------


def shapes_of_rows(vocab: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows that stress one part of the narrowing each."""
    x = torch.randn(vocab, generator=g)
    one_hot = torch.zeros(vocab)
    one_hot[vocab // 3] = 12.0
    masked = x.clone()
    masked[torch.rand(vocab, generator=g) < 0.9] = -torch.inf
    two_levels = torch.where(torch.rand(vocab, generator=g) < 0.5, 1.0, 1.0 + 2.0**-20)
    return {
        "flat": x * 0.5,
        "peaked": x * 4,
        "one hot": one_hot,
        "all equal": torch.full((vocab,), -3.25),
        "neighbours": two_levels,
        "ties": (x * 2).round(),
        "bfloat16": (x * 0.5).bfloat16().float(),
        "masked": masked,
        "wide": torch.sign(x) * 10 ** (x.abs() * 3 - 4),
        "steps": torch.arange(vocab).float() * -0.125,
        "far below": torch.where(x > 2, x, x - 1e4),
    }


FILTERS: dict[str, dict[str, float]] = {
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 7},
    "top_k, top_p": {"top_k": 50, "top_p": 0.9},
    "many, top_p": {"top_k": 1000, "top_p": 0.97, "temperature": 0.7},
    "one short of all": {"top_k": 1199, "top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 300, "top_p": 0.7, "min_p": 0.01, "temperature": 1.5},
    "hot": {"top_p": 0.8, "temperature": 50.0},
    "cold": {"top_p": 0.9, "temperature": 0.01},
    "next to nothing": {"top_p": 1e-7, "top_k": 3},
    "next to everything": {"top_p": 1 - 2.0**-24},
    "greedy": {"temperature": 0.0, "top_p": 0.5},
    "none": {"temperature": 0.8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_every_kind_of_row(name: str) -> None:
    """Fresh random rows; beside real ones, padding full of NaN."""
    vocab = 1200
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    kinds = shapes_of_rows(vocab, g)
    logits = torch.stack([*kinds.values(), torch.full((vocab,), torch.nan)])
    n = len(logits)
    inputs = make_inputs(n, vocab, **FILTERS[name])
    inputs.seed[:] = torch.randint(-(2**31), 2**31, (n, 2), generator=g)
    rows = torch.randperm(n, generator=g)
    rows[-1] = -1
    positions = torch.randint(0, 2**31 - 1, (n,), generator=g)
    print("initial seed", g.initial_seed())
    tokens = assert_same(logits, inputs, rows=rows, positions=positions)
    assert tokens[-1] == 0


@lru_cache
def extreme_positions() -> tuple[int, int]:
    """Where seed 0 gives random numbers within about a millionth of 0 and of 1."""
    u = sampling.philox_uniform(torch.zeros(2**20, 2, dtype=torch.int32), torch.arange(2**20))
    return int(u.argmin()), int(u.argmax())


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_the_least_likely_token_kept(name: str) -> None:
    """In rising order the smallest random number draws it, in falling order the largest."""
    vocab = 1200
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("initial seed", g.initial_seed())
    rising = torch.stack([x.sort().values for x in shapes_of_rows(vocab, g).values()])
    n = len(rising)
    low, high = extreme_positions()
    tokens = assert_same(
        torch.cat([rising, rising[:1].flip(1)]),
        make_inputs(1, vocab, **FILTERS[name]),
        rows=[0] * (n + 1),
        positions=[low] * n + [high],
    )
    if name in ("top_k", "next to nothing"):  # few enough for every one to be within reach
        kept = FILTERS[name]["top_k"] if name == "top_k" else 1
        assert tokens[0] == vocab - kept
        assert tokens[n] == kept - 1


def test_a_list_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """More candidates than the list holds: nothing but the time it takes may change."""
    vocab, n = 2500, 6
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("initial seed", g.initial_seed())
    inputs = make_inputs(
        n,
        vocab,
        temperature=[1e6, 1e6, 1e5, 1e5, 3e4, 1e6],
        top_p=[0.5, 1.0, 0.9, 0.3, 0.99, 1.0],
        top_k=[0, 2100, 2400, 1800, 0, 0],
    )
    inputs.seed[:] = torch.randint(-(2**31), 2**31, (n, 2), generator=g)
    assert_same(torch.randn(n, vocab, generator=g), inputs, rows=range(n))


@pytest.mark.parametrize("tiles", [1, 2, 16])
def test_the_cut_does_not_show(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tiles a program goes through, and however long the chunks are."""
    monkeypatch.setattr(kernels, "_tiles", lambda num_seqs, tiles_of_row: tiles)
    monkeypatch.setattr(kernels, "_ENOUGH_PROGRAMS", 2048 if tiles == 1 else 1)
    logits, rows, positions, inputs, state = full_case(4, 5000, 7)
    assert_same(logits, inputs, state, rows=rows, positions=positions)


def test_sizes_of_the_cut() -> None:
    """Scratch for the largest number of sequences holds every smaller one."""
    for vocab in (1, 1000, 32000, 128256, 151936, 262208, sampling.MAX_VOCAB):
        words = [kernels.scratch_words(n, vocab) for n in range(1, 300)]
        assert words == sorted(words)
        for num in (1, 8, 64, 256):
            block, chunks = kernels._cut(num, vocab)
            assert (chunks - 1) * block < vocab <= chunks * block
            assert chunks <= 256
            assert num * chunks * 4 <= 4 * kernels.scratch_words(num, vocab, GREEDY)


# --- the compiler ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_launches_compile_for_a_gpu(tmp_path: Path) -> None:
    """Every launch, with and without dependent launch, compiles to machine code for an H100."""
    from triton.backends.nvidia import compiler

    try:
        compiler.get_ptxas(90)
    except RuntimeError as error:
        pytest.skip(f"no ptxas: {error}")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [
        "_adjust", "_argmax_partials", "_chunk_best", "_count", "_count_above", "_draw", "_edit_few",
        "_keep_raw", "_narrow", "_report", "_weigh",
    ]  # fmt: skip


def compile_all() -> None:
    """Run the sampler on CPU tensors with launches replaced by compilation; print the kernels' names."""
    names = set()

    def look(made: Compiled) -> None:
        names.add(made.name)
        ptx, pdl = made.ptx, made.named["PDL"]
        assert made.metadata.shared <= 48 * 1024
        assert made.metadata.launch_pdl == pdl
        if made.name in ("_count", "_weigh", "_narrow", "_draw"):
            assert "fma." not in ptx, "what is fused must not decide a token's bin"
        assert ("griddepcontrol" in ptx) == pdl
        if pdl:
            touched = min(ptx.index(word) for word in ("ld.global", "st.global") if word in ptx)
            assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait") < touched

    compile_launches(look)
    for num, vocab, pdl in ((1, 128256, True), (64, 128256, True), (3, 50257, False)):
        rows = torch.zeros(num, dtype=torch.int32)
        inputs, state = make_inputs(num, vocab), make_state(num, vocab)
        for variant in SamplerVariant:
            scratch = torch.zeros(kernels.scratch_words(num, vocab, variant), dtype=torch.int32)
            kernels.sample(
                torch.zeros(num, vocab),
                rows,
                rows,
                inputs,  # type: ignore[arg-type]
                state,  # type: ignore[arg-type]
                variant=variant,
                out=rows.clone(),
                scratch=scratch,
                pdl=pdl,
            )
    sys.stdout.write("\n".join(sorted(names)))


if __name__ == "__main__":
    compile_all()
