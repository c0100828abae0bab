"""The benchmark's rows, as text and as Markdown, and whether its bars hold."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

MIB = 2**20

# Mean and largest |error| in percent, and how far below its measurement a prediction may be.
BARS = {
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
    """One case, measured and predicted, all in bytes."""

    case: str
    ranks: int
    stage: int
    measured_bytes: int
    """What the prediction is held against: on a CPU the peak of the allocator's own events, on a
    GPU the peak of what its allocator reserved."""
    predicted_bytes: int | None
    prediction_s: float
    beside_bytes: dict[str, int]
    """Other measurements, by the column's name: on a CPU how much the resident set grew."""
    deepspeed_bytes: int | None
    accelerate_bytes: int

    @property
    def error_percent(self) -> float | None:
        """Predicted over measured; negative where the prediction is too low."""
        if self.predicted_bytes is None:
            return None
        return 100 * (self.predicted_bytes / self.measured_bytes - 1)


def cells(row: Row, device: str) -> list[str]:
    """A row as text, sizes in MiB."""
    error = row.error_percent
    named = {
        "measured": _mib(row.measured_bytes),
        "reserved": _mib(row.measured_bytes),
        "predicted": _mib(row.predicted_bytes),
        "error %": "" if error is None else f"{error:+.3f}",
        "DeepSpeed": _mib(row.deepspeed_bytes),
        "accelerate": _mib(row.accelerate_bytes),
        "s": "" if error is None else f"{row.prediction_s:.1f}",
        **{name: _mib(size) for name, size in row.beside_bytes.items()},
    }
    stage = str(row.stage) if row.ranks > 1 else ""
    return [row.case, str(row.ranks), stage, *(named[name] for name in COLUMNS[device])]


def _lines(rows: list[Row], device: str) -> list[list[str]]:
    header = ["case", "ranks", "ZeRO", *COLUMNS[device]]
    return [header, *(cells(row, device) for row in rows)]


def _mib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / MIB:.2f}"


def text(rows: list[Row], device: str) -> str:
    """The table in columns."""
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
    """The table in Markdown; sizes are MiB."""
    header, *rest = _lines(rows, device)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rest))


def summary(rows: list[Row], device: str) -> tuple[list[str], bool]:
    """Errors of both kinds of cases in a line each, the peers' and ours; whether the bars hold."""
    lines: list[str] = []
    holds = True
    for kind in ("one process", "several ranks"):
        some = [row for row in rows if (row.ranks == 1) == (kind == "one process")]
        if not some:
            continue
        for name in ("deepspeed", "accelerate"):
            off = [
                abs(100 * (estimate / row.measured_bytes - 1))
                for row in some
                if (estimate := getattr(row, f"{name}_bytes")) is not None
            ]
            lines.append(f"{kind}, {name}: mean |error| {fmean(off):.1f} %, most {max(off):.1f} %")
        errors = [(e, row.case) for row in some if (e := row.error_percent) is not None]
        if not errors:
            lines.append(f"{kind}, hpcft: {len(some)} cases, none predicted")
            holds = False
            continue
        mean_bar, most_bar, below_bar = BARS[device, kind]
        mean = fmean(abs(error) for error, _ in errors)
        most, worst = max((abs(error), case) for error, case in errors)
        low, lowest = min(errors)
        good = mean <= mean_bar and most <= most_bar and low >= -below_bar
        holds = holds and good and len(errors) == len(some)
        lines.append(
            f"{kind}, hpcft: {len(errors)} of {len(some)} cases, "
            f"mean |error| {mean:.4f} % (bar {mean_bar}), "
            f"most {most:.3f} % (bar {most_bar}; {worst}), "
            f"lowest {low:+.3f} % (bar -{below_bar}; {lowest}): {'holds' if good else 'MISSED'}"
        )
    return lines, holds
