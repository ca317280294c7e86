"""The graph report: JSON, text and page. `python -m tests.unit.test_report` writes the example."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ostinato.errors import ConfigError, GraphError
from ostinato.graphs import report as report_module
from ostinato.graphs.report import (
    HEADINGS,
    REASONS,
    STATES,
    BufferInfo,
    ChainNode,
    ConfigValue,
    GraphReport,
    KernelUse,
    KeyReport,
    decide,
    explain,
    findings,
    html,
    table,
)
from ostinato.types import GraphKey, Reason, SamplerVariant, StepKind

EXAMPLE = Path(__file__).parents[1] / "fixtures" / "graphs-report.json"
MIB = 1024**2
LAYERS = 16
LADDER = (1, 2, 4, 8, 16, 18, 20, 24, 28, 32, 40, 48, 64, 80, 96)


def synthetic_chain(size: int, sampler: str, layers: int = LAYERS) -> tuple[ChainNode, ...]:
    """A step of `size` rows: prepare, embed, five kernels a layer, head, sampler, advance."""
    small = size <= 16
    wide = 1.0 + size / 90
    steps: list[tuple[str, str, int | None, int, int, float]] = [
        ("prepare", "prepare_kernel", None, size, 128, 1.6),
        ("embed_norm", "embed_norm_kernel", None, size, 256, 1.9),
    ]
    for layer in range(layers):
        wobble = 1 + 0.04 * ((layer * 7 + size) % 5)
        gemm = "gemv_kernel" if small else "gemm_kernel"
        steps += [
            ("norm_linear", f"norm_{gemm}", layer, 192 if small else 48 * -(-size // 16), 256, 4.1 * wide),
            ("rope_paged_attention", "rope_paged_attention_kernel", layer, 8 * size, 128, 3.2 + 0.07 * size),
            ("linear_add", f"{gemm}_add", layer, 128 if small else 32 * -(-size // 16), 256, 2.9 * wide),
            ("norm_gate_up", f"norm_gate_up_{gemm}", layer, 512, 256, 12.4 * wide * wobble),
            ("linear_add", f"{gemm}_add", layer, 128 if small else 32 * -(-size // 16), 256, 6.6 * wide),
        ]
    steps += [
        ("norm_head", "norm_head_kernel", None, 1002, 256, 88.0 + 0.3 * size),
        ("sample", f"sample_{sampler}_kernel", None, size, 512, 4.5 if sampler == "greedy" else 9.5),
        ("advance", "advance_kernel", None, 1, 128, 1.3),
    ]
    return tuple(
        ChainNode(i, kernel, op, layer, (grid, 1, 1), (block, 1, 1), round(us, 2))
        for i, (op, kernel, layer, grid, block, us) in enumerate(steps)
    )


def synthetic_key(size: int, sampler: str, state: str, hits: int, note: str = "") -> KeyReport:
    key = str(GraphKey(StepKind.DECODE, size, size, SamplerVariant[sampler.upper()]))
    below = max((rung for rung in LADDER if rung < size), default=0)
    waste = round((size - below - 1) / size * (0.3 + size % 3 / 10), 4)
    if state in ("waiting", "failed"):
        return KeyReport(key, "decode", size, size, sampler, state, note, hits=hits, padding_waste=waste)
    chain = synthetic_chain(size, sampler)
    alive = state in ("captured", "checking")
    replay = round(0.93 * sum(node.us or 0.0 for node in chain), 1)
    eager = round(1173 + size % 5 * 9.0, 1)
    if state == "dropped":
        replay = round(1.02 * eager, 1)
    return KeyReport(
        key=key,
        kind="decode",
        num_tokens=size,
        num_seqs=size,
        sampler=sampler,
        state=state,
        note=note,
        nodes=len(chain),
        kernels=len(chain),
        edges=len(chain) - 1,
        programmatic_edges=len(chain) - 4,
        bytes=(540 + size) * 1024 if alive else 0,
        predicted_bytes=560 * 1024,
        capture_ms=6.2 + size / 40,
        instantiate_ms=1.9 + size / 200,
        verify_ms=3.1 + size / 60,
        hits=hits,
        replays=max(0, hits - 3) if alive else 0,
        padding_waste=waste,
        eager_us=eager,
        replay_us=replay,
        checks=3 + hits // 500,
        mismatches=1 if state == "quarantined" else 0,
        chain=chain,
    )


def synthetic_report() -> GraphReport:
    """Numbers that nobody measured, with one key in every state and a hole in the ladder."""
    ladder = LADDER
    hits = dict(
        zip(ladder, (9120, 3310, 2204, 1850, 960, 61, 44, 318, 105, 702, 97, 51, 233, 2, 41), strict=True)
    )
    keys = [
        synthetic_key(size, "greedy", "captured", hits[size])
        for size in ladder
        if size not in (18, 40, 64, 80)
    ]
    keys += [
        synthetic_key(18, "greedy", "evicted", hits[18], "its benefit per byte was the lowest"),
        synthetic_key(40, "greedy", "quarantined", hits[40], "check 2: row 13 of the logits differs"),
        synthetic_key(64, "greedy", "dropped", hits[64], "replay took 1.02 times as long as eager"),
        synthetic_key(80, "greedy", "failed", hits[80], "out of memory while instantiating"),
        synthetic_key(1, "sample", "captured", 4020),
        synthetic_key(4, "sample", "captured", 1377),
        synthetic_key(2, "full", "checking", 3, "captured, not yet proved equal at its real size"),
        synthetic_key(8, "full", "waiting", 1, "1 of 2 hits"),
    ]
    return GraphReport(
        model="synthetic example (Llama, 16 layers)",
        device="NVIDIA H100 80GB HBM3",
        created="2026-01-01T12:00:00+00:00",
        mode="FULL_DECODE_ONLY",
        max_num_seqs=100,
        min_hits=2,
        versions={
            "ostinato": "0.1.0",
            "torch": "2.11.0",
            "cuda": "13.0",
            "triton": "3.6.0",
            "driver": "580.95",
        },
        config=(
            ConfigValue("dtype", "bfloat16", "model"),
            ConfigValue("max_model_len", "131072", "model"),
            ConfigValue("max_num_seqs", "100", "user"),
            ConfigValue("cudagraph_mode", "FULL_DECODE_ONLY", "default"),
            ConfigValue("capture_sizes", ", ".join(map(str, ladder)), "user"),
            ConfigValue("cudagraph_min_hits", "2", "default"),
            ConfigValue("gpu_memory_utilization", "0.92", "default"),
            ConfigValue("pipeline_depth", "2", "device"),
        ),
        ladder=ladder,
        holes=("batches 97 to 100 have no graph",),
        memory=(
            ("weights", 2357 * MIB),
            ("workspaces", 32 * MIB),
            ("arena", 51 * MIB),
            ("static buffers", 4 * MIB),
            ("warm-up", 210 * MIB),
            ("KV cache", 68_400 * MIB),
            ("graphs", sum(key.bytes for key in keys)),
        ),
        budget_bytes=64 * MIB,
        graph_bytes=sum(key.bytes for key in keys),
        steps_by_key={key.key: key.replays for key in keys if key.replays},
        eager_by_reason={
            "prefill_not_captured": 612,
            "over_max": 85,
            "quarantined": 95,
            "slower_than_eager": 231,
            "no_key_yet": 33,
            "being_checked": 14,
            "capture_failed": 2,
        },
        kernels=(
            KernelUse("fused", "", "decode.cu: the whole model in one kernel", "", ((1, 1),)),
            KernelUse("attend", "", "attend.cu: QKV and attention in one kernel", "measured", ((17, 32),)),
            KernelUse("norm_linear", "3072x2048", "Triton: gemv", "by rule", (), ((1, 1),)),
            KernelUse(
                "norm_linear",
                "3072x2048",
                "linear.cu: tile 64x128",
                "measured",
                ((2, 16), (33, 97)),
                ((2, 128),),
            ),
            KernelUse(
                "norm_linear", "3072x2048", "library (cuBLAS)", "by rule", ((98, 100),), ((129, 8192),)
            ),
            KernelUse("sample", "", "sample.cu", "", ((1, 100),), ((1, 8192),)),
        ),
        buffers=(
            BufferInfo("words", (61_440,), "int32", 245_760),
            BufferInfo("block_tables", (100, 512), "int32", 204_800),
            BufferInfo("emitted", (100,), "int32", 400),
            BufferInfo("logprob_values", (100, 21), "float32", 8_400),
            BufferInfo("prompt_mask", (100, 4008), "int32", 1_603_200),
            BufferInfo("arena", (51 * MIB,), "uint8", 51 * MIB),
        ),
        keys=tuple(keys),
    )


EMPTY = GraphReport("m", "cpu", "2026-01-01T00:00:00+00:00", "NONE", 32)
REPORT = synthetic_report()


def write_example(path: Path = EXAMPLE) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(REPORT.to_json() + "\n", encoding="utf-8")


def replaced(report: GraphReport = REPORT, **changes: object) -> GraphReport:
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


# --- JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [REPORT, EMPTY], ids=["full", "empty"])
def test_json_round_trip(report: GraphReport) -> None:
    assert GraphReport.from_json(report.to_json()) == report


def test_the_example_reads_and_renders() -> None:
    report = GraphReport.from_json(EXAMPLE.read_text(encoding="utf-8"))
    assert GraphReport.from_json(report.to_json()) == report
    assert report.keys
    assert report.model in explain(report, 1)
    assert "fused: decode.cu" in explain(report, 1)
    assert "rope_paged_attention: attention.cu" in explain(report, 16)
    assert all(key.key in table(report) for key in report.keys)
    assert len(html(report)) > 10_000


def test_another_version_is_refused_by_name() -> None:
    text = json.dumps({"version": 99, "report": {}})
    with pytest.raises(GraphError, match="version 99: this ostinato reads version 2"):
        GraphReport.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(model=3), r"report\.model: expected str"),
        (lambda r: r.update(colour="red"), r"unknown \['colour'\]"),
        (lambda r: r.pop("ladder"), r"missing \['ladder'\]"),
        (lambda r: r.update(ladder=[1, True]), r"report\.ladder\[1\]: expected int"),
        (lambda r: r.update(ladder={}), r"report\.ladder: expected a list"),
        (lambda r: r.update(memory=[["weights"]]), r"report\.memory\[0\]: expected 2 items"),
        (lambda r: r.update(versions=[]), r"report\.versions: expected an object"),
        (lambda r: r["keys"][0].update(eager_us="fast"), r"report\.keys\[0\]\.eager_us: expected float"),
        (lambda r: r["keys"].append(None), r"expected an object, got 'None'"),
    ],
)
def test_a_damaged_report_names_the_place(change: object, message: str) -> None:
    data = json.loads(REPORT.to_json())
    change(data["report"])  # type: ignore[operator]
    with pytest.raises(GraphError, match=message):
        GraphReport.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "null"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match="not a graph report"):
        GraphReport.from_json(text)


@pytest.mark.parametrize("render", [GraphReport.to_json, html])
def test_numbers_that_json_cannot_hold_are_refused(render: object) -> None:
    broken = replaced(keys=(dataclasses.replace(REPORT.keys[0], capture_ms=float("nan")),))
    with pytest.raises(GraphError, match="JSON"):
        render(broken)  # type: ignore[operator]


def test_every_reason_code_is_explained() -> None:
    assert {reason.value for reason in Reason} <= REASONS.keys()


# --- table -----------------------------------------------------------------------------


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_table_has_every_key_under_aligned_headings() -> None:
    lines = table(REPORT).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("key"))
    assert tuple(cells(lines[start])) == HEADINGS
    body = lines[start + 1 : start + 1 + len(REPORT.keys)]
    for key, line in zip(REPORT.keys, body, strict=True):
        row = dict(zip(HEADINGS, cells(line), strict=True))
        assert (row["key"], row["state"]) == (key.key, key.state)
        assert row["nodes"] == str(key.nodes)
        assert row["hits"] == f"{key.hits:,}"
        assert row["gain"] == (f"{key.gain:.2f}×" if key.gain else "-")
    assert len({len(line) for line in [lines[start], *body]}) == 1


def test_table_totals_are_the_sums_of_the_columns() -> None:
    total = cells(next(line for line in table(REPORT).splitlines() if line.startswith("total")))
    captured = sum(key.state == "captured" for key in REPORT.keys)
    assert total[1] == f"{captured} captured of {len(REPORT.keys)}"
    assert total[2] == f"{sum(key.nodes for key in REPORT.keys):,}"
    assert total[4] == f"{sum(key.bytes for key in REPORT.keys) // 1024:,}"
    assert total[7] == f"{sum(key.hits for key in REPORT.keys):,}"
    assert total[-1] == f"{REPORT.gain:.2f}×"


def test_the_total_gain_weighs_keys_by_their_replays() -> None:
    def key(replays: int, eager: float | None, replay: float | None) -> KeyReport:
        return KeyReport(
            "k", "decode", 1, 1, "greedy", "captured", replays=replays, eager_us=eager, replay_us=replay
        )

    assert replaced(keys=(key(9, 30.0, 10.0), key(1, 10.0, 10.0), key(5, None, 1.0))).gain == 2.8
    assert replaced(keys=(key(5, 1.0, None), key(0, 2.0, 1.0))).gain is None
    assert key(1, 3.0, 0.0).gain is None


def test_table_gives_reasons_most_frequent_first_and_holes() -> None:
    text = table(REPORT)
    found = re.findall(r"^  (\w+) +([\d,]+)  (.+)$", text, re.M)
    assert [code for code, _, _ in found] == sorted(
        REPORT.eager_by_reason, key=lambda c: -REPORT.eager_by_reason[c]
    )
    assert all(words == REASONS[code] for code, _, words in found)
    assert "batches 97 to 100 have no graph" in text
    assert "check 2: row 13 of the logits differs" in text


def test_an_unknown_reason_code_is_shown_all_the_same() -> None:
    assert "no explanation is known" in table(replaced(eager_by_reason={"solar_flare": 3}))


# --- explain ---------------------------------------------------------------------------


def test_explain_gives_values_with_their_sources_and_what_was_allocated() -> None:
    text = explain(REPORT)
    assert re.search(r"max_num_seqs +100 +\(user\)", text)
    assert re.search(r"arena +\[53477376\] +uint8 +51\.0 MiB", text)
    assert re.search(r"KV cache +66\.8 GiB", text)
    assert f"ladder: {', '.join(map(str, REPORT.ladder))}" in text
    assert "batches 97 to 100 have no graph" in text


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (
            1,
            ["on the ladder: no padding", "captured, its graph is replayed", "with sampler full: no key yet"],
        ),
        (3, ["padded to 4: 1 of 4 rows are padding (25.0%)", "sample]: captured"]),
        (8, ["full]: waiting, runs eagerly: seen, not captured yet", "(1 of 2 hits)"]),
        (17, ["evicted, runs eagerly"]),
        (40, ["quarantined, runs eagerly", "row 13 of the logits differs"]),
        (50, ["padded to 64", "dropped, runs eagerly: its graph was slower"]),
        (80, ["failed, runs eagerly: its capture failed", "out of memory"]),
        (98, ["runs at its own size, 98", "eager (over_max)", "hole: batches 97 to 100 have no graph"]),
        (101, ["never happens: at most 100 sequences"]),
    ],
)
def test_explain_says_what_a_batch_does_and_why(batch: int, expected: list[str]) -> None:
    text = explain(REPORT, batch)
    assert f"a decode step of {batch} sequence" in text
    for words in expected:
        assert words in text
    assert all(line in text for line in decide(REPORT, batch))


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (1, ["fused: decode.cu: the whole model in one kernel", "sample: sample.cu"]),
        (3, ["norm_linear 3072x2048: linear.cu: tile 64x128 (measured)", "sample: sample.cu"]),
        (17, ["attend: attend.cu: QKV and attention in one kernel (measured)", "sample: sample.cu"]),
        (97, ["norm_linear 3072x2048: linear.cu: tile 64x128 (measured)", "sample: sample.cu"]),
        (98, ["norm_linear 3072x2048: library (cuBLAS) (by rule)", "sample: sample.cu"]),
        (101, []),
    ],
)
def test_explain_names_the_kernels_of_a_batch(batch: int, expected: list[str]) -> None:
    """Of the size that it is padded to, on a graph or eager."""
    lines = decide(REPORT, batch)
    begin = lines.index("its kernels, by op:") + 1 if expected else len(lines)
    assert lines[begin:] == [f"  {line}" for line in expected]


def test_explain_lists_every_kernel_with_its_steps() -> None:
    text = explain(REPORT)
    rows = [cells(line) for line in text.split("kernels, by rows")[1].split("\n\n")[0].splitlines()[2:]]
    assert rows[0] == ["op (outputs x inputs)", "decode", "prompts", "kernel"]
    assert rows[1] == ["fused", "1", "-", "decode.cu: the whole model in one kernel"]
    assert rows[4] == [
        "norm_linear 3072x2048", "2 to 16, 33 to 97", "2 to 128", "linear.cu: tile 64x128 (measured)"
    ]  # fmt: skip
    assert rows[5][1:3] == ["98 to 100", "129 to 8,192"]
    assert len(rows) == 1 + len(REPORT.kernels)
    assert "kernels, by rows" not in explain(EMPTY)


def test_every_state_says_what_a_step_does() -> None:
    assert {key.state for key in REPORT.keys} == STATES.keys()


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_that_is_none_is_refused(batch: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        explain(REPORT, batch)


def test_an_engine_without_graphs_is_explained() -> None:
    cpu = replaced(EMPTY, eager_by_reason={"disabled": 12})
    assert "no graph keys" in table(cpu)
    assert "0 of 12 on graphs (0.0%)" in table(cpu)
    assert "eager (disabled): graphs are off" in explain(cpu, 5)
    assert "runs at its own size, 5" in explain(cpu, 5)
    assert findings(cpu) == []


def test_findings_name_what_stands_out_and_nothing_else() -> None:
    calm = replaced(keys=REPORT.keys[:1], holes=(), eager_by_reason={})
    assert findings(calm) == []
    found = "\n".join(findings(REPORT))
    for words in (
        "Hole in the ladder",
        "is quarantined",
        "could not be captured",
        "was dropped",
    ):
        assert words in found
    wrong = dataclasses.replace(REPORT.keys[0], checks=3, mismatches=1)
    assert "differed from eager in 1 of 3 checks" in findings(replaced(calm, keys=(wrong,)))[0]
    idle = dataclasses.replace(REPORT.keys[0], replays=0, eager_us=1.0, replay_us=2.0)
    found = "\n".join(
        findings(
            replaced(
                calm, keys=(idle,), graph_bytes=65 * MIB, steps_by_key={}, eager_by_reason={"over_max": 9}
            )
        )
    )
    for words in (
        "1 captured graph never replayed",
        "slower than eager (0.50×)",
        "over the budget",
        "9 of 9",
    ):
        assert words in found


# --- the page --------------------------------------------------------------------------


class Outline(HTMLParser):
    """Tags and attributes of a page, with the data that it carries."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        if data.startswith('{"report"'):
            self.data = data


