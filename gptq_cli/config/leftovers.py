"""Names that training tools and adapters leave in a checkpoint, and the likely reason of a misfit.

Sources: torch.compile (`_orig_mod`), DistributedDataParallel and DeepSpeed (`module`), peft
(`base_model.model`, `base_layer`, `modules_to_save`, `original_module`, `lora_A`, ...).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gptq_cli.errors import InputError

MERGE = "merge the adapter and save the model: model.merge_and_unload().save_pretrained(DIR)"
REMEDIES = {  # by the part that a tool puts into names
    "_orig_mod.": "save the model inside torch.compile: model._orig_mod.save_pretrained(DIR)",
    "module.": "save the model inside the parallel wrapper: model.module.save_pretrained(DIR)",
    "base_model.model.": MERGE,
    "base_layer.": MERGE,
    "original_module.": MERGE,
}
PARALLEL = "module."
# Parts that no model's own names have, and the part under which peft keeps a module that it trains.
CERTAIN = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|base_model\.model|base_layer|original_module)\.")
WRAPPERS = re.compile(rf"{CERTAIN.pattern}|(?<=\.)modules_to_save\.[^.]+\.")
OF_ONE_REVISION = "download config.json and the weights again, of one revision"
FROM_ONE_PLACE = "take config.json and the weights from one place"
CLASSIFIERS = re.compile(
    r"(^|\.)(score|classifier|v_head|value_head|reward_head|regression_head|qa_outputs)\."
)
CLASSES = re.compile(
    r".*(For(Sequence|Token)Classification|ForQuestionAnswering|Reward\w*|ValueHead)$"
)
OF_ADAPTERS = ("lora_", "ia3_", "oft_", "vera_")
MOST_LEADING = 4  # extra parts at the beginning of a name


def foreign_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the tensors that no model asks for.

    They lie below a linear, as an adapter's do, or stand a second time under a wrapper's name.
    """
    linears = set()
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2:
            linears.add(name.removesuffix(".weight"))
    return [name for name in shapes if _is_below(name, linears) or _is_second(name, shapes)]


def _is_below(name: str, linears: Collection[str]) -> bool:
    """Return whether `name` belongs to a part of a linear, although linears have no parts."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in linears for end in range(1, len(parts) - 1))


def _is_second(name: str, names: Collection[str]) -> bool:
    """Return whether `name` is another one of `names` with a wrapper's part in it."""
    plain = WRAPPERS.sub("", name)
    return plain != name and plain in names


def refuse_wrapped(names: Collection[str], *, own_code: bool) -> None:
    """Raise InputError E_CKPT_INCOMPLETE for weights that have only the name a wrapper gave them.

    A model with `own_code` may call a part of it `module`.
    """
    lost = _without_certain_parts(names)
    if not lost and not own_code and all(name.startswith(PARALLEL) for name in names):
        lost = {name: name.removeprefix(PARALLEL) for name in names}
    if lost:
        raise misfit(list(lost.values()), list(lost), {})


def _without_certain_parts(names: Collection[str]) -> dict[str, str]:
    """Return the plain name for each wrapped one, if the plain name is not there itself."""
    found = {}
    for name in names:
        plain = CERTAIN.sub("", name)
        if plain != name and plain not in names:
            found[name] = plain
    return found


def misfit(
    absent: Sequence[str],
    left: Sequence[str],
    config: Mapping[str, Any],
    listed: Collection[str] = (),
) -> InputError:
    """Return E_CKPT_INCOMPLETE: parameters and tensors that do not fit, and the likely reason.

    `absent` are parameters without a tensor, `left` tensors without a parameter, `config` is the
    content of config.json, `listed` are names of the index that no shard holds.
    """
    message = f"the checkpoint has no tensor for {len(absent)} parameters, first `{absent[0]}`"
    if left:
        message += f", and {len(left)} tensors that are no parameters, first `{left[0]}`"
    reason, hint = _reason(absent, left, config, listed)
    if reason is not None:
        message += f": {reason}"
    return InputError("E_CKPT_INCOMPLETE", message, hint=hint)


