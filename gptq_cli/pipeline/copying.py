"""What reaches the output beside quantized linears: tensors as they were or decoded, settings, other files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.durable import write_file
from gptq_cli.checkpoint.manifest import CONFIG_FILE
from gptq_cli.checkpoint.quantization_config import describe
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.checkpoint.writer import CheckpointWriter, write_side_files
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.yaml_writer import to_yaml
from gptq_cli.errors import GateError, InputError
from gptq_cli.pipeline.run_plan import HEAD, RunPlan
from gptq_cli.pipeline.setup import STORED_DTYPES
from gptq_cli.version import __version__


def copy_others(writer: CheckpointWriter, plan: RunPlan) -> None:
    """Write every tensor of `plan.copied`; InputError E_CKPT_NONFINITE if a decoded one is not finite in its dtype."""
    decoded = {tensor.name for tensor in plan.decoded}
    turned = {layer.weight.name for layer in plan.kept if layer.transposed and plan.plain.is_packed(layer.weight.name)}
    reader = open_reader(plan.source)
    for tensor in plan.copied:
        if tensor.name not in decoded:
            writer.copy(tensor)
            continue
        weight = reader.read(tensor.name).to(STORED_DTYPES[tensor.dtype])
        if not bool(weight.isfinite().all()):
            raise InputError(
                "E_CKPT_NONFINITE", f"`{tensor.name}` has values that are not finite as {tensor.dtype}",
                hint="the checkpoint is damaged: download it again",
            )  # fmt: skip
        writer.write(tensor.name, weight.T.contiguous() if tensor.name in turned else weight)


def write_beside(
    directory: Path, plan: RunPlan, config: QuantizeConfig, calibration_sha256: str, hashes: Mapping[str, str]
) -> None:
    """config.json and its like, the configuration of the run, and the files that the source has beside its weights.

    `hashes` are those by which the source is identified; InputError E_SOURCE_CHANGED if a file has another one.
    """
    names = [layer.name for layer in plan.quantized]
    kept = [layer.name for layer in plan.kept if layer.name != HEAD]
    meta: dict[str, Any] = {"quantizer": [f"gptq_cli:{__version__}"], "calibration_sha256": calibration_sha256}
    meta |= {"source_quantization": plan.plain.how} if plan.plain.how else {}
    described = describe(config, names, kept)
    write_side_files(plan.source, directory, described, meta, untie=HEAD in names, hashes=hashes)
    write_file(directory / CONFIG_FILE, to_yaml(config).encode())


def check_written(stage: Path) -> None:
    """GateError E_VERIFY if what was written is not a checkpoint that every reader understands alike."""
    defects = verify_checkpoint(stage).defects
    if defects:
        raise GateError(
            "E_VERIFY", f"what was written has {len(defects)} defects, the first: {defects[0]}",
            hint="this is a fault of gptq: please report it, with the command and the model",
        )  # fmt: skip
