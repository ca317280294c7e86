"""The sampling kernels on a real GPU: at real vocabularies, inside a captured graph, and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton")

from ostinato.inputs import FLAG_LOGPROBS
from ostinato.ops.cuda.sample import ClusterSampler
from ostinato.ops.triton import sampling as kernels
from ostinato.sampling import philox_uniform, prompt_logprobs
from ostinato.types import SamplerVariant

from ..unit.test_sampling import (
    assert_is_draw,
    extreme_case,
    full_case,
    make_inputs,
    make_state,
    reference_probabilities,
    row_params,
    run,
)
from ..unit.test_triton_sampling import FILTERS, shapes_of_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GREEDY, SAMPLE, FULL = SamplerVariant.GREEDY, SamplerVariant.SAMPLE, SamplerVariant.FULL
VOCABS = [49152, 128256]
MORE_VOCABS = [*VOCABS, 1001, 50257, 151936, 262208]
HOPPER = pytest.param(
    True,
    marks=pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="dependent launch needs compute capability 9.0",
    ),
)


class OnDevice:
    """One call's tensors on the GPU. `call` is what a graph captures; `reset` puts the logits back."""

    sampler: ClassVar[ClusterSampler | None] = None
    largest: torch.Tensor | None = None

    def __init__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        inputs: SimpleNamespace,
        state: SimpleNamespace,
        variant: SamplerVariant,
        pdl: bool = False,
    ) -> None:
        self.pdl = pdl
        self.original = logits.cuda()
        self.logits = self.original.clone()
        self.rows = rows.cuda().to(torch.int32)
        self.positions = positions.cuda().to(torch.int32)
        self.inputs = SimpleNamespace(**{k: v.cuda() for k, v in vars(inputs).items()})
        self.state = SimpleNamespace(**{k: v.cuda() for k, v in vars(state).items()})
        self.variant = variant
        num, vocab = logits.shape
        self.out = torch.full((num,), -9, dtype=torch.int32, device="cuda")
        words = kernels.scratch_words(num, vocab, variant)
        self.scratch = torch.full((words,), -1431655766, dtype=torch.int32, device="cuda")

    def reset(self) -> None:
        self.logits.copy_(self.original)

    def call(self) -> None:
        kernels.sample(
            self.logits,
            self.rows,
            self.positions,
            self.inputs,  # type: ignore[arg-type]
            self.state,  # type: ignore[arg-type]
            variant=self.variant,
            out=self.out,
            scratch=self.scratch,
            pdl=self.pdl,
            draw=self.sampler,
            largest=self.largest,
        )

    def tokens(self) -> list[int]:
        self.reset()
        self.call()
        return self.out.tolist()


