"""The tensors of each format compared with a slow unpacking, bit by bit, of what its readers read.

Sources: `unpack_from_int32` of compressed-tensors 0.20.1, the affine mode of mlx 0.32.4, and
`qlinear_torch` and `qlinear_torch_zp` of auto-round 0.16.1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gptq_cli.checkpoint.layout import Sizes
from gptq_cli.checkpoint.mlx import describe
from gptq_cli.checkpoint.quantization_config import packing_for
from gptq_cli.checkpoint.reader import SAFETENSORS_DTYPE, decode, encode, encode_alike
from gptq_cli.config.layer import FORMATS, HOLDS, Linears, Settings
from gptq_cli.solver.quantized_linear import QuantizedLinear

OUT, IN, GROUPS = 64, 96, 3
CASES = [(format, bits) for format in FORMATS for bits in HOLDS[format].bits]


def linear(bits: int, *, sym: bool, in_features: int = IN, groups: int = GROUPS) -> QuantizedLinear:
    """Return random codes, scales of either sign, and zero points in the middle or anywhere."""
    torch.manual_seed(bits)
    zeros = torch.randint(1, 2**bits, (OUT, groups), dtype=torch.uint8)
    if sym:
        zeros = torch.full((OUT, groups), 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedLinear(
        codes=torch.randint(2**bits, (OUT, in_features), dtype=torch.uint8),
        scales=(torch.randn(OUT, groups) / 100).half(),
        zeros=zeros,
        group_of_column=torch.arange(in_features, dtype=torch.int32) * groups // in_features,
        bits=bits,
    )


def fields(words: list[int], bits: int) -> list[int]:
    """Return the unsigned numbers of `bits` bits in 32-bit words, by way of one large integer."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    count = 32 * len(words) // bits
    return [(stream >> (bits * place)) & (2**bits - 1) for place in range(count)]


def rows(words: torch.Tensor, bits: int) -> np.ndarray:
    """Return the numbers in each row of words."""
    return np.array([fields(row, bits) for row in words.view(torch.int32).tolist()])


def slow_weight(format: str, tensors: dict[str, torch.Tensor], bits: int, sym: bool) -> np.ndarray:
    """Return the weight [O, I] as a reader of the format computes it, in float64."""
    if format == "mlx":
        codes = rows(tensors["weight"], bits)
        scales, biases = tensors["scales"].double().numpy(), tensors["biases"].double().numpy()
        columns = codes.shape[1] // scales.shape[1]
        return codes * scales.repeat(columns, 1) + biases.repeat(columns, 1)
    if format == "compressed-tensors":
        codes, scales = rows(tensors["weight_packed"], bits), tensors["weight_scale"].double()
        zeros = np.full(scales.shape, 2 ** (bits - 1))
        if "weight_zero_point" in tensors:
            zeros = rows(tensors["weight_zero_point"].T.contiguous(), bits).T
        assert tensors["weight_shape"].tolist() == list(codes.shape)
    else:
        codes = rows(tensors["qweight"].T.contiguous(), bits)
        offset = format == "gptq" or (format == "auto-round" and sym)
        zeros, scales = rows(tensors["qzeros"], bits).T + offset, tensors["scales"].T.double()
    columns = codes.shape[1] // scales.shape[1]
    return (codes - zeros.repeat(columns, 1)) * scales.numpy().repeat(columns, 1)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("in_features", "groups"), [(IN, GROUPS), (256, 1)])
@pytest.mark.parametrize(("format", "bits"), [case for case in CASES if case[1] in (3, 4)])
def test_linears_that_are_encoded_together_have_the_tensors_of_each(
    format: str, bits: int, in_features: int, groups: int, sym: bool
) -> None:
    first = linear(bits, sym=sym, in_features=in_features, groups=groups)
    packing = packing_for(format, sym=sym)
    others = [replace(first, codes=first.codes.flip(0)), replace(first, scales=-first.scales)]
    linears = [first, *others]
    together = list(encode_alike(linears, packing, sym=sym))
    assert len(together) == len(linears)
    for mine, found in zip(linears, together, strict=True):
        expected = encode(mine, packing, sym=sym)
        assert found.keys() == expected.keys()
        for part, tensor in expected.items():
            assert found[part].is_contiguous()
            assert found[part].dtype == tensor.dtype
            assert torch.equal(found[part], tensor), part


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("format", "bits"), CASES)
def test_readers_of_a_format_compute_the_same_weight(format: str, bits: int, sym: bool) -> None:
    original = linear(bits, sym=sym)
    packing = packing_for(format, sym=sym)
    tensors = encode(original, packing, sym=sym)
    truth = original.dequantize().double().numpy()
    assert np.array_equal(slow_weight(format, tensors, bits, sym), truth)
    back = decode(tensors, bits, packing)
    assert torch.equal(back.dequantize(), original.dequantize())
    assert torch.equal(back.codes, original.codes)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("format", "bits"), CASES)
@pytest.mark.parametrize(("in_features", "groups"), [(96, 3), (192, 1), (512, 2)])
def test_encoded_parts_have_the_planned_shapes(
    format: str, bits: int, sym: bool, in_features: int, groups: int
) -> None:
    packing = packing_for(format, sym=sym)
    sizes = Sizes(OUT, in_features, groups, bits, sym)
    planned = {
        part: (packing.written_dtype(part, sizes), shape)
        for part, shape in packing.shapes(sizes).items()
    }
    layer = linear(bits, sym=sym, in_features=in_features, groups=groups)
    found = {
        part: (SAFETENSORS_DTYPE[tensor.dtype], tuple(tensor.shape))
        for part, tensor in encode(layer, packing, sym=sym).items()
    }
    assert found == planned


@pytest.mark.parametrize(
    ("in_features", "groups", "columns"), [(192, 1, 64), (512, 2, 128), (96, 1, 32), (128, 2, 64)]
)
def test_mlx_splits_long_groups_into_equal_ones(
    in_features: int, groups: int, columns: int
) -> None:
    layer = linear(5, sym=False, in_features=in_features, groups=groups)
    tensors = encode(layer, packing_for("mlx", sym=False), sym=False)
    assert tensors["scales"].shape == (OUT, in_features // columns)
    assert torch.equal(tensors["scales"][:, :: in_features // groups // columns], layer.scales)
    truth = layer.dequantize().double().numpy()
    assert np.array_equal(slow_weight("mlx", tensors, 5, False), truth)


def test_mlx_names_each_linear_that_is_kept() -> None:
    settings = Settings(4, 128, sym=True, desc_act=False)
    linears = Linears({"a.q": settings, "b.q": settings}, {"a.q": 256, "b.q": 256}, ("a.k", "b.k"))
    described = describe(linears)["quantization"]
    assert (described["a.k"], described["b.k"]) == (False, False)
    assert described.keys() == {"bits", "group_size", "a.k", "b.k"}
