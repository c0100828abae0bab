"""Tests of sizes, durations and counts: parsed and formatted."""

from __future__ import annotations

import pytest

from hpcft.core import units


@pytest.mark.parametrize(
    ("text", "size"),
    [("14.74GiB", 14.74 * 2**30), ("15 GB", 15e9), ("512MiB", 2**29), ("1TiB", 2**40),
     ("banana", None), ("-5GiB", None), ("15", None), ("GiB", None), ("1e3GiB", None), ("", None),
     ("nanGiB", None)],
)  # fmt: skip
def test_parse_bytes_needs_a_number_and_a_unit(text: str, size: float | None) -> None:
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, ""), (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (312 * 2**20, "312 MiB"),
     (1.51 * 2**30, "1.51 GiB"), (1500 * 2**30, "1500 GiB"), (-(2**30), "-1 GiB")],
)  # fmt: skip
def test_format_bytes_has_three_figures(size: float | None, text: str) -> None:
    assert units.format_bytes(size) == text


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [("1-02:03:04", 93784.0), ("02:03:04", 7384.0), ("03:04", 184.0), ("03:04.5", 184.0),
     ("4", None), ("INVALID", None), ("", None)],
)  # fmt: skip
def test_parse_slurm_duration_s_reads_days_to_seconds(text: str, duration_s: float | None) -> None:
    assert units.parse_slurm_duration_s(text) == duration_s
