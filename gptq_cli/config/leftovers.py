"""Names of tensors that a training tool or an adapter has left in a checkpoint, and what a misfit most likely comes of.

Sources: torch.compile (`_orig_mod`), DistributedDataParallel and DeepSpeed (`module`), peft (`base_model.model`,
`base_layer`, `modules_to_save`, `original_module`, `lora_A`, ...).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gptq_cli.errors import InputError

MERGE = "merge the adapter and save the model: model.merge_and_unload().save_pretrained(DIR)"
REMEDIES = {  # by what a tool puts into names
    "_orig_mod.": "save the model that torch.compile has wrapped: model._orig_mod.save_pretrained(DIR)",
    "module.": "save the model that is trained in parallel itself: model.module.save_pretrained(DIR)",
    "base_model.model.": MERGE,
    "base_layer.": MERGE,
    "original_module.": MERGE,
}
PARALLEL = "module."
# Parts that are of no model's own names, and where peft keeps a copy of a module that it trains.
CERTAIN = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|base_model\.model|base_layer|original_module)\.")
WRAPPERS = re.compile(rf"{CERTAIN.pattern}|(?<=\.)modules_to_save\.[^.]+\.")
OF_ONE_REVISION = "download config.json and the weights again, of one revision"
CLASSIFIERS = re.compile(
    r"(^|\.)(score|classifier|v_head|value_head|reward_head|regression_head|qa_outputs)\."
)
CLASSES = re.compile(
    r".*(For(Sequence|Token)Classification|ForQuestionAnswering|Reward\w*|ValueHead)$"
)
OF_ADAPTERS = ("lora_", "ia3_", "oft_", "vera_", "hada_", "lokr_")
MOST_LEADING = 4  # parts of a name that may be too many at its beginning


def foreign_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tensors that no model asks for: below a linear, such as an adapter's, or a second time under a wrapper's name."""
    linears = {
        name.removesuffix(".weight") for name, shape in shapes.items() if _is_matrix(name, shape)
    }
    return [name for name in shapes if _is_below(name, linears) or _is_second(name, shapes)]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2


def _is_below(name: str, linears: Collection[str]) -> bool:
    """Whether `name` is of a part of a linear, which has none."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in linears for end in range(1, len(parts) - 1))


def _is_second(name: str, names: Collection[str]) -> bool:
    """Whether `name` is that of another tensor with a wrapper's part in it."""
    plain = WRAPPERS.sub("", name)
    return plain != name and plain in names


def refuse_wrapped(names: Collection[str], *, own_code: bool) -> None:
    """InputError E_CKPT_INCOMPLETE for weights that are there under the name of a wrapper only.

    A model with `own_code` may call a part of it `module`.
    """
    lost = {
        name: plain
        for name in names
        if (plain := CERTAIN.sub("", name)) != name and plain not in names
    }
    if not lost and not own_code and all(name.startswith(PARALLEL) for name in names):
        lost = {name: name.removeprefix(PARALLEL) for name in names}
    if lost:
        raise misfit(list(lost.values()), list(lost), {})


def misfit(
    absent: Sequence[str],
    left: Sequence[str],
    config: Mapping[str, Any],
    listed: Collection[str] = (),
) -> InputError:
    """InputError E_CKPT_INCOMPLETE: parameters without a tensor, tensors without a parameter, and the likely reason.

    `listed` are names of the index that no shard holds.
    """
    told = f"the checkpoint has no tensor for {len(absent)} parameters, first `{absent[0]}`"
    if left:
        told += f", and {len(left)} tensors that are no parameters, first `{left[0]}`"
    reason, hint = _reason(absent, left, config, listed)
    return InputError("E_CKPT_INCOMPLETE", f"{told}: {reason}" if reason else told, hint=hint)


def _reason(
    absent: Sequence[str], left: Sequence[str], config: Mapping[str, Any], listed: Collection[str]
) -> tuple[str | None, str]:
    if part := _wrapper(absent, left):
        adapted = any(is_of_adapter(name) for name in left)
        hint = (
            MERGE
            if adapted
            else REMEDIES.get(part, f"save the model again under names without `{part}`")
        )
        return f"its names have `{part}` in them, those of the model have not", hint
    if lacking := _beginning(absent, left):
        return (
            f"the names of the model begin with `{lacking}`",
            "take config.json and the weights from one place",
        )
    if listed:
        hint = "download the index and the shards again, of one revision, or look at the model's page for a repair"
        return f"the index lists {len(listed)} tensors that no shard holds", hint
    if all(is_head(name) for name in absent):
        return _about_head(left, config)
    if left:
        return "config.json is of another model", "take config.json and the weights from one place"
    return None, OF_ONE_REVISION


def _about_head(left: Sequence[str], config: Mapping[str, Any]) -> tuple[str, str]:
    classes = [name for name in config.get("architectures") or () if isinstance(name, str)]
    if any(CLASSIFIERS.search(name) for name in left) or any(
        CLASSES.match(name) for name in classes
    ):
        return (
            "a classifier, no language model",
            "name a language model: its config.json says ...ForCausalLM",
        )
    if config.get("tie_word_embeddings") is False:
        hint = 'write "tie_word_embeddings": true into config.json if the embeddings are its head; else it is incomplete'
        return "it has no output head, and config.json says tie_word_embeddings: false", hint
    return (
        "it has no output head",
        "name the language model and not its base: its config.json says ...ForCausalLM",
    )


def is_head(name: str) -> bool:
    """Whether a parameter is one of the usual output heads."""
    return name.rpartition(".")[0].rpartition(".")[2] in ("lm_head", "embed_out", "output")


def is_of_adapter(name: str) -> bool:
    """Whether peft has given a tensor its name."""
    return (
        any(part.startswith(("lora_", "ia3_", "oft_", "vera_")) for part in name.split("."))
        or ".base_layer." in name
    )


def _wrapper(absent: Collection[str], left: Collection[str]) -> str | None:
    """What most of `left` have too much, at the beginning or inside, to be among `absent`."""
    wanted, found = set(absent), Counter[str]()
    for name in left:
        parts = name.split(".")
        for end in range(1, min(MOST_LEADING, len(parts) - 1) + 1):
            if ".".join(parts[end:]) in wanted:
                found[".".join(parts[:end]) + "."] += 1
        for part in REMEDIES:
            if _has(name, part) and not name.startswith(part) and _without(name, part) in wanted:
                found[part] += 1
    return found.most_common(1)[0][0] if found else None


def _beginning(absent: Collection[str], left: Collection[str]) -> str | None:
    """What `left` would need at the beginning to be among `absent`."""
    have, found = set(left), Counter[str]()
    for name in absent:
        parts = name.split(".")
        for end in range(1, min(MOST_LEADING, len(parts) - 1) + 1):
            if ".".join(parts[end:]) in have:
                found[".".join(parts[:end]) + "."] += 1
    return found.most_common(1)[0][0] if found else None


def _has(name: str, part: str) -> bool:
    return name.startswith(part) or f".{part}" in name


def _without(name: str, part: str) -> str:
    return name.removeprefix(part).replace(f".{part}", ".")
