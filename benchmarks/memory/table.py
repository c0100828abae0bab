"""Formats the benchmark's rows as text or Markdown, and checks errors against limits."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

MIB = 2**20

# Largest mean of |error|, largest |error|, and how far a prediction may be too low; in percent.
LIMITS = {
    ("cpu", "one process"): (0.1, 0.5, 0.5),
    ("cpu", "several ranks"): (1.0, 3.0, 0.5),
    ("cuda", "one process"): (5.0, 5.0, 1.0),
    ("cuda", "several ranks"): (5.0, 5.0, 1.0),
}

COLUMNS = {
    "cpu": ("measured", "predicted", "error %", "RSS", "DeepSpeed", "accelerate", "s"),
    "cuda": ("reserved", "predicted", "error %", "allocated", "device", "DeepSpeed", "accelerate",
             "s"),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One case with its measured and predicted memory."""

    case: str
    ranks: int
    stage: int
    measured_bytes: int
    """Peak to compare the prediction with: on a CPU of the allocator's events, on a GPU of the
    reserved memory."""
    predicted_bytes: int | None
    prediction_s: float
    other_bytes: dict[str, int]
    """Other measurements by the column's name, for example the growth of the resident set."""
    deepspeed_bytes: int | None
    accelerate_bytes: int

    @property
    def error_percent(self) -> float | None:
        """Error of the prediction in percent; negative if it is too low."""
        if self.predicted_bytes is None:
            return None
        return 100 * (self.predicted_bytes / self.measured_bytes - 1)


def cells(row: Row, device: str) -> list[str]:
    """Returns the cells of a row, with sizes in MiB."""
    error = row.error_percent
    named = {
        "measured": _mib(row.measured_bytes),
        "reserved": _mib(row.measured_bytes),
        "predicted": _mib(row.predicted_bytes),
        "error %": "" if error is None else f"{error:+.3f}",
        "DeepSpeed": _mib(row.deepspeed_bytes),
        "accelerate": _mib(row.accelerate_bytes),
        "s": "" if error is None else f"{row.prediction_s:.1f}",
        **{name: _mib(size) for name, size in row.other_bytes.items()},
    }
    stage = str(row.stage) if row.ranks > 1 else ""
    return [row.case, str(row.ranks), stage, *(named[name] for name in COLUMNS[device])]


def _lines(rows: list[Row], device: str) -> list[list[str]]:
    header = ["case", "ranks", "ZeRO", *COLUMNS[device]]
    return [header, *(cells(row, device) for row in rows)]


def _mib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / MIB:.2f}"


def text(rows: list[Row], device: str) -> str:
    """Returns the table as text in columns."""
    lines = _lines(rows, device)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(rows: list[Row], device: str) -> str:
    """Returns the table in Markdown, with sizes in MiB."""
    header, *rest = _lines(rows, device)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rest))


def summary(rows: list[Row], device: str) -> tuple[list[str], bool]:
    """Returns a line on the errors of each tool and kind of cases, and whether hpcft's pass."""
    lines: list[str] = []
    all_pass = True
    for kind in ("one process", "several ranks"):
        of_kind = [row for row in rows if (row.ranks == 1) == (kind == "one process")]
        if not of_kind:
            continue
        for name in ("deepspeed", "accelerate"):
            off = [
                abs(100 * (estimate / row.measured_bytes - 1))
                for row in of_kind
                if (estimate := getattr(row, f"{name}_bytes")) is not None
            ]
            lines.append(f"{kind}, {name}: mean |error| {fmean(off):.1f} %, max {max(off):.1f} %")
        errors = [(e, row.case) for row in of_kind if (e := row.error_percent) is not None]
        if not errors:
            lines.append(f"{kind}, hpcft: {len(of_kind)} cases, none predicted")
            all_pass = False
            continue
        mean_limit, max_limit, low_limit = LIMITS[device, kind]
        mean = fmean(abs(error) for error, _ in errors)
        highest, worst = max((abs(error), case) for error, case in errors)
        low, lowest = min(errors)
        passes = mean <= mean_limit and highest <= max_limit and low >= -low_limit
        all_pass = all_pass and passes and len(errors) == len(of_kind)
        verdict = "passed" if passes else "FAILED"
        lines.append(
            f"{kind}, hpcft: {len(errors)} of {len(of_kind)} cases, "
            f"mean |error| {mean:.4f} % (limit {mean_limit}), "
            f"max {highest:.3f} % (limit {max_limit}; {worst}), "
            f"lowest {low:+.3f} % (limit -{low_limit}; {lowest}): {verdict}"
        )
    return lines, all_pass
