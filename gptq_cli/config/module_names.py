"""Names of modules in numbered lists, such as the decoder's blocks."""

from __future__ import annotations

import re
from typing import NamedTuple

_ITEM = re.compile(r"(?P<list_name>.*?)\.(?P<number>\d+)\.")
_NUMBER = re.compile(r"\.\d+(?=\.)")
_NUMBER_OR_LAST = re.compile(r"\.\d+(?=\.|$)")


class ListItem(NamedTuple):
    """An item of the outermost numbered list in a name; `inner` is the name inside the item."""

    list_name: str
    number: str
    inner: str


def list_item(name: str) -> ListItem | None:
    """Return the item of the outermost numbered list that holds a module; None outside of lists.

    >>> list_item("model.layers.3.mlp.experts.7.up_proj")
    ListItem(list_name='model.layers', number='3', inner='mlp.experts.7.up_proj')
    """
    match = _ITEM.match(name)
    if match is None:
        return None
    return ListItem(match["list_name"], match["number"], name[match.end() :])


def kind_of(name: str, *, last_too: bool = False) -> str:
    """Return the name that the same module of every block shares: each number in it becomes N.

    A number at the end stays, because it tells modules of one block apart, unless `last_too`.

    >>> kind_of("model.layers.3.mlp.experts.7.up_proj")
    'model.layers.N.mlp.experts.N.up_proj'
    """
    if last_too:
        return _NUMBER_OR_LAST.sub(".N", name)
    return _NUMBER.sub(".N", name)
