"""What reaches the output beside quantized linears: the source's bytes, or weights decoded from codes it stores."""

from __future__ import annotations

from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.errors import InputError
from gptq_cli.pipeline.run_plan import RunPlan
from gptq_cli.pipeline.setup import STORED_DTYPES


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
