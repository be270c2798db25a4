"""The range of float16, the dtype of stored scales and of decoded weights. Needs no torch.

Decision 23 (docs/decisions) has the reasons.
"""

from __future__ import annotations

SMALLEST = 2.0**-24  # the smallest positive number; no scale is smaller
SMALLEST_NORMAL = 2.0**-14  # smaller numbers are multiples of SMALLEST, with fewer digits
LARGEST = 65504.0
