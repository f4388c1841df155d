"""Tables for people, on a terminal."""

from collections.abc import Sequence

Cell = str | float | int | None


def show(cell: Cell) -> str:
    """A number with about four digits."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        digits = 0 if abs(cell) >= 1000 else 1 if abs(cell) >= 100 else 2
        return f"{cell:,.{digits}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The first column to the left, numbers to the right."""
    cells = [list(header), *([show(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