@pytest.fixture(params=["kernels", "one launch"], autouse=True)
def drawn_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test with the Triton kernels, and with the cluster of blocks that does the same."""
    if request.param == "kernels":
        yield
        return
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    sampler = ClusterSampler(torch.device("cuda", torch.cuda.current_device()))
    monkeypatch.setattr(OnDevice, "sampler", sampler)
    yield
    assert all(sampler._kernels.values()), "it was not built"


def sample_case(
    n: int, vocab: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SimpleNamespace, SimpleNamespace]:
    """Mixed filters, ties, holes; the last row is padding full of NaN."""
    g = torch.Generator().manual_seed(vocab + n)
    i = torch.arange(n)
    inputs = make_inputs(
        n,
        vocab,
        temperature=torch.where(i % 8 == 7, 0.0, 0.5 + 0.1 * (i % 10)),
        top_p=torch.where(i % 2 == 1, 0.95 - 0.05 * (i % 6), 1.0),
        top_k=torch.where(i % 3 == 2, 20 + 700 * i, 0),
        min_p=torch.where(i % 5 == 4, 0.01, 0.0),
    )
    inputs.seed[:] = torch.randint(-(2**31), 2**31, (n, 2), generator=g)
    logits = torch.randn(n, vocab, generator=g) * scale
    logits[:, ::11] = logits[:, :1].clone()
    logits[1::4, ::2] = -torch.inf
    rows = torch.randperm(n, generator=g).to(torch.int32)
    rows[-1] = -1
    logits[-1] = torch.nan
    return logits, rows, i.to(torch.int32) * 77, inputs, make_state(n, vocab)


def assert_same_draws(
    tokens: list[int],
    expected: list[int],
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    inputs: SimpleNamespace,
) -> None:
    """exp differs in its last bit: the rare other token has to be one that rounding explains."""
    different = [s for s in range(len(tokens)) if tokens[s] != expected[s]]
    assert len(different) <= 1
    uniforms = philox_uniform(inputs.seed[rows.long()], positions).tolist()
    for s in different:
        p = reference_probabilities(logits[s], **row_params(inputs, int(rows[s])))
        assert_is_draw(tokens[s], p, uniforms[s])


@pytest.mark.parametrize("vocab", [*VOCABS, 151936, 262208, 50257])
def test_greedy(vocab: int) -> None:
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-1000, 1000, (9, vocab), generator=g).float()
    logits[1, :100] = torch.nan
    logits[2] = -torch.inf
    logits[3] = torch.nan
    rows = torch.tensor([0] * 8 + [-1], dtype=torch.int32)
    inputs, state = make_inputs(1, vocab), make_state(9, vocab)
    device = OnDevice(logits, rows, torch.arange(9), inputs, state, GREEDY)
    assert device.tokens() == run(logits, inputs, rows=rows, variant=GREEDY)


@pytest.mark.parametrize("vocab", MORE_VOCABS)
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_sample_equals_the_cpu(vocab: int, scale: float) -> None:
    n = 33
    logits, rows, positions, inputs, state = sample_case(n, vocab, scale)
    expected = run(logits, inputs, rows=rows, positions=positions)
    tokens = OnDevice(logits, rows, positions, inputs, state, SAMPLE).tokens()
    assert_same_draws(tokens, expected, logits, rows, positions, inputs)


@pytest.mark.parametrize("vocab", VOCABS)
def test_full_equals_the_cpu(vocab: int) -> None:
    n = 12
    logits, rows, positions, inputs, state = full_case(n, vocab, vocab, scale=4.0)
    rows[3] = -1
    logits[3] = torch.nan
    device = OnDevice(logits, rows, positions, inputs, state, FULL)
    tokens = device.tokens()
    expected = run(logits, inputs, rows=rows, positions=positions, state=state, variant=FULL)
    assert sum(a != b for a, b in zip(tokens, expected, strict=True)) <= 1
    same = torch.tensor([a == b for a, b in zip(tokens, expected, strict=True)])
    assert torch.equal(device.state.logprob_ids.cpu()[same], state.logprob_ids[same])
    assert torch.equal(device.state.logprob_rank.cpu()[same], state.logprob_rank[same])
    torch.testing.assert_close(
        device.state.logprob_values.cpu()[same], state.logprob_values[same], rtol=1e-5, atol=1e-4
    )
    assert torch.equal(device.state.output_counts.cpu(), state.output_counts)


@pytest.mark.parametrize("vocab", [*VOCABS, 1001])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers overflow
def test_extremes(vocab: int) -> None:
    """Fresh mixtures of the ends of every range and of broken logits."""
    seed, n = torch.seed() % 2**31, 33
    print("seed", seed)
    logits, rows, positions, inputs, state = extreme_case(n, vocab, seed)
    for variant in (SAMPLE, FULL):
        device = OnDevice(logits, rows, positions, inputs, state, variant)
        tokens = device.tokens()
        expected = run(logits, inputs, rows=rows, positions=positions, state=state, variant=variant)
        same = torch.tensor([a == b for a, b in zip(tokens, expected, strict=True)])
        assert (~same).sum() <= 1, (variant, (~same).nonzero())
    assert torch.equal(device.state.logprob_ids.cpu()[same], state.logprob_ids[same])
    assert torch.equal(device.state.logprob_rank.cpu()[same], state.logprob_rank[same])
    values = (s.logprob_values.cpu()[same] for s in (device.state, state))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", FILTERS)
def test_every_kind_of_row(name: str) -> None:
    """Fresh random rows at a real vocabulary; fifty runs, fewer rows and more give one and the same tokens."""
    vocab = 128256
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("initial seed", g.initial_seed())
    logits = torch.stack(list(shapes_of_rows(vocab, g).values()))
    n = len(logits)
    inputs = make_inputs(n, vocab, **FILTERS[name])
    inputs.seed[:] = torch.randint(-(2**31), 2**31, (n, 2), generator=g)
    rows = torch.randperm(n, generator=g).to(torch.int32)
    expected = run(logits, inputs, rows=rows)
    device = OnDevice(logits, rows, torch.arange(n), inputs, make_state(n, vocab), SAMPLE)
    tokens = device.tokens()
    assert_same_draws(tokens, expected, logits, rows, torch.arange(n), inputs)
    assert all(device.tokens() == tokens for _ in range(50))
    for several in (torch.arange(8), torch.arange(3 * n) % n):  # rows are shared out in other ways
        others = OnDevice(logits[several], rows[several], several, inputs, make_state(len(several), vocab), SAMPLE)  # fmt: skip
        assert [others.tokens() for _ in range(3)] == [[tokens[s] for s in several.tolist()]] * 3


def test_a_list_that_is_too_short() -> None:
    vocab, n = 128256, 4
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(2))
    inputs = make_inputs(
        n, vocab, temperature=[1e6, 1e5, 1e6, 3e4], top_p=[0.5, 0.95, 1, 1], top_k=[0, 9999, 5, 0]
    )
    inputs.seed[:, 0] = torch.arange(n)
    rows = torch.arange(n, dtype=torch.int32)
    device = OnDevice(logits, rows, torch.arange(n), inputs, make_state(n, vocab), SAMPLE)
    assert_same_draws(device.tokens(), run(logits, inputs, rows=rows), logits, rows, torch.arange(n), inputs)


@pytest.mark.parametrize("vocab", [49152, 128256, 151936, 1001])
def test_the_largest_logits_of_parts_change_nothing(vocab: int) -> None:
    """Of a row alone: what the one-kernel step knows of it. Parts as its blocks cut it, some of them empty."""
    logits, rows, positions, inputs, state = sample_case(33, vocab, 2.0)
    logits[3, 5:] = -torch.inf
    logits[4, 7] = torch.inf
    logits[6] = -torch.inf
    logits[7, ::3] = torch.nan
    logits[9] = -0.0
    logits[9, ::2] = 0.0
    for s in range(32):
        one = slice(s, s + 1)
        alone = OnDevice(logits[one], rows[one], positions[one], inputs, state, SAMPLE)
        tokens = alone.tokens()
        numbers = logits[s].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        blocks = [
            numbers[i * 16 :].unfold(0, 16, 132 * 16).flatten() for i in range(132) if i * 16 + 16 <= vocab
        ]
        blocks.append(numbers[vocab // (132 * 16) * (132 * 16) :])
        best = [block.max() if len(block) else torch.tensor(-torch.inf) for block in blocks]
        alone.largest = torch.stack([*best, torch.tensor(-torch.inf)])[None].cuda()
        assert float(alone.largest.max()) == float(numbers.max())
        assert [alone.tokens()[0] for _ in range(3)] == tokens * 3, s


@pytest.mark.parametrize("parts", [1, 132, 264, 513])
def test_the_largest_logits_of_many_rows_change_nothing(parts: int) -> None:
    """What the head's product knows: one part or more, also more than a block has threads."""
    logits, rows, positions, inputs, state = sample_case(33, 12800, 2.0)
    logits[6] = -torch.inf
    logits[7, ::3] = torch.nan
    device = OnDevice(logits, rows, positions, inputs, state, SAMPLE)
    tokens = device.tokens()
    plain = logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    device.largest = torch.stack([plain[:, part::parts].amax(1) for part in range(parts)], 1).cuda()
    assert [device.tokens() for _ in range(3)] == [tokens] * 3


