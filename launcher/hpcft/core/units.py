"""Parses and formats sizes, durations and counts. A GiB is 1024³ bytes."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3


def format_bytes(size_bytes: float | None) -> str:
    """Formats bytes with three significant figures: `1.51 GiB`, `312 MiB`, `0 B`."""
    if size_bytes is None:
        return ""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= size:
            digits = ".3g" if abs(size_bytes) < 1000 * size else ".0f"
            return f"{size_bytes / size:{digits}} {unit}"
    return f"{size_bytes:.0f} B"


_SIZES = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip


def parse_bytes(text: str) -> float | None:
    """Parses a size such as `14.74GiB` into bytes; returns None for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip())
    return float(match[1]) * _SIZES[match[2]] if match else None


def format_seconds(duration_s: float | None) -> str:
    """Formats seconds as `h:mm:ss` or `m:ss`; returns an empty text for None."""
    if duration_s is None:
        return ""
    minutes, seconds = divmod(int(max(duration_s, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_count(count: float | None) -> str:
    """Formats a large count in short: `66.4 M`, `8.54 B`, `4,098`."""
    if count is None:
        return ""
    if count < 100_000:
        return f"{count:,.0f}"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def format_number(number: float | None) -> str:
    """Formats a number with three significant figures: `0.0123`, `45.6`, `1,230`."""
    if number is None:
        return ""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def parse_slurm_duration_s(text: str) -> float | None:
    """Parses Slurm's elapsed time (`1-02:03:04`, `03:04`) into seconds; None for other text."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)(?:\.\d+)?", text.strip())
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
