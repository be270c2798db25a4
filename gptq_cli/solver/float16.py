"""Numbers that float16 holds: the scales that are stored, and the weights that they decode to. Needs no torch.

Decision 23 (docs/decisions) has the reasons.
"""

from __future__ import annotations

SMALLEST = 2.0**-24  # above zero; no scale is smaller
SMALLEST_NORMAL = 2.0**-14  # smaller numbers are multiples of SMALLEST, with fewer digits
LARGEST = 65504.0