def test_prompt_logprobs_equal_the_cpu() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 49152, generator=g) * 3
    logits[:20] = logits[:20].round()
    targets = torch.randint(0, 49152, (40,), generator=g).to(torch.int32)
    values, ids, rank = prompt_logprobs(logits, targets)
    on_gpu = prompt_logprobs(logits.cuda(), targets.cuda())
    torch.testing.assert_close(on_gpu[0].cpu(), values, rtol=1e-5, atol=1e-4)
    assert torch.equal(on_gpu[1].cpu(), ids)
    assert torch.equal(on_gpu[2].cpu(), rank)


def test_a_token_does_not_depend_on_the_batch() -> None:
    logits, rows, positions, inputs, state = sample_case(33, 49152, 2.0)
    together = OnDevice(logits, rows, positions, inputs, state, SAMPLE).tokens()
    for s in (0, 5, 17, 31):
        one = slice(s, s + 1)
        alone = OnDevice(logits[one], rows[one], positions[one], inputs, state, SAMPLE)
        assert alone.tokens() == [together[s]]


def capture(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`call` as a graph; it must not have asked the allocator for anything."""
    call()  # loads every kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after == before, "capture allocated"
    return graph


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("variant", list(SamplerVariant))
@pytest.mark.parametrize("pdl", [False, HOPPER])
def test_captured(vocab: int, variant: SamplerVariant, pdl: bool) -> None:
    """A replay reads what the buffers hold by then: other logits, positions, parameters, padding."""
    logits, rows, positions, inputs, state = full_case(6, vocab, 1, scale=4.0)
    rows[2] = -1
    captured = OnDevice(logits, rows, positions, inputs, state, variant, pdl)
    graph = capture(captured.call)
    other = full_case(6, vocab, 2, scale=4.0)
    other[1][4] = -1
    other[0][4] = torch.nan
    eager = OnDevice(*other, variant)
    captured.logits.copy_(eager.original)
    captured.rows.copy_(eager.rows)
    captured.positions.copy_(eager.positions)
    for mine, theirs in ((captured.inputs, eager.inputs), (captured.state, eager.state)):
        for name, value in vars(theirs).items():
            getattr(mine, name).copy_(value)
    graph.replay()
    assert captured.out.tolist() == eager.tokens()
    for name, value in vars(eager.state).items():
        assert torch.equal(getattr(captured.state, name), value), name
    captured.scratch.fill_(1234567)  # means nothing between steps
    captured.reset()
    captured.logits.copy_(eager.original)
    graph.replay()
    assert captured.out.tolist() == eager.out.tolist()


@pytest.mark.parametrize("variant", list(SamplerVariant))
@pytest.mark.parametrize("num", [1, 32])
def test_time(variant: SamplerVariant, num: int, record_property: Callable[[str, object], None]) -> None:
    """Microseconds a replay at 128256 tokens, every filter on; printed, with a loose bound for one row."""
    vocab = 128256
    logits = torch.randn(num, vocab, generator=torch.Generator().manual_seed(0)) * 2
    inputs = make_inputs(num, vocab, temperature=0.8, top_p=0.95, top_k=1000, flags=FLAG_LOGPROBS)
    device = OnDevice(logits, torch.arange(num), torch.arange(num), inputs, make_state(num, vocab), variant)
    graph = capture(device.call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        graph.replay()
    start.record()
    for _ in range(50):
        graph.replay()
    end.record()
    end.synchronize()
    microseconds = start.elapsed_time(end) * 1000 / 50
    record_property("microseconds", microseconds)
    print(f"{variant.name} num_seqs={num} vocab={vocab}: {microseconds:.1f} us")
    if num == 1:
        assert microseconds < {GREEDY: 40, SAMPLE: 80, FULL: 300}[variant]
