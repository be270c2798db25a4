"""Whether a quantized checkpoint stores every parameter of its model, as transformers builds it.

`verify_whole` adds this to the checks of `verify.py`, which compare stored tensors with each other.
No weight is read: the model is built on meta.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from gptq_cli.checkpoint.claims import check_claims
from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.layout import quantized_names
from gptq_cli.checkpoint.quantization_config import packing_of
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.checkpoint.verify import Verification, verify_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.events import Report, ignore
from gptq_cli.models.skeleton import build_skeleton, load_config

CPU = torch.device("cpu")
LOST = "E_CKPT_INCOMPLETE"


def verify_whole(directory: Path, report: Report = ignore) -> Verification:
    """Return every defect of the checkpoint in `directory`, a parameter without a tensor included.

    Does what `verify_checkpoint` does with `full`, and raises its errors. If transformers
    cannot build the model without code of its own, `unchecked` of the result tells why.
    """
    found = verify_checkpoint(directory, full=True, report=report)
    if any(defect.code == LOST for defect in found.defects) or not found.tensors:
        return found
    checkpoint = open_checkpoint(directory)
    try:
        reason = _check_parameters(checkpoint)
    except InputError as error:
        if error.code != LOST:
            return replace(found, unchecked=str(error))
        defect = Defect(LOST, str(error), hint=error.hint)
        return replace(found, defects=(*found.defects, defect))
    return replace(found, unchecked=reason)


def _check_parameters(checkpoint: Checkpoint) -> str:
    """Raise InputError E_CKPT_INCOMPLETE if a parameter of the model has no tensor.

    Return "", or the reason if the parameters are not known. Raises the errors of `check_claims`,
    `load_config` and `build_skeleton`.
    """
    check_claims(checkpoint)
    config = load_config(checkpoint.directory, trust_remote_code=False)
    classes: list[object] = []
    if isinstance(config.architectures, list):  # a damaged config.json may hold anything
        classes = config.architectures
    images = _class_name(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config) in classes
    text = _class_name(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    if classes and not images and text not in classes:
        return f"config.json names the class {classes[0]!r}, which is no language model"
    build_skeleton(
        checkpoint.directory,
        config,
        _plain_names(checkpoint),
        torch.float32,
        CPU,
        trust_remote_code=False,
        listed=checkpoint.absent,
        images=images,
    )
    return ""


def _class_name(classes: object, config: object) -> str | None:
    """Return the name of the class for models of `config`, None if `classes` has none."""
    kind = type(config)
    if kind not in classes:  # type: ignore[operator]
        return None
    name: str = classes[kind].__name__  # type: ignore[index]
    return name


def _plain_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors with each quantized module as its weight.

    A module counts as stored if a part of it is lost: that is a defect of its own.
    """
    if checkpoint.coded():
        return open_reader(checkpoint).names()
    packing = packing_of(checkpoint)
    modules = quantized_names(checkpoint.tensors, packing)
    parts: set[str] = set()
    for module in modules:
        parts.update(f"{module}.{part}" for part in packing.dtypes)
    names = [name for name in checkpoint.tensors if name not in parts]
    return names + [f"{module}.weight" for module in modules]
