"""Several datasets for one calibration: the share of each, and the windows that it has to give.

`a.jsonl:0.7` is the dataset `a.jsonl` with a share of 0.7. Shares are relative to their sum.
Datasets without shares have equal ones. The windows are divided by the largest remainder, so that
they add up, and a dataset that is named earlier wins a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from gptq_cli.calibration.chats import read_template
from gptq_cli.calibration.corpus import DatasetSource, has_columns, has_splits, is_path, split_share
from gptq_cli.config.corpora import BUILT_IN, CORPORA
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError
from gptq_cli.files import expanded


def sources_of(config: QuantizeConfig, names: Sequence[str]) -> list[tuple[DatasetSource, int]]:
    """Return the datasets of a configuration, each with its number of windows.

    A dataset has those of the options dataset_config, dataset_split and text_column that mean
    something for it. The chat template is for all chats. Raises ConfigError: E_CFG_CONFLICT for
    shares of only some datasets, a dataset that is given twice and an option that means nothing for
    any of them; E_CFG_RANGE for a share of 0 and a dataset that would give no window.
    """
    split = [split_share(name) for name in names]
    shares = _shares(split)
    sources = [_source_of(config, name) for name, _ in split]
    _refuse_idle_options(config, sources)
    counts = divide(config.nsamples, shares)
    for source, share, count in zip(sources, shares, counts, strict=True):
        if count == 0:
            portion = float(share / sum(shares))
            raise ConfigError(
                "E_CFG_RANGE",
                f"dataset `{source.name}` would give none of {config.nsamples} windows: its share "
                f"is {portion:.3g}",
                hint="raise --nsamples or its share, or leave the dataset out",
            )
    return list(zip(sources, counts, strict=True))


def _shares(split: Sequence[tuple[str, str | None]]) -> list[Fraction]:
    """Return the share of each dataset, 1 for each if none has one."""
    _refuse_twice([name for name, _ in split])
    without = [name for name, share in split if share is None]
    if len(without) == len(split):
        return [Fraction(1)] * len(split)
    if without:
        message = f"dataset `{without[0]}` has no share, but others have one"
        hint = f"give each dataset a share, such as {without[0]}:0.5, or none of them"
        raise ConfigError("E_CFG_CONFLICT", message, hint=hint)
    shares = []
    for name, share in split:
        assert share is not None
        if Fraction(share) == 0:
            message = f"the share of dataset `{name}` must be more than 0, got {share}"
            hint = "leave the dataset out, or give it a larger share"
            raise ConfigError("E_CFG_RANGE", message, hint=hint)
        shares.append(Fraction(share))
    return shares


def _refuse_twice(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            message = f"dataset `{name}` is given twice"
            raise ConfigError("E_CFG_CONFLICT", message, hint="keep one of them, with a share")


def divide(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Return `total` divided in proportion to `shares` by the largest remainder."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def fitting_nsamples(config: QuantizeConfig, held: Sequence[int]) -> int:
    """Return the largest number of windows of which no dataset gives more than it holds.

    `held` are the windows of each dataset. It is 0 if a dataset would have to give none.
    """
    assert isinstance(config.dataset, list)
    shares = _shares([split_share(name) for name in config.dataset])
    for nsamples in range(config.nsamples, 0, -1):
        counts = divide(nsamples, shares)
        enough = [0 < count <= own for count, own in zip(counts, held, strict=True)]
        if all(enough):
            return nsamples
    return 0


def _source_of(config: QuantizeConfig, name: str) -> DatasetSource:
    """Return a dataset with the options that mean something for it."""
    source = DatasetSource(name)
    if name in CORPORA or name == BUILT_IN:
        return source
    if not is_path(name):
        return DatasetSource(name, config.dataset_config, config.dataset_split, config.text_column)
    path = expanded(name)
    if has_columns(path):
        source = replace(source, text_column=config.text_column)
    if has_splits(path):
        source = replace(source, split=config.dataset_split)
    return source


def _refuse_idle_options(config: QuantizeConfig, sources: Sequence[DatasetSource]) -> None:
    """Raise E_CFG_CONFLICT for an option that no dataset takes."""
    used = {
        "text_column": any(source.text_column for source in sources),
        "dataset_config": any(source.config for source in sources),
        "dataset_split": any(source.split for source in sources),
    }
    for option, is_used in used.items():
        value = getattr(config, option)
        if value is not None and not is_used:
            message = f"{option} `{value}` has no meaning for any of the datasets"
            raise ConfigError("E_CFG_CONFLICT", message, hint=f"remove {option}")
    if config.chat_template is not None:
        read_template(expanded(config.chat_template))