def test_the_page_fetches_nothing() -> None:
    page = html(REPORT)
    outline = Outline(page)
    assert outline.links == ["data:,"]
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", page)
    assert "default-src 'none'" in page
    assert not {"link", "img", "iframe", "object"} & set(outline.tags) - {"link"}
    assert outline.tags.count("link") == 1  # the empty icon, which keeps browsers from asking for one


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;<!-- @@data@@ \u2028 '\""


def test_names_cannot_become_markup() -> None:
    nasty = replaced(
        model=EVIL,
        device=EVIL,
        holes=(EVIL,),
        memory=((EVIL, 1),),
        config=(ConfigValue(EVIL, EVIL, EVIL),),
        buffers=(BufferInfo(EVIL, (1,), EVIL, 4),),
        eager_by_reason={EVIL: 1},
        kernels=(KernelUse(EVIL, EVIL, EVIL, EVIL, ((1, 1),)),),
        keys=(dataclasses.replace(REPORT.keys[0], key=EVIL, note=EVIL, state=EVIL),),
    )
    outline = Outline(html(nasty))
    assert outline.tags == Outline(html(REPORT)).tags
    assert "alert(1)<" not in html(nasty)
    assert json.loads(outline.data)["report"]["model"] == EVIL


def test_an_empty_report_renders() -> None:
    assert "no graph keys" in html(EMPTY)
    assert "no graph keys" in table(EMPTY)
    assert "none reported" in explain(EMPTY)


