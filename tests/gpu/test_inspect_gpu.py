"""What captured graphs hold on a GPU: nodes, pointers, baked values, labels."""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from ostinato import LLM, SamplingParams
from ostinato.graphs import inspect
from ostinato.graphs.inspect import AddressBook, Node
from ostinato.graphs.labels import Label, LabelledOps
from ostinato.models.shapes import SHAPES
from ostinato.types import StepKind

pytestmark = pytest.mark.gpu

logger = logging.getLogger(__name__)

SEQS = 4


@triton.jit
def scale(x, n, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[:n] *= factor. `n` is specialised, as Triton does unless told not to."""
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) * factor, mask=i < n)


def captured(body: Callable[[], Any]) -> Any:
    """A graph of what `body` launches on the current stream, kept for inspection."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    gc.disable()
    try:
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            body()
        finally:
            graph.capture_end()
    finally:
        gc.enable()
    return graph


def read(body: Callable[[], Any], warm: bool = True) -> list[Node]:
    """The nodes of a capture of `body`, which runs once before, so that its kernels are loaded."""
    if warm:
        body()
        torch.cuda.synchronize()
    return inspect.nodes(captured(body))


@pytest.fixture
def stream() -> Iterator[torch.cuda.Stream]:
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        yield stream
        torch.cuda.synchronize()


# --- small graphs ----------------------------------------------------------------------------


def test_a_chain_is_read_in_order(stream: Any) -> None:
    x, y = torch.ones(64, device="cuda"), torch.ones(64, device="cuda")

    def body() -> None:
        scale[(1,)](x, 64, 2.0, BLOCK=64)
        y.copy_(x)
        scale[(1,)](y, 64, 3.0, BLOCK=64, num_warps=2)

    first, copy, last = graph = read(body)
    assert [n.kind for n in graph] == ["kernel", "memcpy", "kernel"]
    assert [n.dependencies for n in graph] == [(), (0,), (1,)]
    assert first.name == last.name == "scale"
    assert (first.grid, first.block, last.block) == ((1, 1, 1), (128, 1, 1), (64, 1, 1))
    assert first.function != last.function
    assert inspect.signatures(sys.modules[__name__])[first.function].types == ("*fp32", "i32", "fp32")
    assert [int.from_bytes(p, "little") for p in first.params[:2]] == [x.data_ptr(), 64]
    assert first.params[2] == b"\0\0\0\x40"
    fields = dict(copy.fields)
    assert (fields["srcDevice"], fields["dstDevice"], fields["WidthInBytes"]) == (
        x.data_ptr(),
        y.data_ptr(),
        256,
    )
    assert str(inspect.summary(graph)).endswith("2 edges, 0 of them programmatic")
    assert "n1 -> n2;" in inspect.dot(graph)


def test_a_fork_is_read_as_a_fork(stream: Any) -> None:
    x, y, side = torch.ones(64, device="cuda"), torch.ones(64, device="cuda"), torch.cuda.Stream()

    def body() -> None:
        x.mul_(2.0)
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            y.mul_(2.0)
        x.mul_(2.0)
        stream.wait_stream(side)
        x.add_(y)

    graph = read(body)
    assert [n.dependencies for n in graph] == [(), (0,), (0,), (1, 2)]
    assert len(inspect.read(captured(body).raw_cuda_graph())) == 4


def test_dependent_launches_are_programmatic_edges(stream: Any) -> None:
    x = torch.ones(64, device="cuda")

    def body() -> None:
        for dependent in (False, True, True, False, True):
            scale[(1,)](x, 64, 2.0, BLOCK=64, launch_pdl=dependent)

    graph = read(body)
    assert [n.programmatic for n in graph] == [(), (0,), (1,), (), (3,)]
    assert inspect.summary(graph).programmatic_edges == 3


def test_sets_and_copies_from_the_host_are_read(stream: Any) -> None:
    from cuda.bindings import runtime

    x, host = torch.ones(64, device="cuda"), torch.ones(64, pin_memory=True)

    def body() -> None:
        runtime.cudaMemsetAsync(x.data_ptr(), 7, 128, stream.cuda_stream)
        x.copy_(host, non_blocking=True)

    graph = read(body)
    assert [n.kind for n in graph] == ["memset", "memcpy"]
    fields = dict(graph[0].fields)
    assert (fields["dst"], fields["value"], fields["width"] * fields["elementSize"]) == (x.data_ptr(), 7, 128)
    book = AddressBook()
    book.observe()
    report = inspect.audit(graph, {"x": x}, book)
    logger.info("%s\n%s", graph, report)
    assert report.ok
    assert report.pointers == {"x": 2}
    assert report.host_addresses == 1


LARGE = 1 << 23
"""Elements of a tensor that torch gives a segment of its own."""


@pytest.mark.parametrize("returned", [False, True], ids=["cached", "returned to the driver"])
@pytest.mark.parametrize("kind", ["triton", "torch", "matmul", "memcpy"])
def test_a_freed_buffer_is_caught(stream: Any, kind: str, returned: bool) -> None:
    doomed, y = [torch.ones(LARGE, device="cuda")], torch.ones(LARGE, device="cuda")
    small = torch.ones(64, 1 << 12, device="cuda", dtype=torch.bfloat16)

    def body() -> None:
        (x,) = doomed
        if kind == "triton":
            scale[(1,)](x, 64, 2.0, BLOCK=64)
        elif kind == "torch":
            x.mul_(y)
        elif kind == "matmul":
            torch.mm(small, x.view(torch.bfloat16).view(-1, 1 << 12)[:512].t(), out=out)
        else:
            y.copy_(x)

    out = torch.empty(64, 512, device="cuda", dtype=torch.bfloat16)
    graph = read(body)
    registered = {"y": y, "small": small, "out": out}
    known = inspect.signatures(sys.modules[__name__])
    book = AddressBook()
    book.observe()
    before = inspect.audit(graph, registered | {"x": doomed[0]}, book, known)
    assert before.ok, str(before)
    address = doomed.pop().data_ptr()
    if returned:
        torch.cuda.empty_cache()
    book.observe()
    after = inspect.audit(graph, registered, book, known)
    logger.info("%s", after)
    assert not after.ok
    assert {(f.problem, f.address) for f in after.findings} == {("stale", address)}
    assert after.findings[0].certain == (kind in ("triton", "memcpy"))


def test_a_library_workspace_is_named_and_missed_when_cleared(stream: Any) -> None:
    """A product that cuBLAS splits keeps partial sums in its workspace, one a stream."""
    a, b = (torch.ones(n, 1 << 12, device="cuda", dtype=torch.bfloat16) for n in (64, 512))
    out = torch.empty(64, 512, device="cuda", dtype=torch.bfloat16)
    buffers = {"a": a, "b": b, "out": out}
    book = AddressBook()
    book.observe()
    graph = read(lambda: torch.mm(a, b.t(), out=out))
    book.observe("library workspace")
    report = inspect.audit(graph, buffers, book, {})
    assert report.ok, str(report)
    if "library workspace" not in report.pointers:
        pytest.skip(f"{graph[0].name} needs no workspace on this GPU")
    assert set(report.pointers) == {*buffers, "library workspace"}
    torch._C._cuda_clearCublasWorkspaces()
    book.observe()
    assert {f.problem for f in inspect.audit(graph, buffers, book, {}).findings} == {"stale"}


def test_a_baked_scalar_is_caught(stream: Any) -> None:
    x = torch.ones(64, device="cuda")
    factors = iter((1.5, 1.5, 2.5, 2.5))
    a = read(lambda: scale[(1,)](x, 64, next(factors), BLOCK=64))
    b = read(lambda: scale[(1,)](x, 64, next(factors), BLOCK=64))
    (found,) = inspect.compare(a, b)
    assert (found.node, found.kernel, found.parameter) == (0, "scale", 2)
    assert (found.expected, found.actual) == ("0x3fc00000", "0x40200000")
    values = iter((1.5, 1.5, 2.5, 2.5))
    a, b = (read(lambda: x.mul_(next(values))) for _ in range(2))
    assert [d.what for d in inspect.compare(a, b)] == ["params"]


@pytest.mark.parametrize("n", [1, 63])
def test_a_specialised_integer_is_caught(stream: Any, n: int) -> None:
    x = torch.ones(64, device="cuda")
    a = read(lambda: scale[(1,)](x, 64, 2.0, BLOCK=64))
    b = read(lambda: scale[(1,)](x, n, 2.0, BLOCK=64))
    found = inspect.compare(a, b)
    assert "function" in {d.what for d in found}, [str(d) for d in found]


def test_a_grid_that_follows_a_value_is_caught(stream: Any) -> None:
    x = torch.ones(64, device="cuda")
    a, b = (read(lambda n=n: scale[(n,)](x, 64, 2.0, BLOCK=64)) for n in (1, 2))
    assert [(d.what, d.expected, d.actual) for d in inspect.compare(a, b)] == [
        ("grid", "(1, 1, 1)", "(2, 1, 1)")
    ]


# --- the engine's decode step -------------------------------------------------------------------


def made(rows: bool) -> LLM:
    """An engine whose steps of a few sequences run op by op, or in the one kernel."""
    # Eager: the tests capture the step themselves, without a runner that captures beside them.
    options = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OSTINATO_FUSED", "1" if rows else "0")  # with it, one engine of a process has it
        return LLM("smollm2-135m", load_format="dummy", **options)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = made(rows=False)
    yield llm
    llm.close()


def program_of(llm: LLM) -> Any:
    runner: Any = llm.engine.runner
    return getattr(runner, "eager", runner).program


def registered(llm: LLM) -> dict[str, torch.Tensor]:
    program = program_of(llm)
    return {
        **llm.engine.buffers.tensors(),
        **program.model.tensors(),
        **program.ops.workspaces(),
        "kv_cache": program.cache.data,
        "arena": program.arena.data,
    }


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0.0}, {"temperature": 0.0, "seed": 3}),
    "sample": (
        {"temperature": 0.8, "top_p": 0.9, "seed": 1},
        {"temperature": 1.3, "top_k": 5, "min_p": 0.1, "seed": 2},
    ),
    "full": (
        {"temperature": 0.8, "repetition_penalty": 1.2, "logit_bias": {3: 1.0}},
        {"temperature": 0.0, "presence_penalty": 0.5, "logprobs": 3, "allowed_token_ids": list(range(9, 99))},
    ),
}


