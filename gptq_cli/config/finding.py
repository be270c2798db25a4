"""What is wrong with a set of values, before it is known whether a file, a flag or the environment said it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

UNITS = ("B", "KB", "MB", "GB", "TB")


def size(n_bytes: float) -> str:
    """Bytes in powers of 1000: 5.4 MB."""
    unit = 0
    while n_bytes >= 999.5 and unit < len(UNITS) - 1:
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.3g} {UNITS[unit]}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


KeyPath = tuple[str | int, ...]

# What other tools and papers call the same thing, where spelling alone would not lead there.
SYNONYMS = {
    "percdamp": "damp_percent",
    "dampening_frac": "damp_percent",
    "act_order": "desc_act",
    "actorder": "desc_act",
    "wbits": "bits",
    "w_bit": "bits",
    "num_calibration_samples": "nsamples",
    "max_seq_length": "seqlen",
    "ignore": "dynamic",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong: where (the first of `paths`), a code, words that follow the field's name, and what to do."""

    paths: tuple[KeyPath, ...]
    code: str
    predicate: str
    hint: str | None = None


def shown(value: object, limit: int = 60) -> str:
    """`value` as one would write it in the file, on one line and not longer than `limit`."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that `word` was most likely meant to be."""
    known = list(known)
    key = word.strip().lower().replace("-", "_").replace(" ", "_")
    if SYNONYMS.get(key) in known:
        return SYNONYMS[key]
    return next(iter(get_close_matches(key, known, n=1, cutoff=cutoff)), None)


def name_of(path: KeyPath) -> str:
    """A path as people write it: `bits`, `dynamic['+:lm_head'].bits`, `dataset[1]`."""
    head, *rest = path
    words = [str(head)]
    for part in rest:
        words.append(f".{part}" if isinstance(part, str) and part.isidentifier() else f"[{part!r}]")
    return "".join(words)