def test_compare_takes_keys_of_the_report_only() -> None:
    first, second = REPORT.keys[0].key, REPORT.keys[1].key
    assert json.loads(Outline(html(REPORT, (first, second))).data)["compare"] == [first, second]
    with pytest.raises(GraphError, match="did you mean"):
        html(REPORT, (first, second.replace("decode", "decoed")))


def test_the_page_answers_as_explain_does() -> None:
    outcomes = json.loads(Outline(html(REPORT)).data)["outcomes"]
    assert [low for low, _, _ in outcomes[1:]] == [top + 1 for _, top, _ in outcomes[:-1]]
    for low, top, lines in outcomes:
        for batch in (low, top):
            assert decide(REPORT, batch)[1:] == lines
    assert (outcomes[0][0], outcomes[-1][1]) == (1, REPORT.max_num_seqs)
    said = {line for _, _, lines in outcomes for line in lines}
    assert {f"  {use}" for use in REPORT.kernels if use.decode} <= said


def test_the_report_needs_no_torch() -> None:
    source = Path(report_module.__file__).read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from) (torch|numpy)", source, re.M)


if __name__ == "__main__":
    write_example()


def test_explain_says_which_graph_ran_how_often_why_not_and_at_what_cost() -> None:
    """The questions that people have about a server on graphs, each with its answer in the text."""
    report = GraphReport.from_json(EXAMPLE.read_text())
    text, page = explain(report), html(report)
    used = next(k for k in report.keys if k.replays)
    line = next(line for line in text.splitlines() if line.startswith(f"  {used.key}"))
    for answer in (f"{used.replays:,}", f"{used.hits:,}", f"{used.capture_ms + used.instantiate_ms:,.1f}"):
        assert answer in line.split()  # which, how often, what it cost to make
    assert line.endswith("×")  # what it brings
    for code, count in (report.eager_by_reason | report.delayed_by_reason).items():
        assert re.search(rf"  {code} +{count:,}  \w", text), code  # why not, in words
        assert code in page
    assert used.key in page
