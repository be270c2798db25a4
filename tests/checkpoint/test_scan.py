"""One pass over the weights: it hashes whole files and finds each number that is not finite."""

from __future__ import annotations

import hashlib
from pathlib import Path
from threading import Event as Signal

import pytest
import torch
from safetensors.torch import save_file

from gptq_cli.checkpoint import headers
from gptq_cli.checkpoint.headers import WeightScan, is_finite, read_header, scan_weights
from gptq_cli.checkpoint.layout import TensorSpec, plan_layout
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.errors import InputError
from gptq_cli.files import ByteCount, BytesDone

FLOATS = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# bit patterns of NaN, infinity and the numbers next to them, by the bytes of the type
LIMITS = {
    4: [2**31 - 1, 0x7F800000, 0x7F7FFFFF, 0, 1],
    8: [2**63 - 1, 0x7FF << 52, (0x7FF << 52) - 1],
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_finite_agrees_with_torch(dtype: str) -> None:
    n_bytes = FLOATS[dtype].itemsize
    if n_bytes < 4:
        patterns = torch.arange(2 ** (8 * n_bytes))  # all numbers of the type
    else:
        limits = torch.tensor(LIMITS[n_bytes])
        patterns = torch.cat([limits, ~limits, torch.arange(-(2**31), 2**31, 2**22)])
    patterns = patterns.to(WIDTH[n_bytes])
    expected = patterns.view(FLOATS[dtype]).double().isfinite()
    assert not expected.all()
    for pattern, finite in zip(patterns, expected.tolist(), strict=True):
        among = torch.stack([torch.zeros_like(pattern), pattern, torch.zeros_like(pattern)])
        assert is_finite(among.numpy().tobytes(), dtype) == finite
    assert is_finite(patterns[expected].numpy().tobytes(), dtype)


def test_integers_and_empty_data_are_finite() -> None:
    assert is_finite(b"\xff" * 8, "I32")
    assert is_finite(b"", "F32")
    assert is_finite(b"\xff", "F16")  # the header shows that a file ends inside a number


def two_shards(directory: Path, **changes: torch.Tensor) -> list[Path]:
    directory.mkdir(exist_ok=True)
    weights = {
        "a": torch.arange(40.0).half(),
        "b": torch.ones(3, dtype=torch.uint8),
        "c": -torch.arange(37.0),
    } | changes
    files = [directory / "1.safetensors", directory / "2.safetensors"]
    save_file({name: weights[name] for name in "ab"}, files[0])
    save_file({name: weights[name] for name in "c"}, files[1])
    return files


@pytest.fixture(params=[7, 16, 2**24])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of bytes of one read; 7 bytes end inside a number."""
    monkeypatch.setattr(headers, "CHUNK_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunks")
def test_scan_hashes_whole_files(tmp_path: Path) -> None:
    files = two_shards(tmp_path)
    tensors = [*read_header(files[0]).values(), *read_header(files[1]).values()]
    found = scan_weights(reversed(tensors))
    assert found == {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert scan_weights(tensors, hashed=False) == {}


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "file"), [("a", "1.safetensors"), ("c", "2.safetensors")])
def test_scan_names_a_tensor_that_is_not_finite(
    name: str, file: str, value: float, hashed: bool, tmp_path: Path
) -> None:
    dtype = {"a": torch.float16, "c": torch.float32}[name]
    tensor = torch.arange(40.0).to(dtype)
    tensor[[5, 39]] = value
    first, second = two_shards(tmp_path, **{name: tensor})
    tensors = [*read_header(first).values(), *read_header(second).values()]
    with pytest.raises(InputError) as caught:
        scan_weights(tensors, hashed=hashed)
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
    assert str(caught.value) == f"`{name}` in {file} holds NaN or infinity, 2 times"
    assert "the file's hash with the original's" in (caught.value.hint or "")


def test_the_writer_refuses_to_copy_numbers_that_are_not_finite(tmp_path: Path) -> None:
    spoilt = torch.ones(4)
    spoilt[3] = float("nan")
    (_, file) = two_shards(tmp_path / "source", c=spoilt)
    layout = plan_layout([(TensorSpec("c", "F32", (4,)),)], 2**20)
    message = r"`c` in 2\.safetensors holds NaN or infinity, 1 times"
    refused = pytest.raises(InputError, match=message)
    with CheckpointWriter(tmp_path / "out", layout) as writer, refused:
        writer.copy(read_header(file)["c"], ByteCount())


def test_a_scan_in_a_thread_finds_the_same_hashes(tmp_path: Path) -> None:
    first, second = two_shards(tmp_path)
    tensors = [*read_header(first).values(), *read_header(second).values()]
    total = sum(tensor.nbytes for tensor in tensors)
    told: list[BytesDone] = []
    with WeightScan(tensors, hashed=True) as scan:
        for _ in range(2):  # both an allocation and its run ask
            assert scan.result(ByteCount(told.append, total)) == scan_weights(tensors)
            assert told[-1] == BytesDone(total, total)
    with WeightScan(tensors, hashed=False) as scan:
        assert scan.result(ByteCount()) == {}


def test_a_scan_that_nobody_waits_for_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, read = Signal(), []
    monkeypatch.setattr(headers, "Event", lambda: given_up)
    monkeypatch.setattr(headers, "CHUNK_BYTES", 4)
    first, _ = two_shards(tmp_path)
    usual = headers.is_finite

    def stay(chunk: bytes, dtype: str) -> bool:
        read.append(chunk)
        assert given_up.wait(60)
        return usual(chunk, dtype)

    monkeypatch.setattr(headers, "is_finite", stay)
    with WeightScan(read_header(first).values(), hashed=True):
        pass
    assert len(read) <= 1


def test_a_scan_in_a_thread_raises_for_the_caller(tmp_path: Path) -> None:
    spoilt = torch.ones(4)
    spoilt[3] = float("nan")
    (_, file) = two_shards(tmp_path, c=spoilt)
    refused = pytest.raises(InputError, match=r"`c` in 2\.safetensors holds NaN")
    with WeightScan(read_header(file).values(), hashed=True) as scan, refused as caught:
        scan.result(ByteCount())
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
    assert "download it again" in (caught.value.hint or "")