def at_decode_step(
    llm: LLM, lengths: list[int], values: dict[str, Any], step: int, what: Callable[[Any], Any]
) -> Any:
    """What a function of the batch returns right behind the n-th decode step of all sequences."""
    return at_step(
        llm,
        lengths,
        values,
        step,
        what,
        lambda key: key.kind is StepKind.DECODE and key.num_seqs == len(lengths),
    )


def at_step(
    llm: LLM, lengths: list[int], values: dict[str, Any], step: int, what: Callable[[Any], Any], wanted: Callable[[Any], bool],
) -> Any:  # fmt: skip
    """The same of the n-th step whose key is `wanted`."""
    runner: Any = llm.engine.runner
    run, seen, found = runner.run, 0, []

    def observing(batch: Any) -> Any:
        nonlocal seen
        pending = run(batch)
        if wanted(batch.key):
            seen += 1
            if seen == step:
                found.append(what(batch))
        return pending

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run", observing)
        patch.setattr(runner, "again", lambda batch: None)  # each step goes through `run`
        prompts = [[(7 * i + n) % 1000 for i in range(n)] for n in lengths]
        llm.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True, **values), use_tqdm=False)
    (result,) = found
    return result


@pytest.fixture(scope="module", params=VARIANTS)
def decode_captures(request: Any, llm: LLM) -> tuple[Any, list[Node], Any, list[Node]]:
    """(key, nodes) twice: other lengths, positions and sampling values at the same key."""
    first, second = VARIANTS[request.param]
    program = program_of(llm)

    def capture(batch: Any) -> tuple[Any, list[Node]]:
        return batch.key, read(lambda: program(batch), warm=False)

    return (
        *at_decode_step(llm, [5, 17, 33, 64], first, 3, capture),
        *at_decode_step(llm, [130, 1, 90, 200], second, 20, capture),
    )


