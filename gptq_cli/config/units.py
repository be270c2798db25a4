"""Sizes and times as people say them."""

from __future__ import annotations

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
