"""What goes wrong with captured graphs elsewhere, pinned: each must be caught here.

Most break the contract on purpose and expect the strict runner to say which line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ostinato import LLM, SamplingParams
from ostinato.errors import StrictError
from ostinato.graphs.strict import StrictRunner
from ostinato.inputs import Batch
from ostinato.kv_cache import GUARD_BLOCK

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def make(tiny: Callable[[str], tuple[Path, Any]], **options: Any) -> LLM:
    """A tiny Llama of eight rows, checked at every step."""
    defaults: dict[str, Any] = {"skip_tokenizer_init": True, "strict": True}
    defaults |= {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(str(tiny("llama3")[0]), **defaults | options)


@pytest.fixture
def llm(tiny: Callable[[str], tuple[Path, Any]]) -> Iterator[LLM]:
    made = make(tiny)
    yield made
    made.close()


def run(llm: LLM, count: int = 3) -> list[list[int]]:
    prompts = [[5 + i, 6, 7] for i in range(count)]
    return [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]


def before_each_step(llm: LLM, monkeypatch: pytest.MonkeyPatch, change: Callable[[Batch], Batch]) -> None:
    runner = llm.engine.runner
    original = runner.run
    monkeypatch.setattr(runner, "run", lambda batch: original(change(batch)))


def around_advance(llm: LLM, monkeypatch: pytest.MonkeyPatch, extra: Callable[[Batch], None]) -> None:
    """Let the step do something more at its end."""
    ops = llm.engine.runner.eager.program.ops
    original = ops.advance

    def advance(batch: Batch, *step: Any) -> None:
        original(batch, *step)
        extra(batch)

    monkeypatch.setattr(ops, "advance", advance)


def test_the_strict_runner_is_on(llm: LLM) -> None:
    assert isinstance(llm.engine.runner, StrictRunner)
    assert len(run(llm)) == 3


def test_poisoned_padding_changes_no_token(llm: LLM, tiny: Callable[[str], tuple[Path, Any]]) -> None:
    """5 rows padded to 8, with NaN all around, against no padding at all."""
    plain = make(tiny, strict=False)
    assert llm.engine.plan.pad_seqs(5) == 8
    assert plain.engine.plan.pad_seqs(5) == 5
    assert run(llm, 5) == run(plain, 5)


def test_a_buffer_that_moved(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llm)
    grown = torch.zeros_like(llm.engine.buffers.state.emitted)
    original = llm.engine.buffers.state.emitted

    def moved(batch: Batch) -> Batch:
        original.data = grown  # the same object, other memory: what growing a buffer in place does
        return batch

    before_each_step(llm, monkeypatch, moved)
    with pytest.raises(StrictError, match="'emitted' moved"):
        run(llm)


def test_a_batch_outside_the_buffers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before_each_step(llm, monkeypatch, lambda batch: replace(batch, rows=batch.rows.clone()))
    with pytest.raises(StrictError, match=r"batch\.rows lies in no registered buffer"):
        run(llm)


def test_a_view_at_another_place_of_the_buffer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llm)
    static = llm.engine.buffers.static

    def shifted(batch: Batch) -> Batch:
        return replace(batch, samples=static.samples[1 : 1 + batch.num_seqs]) if batch.decode else batch

    before_each_step(llm, monkeypatch, shifted)
    with pytest.raises(StrictError, match=r"batch\.samples is .* the key's first step had"):
        run(llm)


def test_a_value_that_changed_without_being_in_the_key(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llm)
    before_each_step(llm, monkeypatch, lambda batch: replace(batch, block_size=8))
    with pytest.raises(StrictError, match="block_size.*without being part of the key"):
        run(llm)


def test_a_padded_row_that_writes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = llm.engine.runner.eager.program.cache
    around_advance(llm, monkeypatch, lambda batch: cache.data[0, 0, GUARD_BLOCK, 0].fill_(0.0))
    with pytest.raises(StrictError, match="guard block"):
        run(llm)


def test_a_step_that_advances_a_row_it_should_not(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    state = llm.engine.buffers.state
    around_advance(llm, monkeypatch, lambda batch: state.position.add_(1))
    with pytest.raises(StrictError, match="rows that did not run"):
        run(llm)


def test_a_step_that_forgets_to_emit(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous step's output is clobbered, so a stale result cannot pass for a fresh one."""
    monkeypatch.setattr(llm.engine.runner.eager.program.ops, "advance", lambda *step: None)
    with pytest.raises(StrictError, match="out of range"):
        run(llm)


