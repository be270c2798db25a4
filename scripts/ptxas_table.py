#!/usr/bin/env python3
"""Compile each Triton kernel for generations of GPUs, and show what a program of it takes.

    .venv/bin/python scripts/ptxas_table.py [--targets 80 89 90 100] [--markdown] [--json FILE]

Needs no GPU: the compiler and the assembler come with Triton. For each kernel and compute
capability it prints registers of a thread, bytes that a thread spills to local memory, and bytes of
shared memory of a program. The exit code is 1 if a kernel spills, or if two programs do not fit in
a multiprocessor by their registers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import benchmark_parser, write_json

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

TARGETS = {80: "A100", 89: "L4, RTX 4090", 90: "H100", 100: "B200"}  # by compute capability
REGISTERS = 65536  # of a multiprocessor
SHARED_BYTES = 48 * 1024  # that a program may have on any device without asking for more
THREADS = 32  # of a warp


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as the program launches it: function, sizes, and options of the launch."""

    function: str
    sizes: Mapping[str, object]
    options: Mapping[str, int]


ONE_BY_ONE = {"S": COLUMNS, "ROWS": ROWS}
TOGETHER = {"B": MOST_COLUMNS, "K": SUMMANDS, "ROWS": GROUP_ROWS}
SHORT = {"B": MOST_COLUMNS, "ROWS": ELEMENTS // MOST_COLUMNS}
PACKED = {"BITS": 3, "BLOCK_O": BLOCK_O, "BLOCK_I": BLOCK_I}
OF_COLUMNS, OF_GROUPS = {"num_warps": WARPS}, {"num_warps": GROUP_WARPS, "num_stages": STAGES}
USUAL = {"num_warps": 4}
KERNELS = {
    "round columns": Kernel("round_columns_kernel", ONE_BY_ONE, OF_COLUMNS),
    "fit codes": Kernel("fit_codes_kernel", ONE_BY_ONE, OF_COLUMNS),
    "fit scales": Kernel("fit_scales_kernel", TOGETHER | {"SIGNED": True}, OF_GROUPS),
    "find sym grids": Kernel("find_grids_kernel", TOGETHER | {"SYM": True}, OF_GROUPS),
    "find asym grids": Kernel("find_grids_kernel", TOGETHER | {"SYM": False}, OF_GROUPS),
    "best candidate": Kernel("best_candidate_kernel", SHORT | {"CANDIDATES": 64}, USUAL),
    "dequantize": Kernel("dequantize_kernel", PACKED, USUAL),
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


@dataclass(frozen=True, slots=True)
class Usage:
    """What a kernel takes on one target: registers and spilled bytes of a thread, shared bytes."""

    kernel: str
    target: int
    warps: int
    registers: int
    spilled: int
    shared: int

    @property
    def programs(self) -> int:
        """The number of programs that the registers of a multiprocessor hold."""
        return REGISTERS // (self.registers * self.warps * THREADS)

    @property
    def fits(self) -> bool:
        """Whether nothing spills, and two programs fit in a multiprocessor."""
        return not self.spilled and self.programs >= 2 and self.shared <= SHARED_BYTES


def usage(name: str, target: int) -> Usage:
    """Compile one of KERNELS for the compute capability `target` and return what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = KERNELS[name]
    options = {**kernel.options, "enable_fp_fusion": FUSED}
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, TRITON_CACHE_DIR=folder),
    ):
        compiled = triton.compile(_source(kernel), GPUTarget("cuda", target, THREADS), options)
        told = _resources(compiled.asm["cubin"], Path(folder) / "kernel.cubin")
    return Usage(
        kernel=name,
        target=target,
        warps=kernel.options["num_warps"],
        registers=told["REG"],
        spilled=told["STACK"] + told["LOCAL"],
        shared=compiled.metadata.shared,
    )


def _source(kernel: Kernel) -> Any:
    """Return the kernel with the types of its arguments, as for tensors of usual sizes."""
    from triton.compiler import ASTSource

    from gptq_cli.solver import triton_kernels

    function: Any = getattr(triton_kernels, kernel.function)
    types, hints = {}, {}
    for number, argument in enumerate(function.arg_names):
        types[argument] = _type_of(argument, kernel)
        if types[argument].startswith("*") or types[argument] == "i32":
            hints[(number,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in kernel.sizes.items()}
    return ASTSource(fn=function, signature=types, constexprs=values, attrs=hints)


def _type_of(argument: str, kernel: Kernel) -> str:
    if argument in kernel.sizes:
        return "constexpr"
    if argument in COUNTS or argument.startswith("n_"):
        return "i32"
    if argument.endswith(("_stride", "_distance")):
        return "i32"
    return NUMBERS.get(argument) or POINTERS.get(argument, "*fp32")


def _resources(cubin: bytes, file: Path) -> dict[str, int]:
    """Return what the assembler has noted in a compiled kernel, by the names of cuobjdump."""
    import triton

    file.write_bytes(cubin)
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(reader), "-res-usage", str(file)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {kind: int(number) for kind, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


def markdown(found: Iterable[Usage], targets: Iterable[int]) -> Iterator[str]:
    """Yield the lines of a table with a row for each kernel and a column for each target."""
    names = [f"sm_{target} ({TARGETS.get(target, 'other')})" for target in targets]
    yield f"| kernel | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    rows: dict[str, list[str]] = {}
    for use in found:
        cell = f"{use.registers} / {use.spilled} / {use.shared}"
        rows.setdefault(use.kernel, []).append(cell)
    for kernel, cells in rows.items():
        yield f"| {kernel} | {' | '.join(cells)} |"


def main() -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), metavar="NUMBER")
    parser.add_argument("--markdown", action="store_true", help="print a table for the documents")
    arguments = parser.parse_args()
    found = [usage(kernel, target) for kernel in KERNELS for target in arguments.targets]
    write_json(arguments.json, [asdict(use) for use in found])
    if arguments.markdown:
        for line in markdown(found, arguments.targets):
            print(line)
    for use in found:
        takes = f"{use.registers} registers, {use.spilled} bytes spilled, {use.shared} shared"
        line = f"{use.kernel:16} sm_{use.target:<4} {takes}, {use.programs} programs"
        if not arguments.markdown:
            print(line)
        if not use.fits:
            print(f"error: does not fit: {line}", file=sys.stderr)
    return int(not all(use.fits for use in found))


if __name__ == "__main__":
    sys.exit(main())
