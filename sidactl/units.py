"""Counts, seeds, sizes and times as people write them."""

import math
import re
from collections.abc import Sequence
from itertools import chain, pairwise

from sidactl.errors import SidaError

_COUNT = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,15}))?([kMG]?)", re.IGNORECASE)

_ZEROS = {"": 0, "k": 3, "m": 6, "g": 9}

_SEEDS = re.compile(r"\s*([0-9]{1,15})(?:-([0-9]{1,15}))?\s*")


def parse_count(text: str, flag: str, what: str = "images") -> int:
    """'500', '10_000', '50k', '1.5M', '1G' -> that many images or else; SidaError names `flag` otherwise."""
    match = _COUNT.fullmatch(text.strip().replace("_", ""))
    whole, fraction, suffix = match.groups(default="") if match else ("", "", "")
    zeros, fraction = _ZEROS[suffix.lower()], fraction.rstrip("0")
    if not match or len(fraction) > zeros:
        raise SidaError(f"{flag} must be a whole number of {what} such as 500, 50k or 1.5M, got {text!r}")
    return int(whole + fraction.ljust(zeros, "0"))


def parse_seeds(text: str, flag: str = "--seeds") -> Sequence[int]:
    """'0-63,100,200-203' -> the seeds in this order, both ends of a range included.

    Consecutive seeds come as a `range`, however many they are.
    SidaError for anything else, for a range that runs downwards and for a seed that is named twice.
    """
    ranges: list[range] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part)
        if not match:
            raise SidaError(f"{flag} must be seeds and ranges of seeds such as 0-63,100, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SidaError(f"{flag} must have ranges that run upwards, got '{part.strip()}'", f"Write {last}-{first}.")
        if ranges and ranges[-1].stop == first:
            ranges[-1] = range(ranges[-1].start, last + 1)
        else:
            ranges.append(range(first, last + 1))
    ascending = sorted(ranges, key=lambda seeds: seeds.start)
    for before, after in pairwise(ascending):
        if after.start < before.stop:
            raise SidaError(f"{flag} must name each seed once, got {after.start} twice in {text!r}")
    return ranges[0] if len(ranges) == 1 else list(chain.from_iterable(ranges))


def format_count(count: int) -> str:
    """50000 -> '50k', 200000000 -> '200M', 1797 -> '1,797': exact, with a suffix where that is shorter."""
    for size, suffix, decimals in ((10**6, "M", 2), (10**3, "k", 1)):
        if count >= size and count % (size // 10**decimals) == 0:
            digits = f"{count % size * 10**decimals // size:0{decimals}}".rstrip("0")
            return f"{count // size:,}{'.' if digits else ''}{digits}{suffix}"
    return f"{count:,}"


def format_duration(duration_sec: float) -> str:
    """3.25 -> '3.2s', 185 -> '3m 05s', 8040 -> '2h 14m', 273600 -> '3d 04h': two units at most, rounded down."""
    if duration_sec < 10:
        return f"{math.floor(duration_sec * 10) / 10:.1f}s"
    minutes, seconds = divmod(int(duration_sec), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"


def format_bytes(num_bytes: int) -> str:
    """512 -> '512 B', 95600000 -> '95.6 MB': powers of 1000, three digits."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 999.5 else f"{size:,.0f} {units[0]}"