def test_scratch_means_nothing_between_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that reads what an earlier step left behind gets NaN instead."""
    run(llm, 1)
    program = llm.engine.runner.program
    monkeypatch.setattr(program.ops, "embed", lambda ids, table, out, then: None)
    run(llm, 1)
    assert torch.isnan(program.arena.view(1, 1).logits).all(), (
        "the step ran on the residuals of an earlier one"
    )


def test_a_kept_output_is_not_overwritten_by_the_next_step(llm: LLM) -> None:
    """Results are copied out of the static buffers: a caller may keep them."""
    first = llm.generate(
        [[5, 6, 7]],
        SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2),
        use_tqdm=False,
    )
    kept = (list(first[0].outputs[0].token_ids), [dict(p) for p in first[0].outputs[0].logprobs or []])
    run(llm)
    assert (first[0].outputs[0].token_ids, first[0].outputs[0].logprobs) == kept


def test_results_in_flight_have_slots_of_their_own(tiny: Callable[[str], tuple[Path, Any]]) -> None:
    """Three steps in flight: the ring must be deeper, or a result is overwritten before it is read."""
    llm = make(tiny, pipeline_depth=3)
    slow = run(llm, 5)
    llm2 = make(tiny, pipeline_depth=1)
    assert slow == run(llm2, 5)
    ring = llm.engine.runner.eager.ring
    assert len(ring._slots) == 4


def test_a_pipeline_deeper_than_the_ring(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that was overwritten before it was read does not pass for the step's own."""
    engine = llm.engine
    object.__setattr__(engine.config, "pipeline_depth", 4)  # the ring was made for one
    with pytest.raises(StrictError, match="the pipeline is deeper than the ring"):
        run(llm)


@pytest.mark.parametrize("name", ["tokens", "token_positions", "seq_lens"])
def test_padding_of_a_prompt_step_that_is_used(llm: LLM, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It holds numbers far out of range, so whoever takes one for an index fails at once."""

    def use(batch: Batch) -> None:
        if not batch.decode:
            batch.static.block_table[0][getattr(batch, name)[-1].long()]

    around_advance(llm, monkeypatch, use)
    with pytest.raises(IndexError, match=str(2**30)):
        run(llm)


def test_padded_sequences_of_a_prompt_step_ask_for_samples(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that samples for whoever asks, row or no row, writes to rows that did not run."""
    seen: list[int] = []

    def look(batch: Batch) -> None:
        if not batch.decode:
            seen.extend(batch.samples[batch.rows < 0].tolist())

    around_advance(llm, monkeypatch, look)
    run(llm)
    assert seen
    assert set(seen) == {1}


@pytest.mark.parametrize("read", [torch.Tensor.item, int, bool, float], ids=["item", "int", "bool", "float"])
def test_a_host_synchronisation_inside_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, read: Callable[[torch.Tensor], object]
) -> None:
    """On a GPU the driver gives the capture up instead: see test_a_failed_capture_leaves_the_engine_serving."""
    around_advance(llm, monkeypatch, lambda batch: read(batch.state.position[0]))
    with pytest.raises(StrictError, match="read a value on the host"):
        run(llm)


def test_a_tensor_swapped_for_another_of_the_same_shape(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two registered buffers too: the same shape, alive, and not what the graph would read."""
    run(llm)
    static = llm.engine.buffers.static
    before_each_step(
        llm,
        monkeypatch,
        lambda batch: replace(batch, tokens=static.token_positions[: batch.num_tokens]),
    )
    with pytest.raises(StrictError, match=r"batch\.tokens is .* the key's first step had"):
        run(llm)


def test_weights_that_moved(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As reloading a model in place would do."""
    run(llm)
    name, weight = next(iter(llm.engine.program.model.tensors().items()))

    def moved(batch: Batch) -> Batch:
        weight.data = weight.clone()
        return batch

    before_each_step(llm, monkeypatch, moved)
    with pytest.raises(StrictError, match=f"buffer '{name}' moved"):
        run(llm)


def test_an_idle_rows_garbage_has_no_effect(llm: LLM) -> None:
    """Rows that requests left hold NaN parameters and guard blocks; later requests see none of it."""
    alone = run(llm, 1)
    run(llm, 7)
    assert run(llm, 1) == alone
    assert torch.isnan(llm.engine.buffers.static.temperature).any()
