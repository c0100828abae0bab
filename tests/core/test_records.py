"""Tests of the base classes of records: the bounds of stored numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import Field, ValidationError

from builders import run_plan, run_progress, run_record
from hpcft.core.records import Plan, Progress, RunRecord, StoredRecord


class Numbers(StoredRecord):
    """A stored record with numbers in all kinds of fields."""

    plain: float = 0.0
    optional: float | None = None
    count: int = 0
    several: list[float] = Field(default_factory=list)
    by_name: dict[str, float] = Field(default_factory=dict)
    pair: tuple[float, float] | None = None


@pytest.mark.parametrize(
    "values",
    [{"plain": 1e101}, {"optional": -1e101}, {"count": 10**19}, {"several": [1.0, 1e101]},
     {"by_name": {"a": 1e101}}, {"pair": [1.0, 1e101]}],
)  # fmt: skip
def test_stored_numbers_beyond_any_quantity_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"(less|greater) than or equal"):
        Numbers.model_validate_json(json.dumps(values))


def test_stored_numbers_of_any_real_quantity_are_read() -> None:
    in_2100_ns = 4_102_444_800 * 10**9  # the time of a file's last change
    values = {"plain": -1e99, "count": in_2100_ns, "several": [1e99], "by_name": {"a": 1e-99}}
    record = Numbers.model_validate_json(json.dumps(values))
    assert (record.plain, record.count, record.several) == (-1e99, in_2100_ns, [1e99])


def test_stored_records_are_read_without_a_python_function() -> None:
    """A status of 10,000 runs reads half a million parts: a Python call for each is seconds."""
    records = [run_plan(), run_record("aaaa0000", accuracy=0.5), run_progress()]
    for kind, record in zip((Plan, RunRecord, Progress), records, strict=True):
        text = record.model_dump_json()
        assert kind.model_validate_json(text) == record
        assert "function-after" not in str(kind.__pydantic_core_schema__)
