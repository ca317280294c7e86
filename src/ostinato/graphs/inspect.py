"""What is inside a captured graph: nodes, edges, parameters, and what they point to.

`nodes` reads a graph through the driver; everything else works on the result and needs no GPU.
`audit` guards contract line 9 (pointers lie in live memory), `compare` line 10 (two captures
of a key are the same graph).

What the audit cannot see: memory that was freed and handed to somebody else since (the address
is live again), what a kernel computes from its parameters or reads through pointers in device
memory, and where a pointer that lies in a live block goes from there.
"""

from __future__ import annotations

import ctypes
import heapq
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from ..errors import GraphError

Dim = tuple[int, int, int]

TENSOR_MAP_BYTES = 128
"""Size of a CUtensorMap; its first 8 bytes are the tensor's address, the rest is opaque."""


@dataclass(frozen=True)
class Node:
    """One node of a captured graph. Numbers of other nodes are their indices."""

    index: int
    """Place in the order of capture, which is a topological order."""
    kind: str
    """kernel, memcpy, memset, host, graph, empty, event_record, ..."""
    name: str = ""
    """Kernels: the demangled name."""
    grid: Dim = (0, 0, 0)
    block: Dim = (0, 0, 0)
    cluster: Dim = (0, 0, 0)
    """Blocks in a cluster; zeros without clusters."""
    shared_bytes: int = 0
    """Dynamic shared memory a block."""
    function: int = 0
    """Kernels: the handle that is launched; equal handles are equal kernels."""
    params: tuple[bytes, ...] = ()
    """Kernels: the bytes of each parameter, by its true size."""
    offsets: tuple[int, ...] = ()
    """Bytes from the start of the parameter buffer, for each parameter."""
    fields: tuple[tuple[str, int], ...] = ()
    """Other nodes: the raw parameters by the driver's names, pointers and handles as integers."""
    dependencies: tuple[int, ...] = ()
    """Nodes that this one waits for, ascending."""
    programmatic: tuple[int, ...] = ()
    """Those of `dependencies` whose end it does not wait for (dependent launch)."""

    @property
    def short_name(self) -> str:
        """The kernel's name without template arguments and parameters; the kind of other nodes."""
        return _short(self.name) or self.kind


# --- reading a graph -----------------------------------------------------------------------


def nodes(graph: Any) -> list[Node]:
    """The nodes of a `torch.cuda.CUDAGraph`, in the order of capture.

    Args:
        graph: captured with `keep_graph=True`; need not be instantiated.

    Raises:
        GraphError: the driver refused a query; the message names it and the node.
    """
    return read(int(graph.raw_cuda_graph()))


def read(handle: int) -> list[Node]:
    """The nodes of a `cudaGraph_t`; see `nodes`."""
    from cuda.bindings import driver

    graph = driver.CUgraph(init_value=handle)
    _, count = _checked(driver.cuGraphGetNodes(graph), "cuGraphGetNodes")
    if not count:
        return []
    handles, _ = _checked(driver.cuGraphGetNodes(graph, count), "cuGraphGetNodes")
    place = {int(h): i for i, h in enumerate(handles)}
    edges = [(place[a], place[b], programmatic) for a, b, programmatic in _edges(handle)]
    order = topological(len(handles), [(a, b) for a, b, _ in edges])
    rank = {old: new for new, old in enumerate(order)}
    before: dict[int, set[int]] = {i: set() for i in range(len(handles))}
    early: dict[int, set[int]] = {i: set() for i in range(len(handles))}
    for a, b, programmatic in edges:
        before[rank[b]].add(rank[a])
        if programmatic:
            early[rank[b]].add(rank[a])
    return [
        Node(
            index=new,
            dependencies=tuple(sorted(before[new])),
            programmatic=tuple(sorted(early[new])),
            **_describe(handles[old], new),
        )
        for new, old in enumerate(order)
    ]


