"""What several devices would gain, by the cost model of `gptq plan --time` at assumed rates: nothing of it is measured.

python scripts/scale_out.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.planning.estimate import Calibration, Rates, estimate_seconds
from gptq_cli.planning.run_plan import LayerPlan

DEVICES = (1, 2, 4, 8, 16, 64)
NODE = 8
# From data sheets of an H100 with NVLink and the share that such kernels usually reach; between nodes 400 Gb/s each.
WITHIN = Rates(
    forward=3e14, hessian=3e14, factor=1e13, solve=1e14, columns=4e10, network=2e11, disk=6e9
)
BETWEEN = Rates(
    forward=3e14, hessian=3e14, factor=1e13, solve=1e14, columns=4e10, network=4e10, disk=6e9
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; with `experts`, how many each block has and how many a token is sent to."""

    name: str
    blocks: int
    hidden: int
    wide: int
    keys: int
    experts: tuple[int, int] = (0, 1)


SHAPES = (
    Shape("8B", 32, 4096, 14336, 1024),
    Shape("70B", 80, 8192, 28672, 1024),
    Shape("405B", 126, 16384, 53248, 1024),
    Shape("1T mixture", 60, 7168, 2048, 1536, (384, 8)),
)


def layers_of(shape: Shape, config: QuantizeConfig) -> Iterator[LayerPlan]:
    def layer(block: int, name: str, rows: int, columns: int) -> LayerPlan:
        full = f"model.layers.{block}.{name}"
        tensor = TensorInfo(full, "BF16", (rows, columns), Path("none"), 0, 2 * rows * columns)
        return LayerPlan(full, block, rows, columns, config.base, "", tensor)

    for block in range(shape.blocks):
        yield layer(block, "self_attn.q_proj", shape.hidden, shape.hidden)
        yield layer(block, "self_attn.k_proj", shape.keys, shape.hidden)
        yield layer(block, "self_attn.v_proj", shape.keys, shape.hidden)
        yield layer(block, "output.o_proj", shape.hidden, shape.hidden)
        for place in [f"mlp.experts.{n}" for n in range(shape.experts[0])] or ["mlp"]:
            yield layer(block, f"{place}.gate_proj", shape.wide, shape.hidden)
            yield layer(block, f"{place}.up_proj", shape.wide, shape.hidden)
            yield layer(block, f"{place}.down_proj", shape.hidden, shape.wide)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--preset", default="balanced")
    arguments = parser.parse_args()
    results = []
    for shape in SHAPES:
        for devices in DEVICES:
            batch_size = 8 if devices <= 16 else 2
            config = QuantizeConfig(bits=4, preset=arguments.preset, batch_size=batch_size)
            layers = list(layers_of(shape, config))
            tokens = config.nsamples * config.seqlen
            text = Calibration(
                tokens, shape.experts[1], config.nsamples // batch_size, 2 * shape.hidden
            )
            nbytes = sum(2 * layer.out_features * layer.in_features for layer in layers)
            found = estimate_seconds(
                layers, text, devices, nbytes, WITHIN if devices <= NODE else BETWEEN
            )
            results.append(
                {"model": shape.name, "devices": devices, "total": found.total, **asdict(found)}
            )
            cells = " | ".join(
                f"{seconds:.0f}" for seconds in (found.total, *asdict(found).values())
            )
            print(f"| {shape.name} | {devices} | {cells} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