def _reason(
    absent: Sequence[str], left: Sequence[str], config: Mapping[str, Any], listed: Collection[str]
) -> tuple[str | None, str]:
    """Return the likely reason, None if there is none, and a hint."""
    part = _extra_part(absent, left)
    if part is not None:
        reason = f"its names have `{part}` in them, but those of the model do not"
        return reason, _remedy(part, left)
    beginning = _missing_beginning(absent, left)
    if beginning is not None:
        return f"the names of the model begin with `{beginning}`", FROM_ONE_PLACE
    if listed:
        hint = (
            "download the index and the shards again, of one revision, or look at the model's page "
            "for a repair"
        )
        return f"the index lists {len(listed)} tensors that no shard holds", hint
    if all(is_head(name) for name in absent):
        return _about_head(left, config)
    if left:
        return "config.json is of another model", FROM_ONE_PLACE
    return None, OF_ONE_REVISION


def _remedy(part: str, left: Sequence[str]) -> str:
    """Return the hint for names with an extra part."""
    if any(is_of_adapter(name) for name in left):
        return MERGE
    return REMEDIES.get(part, f"save the model again under names without `{part}`")


def _about_head(left: Sequence[str], config: Mapping[str, Any]) -> tuple[str, str]:
    if _is_classifier(left, config):
        hint = "name a language model: its config.json says ...ForCausalLM"
        return "it is a classifier, not a language model", hint
    if config.get("tie_word_embeddings") is False:
        hint = (
            'write "tie_word_embeddings": true into config.json if the embeddings are its head; '
            "else it is incomplete"
        )
        return "it has no output head, and config.json says tie_word_embeddings: false", hint
    hint = "name the language model and not its base: its config.json says ...ForCausalLM"
    return "it has no output head", hint


def _is_classifier(left: Sequence[str], config: Mapping[str, Any]) -> bool:
    if any(CLASSIFIERS.search(name) for name in left):
        return True
    classes = config.get("architectures") or ()
    return any(isinstance(name, str) and CLASSES.match(name) for name in classes)


def is_head(name: str) -> bool:
    """Return whether a parameter is one of the usual output heads."""
    return name.rpartition(".")[0].rpartition(".")[2] in ("lm_head", "embed_out", "output")


def is_of_adapter(name: str) -> bool:
    """Return whether a tensor has its name from peft."""
    if ".base_layer." in name:
        return True
    return any(part.startswith(OF_ADAPTERS) for part in name.split("."))


def _extra_part(absent: Collection[str], left: Collection[str]) -> str | None:
    """Return the part without which most of `left` would be among `absent`, None if there is none.

    It stands at the beginning or inside of the names.
    """
    wanted, found = set(absent), Counter[str]()
    for name in left:
        found.update(_extra_beginnings(name, wanted))
        for part in REMEDIES:
            is_inside = f".{part}" in name and not name.startswith(part)
            if is_inside and name.replace(f".{part}", ".") in wanted:
                found[part] += 1
    return _most_common(found)


def _missing_beginning(absent: Collection[str], left: Collection[str]) -> str | None:
    """Return the beginning with which most of `left` would be among `absent`."""
    have, found = set(left), Counter[str]()
    for name in absent:
        found.update(_extra_beginnings(name, have))
    return _most_common(found)


def _extra_beginnings(name: str, wanted: Collection[str]) -> list[str]:
    """Return the beginnings of `name` without which it would be in `wanted`."""
    parts = name.split(".")
    found = []
    for end in range(1, min(MOST_LEADING, len(parts) - 1) + 1):
        if ".".join(parts[end:]) in wanted:
            found.append(".".join(parts[:end]) + ".")
    return found


def _most_common(found: Counter[str]) -> str | None:
    for part, _ in found.most_common(1):
        return part
    return None
