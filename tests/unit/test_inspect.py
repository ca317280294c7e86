"""Graph inspection without a GPU: comparison, pointer audit, drawing and labels over made-up nodes."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ostinato.errors import GraphError
from ostinato.graphs import inspect
from ostinato.graphs.inspect import AddressBook, Node, Signature
from ostinato.graphs.labels import Label, LabelledOps

OURS, LIBRARY = 0x10, 0x20
"""Function handles: one with a signature, one without."""


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def kernel(*params: bytes, function: int = OURS, index: int = 0, **changes: Any) -> Node:
    offsets, at = [], 0
    for p in params:
        at = -(-at // min(len(p), 8)) * min(len(p), 8)
        offsets.append(at)
        at += len(p)
    base = Node(
        index, "kernel", "step", (4, 1, 1), (128, 1, 1), (0, 0, 0), 64, function, params, tuple(offsets),
        dependencies=(index - 1,) if index else (),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def copy(src: int, dst: int, index: int = 0, **fields: int) -> Node:
    values = {"srcDevice": src, "dstDevice": dst, "srcHost": 0, "dstHost": 0, "WidthInBytes": 64} | fields
    return Node(index, "memcpy", fields=tuple(values.items()), dependencies=(index - 1,) if index else ())


def segment(address: int, *blocks: tuple[int, str], pool: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    found, at = [], address
    for size, state in blocks:
        found.append({"address": at, "size": size, "requested_size": size, "state": state})
        at += size
    return {"address": address, "total_size": at - address, "segment_pool_id": pool, "blocks": found}


LIVE, FREE, WAITS = "active_allocated", "inactive", "active_pending_free"


# --- order, summary, dot ---------------------------------------------------------------------


def test_topological_order_keeps_the_chain_and_prefers_low_numbers() -> None:
    assert inspect.topological(4, [(2, 0), (0, 3), (3, 1)]) == [2, 0, 3, 1]
    assert inspect.topological(4, [(0, 2), (1, 3)]) == [0, 1, 2, 3]
    assert inspect.topological(0, []) == []
    with pytest.raises(GraphError, match="cycle: only 1 of 3"):
        inspect.topological(3, [(1, 2), (2, 1)])


def test_summary_counts_kinds_and_edges() -> None:
    graph = [
        kernel(),
        kernel(index=1),
        copy(1, 2, index=2),
        kernel(index=3, dependencies=(1, 2), programmatic=(1,)),
    ]
    found = inspect.summary(graph)
    assert (found.nodes, found.kernels, found.kinds["memcpy"]) == (4, 3, 1)
    assert (found.edges, found.programmatic_edges) == (4, 1)
    assert str(found) == "4 nodes (3 kernel, 1 memcpy), 4 edges, 1 of them programmatic"


def test_dot_draws_nodes_labels_and_programmatic_edges() -> None:
    graph = [
        kernel(name='void a::b<int, c<2> >(float*, "x")'),
        kernel(index=1, programmatic=(0,)),
        copy(1, 2, index=2),
    ]
    text = inspect.dot(graph, [Label("prepare", None), Label("linear_add", 3), Label("advance", None)])
    assert text.startswith("digraph step {")
    assert text.endswith("}\n")
    assert 'n0 [label="0: a::b\\ngrid 4x1x1 block 128x1x1\\nprepare"];' in text
    assert "linear_add, layer 3" in text
    assert "n0 -> n1 [style=dashed];" in text
    assert "n1 -> n2;" in text
    assert 'n2 [label="2: memcpy\\nadvance"];' in text
    with pytest.raises(GraphError, match="1 labels for 3 nodes"):
        inspect.dot(graph, [Label("prepare", None)])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("rms_norm", "rms_norm"),
        (
            "void at::native::f<4, at::(anonymous namespace)::G<float>, A<2ul> >(int, G<float>)",
            "at::native::f",
        ),
        ("void (anonymous namespace)::fill<int>(int*)", "fill"),
        ("", "kernel"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert kernel(name=name).short_name == short


def test_symbols_are_demangled() -> None:
    assert inspect.demangle(b"_ZN2at6native4copyIfEEvPT_i") == "void at::native::copy<float>(float*, int)"
    assert inspect.demangle(b"rms_norm") == "rms_norm"
    assert inspect.demangle(b"_Zonk") == "_Zonk"


# --- compare ---------------------------------------------------------------------------------


def graph_of_three() -> list[Node]:
    return [kernel(word(0x1000), b"\x01\0\0\0"), copy(0x1000, 0x2000, index=1), kernel(bytes(24), index=2)]


def test_equal_captures_have_no_difference() -> None:
    assert inspect.compare(graph_of_three(), graph_of_three()) == []


@pytest.mark.parametrize(
    ("node", "changes", "what"),
    [
        (0, {"function": 0x99}, "function"),
        (0, {"name": "other"}, "function"),
        (0, {"grid": (5, 1, 1)}, "grid"),
        (0, {"block": (64, 1, 1)}, "block"),
        (0, {"cluster": (2, 1, 1)}, "cluster"),
        (0, {"shared_bytes": 65}, "shared_bytes"),
        (0, {"offsets": (0, 16)}, "offsets"),
        (2, {"dependencies": (0,)}, "dependencies"),
        (2, {"programmatic": (1,)}, "programmatic"),
        (2, {"kind": "memset"}, "kind"),
        (1, {"fields": ()}, "fields"),
        (2, {"params": (bytes(16),)}, "params"),
        (2, {"params": (bytes(24), bytes(8))}, "params"),
    ],
)
def test_each_field_that_differs_is_named(node: int, changes: Mapping[str, Any], what: str) -> None:
    changed = graph_of_three()
    changed[node] = dataclasses.replace(changed[node], **changes)
    (found,) = inspect.compare(graph_of_three(), changed)
    assert (found.node, found.what) == (node, what)
    assert found.expected != found.actual


def test_differing_parameter_bytes_are_named() -> None:
    changed = graph_of_three()
    changed[0] = kernel(word(0x1000), b"\x02\0\0\0")
    changed[2] = kernel(bytes(9) + b"\x07" + bytes(14), index=2)
    first, second = inspect.compare(graph_of_three(), changed)
    assert (first.node, first.kernel, first.parameter, first.byte) == (0, "step", 1, 0)
    assert (first.expected, first.actual) == ("0x1", "0x2")
    assert (second.node, second.parameter, second.byte, second.actual) == (2, 0, 8, "0x700")
    assert str(first) == "node 0 (step): parameter 1: expected 0x1, found 0x2"
    assert str(second) == "node 2 (step): parameter 0, byte 8: expected 0x0, found 0x700"


def test_raw_copy_parameters_and_node_counts_are_compared() -> None:
    changed = graph_of_three()[:2]
    changed[1] = copy(0x1000, 0x2000, index=1, WidthInBytes=128)
    count, width = inspect.compare(graph_of_three(), changed)
    assert (count.node, count.expected, count.actual) == (None, "3", "2")
    assert (width.node, width.what, width.expected, width.actual) == (1, "WidthInBytes", "0x40", "0x80")
    assert str(count) == "graph: nodes: expected 3, found 2"


# --- live memory -----------------------------------------------------------------------------


def test_only_allocated_blocks_are_live_and_segments_stay_known() -> None:
    book = AddressBook()
    book.observe(snapshot=[segment(0x1000, (0x100, LIVE), (0x100, FREE), (0x100, WAITS))])
    assert book.find(0x10FF) is not None
    assert book.find(0x1100) is None
    assert book.find(0x1200) is None
    book.observe(snapshot=[segment(0x8000, (0x100, LIVE))])
    assert book.find(0x1000) is None
    assert book.segment(0x1000) is not None
    assert book.segment(0x7FFF) is None


def test_blocks_are_named_by_when_they_came() -> None:
    book = AddressBook()
    book.observe("early", [segment(0x1000, (0x100, LIVE), (0x100, FREE))])
    book.observe("late", [segment(0x1000, (0x100, LIVE), (0x100, LIVE))])
    assert [b.name for b in book.live] == ["early", "late"]


def test_blocks_without_addresses_fill_their_segment() -> None:
    old = segment(0x1000, (0x100, FREE), (0x100, LIVE))
    for block in old["blocks"]:
        del block["address"]
    book = AddressBook()
    book.observe(snapshot=[old])
    assert [b.address for b in book.live] == [0x1100]


# --- audit -----------------------------------------------------------------------------------


@pytest.fixture
def memory() -> tuple[dict[str, torch.Tensor], AddressBook, int]:
    """A registered buffer inside a live block, and a book that says so; the block's address.

    Behind the 4 KiB block of the buffer: a live block of someone else, and a freed one.
    """
    buffer = torch.zeros(1024, dtype=torch.float32)
    book = AddressBook()
    book.observe(snapshot=[segment(buffer.data_ptr(), (4096, LIVE), (512, LIVE), (512, FREE))])
    return {"arena": buffer}, book, buffer.data_ptr()


SIGNATURE = {OURS: Signature(("x", "n"), ("*fp32", "i32"))}
N = b"\x05\0\0\0"


def test_good_pointers_are_named(memory: Any) -> None:
    registered, book, at = memory
    graph = [
        kernel(word(at + 64), N, word(0), word(0)),
        kernel(word(at), N, index=1),
        kernel(N, bytes(8) + word(at + 4095) + word(0x123456), function=LIBRARY, index=2),
        copy(at, at + 4096, index=3),
        Node(4, "memset", fields=(("dst", at), ("value", 0)), dependencies=(3,)),
        Node(5, "event_record", fields=(("event", 77),)),
        Node(6, "host", fields=(("fn", 1), ("userData", 2))),
    ]
    report = inspect.audit(graph, registered, book, SIGNATURE)
    assert report.ok
    assert report.pointers == {"arena": 5, inspect.UNREGISTERED: 1}
    assert [(f.node, f.parameter) for f in report.unregistered] == [(3, "dstDevice")]
    assert report.coverage[inspect.EXACT] == inspect.Coverage(2, 2)
    assert report.coverage[inspect.WORDS] == inspect.Coverage(1, 1)
    assert report.coverage[inspect.COPIES] == inspect.Coverage(2, 3)
    assert report.coverage[inspect.UNREAD].nodes == 1


def test_stale_pointers_are_errors_everywhere(memory: Any) -> None:
    registered, book, at = memory
    gone = at + 4096 + 512
    graph = [
        kernel(word(gone), N),
        kernel(bytes(8) + word(gone + 8), function=LIBRARY, index=1),
        copy(at, gone, index=2),
    ]
    report = inspect.audit(graph, registered, book, SIGNATURE)
    assert not report.ok
    assert [(f.node, f.parameter, f.address, f.problem, f.certain) for f in report.findings] == [
        (0, "parameter 'x'", gone, "stale", True),
        (1, "parameter 0, byte 8", gone + 8, "stale", False),
        (2, "dstDevice", gone, "stale", True),
    ]
    text = str(report)
    assert "3 findings" in text
    assert f"node 0 (step), parameter 'x': stale address {gone:#x}\n" in text
    assert f"stale address {gone + 8:#x} (if it is a pointer)" in text


def test_a_registered_buffer_whose_block_was_freed_is_stale(memory: Any) -> None:
    registered, book, at = memory
    book.observe(snapshot=[segment(at, (4096, FREE))])
    (found,) = inspect.audit([kernel(word(at), N)], registered, book, SIGNATURE).findings
    assert found.problem == "stale"


def test_memory_that_went_back_to_the_driver_is_stale(memory: Any) -> None:
    registered, book, at = memory
    book.observe(snapshot=[])
    (found,) = inspect.audit([kernel(word(at + 4096), function=LIBRARY)], registered, book, {}).findings
    assert found.problem == "stale"


def test_unknown_addresses_are_errors_for_our_kernels_alone(memory: Any) -> None:
    registered, book, at = memory
    stray = word(at + (1 << 40))
    ours, theirs = kernel(stray, N), kernel(stray, N, function=LIBRARY, index=1)
    (found,) = inspect.audit([ours, theirs], registered, book, SIGNATURE).findings
    assert (found.node, found.problem) == (0, "unknown")


def test_registered_memory_may_come_from_another_allocator(memory: Any) -> None:
    registered, book, _ = memory
    foreign = torch.zeros(16)
    graph = [kernel(word(foreign.data_ptr()), N)]
    assert inspect.audit(graph, registered | {"foreign": foreign}, book, SIGNATURE).pointers == {"foreign": 1}
    assert not inspect.audit(graph, registered, book, SIGNATURE).ok


def test_a_hidden_scratch_pointer_is_checked(memory: Any) -> None:
    registered, book, at = memory
    graph = [kernel(word(at), N, word(at + 4096 + 512), word(0))]
    (found,) = inspect.audit(graph, registered, book, SIGNATURE).findings
    assert (found.parameter, found.problem) == ("parameter 'global_scratch'", "stale")


@pytest.mark.parametrize("params", [(4,), (8, 8), (8, 4, 8, 8, 8), (8, 4, 4)])
def test_a_signature_that_does_not_fit_is_an_error(memory: Any, params: tuple[int, ...]) -> None:
    registered, book, _ = memory
    report = inspect.audit([kernel(*(bytes(n) for n in params))], registered, book, SIGNATURE)
    assert [f.problem for f in report.findings] == ["layout"]
    assert report.coverage[inspect.WORDS].nodes == 1


def test_a_graphs_own_pool_keeps_its_memory(memory: Any) -> None:
    registered, book, at = memory
    base = at + (1 << 30)
    book.observe(snapshot=[segment(at, (4096, LIVE)), segment(base, (512, FREE), pool=(0, 7))])
    graph = [kernel(word(base), N)]
    assert inspect.audit(graph, registered, book, SIGNATURE, pool=(0, 7)).pointers == {inspect.GRAPH_POOL: 1}
    assert not inspect.audit(graph, registered, book, SIGNATURE, pool=(0, 8)).ok
    book.observe(snapshot=[segment(at, (4096, LIVE))])
    assert not inspect.audit(graph, registered, book, SIGNATURE, pool=(0, 7)).ok


def test_words_are_aligned_to_the_buffer_not_to_the_parameter(memory: Any) -> None:
    registered, book, at = memory
    # At offset 4 of the buffer the pointer starts 4 bytes into the struct.
    shifted = kernel(N, bytes(4) + word(at), function=LIBRARY, offsets=(0, 4))
    assert inspect.audit([shifted], registered, book, {}).pointers == {"arena": 1}
    straight = dataclasses.replace(shifted, offsets=(0, 8))
    assert inspect.audit([straight], registered, book, {}).pointers == {}


def test_tensor_maps_are_counted_and_their_address_is_checked(memory: Any) -> None:
    registered, book, at = memory
    good, bad = word(at) + bytes(120), word(at + 4096 + 512) + bytes(120)
    report = inspect.audit([kernel(good, bad, function=LIBRARY)], registered, book, {})
    assert report.tensor_maps == 2
    assert [(f.parameter, f.problem) for f in report.findings] == [("parameter 1, byte 0", "stale")]
    assert report.struct_words == 32
    assert "tensor maps by themselves (not decoded, first word checked): 2" in str(report)


def test_host_ends_of_copies_are_counted_not_checked(memory: Any) -> None:
    registered, book, at = memory
    report = inspect.audit([copy(0, at, srcHost=0x5000)], registered, book, {})
    assert report.ok
    assert report.host_addresses == 1
    assert "host addresses (not checked): 1" in str(report)


def test_named_blocks_and_layers_in_the_report(memory: Any) -> None:
    registered, book, at = memory
    parts = {f"layers.{i}.qkv": registered["arena"][i * 8 : i * 8 + 8] for i in range(2)}
    book.live[1] = dataclasses.replace(book.live[1], name="library workspace")
    graph = [kernel(word(at), word(at + 32), word(at + 4096), function=LIBRARY)]
    report = inspect.audit(graph, parts, book, {})
    assert report.pointers == {"layers.0.qkv": 1, "layers.1.qkv": 1, "library workspace": 1}
    assert report.groups() == {"layers.*": 2, "library workspace": 1}
    assert "pointer audit: no stale pointer" in str(report)


def test_extent_of_views() -> None:
    base = torch.zeros(4, 8)
    at = base.data_ptr()
    assert inspect.extent(base) == (at, at + 128)
    assert inspect.extent(base[:, 2]) == (at + 8, at + 8 + 4 * 25)
    begin, end = inspect.extent(base[:0])
    assert begin == end


# --- signatures ------------------------------------------------------------------------------


def compiled(function: int | None, signature: Mapping[str, Any]) -> Any:
    return types.SimpleNamespace(function=function, src=types.SimpleNamespace(signature=signature))


def jitted(*kernels: Any) -> Any:
    return types.SimpleNamespace(device_caches={0: (dict(enumerate(kernels)), "backend")})


def test_signatures_come_from_the_kernels_that_were_launched() -> None:
    module: Any = types.ModuleType("kernels")
    module.plain = jitted(
        compiled(7, {"x": "*bf16", "n": "i32", "BLOCK": "constexpr"}),
        compiled(8, {"x": "*bf16", "n": "constexpr", "BLOCK": "constexpr"}),
        compiled(None, {"x": "*bf16"}),
    )
    module.tuned = types.SimpleNamespace(fn=jitted(compiled(9, {"pair": ("*fp32", "i64", "constexpr")})))
    module.odd = jitted(compiled(10, {"d": "tensordesc<fp16[16, 16]>"}))
    module.other = 5
    assert inspect.signatures(module) == {
        7: Signature(("x", "n"), ("*bf16", "i32")),
        8: Signature(("x",), ("*bf16",)),
        9: Signature(("pair[0]", "pair[1]"), ("*fp32", "i64")),
    }


# --- labels ----------------------------------------------------------------------------------


class CountingOps:
    """Each op adds as many nodes as it is told."""

    name = "counting"

    def __init__(self) -> None:
        self.nodes = 0

    def launch(self, nodes: int = 1) -> int:
        self.nodes += nodes
        return nodes

    prepare = embed = norm_linear = rope_paged_attention = linear_add = norm_gate_up = attend = launch
    norm_head = sample = advance = launch


def test_labels_name_op_and_layer() -> None:
    inner = CountingOps()
    labelled = LabelledOps(inner, lambda: inner.nodes)  # type: ignore[arg-type]
    ops: Any = labelled.ops
    assert ops.name == "counting"
    ops.prepare()
    ops.embed()
    for _ in range(2):
        assert ops.attend(0) == 0  # does nothing
        assert ops.norm_linear(2) == 2
        ops.rope_paged_attention(nodes=3)
        ops.linear_add()
        ops.norm_gate_up(0)
        ops.linear_add()
    for _ in range(2):
        assert ops.attend(1) == 1
        ops.linear_add(2)
    inner.launch()  # by nobody
    ops.norm_head()
    ops.advance()
    layer = [("norm_linear", 2), ("rope_paged_attention", 3), ("linear_add", 2)]
    wanted = [Label("prepare", None), Label("embed", None)]
    wanted += [Label(op, i) for i in range(2) for op, n in layer for _ in range(n)]
    wanted += [Label(op, i) for i in (2, 3) for op in ("attend", "linear_add", "linear_add")]
    wanted += [Label("", None), Label("norm_head", None), Label("advance", None)]
    assert labelled.labels(len(wanted)) == wanted
    assert labelled.labels(len(wanted) + 1)[-1] == Label("", None)
    with pytest.raises(GraphError, match=r"launched 25 nodes, the graph has 24"):
        labelled.labels(24)


def test_outside_a_capture_ops_work_and_nothing_is_labelled() -> None:
    inner = CountingOps()
    labelled = LabelledOps(inner, lambda: 0)  # type: ignore[arg-type]
    assert labelled.launch(4) == 4
    assert labelled.labels(0) == []


def test_an_op_that_fails_fails_as_before() -> None:
    labelled = LabelledOps(CountingOps(), lambda: 0)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        labelled.softmax()
    with pytest.raises(TypeError):
        labelled.launch(1, 2, 3)
