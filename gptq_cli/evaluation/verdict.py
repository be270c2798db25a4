"""What a KL to the original means in words, and what to try. Needs no torch.

The limits are those of the section "Verdicts" of docs/accuracy.md, which has the measurements.
"""

from __future__ import annotations

BETTER = "try more bits, a smaller --group-size, more calibration text, or --preset best or max"
VERDICTS = {  # the KL, in nats a token, below which the words hold
    0.01: "hardly differs from the original",
    0.05: "is close to the original",
    0.2: "differs noticeably from the original",
    0.5: "has lost much of the original",
}
WORST = "is badly damaged"
GOOD = 0.05  # below it there is nothing to try


def verdict_lines(kl: float) -> list[str]:
    """Return a line with the words for a KL, and one with what to try if it is large.

    A KL that is not finite is the worst.

    >>> verdict_lines(0.03)
    ['verdict     the model is close to the original: KL is below 0.05']
    """
    words = f"{WORST}: KL is {max(VERDICTS)} or more"
    for limit, meaning in VERDICTS.items():
        if kl < limit:
            words = f"{meaning}: KL is below {limit}"
            break
    lines = [f"verdict     the model {words}"]
    if not kl < GOOD:
        lines.append(f"            {BETTER}")
    return lines
