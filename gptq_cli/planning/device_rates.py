"""Rates that an H100 and its host usually reach, each with its source; nothing here is measured.

`gptq plan --time` measures most rates where it runs, and takes from here what it cannot measure.
`scripts/count_gpu_work.py` and `scripts/scale_out.py` estimate with all of them. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from gptq_cli.config.layer import LayerConfig
from gptq_cli.planning.seconds import Rates

SHRINKS_TRIED = 25  # factors of the scale that the search tries, as many as `SHRINKS` of the solver
HESSIAN_PANEL = 2048  # columns of a Hessian on a GPU, as `CUDA_PANEL` of the solver
CPU_START_SECONDS = 4.0  # measured: Python, torch and transformers are imported
TORCH_SHARE = 0.45  # of them until torch and Triton are there, measured: 0.41 to 0.45


def _rate(value: float, source: str, *, known: bool = False) -> Any:
    """Return a field with this default; a GPU is to confirm it, unless it is known already."""
    return field(default=value, metadata={"source": source, "known": known})


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """The rates of one device and its host, by default those of an H100.

    Products are operations in a second, two for a multiplication with an addition.
    """

    # Work of the device
    bfloat16: float = _rate(
        600e12, "products of bfloat16, sums in float32: 989e12 by the data sheet, 60 % reached"
    )
    tf32: float = _rate(250e12, "products in TF32: 495e12 by the data sheet, about half reached")
    float32: float = _rate(
        45e12, "products in float32, no tensor cores: 67e12 by the data sheet, 2/3 reached"
    )
    cholesky: float = _rate(15e12, "Cholesky factors in float32 by cuSOLVER")
    memory: float = _rate(
        3.0e12, "bytes read and written: 3.35e12 by the data sheet, nine tenths reached"
    )
    pinned_copy: float = _rate(50e9, "bytes to and from pinned memory of the host: PCIe 5")
    other_copy: float = _rate(6e9, "bytes to and from other memory of the host")
    torch_launch: float = _rate(6e-6, "seconds of the host for an operation of torch")
    triton_launch: float = _rate(15e-6, "seconds of the host for a kernel of Triton")
    least_kernel: float = _rate(2e-6, "seconds that the shortest kernel takes on the device")
    multiprocessors: int = _rate(
        132, "tiles of a product, 128 x 128, that are computed at once; no sum is split", known=True
    )
    small_tiles: float = _rate(
        0.6, "share of the rate that products in tiles 64 x 64 reach; the faster counts"
    )
    column: float = _rate(
        0.3e-6,
        "seconds of a column in kernels that take columns in turn, if they have few rows: "
        "the 247 instructions of one warp, one in two cycles",
    )
    column_rows: float = _rate(
        117e9,
        "weights that these kernels round in a second, if they have many rows: 247 "
        "instructions of a warp for 32 weights, of which a device issues 132 x 4 in a cycle of "
        "1.7 GHz",
    )
    candidates: float = _rate(
        7.3e11, "candidates for the scale that are tried on a weight in a second"
    )
    # What the cost model of whole runs takes from counts of blocks
    state_bytes: float = _rate(
        10.0,
        "bytes in memory for each number that enters or leaves a linear, beside products: norms, "
        "activations, attention, limits of tokens; counted for 8B",
    )
    expert_state_bytes: float = _rate(
        20.0,
        "the same for experts, whose tokens are gathered before and added after; counted for "
        "Qwen3-30B-A3B, with the norms of its queries and keys",
    )
    wide_cholesky: float = _rate(
        60e12, "Cholesky factors by panels on tensor cores, from 8192 columns on, counted for 8B"
    )
    weight_seconds: float = _rate(
        0.187e-9,
        "seconds of a weight beside products and turns of columns, for rounding, errors and "
        "putting back: counted 0.18e-9 for 8B and 0.195e-9 for Qwen3-30B-A3B",
    )
    sweep_seconds: float = _rate(
        0.026e-9, "the same for a sweep of refinement: counted 0.024e-9 and 0.028e-9"
    )
    row_turn_seconds: float = _rate(
        1.33e-6,
        "seconds of a column of each 32 rows that are rounded and refined with gradients: counted "
        "for 8B, where 0.63e-6 are rounding, 0.60e-6 refinement and 0.10e-6 products along rows",
    )
    followed_seconds: float = _rate(
        0.175e-9, "the same for a weight that follows the unquantized model"
    )
    # Work before and after the blocks
    import_seconds: float = _rate(
        CPU_START_SECONDS, "seconds to import Python, torch and transformers, measured on a CPU"
    )
    torch_seconds: float = _rate(
        TORCH_SHARE * CPU_START_SECONDS,
        "seconds of these until torch and Triton are imported, by processor time on a CPU",
    )
    kernel_seconds: float = _rate(
        6.0,
        "seconds to start CUDA and compile kernels, while transformers is imported; then cached. "
        "Compiling four kernels took 3 s of processor time on a CPU",
    )
    cached_kernel_seconds: float = _rate(
        1.5, "seconds to start CUDA and load kernels that an earlier run has compiled"
    )
    hashes: float = _rate(
        1.5e9, "bytes that one thread reads and hashes in a second, measured on a CPU"
    )
    hash_threads: int = _rate(8, "threads that hash at most, one for each file", known=True)
    disk: float = _rate(6e9, "bytes read from the disk: NVMe")
    disk_writes: float = _rate(2e9, "bytes written to the disk and made durable: NVMe")
    # Other devices
    between_devices: float = _rate(2e11, "bytes sent to another device of the machine: NVLink")
    between_machines: float = _rate(4e10, "bytes sent to another machine: 400 Gb/s each device")


H100 = DeviceRates()


def cost_model(rates: DeviceRates, config: LayerConfig) -> Rates:
    """Return the rates of the cost model for layers with `config`.

    They are those of a device beside others of the same machine.
    """
    product = rates.bfloat16 / 2
    each = rates.weight_seconds + config.refine_sweeps * rates.sweep_seconds
    each += n_candidates(config) / rates.candidates
    return Rates(
        forward=product,
        hessian=product,
        shift=product,
        factor=rates.cholesky / 2,
        wide_factor=rates.wide_cholesky / 2,
        panel=HESSIAN_PANEL,
        shifts_of_rows=True,  # as with forwards in bfloat16
        solve=product,
        columns=(1 + config.refine_sweeps) / each,
        states=rates.memory / rates.state_bytes,
        expert_states=rates.memory / rates.expert_state_bytes,
        followed=1 / rates.followed_seconds,
        turn=rates.column,
        row_turn=rates.row_turn_seconds,
        copies=rates.pinned_copy,
        network=rates.between_devices,
        disk=rates.disk,
        writes=rates.disk_writes,
        hashes=rates.hashes * rates.hash_threads,
        hash_threads=rates.hash_threads,
        start=rates.import_seconds,
        before_kernels=rates.torch_seconds,
        kernels=rates.kernel_seconds,
    )


def n_candidates(config: LayerConfig) -> int:
    """Return how many scales and zero points the search tries on each group."""
    if config.scale_search != "mse":
        return 0
    count = SHRINKS_TRIED
    if config.signed_scales:
        count *= 2
    if not config.sym:
        count *= 3
    return count


class Described(NamedTuple):
    """A rate with its source; a GPU is to confirm it if it is not `known`."""

    name: str
    value: float
    source: str
    known: bool


def described(rates: DeviceRates) -> Iterator[Described]:
    """Yield each rate with its source."""
    for rate in fields(rates):
        value, about = getattr(rates, rate.name), rate.metadata
        yield Described(rate.name, value, about["source"], about["known"])
