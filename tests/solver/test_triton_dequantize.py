"""The kernel equals a decoder that reads one bit at a time.

Triton decides at import whether it interprets, so one process of its own runs all cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from gptq_cli.solver.triton_launch import dequantize_packed

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("dequantize_in_interpreter.py")


@dataclass(frozen=True)
class Packed:
    qweight: np.ndarray
    qzeros: np.ndarray
    scales: np.ndarray
    g_idx: np.ndarray
    bits: int
    v2: bool


def packed_case(
    bits: int, v2: bool, out_features: int, in_features: int, group_size: int
) -> Packed:
    """Return random words, so that fields take every value, and columns of scattered groups."""
    random = np.random.default_rng(bits + 10 * v2)

    def words(*shape: int) -> np.ndarray:
        return random.integers(-(2**31), 2**31, size=shape, dtype=np.int64).astype(np.int32)

    n_groups = in_features // group_size
    scales = random.uniform(0.01, 0.1, size=(n_groups, out_features)).astype(np.float16)
    g_idx = random.permutation(np.arange(in_features) // group_size).astype(np.int32)
    qweight = words(in_features * bits // 32, out_features)
    qzeros = words(n_groups, out_features * bits // 32)
    return Packed(qweight, qzeros, scales, g_idx, bits, v2)


# More and less than one tile of the kernel; where the packing of zeros allows it, tiles extend
# beyond the weight on both sides.
WIDE = {2: 48, 3: 64, 4: 40, 8: 36}
CASES: dict[str, Packed] = {}
for _bits, _v2 in product(WIDE, (False, True)):
    for _rows, _columns in ((WIDE[_bits], 96), (32, 32)):
        _version = "v2" if _v2 else "v1"
        _name = f"{_bits}bit-{_version}-{_rows}x{_columns}"
        CASES[_name] = packed_case(_bits, _v2, _rows, _columns, 32)


def field(words: np.ndarray, index: int, bits: int) -> int:
    value = 0
    for place in range(bits):
        bit = bits * index + place
        value |= ((int(words[bit // 32]) >> (bit % 32)) & 1) << place
    return value


def slow_weight(case: Packed) -> np.ndarray:
    out_features, in_features = case.qweight.shape[1], len(case.g_idx)
    weight = np.zeros((out_features, in_features))
    for i, group in enumerate(case.g_idx):
        for o in range(out_features):
            zero = field(case.qzeros[group], o, case.bits)
            if not case.v2:
                zero = (zero + 1) % 2**case.bits
            code = field(case.qweight[:, o], i, case.bits)
            weight[o, i] = float(case.scales[group, o]) * (code - zero)
    return weight


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("dequantize")
    parts = {}
    for name, case in CASES.items():
        for part in Packed.__annotations__:
            parts[f"{name}/{part}"] = getattr(case, part)
    np.savez(folder / "cases.npz", **parts)
    command = [sys.executable, str(SCRIPT), str(folder / "cases.npz"), str(folder / "weights.npz")]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    with np.load(folder / "weights.npz") as weights:
        return dict(weights)


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_decoding_bit_by_bit(name: str, interpreted: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(interpreted[name], slow_weight(CASES[name]), rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel_equals_decoding_bit_by_bit(name: str) -> None:
    case = CASES[name]
    packed = [
        torch.tensor(part).cuda() for part in (case.qweight, case.qzeros, case.scales, case.g_idx)
    ]
    weight = dequantize_packed(*packed, case.bits, case.v2, torch.float32)
    np.testing.assert_allclose(weight.cpu().numpy(), slow_weight(case), rtol=1e-6, atol=0)


def test_module_imports_without_triton() -> None:
    block_triton = "import sys; sys.modules['triton'] = None; import gptq_cli.solver.triton_launch"
    run = subprocess.run(
        [sys.executable, "-c", block_triton], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
