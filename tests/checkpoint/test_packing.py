"""Packing compared with a slow bit stream and with the words that other tools write."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.checkpoint.layout import GPTQ, GPTQ_V2
from gptq_cli.checkpoint.reader import decode, encode, pack, unpack
from gptq_cli.solver.quantized_linear import QuantizedLinear

BITS = [2, 3, 4, 5, 6, 7, 8]
FORMATS = ["gptq", "gptq_v2"]
PACKINGS = {"gptq": GPTQ, "gptq_v2": GPTQ_V2}


def slow_words(column: list[int], bits: int) -> list[int]:
    """Return one column as 32-bit words, by way of one large integer.

    Value i has the bits [i * bits, (i + 1) * bits).
    """
    stream = sum(value << (index * bits) for index, value in enumerate(column))
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(len(column) * bits // 32)]


@given(
    data=st.data(), bits=st.sampled_from(BITS), blocks=st.integers(1, 4), columns=st.integers(1, 5)
)
@settings(max_examples=60, deadline=None)
def test_packed_words_are_the_little_endian_bit_stream(
    data: st.DataObject, bits: int, blocks: int, columns: int
) -> None:
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    rows = st.lists(row, min_size=32 * blocks, max_size=32 * blocks)
    values = np.array(data.draw(rows))
    words = pack(torch.tensor(values, dtype=torch.uint8), bits)
    assert words.dtype == torch.int32
    for column in range(columns):
        found = (words[:, column].numpy().astype(np.int64) & 0xFFFFFFFF).tolist()
        assert found == slow_words(values[:, column].tolist(), bits)
    assert torch.equal(unpack(words, bits), torch.tensor(values, dtype=torch.uint8))


def test_three_bit_words_have_the_layout_of_autogptq() -> None:
    values = torch.zeros(32, 1, dtype=torch.uint8)
    values[10], values[21] = 0b110, 0b101  # the two values that straddle words
    first, second, third = (int(word) & 0xFFFFFFFF for word in pack(values, 3)[:, 0])
    assert first == 0b10 << 30  # low two bits of value 10
    assert second == 0b1 | (0b1 << 31)  # its high bit, and the low bit of value 21
    assert third == 0b10  # high two bits of value 21


def symmetric(bits: int) -> QuantizedLinear:
    out_features, in_features, groups = 64, 96, 3
    return QuantizedLinear(
        codes=torch.randint(2**bits, (out_features, in_features), dtype=torch.uint8),
        scales=torch.rand(out_features, groups).half() + 0.1,
        zeros=torch.full((out_features, groups), 2 ** (bits - 1), dtype=torch.uint8),
        group_of_column=torch.arange(in_features, dtype=torch.int32) // 32,
        bits=bits,
    )


GOLDEN = {("gptq", 2): 0x55555555, ("gptq", 4): 0x77777777, ("gptq", 8): 0x7F7F7F7F}
GOLDEN |= {("gptq_v2", 2): 0xAAAAAAAA, ("gptq_v2", 4): 0x88888888, ("gptq_v2", 8): 0x80808080}


@pytest.mark.parametrize(("format", "bits"), GOLDEN)
def test_symmetric_zero_points_have_the_usual_words(format: str, bits: int) -> None:
    words = encode(symmetric(bits), PACKINGS[format], sym=True)["qzeros"]
    assert {int(word) & 0xFFFFFFFF for word in words.flatten()} == {GOLDEN[format, bits]}


@pytest.mark.parametrize(("format", "stored"), [("gptq", 3), ("gptq_v2", 4)])
def test_three_bit_symmetric_zero_points_have_the_usual_words(format: str, stored: int) -> None:
    words = encode(symmetric(3), PACKINGS[format], sym=True)["qzeros"][0]
    assert [int(word) & 0xFFFFFFFF for word in words] == slow_words([stored] * 64, 3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(32, 32, 1), (64, 96, 3), (96, 128, 2), (32, 160, 5)])
def test_decode_reverses_encode(format: str, bits: int, shape: tuple[int, int, int]) -> None:
    out_features, in_features, groups = shape
    groups_in_order = torch.arange(in_features, dtype=torch.int32) * groups // in_features
    linear = QuantizedLinear(
        codes=torch.randint(2**bits, (out_features, in_features), dtype=torch.uint8),
        scales=torch.rand(out_features, groups).half() + 0.1,
        zeros=torch.randint(1, 2**bits, (out_features, groups), dtype=torch.uint8),
        group_of_column=groups_in_order[torch.randperm(in_features)],
        bits=bits,
    )
    tensors = encode(linear, PACKINGS[format], sym=False)
    found = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}
    assert found == {
        "qweight": (torch.int32, (in_features * bits // 32, out_features)),
        "qzeros": (torch.int32, (groups, out_features * bits // 32)),
        "scales": (torch.float16, (groups, out_features)),
        "g_idx": (torch.int32, (in_features,)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = decode(tensors, bits, PACKINGS[format])
    for field in ("codes", "scales", "zeros", "group_of_column"):
        assert torch.equal(getattr(back, field), getattr(linear, field)), field
    assert torch.equal(back.dequantize(), linear.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_dequantized_weight_is_scale_times_code_minus_zero(bits: int) -> None:
    linear = symmetric(bits)
    weight = linear.dequantize()
    for row, column in [(0, 0), (5, 31), (5, 32), (63, 95)]:
        group = column // 32
        code, zero = int(linear.codes[row, column]), int(linear.zeros[row, group])
        assert float(weight[row, column]) == float(linear.scales[row, group]) * (code - zero)
