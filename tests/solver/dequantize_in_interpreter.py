"""Run the Triton kernel on the cases of an .npz file; Triton interprets the kernel on the CPU.

usage: TRITON_INTERPRET=1 dequantize_in_interpreter.py CASES.npz WEIGHTS.npz
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from gptq_cli.solver.triton_launch import dequantize_packed


def main(cases_file: str, weights_file: str) -> None:
    weights = {}
    with np.load(cases_file) as cases:
        for name in {key.split("/")[0] for key in cases}:
            tensors = [
                torch.tensor(cases[f"{name}/{part}"])
                for part in ("qweight", "qzeros", "scales", "g_idx")
            ]
            bits, v2 = cases[f"{name}/bits"].item(), cases[f"{name}/v2"].item()
            weights[name] = dequantize_packed(*tensors, bits, v2, torch.float32).numpy()
    np.savez(weights_file, **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
