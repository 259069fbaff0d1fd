"""What :func:`ipt_fast.accelerate` did, as a table, and how to take it back."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class Row:
    """One module.

    Args:
        path: of the module in the model; "" is the model itself.
        kind: name of its class.
        rule: name of the rule by which it runs, or None.
        reason: why it was left as it is, though there is a rule for classes of its name, or None.
        error: largest error of its output, max |out - exact| / max |exact|, on the example; None if not verified.
        allowed: by the error rule, from the error of the plain module.
        before, after: seconds of one call on the example, if asked for.
    """

    path: str
    kind: str
    rule: str | None = None
    reason: str | None = None
    error: float | None = None
    allowed: float | None = None
    before: float | None = None
    after: float | None = None


class Report:
    """The modules that :func:`ipt_fast.accelerate` met; printed, it is a table.

    Args:
        rows: a `Row` for each module that a rule knows by name, in the order of the model.
        whole: the same of the whole model's output; without a rule.
        undo: restores the model.
    """

    def __init__(self, rows: list[Row], whole: Row, undo: Callable[[], None]) -> None:
        self.rows, self.whole, self._undo = rows, whole, undo

    @property
    def accelerated(self) -> list[Row]:
        """The rows of modules that run by a rule."""
        return [row for row in self.rows if row.rule is not None]

    def undo(self) -> None:
        """Give every module its own class back: the model is what it was before, but for what was done to it since.

        Once: what is accelerated again afterwards belongs to another report.
        """
        undo, self._undo = self._undo, _nothing
        undo()

    def __str__(self) -> str:
        lines = [("module", "class", "rule", "error", "allowed", "before", "after")]
        for row in (*self.rows, self.whole):
            what = row.rule or (f"left: {row.reason}" if row.reason else "")
            numbers = (_number(row.error), _number(row.allowed), _seconds(row.before), _seconds(row.after))
            lines.append((row.path or "(whole model)", row.kind, what, *numbers))
        shown = [column for column in zip(*lines, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in shown]
        padded = (
            [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in zip(*shown, strict=True)
        )
        table = ["  ".join(cells).rstrip() for cells in padded]
        return "\n".join([*table, f"{len(self.accelerated)} of {len(self.rows)} known modules run on the operators"])

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.accelerated)} of {len(self.rows)} known modules accelerated>"


def _nothing() -> None:
    pass


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.4f} s"