def topological(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """Nodes 0 to count - 1 in an order that edges (from, to) allow, lower numbers first.

    Raises:
        GraphError: the edges form a cycle.
    """
    after: dict[int, list[int]] = {}
    waits = [0] * count
    for a, b in edges:
        after.setdefault(a, []).append(b)
        waits[b] += 1
    ready = [i for i in range(count) if not waits[i]]
    order = []
    while ready:
        node = heapq.heappop(ready)
        order.append(node)
        for b in after.get(node, ()):
            waits[b] -= 1
            if not waits[b]:
                heapq.heappush(ready, b)
    if len(order) != count:
        raise GraphError(f"the edges form a cycle: only {len(order)} of {count} nodes can be ordered")
    return order


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """The values of a driver call."""
    error, *values = result
    if int(error):
        raise GraphError(f"{what}: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


class _EdgeData(ctypes.Structure):
    """CUgraphEdgeData."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


def _edges(handle: int) -> list[tuple[int, int, bool]]:
    """(from, to, programmatic) of every edge, nodes by handle."""
    # Not through the bindings: theirs (13.0) returns edge data that it has already freed.
    get = ctypes.CDLL("libcuda.so.1").cuGraphGetEdges_v2
    graph, count = ctypes.c_void_p(handle), ctypes.c_size_t()
    error = get(graph, None, None, None, ctypes.byref(count))
    if not error and count.value:
        starts = (ctypes.c_void_p * count.value)()
        ends = (ctypes.c_void_p * count.value)()
        data = (_EdgeData * count.value)()
        error = get(graph, starts, ends, data, ctypes.byref(count))
        if not error:
            return [
                (int(a or 0), int(b or 0), bool(d.type)) for a, b, d in zip(starts, ends, data, strict=True)
            ]
    if error:
        raise GraphError(f"cuGraphGetEdges: error {error}")
    return []


_COPY_FIELDS = (
    *(f"{side}{part}" for side in ("src", "dst") for part in ("MemoryType", "Device", "Host", "Array")),
    *(
        f"{side}{part}"
        for side in ("src", "dst")
        for part in ("XInBytes", "Y", "Z", "LOD", "Pitch", "Height")
    ),
    *("WidthInBytes", "Height", "Depth"),
)
_SET_FIELDS = ("dst", "pitch", "value", "elementSize", "width", "height")


def _describe(handle: Any, index: int) -> dict[str, Any]:
    """The fields of a node but its place and edges."""
    from cuda.bindings import driver

    where = f"node {index}"
    kind = _checked(driver.cuGraphNodeGetType(handle), where).name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()
    if kind == "kernel":
        return {"kind": kind, **_describe_kernel(handle, where)}
    if kind == "memcpy":
        params = _checked(driver.cuGraphMemcpyNodeGetParams(handle), f"{where} (memcpy)")
        return {"kind": kind, "fields": _fields(params, _COPY_FIELDS)}
    if kind == "memset":
        params = _checked(driver.cuGraphMemsetNodeGetParams(handle), f"{where} (memset)")
        return {"kind": kind, "fields": _fields(params, _SET_FIELDS)}
    if kind == "host":
        params = _checked(driver.cuGraphHostNodeGetParams(handle), f"{where} (host)")
        return {"kind": kind, "fields": _fields(params, ("fn", "userData"))}
    if kind in ("event_record", "wait_event"):
        get = (
            driver.cuGraphEventRecordNodeGetEvent
            if kind == "event_record"
            else driver.cuGraphEventWaitNodeGetEvent
        )
        return {"kind": kind, "fields": (("event", int(_checked(get(handle), f"{where} ({kind})"))),)}
    return {"kind": kind}


def _fields(params: Any, names: Iterable[str]) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(getattr(params, name) or 0)) for name in names)


def _describe_kernel(handle: Any, where: str) -> dict[str, Any]:
    from cuda.bindings import driver

    p = _checked(driver.cuGraphKernelNodeGetParams(handle), f"{where} (kernel)")
    function = int(p.func) or int(p.kern)
    name, layout = _kernel(function, not int(p.func))
    cluster = _checked(
        driver.cuGraphKernelNodeGetAttribute(
            handle, driver.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        ),
        f"{where} ({name}): cluster",
    ).clusterDim
    return {
        "name": name,
        "grid": (int(p.gridDimX), int(p.gridDimY), int(p.gridDimZ)),
        "block": (int(p.blockDimX), int(p.blockDimY), int(p.blockDimZ)),
        "cluster": (int(cluster.x), int(cluster.y), int(cluster.z)),
        "shared_bytes": int(p.sharedMemBytes),
        "function": function,
        "params": _parameter_bytes(int(p.kernelParams), int(p.extra), layout, f"{where} ({name})"),
        "offsets": tuple(offset for offset, _ in layout),
    }


def _kernel(handle: int, library: bool) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Name, and (offset, size) of each parameter; `library`: the handle is a CUkernel, not a CUfunction."""
    from cuda.bindings import driver

    # Not cached by handle: an unloaded kernel's handle may come back as another's.
    if library:
        kernel, get_name, get_info = (
            driver.CUkernel(handle),
            driver.cuKernelGetName,
            driver.cuKernelGetParamInfo,
        )
    else:
        kernel, get_name, get_info = (
            driver.CUfunction(handle),
            driver.cuFuncGetName,
            driver.cuFuncGetParamInfo,
        )
    name = demangle(_checked(get_name(kernel), "kernel name"))
    layout: list[tuple[int, int]] = []
    while True:
        error, offset, size = get_info(kernel, len(layout))
        if int(error) == int(driver.CUresult.CUDA_ERROR_INVALID_VALUE):
            return name, tuple(layout)  # past the last one
        if int(error):
            raise GraphError(f"{name}: parameter {len(layout)}: {error.name}")
        layout.append((int(offset), int(size)))


def _parameter_bytes(
    values: int, extra: int, layout: Sequence[tuple[int, int]], where: str
) -> tuple[bytes, ...]:
    """Copies of parameters that the node owns, from its array of pointers or from one packed buffer."""
    if not layout:
        return ()
    if values:
        pointers = (ctypes.c_void_p * len(layout)).from_address(values)
        return tuple(ctypes.string_at(p, size) for p, (_, size) in zip(pointers, layout, strict=True))
    if extra:
        # Pairs of (what, value): 1 is the buffer, 2 a pointer to its size, 0 the end.
        pairs = (ctypes.c_void_p * 4).from_address(extra)
        found = {pairs[i]: pairs[i + 1] for i in (0, 2)}
        if found.get(1):
            return tuple(ctypes.string_at(int(found[1] or 0) + offset, size) for offset, size in layout)
    raise GraphError(
        f"{where}: has {len(layout)} parameters, but the node holds neither an array nor a buffer"
    )


@lru_cache
def demangle(symbol: bytes) -> str:
    """A C++ symbol as its source spells it; other names as they are."""
    if symbol.startswith(b"_Z"):
        try:
            call = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
        except (OSError, AttributeError):
            return symbol.decode()
        call.restype, status = ctypes.c_void_p, ctypes.c_int()
        text = call(symbol, None, None, ctypes.byref(status))
        if text:
            try:
                return ctypes.string_at(text).decode()
            finally:
                free = ctypes.CDLL(None).free
                free.argtypes = (ctypes.c_void_p,)
                free(text)
    return symbol.decode()


def _short(name: str) -> str:
    """A demangled name without return type, template arguments and parameters."""
    depth, kept = 0, ""
    for i, c in enumerate(name.replace("(anonymous namespace)::", "")):
        if c == "(" and not depth and i:
            break
        depth += (c == "<") - (c == ">")
        kept += c if not depth and c != ">" else ""
    return kept.split(" ")[-1] if kept.startswith(("void ", "bool ", "int ")) else kept


# --- summary and drawing --------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Counts of a graph."""

    nodes: int
    kinds: Mapping[str, int]
    """Nodes of each kind, most frequent first."""
    edges: int
    programmatic_edges: int

    @property
    def kernels(self) -> int:
        return self.kinds.get("kernel", 0)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return f"{self.nodes} nodes ({kinds}), {self.edges} edges, {self.programmatic_edges} of them programmatic"


def summary(graph: Sequence[Node]) -> Summary:
    """Counts of a graph's nodes and edges."""
    return Summary(
        nodes=len(graph),
        kinds=dict(Counter(node.kind for node in graph).most_common()),
        edges=sum(len(node.dependencies) for node in graph),
        programmatic_edges=sum(len(node.programmatic) for node in graph),
    )


def dot(graph: Sequence[Node], labels: Sequence[tuple[str, int | None]] = ()) -> str:
    """GraphViz text: a box for each node, programmatic edges dashed.

    Args:
        graph: the nodes.
        labels: (op, layer) of each node (`labels.LabelledOps`), or none.

    Raises:
        GraphError: there are labels, but not one for each node.
    """
    if labels and len(labels) != len(graph):
        raise GraphError(f"{len(labels)} labels for {len(graph)} nodes")
    lines = ["digraph step {", "  node [shape=box];"]
    for node in graph:
        parts = [f"{node.index}: {node.short_name}"]
        if node.kind == "kernel":
            parts.append(f"grid {_dim(node.grid)} block {_dim(node.block)}")
        if labels:
            op, layer = labels[node.index]
            parts.append(op if layer is None else f"{op}, layer {layer}")
        text = "\\n".join(part.replace("\\", "\\\\").replace('"', '\\"') for part in parts)
        lines.append(f'  n{node.index} [label="{text}"];')
        for before in node.dependencies:
            style = " [style=dashed]" if before in node.programmatic else ""
            lines.append(f"  n{before} -> n{node.index}{style};")
    return "\n".join([*lines, "}", ""])


def _dim(value: Dim) -> str:
    return "x".join(map(str, value))


# --- two captures of a key (contract line 10) -------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One place where two captures of a key differ."""

    node: int | None
    """None: the graphs differ in their number of nodes."""
    kernel: str
    what: str
    """A field of `Node`, a raw parameter of a copy or set node, or `params`."""
    expected: str
    actual: str
    parameter: int | None = None
    """With `params`: which one, counted from 0."""
    byte: int | None = None
    """With `params`: where in the parameter the differing word starts."""

    def __str__(self) -> str:
        where = "graph" if self.node is None else f"node {self.node} ({self.kernel})"
        what = self.what if self.parameter is None else f"parameter {self.parameter}"
        what += "" if not self.byte else f", byte {self.byte}"
        return f"{where}: {what}: expected {self.expected}, found {self.actual}"


def compare(a: Sequence[Node], b: Sequence[Node]) -> list[Difference]:
    """Where capture `b` of a key differs from capture `a`; empty if they are the same graph.

    The two are to be captured with other lengths, positions and sampling values: what then
    differs is baked into the graph without being part of its key. Nothing is tolerated.
    """
    found = [] if len(a) == len(b) else [Difference(None, "", "nodes", str(len(a)), str(len(b)))]
    for x, y in zip(a, b, strict=False):
        found += _compare_nodes(x, y)
    return found


def _compare_nodes(a: Node, b: Node) -> list[Difference]:
    def differs(what: str, expected: object, actual: object, **place: int) -> Difference:
        return Difference(a.index, a.short_name, what, str(expected), str(actual), **place)

    if a.kind != b.kind:
        return [differs("kind", a.kind, b.kind)]
    found = []
    for what in ("dependencies", "programmatic", "grid", "block", "cluster", "shared_bytes", "offsets"):
        if getattr(a, what) != getattr(b, what):
            found.append(differs(what, getattr(a, what), getattr(b, what)))
    if a.function != b.function or a.name != b.name:
        names = [f"{node.name} ({node.function:#x})" for node in (a, b)]
        found.append(differs("function", *names))
    if [name for name, _ in a.fields] != [name for name, _ in b.fields]:
        found.append(differs("fields", a.fields, b.fields))
    else:
        for (what, x), (_, y) in zip(a.fields, b.fields, strict=True):
            if x != y:
                found.append(differs(what, hex(x), hex(y)))
    if [len(p) for p in a.params] != [len(p) for p in b.params]:
        found.append(
            differs("params", f"sizes {[len(p) for p in a.params]}", f"sizes {[len(p) for p in b.params]}")
        )
        return found
    for number, (p, q) in enumerate(zip(a.params, b.params, strict=True)):
        for byte in range(0, len(p), 8):
            if p[byte : byte + 8] != q[byte : byte + 8]:
                values = [_number(value[byte : byte + 8]) for value in (p, q)]
                found.append(differs("params", *values, parameter=number, byte=byte))
    return found


def _number(word: bytes) -> str:
    return f"{int.from_bytes(word, 'little'):#x}"


# --- live memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A live block of torch's allocator."""

    address: int
    size: int
    """Bytes, rounded up as the allocator does."""
    name: str = ""
    """What it is for, where that is known."""

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.size


@dataclass(frozen=True)
class Segment:
    """A range that torch's allocator got from the driver."""

    address: int
    size: int
    pool: tuple[int, int] = (0, 0)
    """The memory pool that it belongs to; (0, 0) is the common one."""

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.size


@dataclass
class AddressBook:
    """What torch's allocator holds now, and all that it was ever seen to own.

    Segments that went back to the driver stay known, so that a pointer into one is recognised:
    observe before memory may be returned (`empty_cache`, out of memory) as well as before an audit.
    """

    live: list[Block] = field(default_factory=list)
    """Blocks in use when last observed, by address."""
    owned: dict[Segment, None] = field(default_factory=dict)
    """Every segment ever seen, in the order of first sight."""
    present: set[Segment] = field(default_factory=set)
    """Those that were there when last observed."""

    def observe(self, name: str = "", snapshot: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Look at the allocator.

        Args:
            name: given to blocks that were not live when last observed, "library workspace", say.
            snapshot: as from `torch.cuda.memory_snapshot()`, the default.
        """
        segments = torch.cuda.memory_snapshot() if snapshot is None else snapshot
        known = {(b.address, b.size): b for b in self.live}
        live = []
        self.present = set()
        for s in segments:
            segment = Segment(
                int(s["address"]), int(s["total_size"]), tuple(s.get("segment_pool_id", (0, 0)))
            )
            self.owned[segment] = None
            self.present.add(segment)
            address = segment.address
            for b in s["blocks"]:
                size = int(b["size"])
                # Blocks fill their segment without gaps; older versions of torch give no address.
                address = int(b.get("address", address))
                if b["state"] == "active_allocated":
                    live.append(known.get((address, size)) or Block(address, size, name))
                address += size
        self.live = sorted(live, key=lambda b: b.address)

    def find(self, address: int) -> Block | None:
        """The live block that holds an address."""
        return next((b for b in self.live if address in b), None)

    def segment(self, address: int) -> Segment | None:
        """The segment that an address lies in, those that are there before those that were."""
        held = [s for s in self.owned if address in s]
        return next((s for s in held if s in self.present), held[-1] if held else None)


# --- the pointer audit (contract line 9) --------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """Parameters of one of our own kernels; types as Triton spells them: *bf16, i32, fp32, ..."""

    names: tuple[str, ...]
    types: tuple[str, ...]


_TYPE_BYTES = {
    **dict.fromkeys(("i1", "u1", "i8", "u8"), 1),
    **dict.fromkeys(("i16", "u16", "fp16", "bf16"), 2),
    **dict.fromkeys(("i32", "u32", "fp32", "f32"), 4),
    **dict.fromkeys(("i64", "u64", "fp64"), 8),
    "nvTmaDesc": TENSOR_MAP_BYTES,
}
_HIDDEN = ("global_scratch", "profile_scratch")
"""Pointers that Triton adds behind a kernel's own arguments."""


def signatures(*modules: ModuleType) -> dict[int, Signature]:
    """Signatures by function handle of every Triton kernel that was launched from these modules.

    Args:
        modules: where the kernels are defined; by default all of ours that are loaded.
    """
    if not modules:
        own = f"{__name__.split('.')[0]}.ops.triton"
        modules = tuple(
            m for name, m in list(sys.modules.items()) if name == own or name.startswith(f"{own}.")
        )
    found = {}
    for module in modules:
        for value in list(vars(module).values()):
            for kernel in _compiled(value):
                signature = _signature(getattr(getattr(kernel, "src", None), "signature", None))
                handle = getattr(kernel, "function", None)
                if signature is not None and isinstance(handle, int):
                    found[handle] = signature
    return found


def _compiled(value: Any) -> list[Any]:
    """The compiled kernels of a `triton.jit` function, looked for by shape: no import of Triton here."""
    caches = getattr(value, "device_caches", None)
    if not isinstance(caches, dict):
        inner = getattr(value, "fn", None)  # an autotuner or heuristics around it
        caches = getattr(inner, "device_caches", None)
    return [k for cache in caches.values() for k in cache[0].values()] if isinstance(caches, dict) else []


def _signature(types: Mapping[str, Any] | None) -> Signature | None:
    """What is passed at run time; None where that cannot be told from the types."""
    names: list[str] = []
    flat: list[str] = []

    def add(name: str, kind: Any) -> None:
        if isinstance(kind, tuple):
            for i, part in enumerate(kind):
                add(f"{name}[{i}]", part)
        elif kind != "constexpr":
            names.append(name)
            flat.append(str(kind))

    for name, kind in (types or {}).items():
        add(name, kind)
    known = all(kind.startswith("*") or kind in _TYPE_BYTES for kind in flat)
    return Signature(tuple(names), tuple(flat)) if types is not None and known else None


@dataclass(frozen=True)
class Finding:
    """A pointer of a captured node that leads nowhere good."""

    node: int
    kernel: str
    parameter: str
    address: int
    problem: str
    """stale: was ours, is not live. unknown: never was ours. layout: the kernel's parameters are
    not those of its signature."""
    certain: bool
    """False: a word of a library kernel that looks like a pointer, but need not be one."""

    def __str__(self) -> str:
        doubt = "" if self.certain else " (if it is a pointer)"
        return f"node {self.node} ({self.kernel}), {self.parameter}: {self.problem} address {self.address:#x}{doubt}"


@dataclass(frozen=True)
class Coverage:
    """How much of one class of nodes an audit read."""

    nodes: int = 0
    pointers: int = 0


EXACT = "kernels, exactly by signature"
WORDS = "kernels, every aligned word"
COPIES = "copies and sets"
UNREAD = "other nodes (not read)"

UNREGISTERED = "unregistered live block"
GRAPH_POOL = "graph's own pool"


@dataclass(frozen=True)
class AuditReport:
    """Where the pointers of a graph lead, and how much of it was read."""

    findings: tuple[Finding, ...]
    pointers: Mapping[str, int]
    """How many lead to each registered buffer, named block, `GRAPH_POOL` or `UNREGISTERED`."""
    unregistered: tuple[Finding, ...]
    """Each pointer to a live block that nobody registered or named: no error, but not ours to rely on."""
    coverage: Mapping[str, Coverage]
    """By class: `EXACT`, `WORDS`, `COPIES`, `UNREAD`."""
    tensor_maps: int
    """128-byte parameters; their first word was checked as an address, the rest is not decoded."""
    struct_words: int
    """Aligned words of structs passed to library kernels, each checked as an address. cuBLAS keeps
    its tensor maps inside such a struct, where they cannot be told from other fields."""
    host_addresses: int
    """Ends of copies in host memory; not checked."""

    @property
    def ok(self) -> bool:
        return not self.findings

    def groups(self) -> dict[str, int]:
        """`pointers` with the weights of all layers under one name."""
        grouped: Counter[str] = Counter()
        for name, count in self.pointers.items():
            grouped["layers.*" if name.startswith("layers.") else name] += count
        return dict(grouped)

    def __str__(self) -> str:
        lines = ["pointer audit: " + ("no stale pointer" if self.ok else f"{len(self.findings)} findings")]
        lines += [f"  {finding}" for finding in self.findings]
        lines += [f"  {what}: {c.nodes} nodes, {c.pointers} pointers" for what, c in self.coverage.items()]
        lines.append(f"  words of library structs, tensor maps in them included: {self.struct_words}")
        lines.append(f"  tensor maps by themselves (not decoded, first word checked): {self.tensor_maps}")
        lines.append(f"  host addresses (not checked): {self.host_addresses}")
        lines.append("  lead to: " + ", ".join(f"{name} {count}" for name, count in self.groups().items()))
        return "\n".join(lines)


def audit(
    graph: Sequence[Node],
    registered: Mapping[str, torch.Tensor],
    book: AddressBook,
    known: Mapping[int, Signature] | None = None,
    *,
    pool: tuple[int, int] | None = None,
) -> AuditReport:
    """Check every pointer of a captured graph against live memory.

    Args:
        graph: the nodes.
        registered: every buffer that a step may read, by name; the first of equal ranges names it.
        book: live blocks and all ranges ever owned, observed just now.
        known: signatures of our own kernels by function handle; by default `signatures()`.
        pool: memory pool of this graph, where it allocates while captured: it keeps such memory.
    """
    known = signatures() if known is None else known
    reader = _Auditor(registered, book, pool)
    for node in graph:
        if node.kind == "kernel":
            reader.kernel(node, known.get(node.function))
        elif node.kind in ("memcpy", "memset"):
            reader.copy(node)
        elif node.kind not in ("empty", "event_record", "wait_event"):
            reader.count(UNREAD)
    return reader.report()


@dataclass(frozen=True)
class _Place:
    """Where an address leads."""

    name: str
    problem: str = ""


class _Auditor:
    """Collects what an audit finds."""

    def __init__(
        self, registered: Mapping[str, torch.Tensor], book: AddressBook, pool: tuple[int, int] | None
    ) -> None:
        self._book, self._pool = book, pool
        self._spans = [(name, *extent(tensor)) for name, tensor in registered.items()]
        ranges = [(begin, end) for _, begin, end in self._spans]
        ranges += [(s.address, s.address + s.size) for s in book.owned]
        self._lowest = min((begin for begin, _ in ranges), default=0)
        self._end = max((end for _, end in ranges), default=0)
        self._places: dict[int, _Place | None] = {}
        self._findings: list[Finding] = []
        self._unregistered: list[Finding] = []
        self._pointers: Counter[str] = Counter()
        self._nodes: Counter[str] = Counter()
        self._checked: Counter[str] = Counter()
        self._maps = self._structs = self._hosts = 0

    def count(self, kind: str) -> None:
        self._nodes[kind] += 1

    def kernel(self, node: Node, signature: Signature | None) -> None:
        fields = _struct_pointers(node.function)
        if fields and len(node.params) == 1 and len(node.params[0]) >= 8 * fields:
            self.count(EXACT)
            for at in range(fields):
                data = node.params[0][8 * at : 8 * at + 8]
                self._check(node, EXACT, f"parameter 0, byte {8 * at}", int.from_bytes(data, "little"))
            return
        if signature is not None:
            types = _with_hidden(signature, node)
            if types is not None:
                self.count(EXACT)
                for (name, kind), data in zip(types, node.params, strict=True):
                    if kind.startswith("*") or kind == "nvTmaDesc":
                        self._maps += kind == "nvTmaDesc"
                        self._check(node, EXACT, f"parameter {name!r}", int.from_bytes(data[:8], "little"))
                return
            sizes = [len(data) for data in node.params]
            what = f"parameters of sizes {sizes} against {', '.join(signature.types)}"
            self._findings.append(Finding(node.index, node.short_name, what, 0, "layout", True))
        self.count(WORDS)
        for number, (offset, data) in enumerate(zip(node.offsets, node.params, strict=True)):
            self._maps += len(data) == TENSOR_MAP_BYTES
            for byte in range(-offset % 8, len(data) - 7, 8):
                self._structs += len(data) > 8
                what = f"parameter {number}" + (f", byte {byte}" if len(data) > 8 else "")
                self._check(node, WORDS, what, int.from_bytes(data[byte : byte + 8], "little"))

    def copy(self, node: Node) -> None:
        self.count(COPIES)
        fields = dict(node.fields)
        for name in ("dst", "srcDevice", "dstDevice"):
            if fields.get(name):
                self._check(node, COPIES, name, fields[name])
        self._hosts += sum(bool(fields.get(name)) for name in ("srcHost", "dstHost"))

    def _check(self, node: Node, kind: str, parameter: str, address: int) -> None:
        if not address:
            return
        if address not in self._places:
            self._places[address] = self._place(address)
        place = self._places[address]
        certain = kind != WORDS
        if place is None:
            if not certain:
                return  # a number, not a pointer
            place = _Place("", "unknown")
        self._checked[kind] += 1
        finding = Finding(
            node.index, node.short_name, parameter, address, place.problem or UNREGISTERED, certain
        )
        if place.problem:
            self._findings.append(finding)
            return
        self._pointers[place.name] += 1
        if place.name == UNREGISTERED:
            self._unregistered.append(finding)

    def _place(self, address: int) -> _Place | None:
        """None: in no range that was ever ours."""
        if not self._lowest <= address < self._end:
            return None  # most words of most structs
        block, segment = self._book.find(address), self._book.segment(address)
        span = next((name for name, begin, end in self._spans if begin <= address < end), None)
        if segment is None:
            return None if span is None else _Place(span)  # memory of another allocator
        if block is None:
            in_pool = self._pool is not None and segment.pool == self._pool and segment in self._book.present
            return _Place(GRAPH_POOL) if in_pool else _Place("", "stale")
        return _Place(span or block.name or UNREGISTERED)

    def report(self) -> AuditReport:
        return AuditReport(
            findings=tuple(self._findings),
            pointers=dict(self._pointers.most_common()),
            unregistered=tuple(self._unregistered),
            coverage={
                kind: Coverage(self._nodes[kind], self._checked[kind])
                for kind in (EXACT, WORDS, COPIES, UNREAD)
            },
            tensor_maps=self._maps,
            struct_words=self._structs,
            host_addresses=self._hosts,
        )


def _struct_pointers(function: int) -> int:
    """How many pointers the parameter of one of our CUDA kernels begins with; 0 for other kernels."""
    own = sys.modules.get(f"{__name__.split('.')[0]}.ops.cuda.program")
    return own.POINTERS.get(function, 0) if own is not None else 0


def _with_hidden(signature: Signature, node: Node) -> list[tuple[str, str]] | None:
    """(name, type) of each parameter, Triton's own included; None if sizes do not fit."""
    hidden = len(node.params) - len(signature.types)
    if not 0 <= hidden <= len(_HIDDEN):
        return None
    names = (*signature.names, *_HIDDEN[:hidden])
    types = (*signature.types, *("*i8",) * hidden)
    sizes = [8 if kind.startswith("*") else _TYPE_BYTES[kind] for kind in types]
    return list(zip(names, types, strict=True)) if sizes == [len(p) for p in node.params] else None


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor's elements, and the one after the last; strides must not be negative."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


Count = Callable[[], int]
"""How many nodes the graph under capture has so far; 0 when nothing is captured."""


def node_counter(stream: int) -> Count:
    """A cheap counter of the nodes that a stream has captured so far.

    Args:
        stream: a `cudaStream_t`; nothing needs to be under capture yet.
    """
    from cuda.bindings import driver

    handle = driver.CUstream(stream)
    active = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
    graph: Any = None

    def count() -> int:
        nonlocal graph
        if graph is None:
            status, _, found, *_ = _checked(driver.cuStreamGetCaptureInfo(handle), "cuStreamGetCaptureInfo")
            if status != active:
                return 0
            graph = driver.CUgraph(init_value=int(found))
        return int(_checked(driver.cuGraphGetNodes(graph), "cuGraphGetNodes")[1])

    return count
