"""The kernels that `ostinato explain` names, against those of captured graphs."""

from __future__ import annotations

import pytest
import torch

from ostinato import LLM
from ostinato.graphs import survey
from ostinato.types import GraphKey, SamplerVariant, StepKind

pytestmark = pytest.mark.gpu

ENTRIES = {
    "decode.cu": "decode", "rows.cu": "decode_rows", "attention.cu": "attention", "attend.cu": "attend",
    "chain.cu": "chain", "linear.cu": "linear", "sample.cu": "sample",
}  # fmt: skip
"""Names of the kernels in CUDA C++"""


def test_a_graph_has_the_kernels_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTINATO_TUNE", "0")
    llm = LLM(
        "llama-3.2-1b", load_format="dummy", max_num_seqs=132, max_model_len=256, max_num_batched_tokens=256
    )
    try:
        report, engine = llm.graph_report(), llm.engine
        hopper = torch.cuda.get_device_capability()[0] == 9
        seen = set()
        for rows in (1, 8, 16, 32, 128, 132):
            for sampler in (SamplerVariant.GREEDY, SamplerVariant.SAMPLE):
                key = GraphKey(StepKind.DECODE, rows, rows, sampler)
                with engine.device_context():
                    engine.runner.prepare([key])
                launched = {name for name, _, _ in survey.kernels(engine, key)} & set(ENTRIES.values())
                said = {
                    ENTRIES[source]
                    for use in report.kernels
                    if any(low <= rows <= top for low, top in use.decode)
                    and (use.op != "sample" or sampler is not SamplerVariant.GREEDY)
                    and (source := use.kernel.partition(":")[0].partition(";")[0]) in ENTRIES
                }
                assert launched == said, key
                seen |= said
        assert not hopper or seen == set(ENTRIES.values())
    finally:
        llm.close()
