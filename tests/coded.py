"""Weights in codes of every form with the numbers they stand for, computed one by one.

Numbers are read from their bits as the formats define them: sign, exponent and mantissa of a float
of 8 or 4 bits, and the exponent of a power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Number = Callable[[int, int], float]  # by row and column


@dataclass(frozen=True)
class Example:
    """The parts of a linear [O, I] by their names, the weight they stand for, and settings."""

    parts: dict[str, Tensor]
    weight: Tensor
    settings: dict[str, Any]
    form: str


def e4m3(byte: int) -> float:
    """Return the value of a float of 8 bits with 4 bits of exponent."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6
    if exponent:
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte >> 7 else size


def e2m1(nibble: int) -> float:
    """Return the value of a float of 4 bits with 2 bits of exponent."""
    exponent, mantissa = nibble >> 1 & 3, nibble & 1
    size = mantissa / 2
    if exponent:
        size = (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if nibble >> 3 else size


def power(byte: int) -> float:
    """Return the value of a scale that is an exponent of two."""
    return 2.0 ** (byte - 127)


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8)


def random_e4m3(*shape: int) -> Tensor:
    """Return bytes of finite floats of 8 bits."""
    codes = random_bytes(*shape)
    return codes.where(codes % 128 != 127, codes - 1)


def product(rows: int, columns: int, code: Number, scale: Number) -> Tensor:
    """Return the products of codes and scales, rounded to float32 and then to bfloat16."""
    products = []
    for i in range(rows):
        products.append([code(i, j) * scale(i, j) for j in range(columns)])
    return torch.tensor(products, dtype=torch.float64).float().bfloat16()


def grouped(weights: dict[str, Any], format: str) -> dict[str, Any]:
    """Return the settings of compressed-tensors for weights of one kind."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "kv_cache_scheme": {"num_bits": 8},
    }


def fp8(
    rows: int, columns: int, scales: Tensor, block: tuple[int, int], name: str = "weight_scale"
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a weight in floats of 8 bits with a scale for each block, and its numbers."""
    codes = random_e4m3(rows, columns)
    values = codes.tolist()
    grid = scales.reshape(-(-rows // block[0]), -1)
    numbers = grid.tolist()
    if scales.dtype == torch.uint8:
        numbers = [[power(byte) for byte in row] for row in numbers]
    weight = product(
        rows,
        columns,
        lambda i, j: e4m3(values[i][j]),
        lambda i, j: numbers[i // block[0]][j // block[1]],
    )
    return {"weight": codes.view(torch.float8_e4m3fn), name: scales}, weight


def fp4_codes(rows: int, columns: int) -> tuple[Tensor, Number]:
    """Return random floats of 4 bits, two in a byte, and the value of each."""
    codes = random_bytes(rows, columns // 2)
    values = codes.tolist()

    def value(i: int, j: int) -> float:
        byte = values[i][j // 2]
        return e2m1(byte >> 4 if j % 2 else byte & 15)

    return codes, value


def mxfp4(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [O, I / 2] and exponents [O, I / 32] of a weight, and its numbers."""
    codes, value = fp4_codes(rows, columns)
    scales = random_bytes(rows, columns // 32, low=121, high=126)
    exponents = scales.tolist()
    weight = product(rows, columns, value, lambda i, j: power(exponents[i][j // 32]))
    return codes, scales, weight


def nvfp4(rows: int, columns: int, of_all: float, *, divides: bool) -> tuple[Tensor, ...]:
    """Return codes, scales of 16 columns, the scale of all, and the numbers."""
    codes, value = fp4_codes(rows, columns)
    scales = random_e4m3(rows, columns // 16) & 127
    single = float(np.float32(of_all))
    numbers = []
    for row in scales.tolist():
        stored = [e4m3(byte) for byte in row]
        changed = [number / single if divides else number * single for number in stored]
        numbers.append([float(np.float32(number)) for number in changed])
    weight = product(rows, columns, value, lambda i, j: numbers[i][j // 16])
    return codes, scales.view(torch.float8_e4m3fn), torch.tensor(of_all), weight


def int8(
    rows: int, columns: int, group: int, *, asymmetric: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a weight in bytes with scales, and with zero points if `asymmetric`."""
    codes = random_bytes(rows, columns).view(torch.int8)
    scales = (torch.rand(rows, columns // group) * 1e-3).bfloat16()
    parts = {"weight": codes, "weight_scale": scales}
    zeros = torch.zeros(rows, columns // group, dtype=torch.int8)
    if asymmetric:
        zeros = random_bytes(rows, columns // group).view(torch.int8)
        parts["weight_zero_point"] = zeros
    numbers, offsets, factors = codes.tolist(), zeros.tolist(), scales.tolist()
    weight = product(
        rows,
        columns,
        lambda i, j: numbers[i][j] - offsets[i][j // group],
        lambda i, j: factors[i][j // group],
    )
    return parts, weight


def packed(
    rows: int, columns: int, group: int, *, asymmetric: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a linear of compressed-tensors in words of eight numbers of 4 bits, lowest first."""
    codes = torch.randint(16, (rows, columns))
    zeros = torch.full((rows, columns // group), 8)
    scales = (torch.rand(rows, columns // group) * 1e-2).bfloat16()
    parts = {
        "weight_packed": words_of(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if asymmetric:
        zeros = torch.randint(16, (rows, columns // group))
        parts["weight_zero_point"] = words_of(zeros.T).T.contiguous()
    numbers, offsets, factors = codes.tolist(), zeros.tolist(), scales.tolist()
    weight = product(
        rows,
        columns,
        lambda i, j: numbers[i][j] - offsets[i][j // group],
        lambda i, j: factors[i][j // group],
    )
    return parts, weight


def words_of(numbers: Tensor) -> Tensor:
    """Return words int32 [R, C / 8] of numbers [R, C] of 4 bits, lowest first."""
    words = []
    for row in numbers.tolist():
        text = b"".join((low | high << 4).to_bytes(1, "little") for low, high in pairs(row))
        words.append(np.frombuffer(text, "<i4"))
    return torch.from_numpy(np.stack(words).copy())


def pairs(row: list[int]) -> list[tuple[int, int]]:
    return list(zip(row[::2], row[1::2], strict=True))


def awq(rows: int, columns: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a linear of AWQ, whose words hold outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest."""
    codes = torch.randint(16, (columns, rows))
    zeros = torch.randint(16, (columns // group, rows))
    scales = (torch.rand(columns // group, rows) * 1e-2).half()
    products = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            number = int(codes[j, i]) - int(zeros[j // group, i])
            products[i, j] = number * float(scales[j // group, i])
    weight = products.half().bfloat16()  # in the dtype of the scales first
    return {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}, weight


def awq_words(numbers: Tensor) -> Tensor:
    """Return words int32 [R, C / 8] of numbers [R, C]."""
    rows, columns = numbers.shape
    words = torch.zeros(rows, columns // 8, dtype=torch.int64)
    for row in range(rows):
        for word in range(columns // 8):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[row, word] |= int(numbers[row, 8 * word + output]) << 4 * place
    return words.int()
