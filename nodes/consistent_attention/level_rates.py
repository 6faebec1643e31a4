"""Sampling rates of single levels of the UNet, as users write them. Host-free."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..story.place import quote


def parse_level_rates(text: str, levels: Collection[int]) -> dict[int, float]:
    """Read "2: 0.3, 4: 0.7" as {downsampling: sampling rate}; `levels` are those of the blocks that share.

    Raises:
        ValueError: what is no such pair, a level that isn't there or comes twice, a rate out of range.
    """
    rates: dict[int, float] = {}
    for part in filter(str.strip, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\.\d*)?|\.\d+)\s*", part)
        if not match:
            raise ValueError(
                f"level_rates has {quote(part.strip())}; write 'level: rate' pairs, as in '2: 0.3, 4: 0.7'."
            )
        level, rate = int(match[1]), float(match[2])
        if level not in levels:
            known = ", ".join(map(str, sorted(levels)))
            raise ValueError(f"level_rates names level {level}, but the chosen blocks lie on the levels {known}.")
        if not 0 <= rate <= 1:
            raise ValueError(f"level_rates gives level {level} the rate {rate}; it must lie between 0 and 1.")
        if level in rates:
            raise ValueError(f"level_rates gives level {level} two rates, {rates[level]} and {rate}; keep one.")
        rates[level] = rate
    return rates
