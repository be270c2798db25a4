"""Every kernel compiles for a GPU with the sizes of its launches and keeps its data in registers.

Compiling needs no GPU: Triton brings the assembler along.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.solver.triton_launch import (
    BLOCK_I,
    BLOCK_O,
    COLUMNS,
    ELEMENTS,
    FUSED,
    GROUP_ROWS,
    GROUP_WARPS,
    MOST_COLUMNS,
    ROWS,
    STAGES,
    SUMMANDS,
    WARPS,
)

triton = pytest.importorskip("triton")
GENERATIONS = [80, 90, 100]  # compute capabilities: A100, H100, B200; 89 compiles like 80
SHARED_BYTES = 48 * 1024  # of a program, on any device
REGISTERS = 65536  # of a multiprocessor, where two programs at least should fit
THREADS = 32  # of a warp
ONE_BY_ONE = {"S": COLUMNS, "ROWS": ROWS}
TOGETHER = {"B": MOST_COLUMNS, "K": SUMMANDS, "ROWS": GROUP_ROWS}
SHORT = {"B": MOST_COLUMNS, "ROWS": ELEMENTS // MOST_COLUMNS}
OF_COLUMNS, OF_GROUPS = {"num_warps": WARPS}, {"num_warps": GROUP_WARPS, "num_stages": STAGES}
USUAL = {"num_warps": 4}
# Kernel, sizes, options of the launch
KERNELS: dict[str, tuple[str, dict[str, object], dict[str, int]]] = {
    "round columns": ("round_columns_kernel", ONE_BY_ONE, OF_COLUMNS),
    "fit codes": ("fit_codes_kernel", ONE_BY_ONE, OF_COLUMNS),
    "fit scales": ("fit_scales_kernel", TOGETHER | {"SIGNED": True}, OF_GROUPS),
    "find sym grids": ("find_grids_kernel", TOGETHER | {"SYM": True}, OF_GROUPS),
    "find asym grids": ("find_grids_kernel", TOGETHER | {"SYM": False}, OF_GROUPS),
    "best candidate": ("best_candidate_kernel", SHORT | {"CANDIDATES": 64}, USUAL),
    "dequantize": ("dequantize_kernel", {"BITS": 3, "BLOCK_O": BLOCK_O, "BLOCK_I": BLOCK_I}, USUAL),
}
POINTERS = {
    "group_of": "*i32",
    "qweight": "*i32",
    "qzeros": "*i32",
    "g_idx": "*i32",
    "best": "*i64",
}
NUMBERS = {"max_code": "fp32", "norm": "fp32"}
COUNTS = {"out_features", "in_features", "zero_offset"}


def type_of(argument: str) -> str:
    if argument in COUNTS or argument.startswith("n_"):
        return "i32"
    if argument.endswith(("_stride", "_distance")):
        return "i32"
    return NUMBERS.get(argument) or POINTERS.get(argument, "*fp32")


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu_and_spill_nothing(
    name: str, generation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gptq_cli.solver import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, sizes, options = KERNELS[name]
    kernel: Any = getattr(triton_kernels, function)
    types, hints = {}, {}
    for number, argument in enumerate(kernel.arg_names):
        kind = "constexpr" if argument in sizes else type_of(argument)
        types[argument] = kind
        if kind.startswith("*") or kind == "i32":
            hints[(number,)] = [["tt.divisibility", 16]]  # as for tensors of usual sizes
    values = {(kernel.arg_names.index(argument),): value for argument, value in sizes.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=hints)
    target = GPUTarget("cuda", generation, THREADS)
    compiled = triton.compile(source, target, options={**options, "enable_fp_fusion": FUSED})
    assert compiled.metadata.shared <= SHARED_BYTES
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run(
        [str(reader), "-res-usage", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    used = {kind: int(number) for kind, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    assert (used["STACK"], used["LOCAL"]) == (0, 0), told
    assert used["REG"] * options["num_warps"] * THREADS <= REGISTERS // 2, told
