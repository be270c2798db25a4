"""Whether the files of a checkpoint lie where every reader looks for them, and nothing lies there that misleads one."""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.checkpoint.defect import Defect, convert_command
from gptq_cli.checkpoint.source import INDEX_NAME, Checkpoint, index_file
from gptq_cli.checkpoint.stored import format_of

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"


def check_files(checkpoint: Checkpoint) -> Iterator[Defect]:
    """Weights under a name that transformers does not know, others beside them, and the settings of an adapter.

    A checkpoint of which only headers were fetched from the Hub has no other files here.
    """
    directory = checkpoint.directory
    if any(tensor.file.parent != directory for tensor in checkpoint.tensors.values()):
        return
    used = sorted({tensor.file.name for tensor in checkpoint.tensors.values()})
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    sharded = (directory / INDEX_NAME).is_file()
    if not sharded and used and WEIGHTS not in used:
        used_names = used[0] if len(used) == 1 else index_file(directory).name
        message = f"transformers looks for {WEIGHTS} or {INDEX_NAME}, and not for this name"
        hint = f"{convert_command(directory, format_of(checkpoint))} gives it that name"
        yield Defect("E_CKPT_MISSING", message, used_names, None, hint, "form")
    for name in present:
        if name not in used and not sharded:
            message = "lies beside the weights, and readers differ in whether they load it"
            yield Defect("E_CKPT_INDEX", message, name, None, "move it out of the directory", "form")
    if (directory / ADAPTER).is_file():
        message = "makes transformers take the directory for an adapter of another model"
        yield Defect("E_CKPT_KIND", message, ADAPTER, None, "move it out of the directory", "form")
