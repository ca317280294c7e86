"""Programs compiled at run time, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ostinato.ops.cuda.program import addresses, build

pytestmark = pytest.mark.gpu

SOURCE = """
extern "C" __global__ void last_word(int *out) {
    extern __shared__ int words[];
    unsigned bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    words[bytes / 4 - 1] = bytes;
    *out = words[bytes / 4 - 1];
}
"""


def test_launches_of_one_function_have_each_their_own_shared_memory(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    file = tmp_path / "last_word.cu"
    file.write_text(SOURCE)
    sizes = (96 << 10, 60 << 10, 1 << 10)
    kernels = [
        build(file, "last_word", {}, device=device, grid=1, block=1, shared_bytes=size) for size in sizes
    ]
    for size, kernel in zip(sizes, kernels, strict=True):
        out = torch.zeros(1, dtype=torch.int32, device=device)
        kernel.launch(addresses([out]))
        assert int(out) == size
