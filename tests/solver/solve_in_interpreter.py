"""Solve the cases of `kernel_cases` with Triton kernels that are interpreted on the CPU.

usage: solve_in_interpreter.py SOLUTIONS.npz        with TRITON_INTERPRET=1 set from outside
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from gptq_cli.solver import numerics, refine, solve
from tests.solver.kernel_cases import CASES, EXPERTS, MOST_COLUMNS, solved, solved_experts


def every(tensor: Tensor) -> bool:
    return len(tensor) > 0


def multiply_halves(left: Tensor, right: Tensor) -> Tensor:
    assert left.dtype == right.dtype == torch.float16
    return left.float() @ right.float()


def main(solutions_file: str) -> None:
    torch.set_num_threads(1)
    numerics.KERNEL_DEVICES.add("cpu")
    # Launches and panels of fewer columns, as a step takes milliseconds here.
    solve.KERNEL_BLOCKS, refine.MOST_COLUMNS = (MOST_COLUMNS, MOST_COLUMNS), MOST_COLUMNS
    refine.PANEL = 2 * MOST_COLUMNS
    solutions = {}
    for name, case in CASES.items():
        quantized = solved(case)
        for part in ("codes", "scales", "zeros"):
            solutions[f"{name}/{part}"] = getattr(quantized, part).numpy()
    for name, experts in EXPERTS.items():
        for number, solution in enumerate(solved_experts(experts)):
            for part in ("codes", "scales", "zeros"):
                values = getattr(solution.quantized, part).numpy()
                solutions[f"{name}/{number}/{part}"] = values
            errors = (solution.relative_error, solution.rtn_relative_error)
            solutions[f"{name}/{number}/errors"] = np.array(errors)
    # The factors of tensor cores, on this device
    refine.splits, refine.exact_product = every, multiply_halves
    for name, case in CASES.items():
        if case.config.refine_sweeps:
            solutions[f"{name}/halves"] = solved(case).dequantize().numpy()
    np.savez(solutions_file, **solutions)


if __name__ == "__main__":
    main(*sys.argv[1:])
