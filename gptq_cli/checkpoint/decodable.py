"""The one door to packed weights: whoever decodes them for a result opens their checkpoint here.

What would come out as other numbers than were meant is refused, with what its owner can do. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from gptq_cli.checkpoint.defect import Defect
from gptq_cli.checkpoint.quantization_config import format_of
from gptq_cli.checkpoint.source import METHOD as FP8
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.checkpoint.verify import examine, packed_modules
from gptq_cli.errors import InputError


def open_decodable(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`, quantized or not; raises as `open_checkpoint` and `refuse_wrong_numbers` do."""
    checkpoint = open_checkpoint(directory)
    refuse_wrong_numbers(checkpoint)
    return checkpoint


def refuse_wrong_numbers(checkpoint: Checkpoint) -> tuple[Defect, ...]:
    """The defects that change no number of a GPTQ checkpoint; nothing for a plain one.

    InputError with the code of the first defect if it would be decoded to other weights than were meant,
    E_CKPT_QUANTIZED if its weights are packed in a way that is not read here.
    """
    packed = packed_modules(checkpoint.tensors)
    if checkpoint.method in (None, FP8) and not packed:
        return ()
    if checkpoint.method not in (None, FP8):
        format_of(checkpoint)
    found = examine(checkpoint)
    for defect in found.defects:
        if defect.effect == "numbers":
            everything = f"all of it: gptq verify {quote(str(checkpoint.directory))}"
            hint = f"{defect.hint}; {everything}" if defect.hint else everything
            where = f"{defect.place}: " if defect.place else ""
            raise InputError(
                defect.code, f"`{checkpoint.directory}`, {where}{defect.message}", hint=hint
            )
    return found.defects