def test_two_captures_of_a_decode_key_are_the_same_graph(decode_captures: Any) -> None:
    key, a, other, b = decode_captures
    assert key == other
    assert [str(d) for d in inspect.compare(a, b)] == []
    assert len(a) > 30 * 5


def test_a_decode_step_points_to_registered_memory(llm: LLM, decode_captures: Any) -> None:
    key, graph, *_ = decode_captures
    book = AddressBook()
    book.observe()
    begin = time.perf_counter()
    report = inspect.audit(graph, registered(llm), book)
    logger.info(
        "%s: %s\naudited in %.1f ms\n%s",
        key,
        inspect.summary(graph),
        (time.perf_counter() - begin) * 1e3,
        report,
    )
    unread = sorted(
        {(f.kernel, f.parameter, hex(f.address), book.find(f.address)) for f in report.unregistered}, key=str
    )
    logger.info("unregistered: %s", unread[:20])
    assert report.ok, str(report)
    groups = report.groups()
    assert {"arena", "words", "kv_cache", "embedding", "rope", "final_norm", "layers.*"} <= set(groups)
    weights = {name for name in report.pointers if name.startswith("layers.")}
    assert weights == {name for name in program_of(llm).model.tensors() if name.startswith("layers.")}
    assert report.coverage[inspect.EXACT].nodes > 100
    assert report.coverage[inspect.UNREAD].nodes == 0
    assert all(not f.certain for f in report.unregistered), "our own kernels read registered buffers alone"


