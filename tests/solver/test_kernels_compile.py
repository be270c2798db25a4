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
    ELEMENTS,
    FUSED,
    MOST_COLUMNS,
    ROWS,
    WARPS,
)

triton = pytest.importorskip("triton")
HOPPER = 90
SHARED_BYTES = 48 * 1024  # of a program, on any device
REGISTERS = 65536  # of a multiprocessor, where two programs at least should fit
TILE = {"B": MOST_COLUMNS, "ROWS": ROWS}
SHORT = {"B": MOST_COLUMNS, "ROWS": ELEMENTS // MOST_COLUMNS}
KERNELS: dict[str, tuple[str, dict[str, object]]] = {
    "round_columns_kernel": ("triton_kernels", TILE),
    "fit_codes_kernel": ("triton_kernels", TILE),
    "fit_scales_kernel": ("triton_kernels", SHORT | {"SIGNED": True}),
    "best_candidate_kernel": ("triton_kernels", SHORT | {"CANDIDATES": 64}),
    "dequantize_kernel": ("triton_kernels", {"BITS": 3, "BLOCK_O": BLOCK_O, "BLOCK_I": BLOCK_I}),
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
    return NUMBERS.get(argument) or POINTERS.get(argument, "*fp32")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu_and_spill_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, sizes = KERNELS[name]
    kernel: Any = getattr(__import__(f"gptq_cli.solver.{module}", fromlist=[name]), name)
    types, hints = {}, {}
    for number, argument in enumerate(kernel.arg_names):
        kind = "constexpr" if argument in sizes else type_of(argument)
        types[argument] = kind
        if kind.startswith("*") or kind == "i32":
            hints[(number,)] = [["tt.divisibility", 16]]  # as for tensors of usual sizes
    values = {(kernel.arg_names.index(argument),): value for argument, value in sizes.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=hints)
    options = {"num_warps": WARPS, "enable_fp_fusion": FUSED}
    compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run(
        [str(reader), "-res-usage", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    used = {kind: int(number) for kind, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    assert (used["STACK"], used["LOCAL"]) == (0, 0), told
    assert used["REG"] * WARPS * 32 <= REGISTERS // 2, told