def test_a_decode_step_is_a_chain_of_dependent_launches(decode_captures: Any) -> None:
    _, graph, *_ = decode_captures
    counts = inspect.summary(graph)
    assert counts.edges == counts.nodes - 1, "a chain"
    if torch.cuda.get_device_capability()[0] == 9:  # a library's kernel would break it twice
        assert counts.programmatic_edges == counts.edges
    else:
        assert counts.programmatic_edges == 0
    assert all(n.dependencies == ((n.index - 1,) if n.index else ()) for n in graph)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_of_a_few_sequences_points_to_registered_memory(variant: str) -> None:
    """Two captures of its step are the same graph, and nothing in it points elsewhere."""
    llm = made(rows=True)
    try:
        first, second = VARIANTS[variant]
        program = program_of(llm)
        if not program.ops.fuses(program.model, SEQS):
            pytest.skip("the kernel of a few sequences does not run here")

        def capture(batch: Any) -> list[Node]:
            return read(lambda: program(batch), warm=False)

        a = at_decode_step(llm, [5, 17, 33, 64], first, 3, capture)
        b = at_decode_step(llm, [130, 1, 90, 200], second, 20, capture)
        assert [str(d) for d in inspect.compare(a, b)] == []
        assert "decode_rows" in {node.name for node in a}
        book = AddressBook()
        book.observe()
        report = inspect.audit(a, registered(llm), book)
        assert report.ok, str(report)
        weights = {name for name in report.pointers if name.startswith("layers.")}
        assert weights == {name for name in program.model.tensors() if name.startswith("layers.")}
        assert report.coverage[inspect.UNREAD].nodes == 0
        assert all(not f.certain for f in report.unregistered), (
            "our own kernels read registered buffers alone"
        )
    finally:
        llm.close()


LAYERS = 2
CHAINED = {  # by rows: what serves a step of a small model of the 1B shape by rule, all of it ours
    18: {"begin_decode": 1, "attend": LAYERS, "linear": 3 * LAYERS + 1, "advance": 1},
    32: {"begin_decode": 1, "attend": LAYERS, "linear": 3 * LAYERS + 1, "advance": 1},
    64: {"begin_decode": 1, "attention": LAYERS, "linear": 4 * LAYERS + 1, "advance": 1},
    128: {"begin_decode": 1, "attention": LAYERS, "chain": LAYERS, "linear": 2, "advance": 1},
}
BROKEN: dict[int, Counter[str]] = {  # by rows: our own kernels between the library's
    160: Counter({"prepare_decode": 1, "embed": 1, "rms_norm": 2 * LAYERS + 1, "attention": LAYERS, "silu_mul": LAYERS,
                  "_chunk_best": 1, "_argmax_partials": 1, "advance": 1}),
}  # fmt: skip
BROKEN[256] = BROKEN[160]
PROMPTS: dict[int, dict[str, int]] = {  # by tokens of a prompt; those of the head depend on its sequences, here one
    40: {"prepare_mixed": 1, "embed_norm": 1, "linear": 4 * LAYERS, "rope_kv_write": LAYERS, "varlen": LAYERS, "advance": 1},
    100: {"prepare_mixed": 1, "embed_norm": 1, "linear": 1, "chain": LAYERS, "rope_kv_write": LAYERS, "varlen": LAYERS, "advance": 1},
    300: {"prepare_mixed": 1, "embed": 1, "rms_norm": 2 * LAYERS, "silu_mul": LAYERS, "rope_kv_write": LAYERS, "varlen": LAYERS,
          "linear": 0, "chain": 0, "advance": 1},
}  # fmt: skip


def test_a_kernel_follows_another_as_early_as_it_can_at_every_size() -> None:
    """With `attend.cu` and `chain.cu`, beyond 128 rows, and with prompts: as many kernels as there should be, and no edge between
    two of ours that waits for an end."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    options = {
        "max_model_len": 512,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 1 << 30,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OSTINATO_TUNE", "0")  # by rule, so that it is known what serves
        patch.setitem(SHAPES, "two-layers", {**SHAPES["llama-3.2-1b"], "num_hidden_layers": LAYERS})
        llm = LLM("two-layers", load_format="dummy", enforce_eager=True, **options)
    try:
        program = program_of(llm)
        if program.ops._chain is None or program.ops._attend is None:
            pytest.skip("an engine of this process has the kernels whose blocks wait for each other")

        def capture(batch: Any) -> list[Node]:
            return read(lambda: program(batch), warm=False)

        for rows in (*CHAINED, *BROKEN):
            graph = at_decode_step(llm, [5 + i % 7 for i in range(rows)], {"temperature": 0.0}, 2, capture)
            counts = Counter(node.name for node in graph)
            logger.info("%d rows: %s %s", rows, inspect.summary(graph), dict(counts))
            if rows in CHAINED:
                assert counts == CHAINED[rows], rows
                assert all_early(graph, set(counts)), rows
            else:
                assert {name: counts[name] for name in BROKEN[rows]} == BROKEN[rows], rows
                assert not counts.keys() & {"linear", "chain", "attend"}, "tiles multiply up to 128 rows"
                assert len(graph) >= BROKEN[rows].total() + 4 * LAYERS + 1, (
                    "four products of a layer, and the head"
                )
                assert all_early(graph, set(BROKEN[rows])), rows
        for tokens, expected in PROMPTS.items():
            graph = at_step(
                llm, [tokens], {"temperature": 0.0}, 1, capture, lambda key: key.kind is StepKind.MIXED
            )
            counts = Counter(node.name for node in graph)
            logger.info("%d tokens: %s %s", tokens, inspect.summary(graph), dict(counts))
            assert {name: counts[name] for name in expected} == expected, tokens
            assert all_early(graph, {*expected, "gemv", "_chunk_best", "_argmax_partials"}), tokens
    finally:
        llm.close()


def all_early(graph: list[Node], ours: set[str]) -> bool:
    """Whether the graph is a chain in which each of our kernels but the first one is launched early."""
    chain = all(node.dependencies == ((node.index - 1,) if node.index else ()) for node in graph)
    return chain and all(node.programmatic == node.dependencies for node in graph[1:] if node.name in ours)


def test_labels_name_op_and_layer_of_every_node(llm: LLM) -> None:
    program = program_of(llm)

    def capture(batch: Any) -> tuple[list[Node], list[Label], float, float]:
        begin = time.perf_counter()
        plain = captured(lambda: program(batch))
        middle = time.perf_counter()
        labelled = LabelledOps(program.ops)
        graph = captured(lambda: dataclasses.replace(program, ops=labelled.ops)(batch))
        end = time.perf_counter()
        found = inspect.nodes(graph)
        logger.info("read %d nodes in %.1f ms", len(found), (time.perf_counter() - end) * 1e3)
        assert [str(d) for d in inspect.compare(inspect.nodes(plain), found)] == []
        return found, labelled.labels(len(found)), middle - begin, end - middle

    graph, labels, plain, labelled = at_decode_step(llm, [9] * SEQS, {"temperature": 0.0}, 3, capture)
    logger.info("capture %.2f ms plain, %.2f ms labelled", plain * 1e3, labelled * 1e3)
    assert len(graph) == len(labels)
    assert labels[0].op == "prepare"
    assert labels[-1].op == "advance"
    assert all(label.op for label in labels)
    layers = [label.layer for label in labels if label.layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == set(range(llm.engine.spec.num_layers))
    for index in set(layers):
        ops = {label.op for label in labels if label.layer == index}
        assert ops == {"norm_linear", "rope_paged_attention", "linear_add", "norm_gate_up"}
    for node, label in zip(graph, labels, strict=True):
        if "rope" in node.name:
            assert label.op == "rope_paged_attention"
    assert f"{labels[4].op}, layer {labels[4].layer}" in inspect.dot(graph, labels)
