"""What commands write for people and for programs; never a control character of the data."""

import csv
import io
import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ghostjax.runs.blocks import blocks
from ghostjax.runs.store.run import Run

PLAIN_WIDTH = 120  # of output that is not a terminal
_BLOCK = 2**10  # rows that are printed at once


def make_console(stream: TextIO) -> Console:
    """A console that writes control characters to terminals only, whatever FORCE_COLOR says."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(
        file=stream,
        highlight=False,
        force_terminal=False,
        color_system=None,
        width=PLAIN_WIDTH,
        legacy_windows=False,
    )


def plain(text: str) -> str:
    """The text on one line and without anything that does not print.

    Blanks of any kind become spaces, invisible marks (of direction, of joining) are left out, and
    the rest that does not print becomes U+FFFD.

    >>> plain("a\\n\\x1b[31mb\\u202e")
    'a �[31mb'
    """
    return text if text.isprintable() else "".join(map(_plain, text))


def _plain(character: str) -> str:
    if character.isprintable():
        return character
    if character.isspace():
        return " "
    return "" if unicodedata.category(character) == "Cf" else "\ufffd"


def encodable(text: str, console: Console) -> str:
    """The text with question marks for what the stream cannot encode."""
    return text.encode(console.encoding, "replace").decode(console.encoding)


def print_text(console: Console, text: str, style: str = "") -> None:
    """Prints a paragraph that is neither markup nor beyond what the stream can encode."""
    console.print(plain_cell(text, console), style=style)


def plain_cell(text: str, console: Console) -> Text:
    """A cell of a table that is neither markup nor beyond what the stream can encode."""
    return Text(encodable(plain(text), console))


def with_error(value: float, error: float, console: Console) -> str:
    """Value and standard error, both to three digits: ``+1.23e-04 ± 5.00e-06``. Without an error,
    the value alone."""
    if not math.isfinite(error):
        return f"{value:+.2e}"
    sign = "±" if encodable("±", console) == "±" else "+-"
    return f"{value:+.2e} {sign} {error:.1e}"


def plain_table(title: str, columns: Mapping[str, Any], console: Console) -> Table:
    """An empty table of ``columns``, by name; the value is what ``Table.add_column`` takes."""
    table = Table(title=encodable(plain(title), console), title_justify="left", expand=True)
    overflow = "ellipsis" if encodable("…", console) == "…" else "crop"
    for name, options in columns.items():
        options = {"no_wrap": True, "overflow": overflow, **options}
        table.add_column(Text(encodable(name, console)), **options)
    return table


def names(ids: Sequence[str], most: int = 3) -> str:
    """The first of them, in parentheses, or nothing.

    >>> names(["a", "b", "c", "d"])
    ' (a, b, c, ...)'
    """
    more = ", ..." if len(ids) > most else ""
    return f" ({', '.join(ids[:most])}{more})" if len(ids) else ""


def progress_note(run: Run) -> str:
    """One sentence for a run that is not over.

    The number of steps it will have is left out where ``run.json`` does not tell it.
    """
    total = run.metadata.get("options", {}).get("steps")
    of = f" of {total}" if isinstance(total, int) else ""
    return f"The run is not over: these are the values after {run.end}{of} steps."


def print_csv(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] | None = None) -> None:
    """Prints rows, which have the same columns, as UTF-8 CSV with a header.

    Args:
      columns: The names; where there may be no rows.

    Floats have all their digits; None and NaN are empty. Texts go through ``plain``, so that a line
    of the output is a row.
    """
    if columns is not None:
        _write_csv([list(columns)])
    for some in blocks(rows, _BLOCK):
        if columns is None:
            columns = list(some[0])
            _write_csv([columns])
        _write_csv(map(_csv_cell, row.values()) for row in some)


def _write_csv(lines: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    _write(text.getvalue())


def print_json(value: Any) -> None:
    """Prints JSON: in ASCII, control characters escaped, null for NaN and infinities.

    A list at the top, or an iterator, has one element per line. Iterators within are lists.
    """
    if not isinstance(value, list | Iterator):
        for some in blocks(_indented(value), _BLOCK):
            _write("".join(some))
        _write("\n")
        return
    end = "["
    for some in blocks(value, _BLOCK):
        lines = ",\n".join(json.dumps(_finite(item), allow_nan=False) for item in some)
        _write(f"{end}\n{lines}")
        end = ","
    _write("[]\n" if end == "[" else "\n]\n")


def _indented(value: Any, indent: str = "\n") -> Iterator[str]:
    """The pieces of what ``json.dumps`` makes of a value with ``indent=2``; iterators are lists.

    >>> "".join(_indented({"a": [1, {}], "b": iter(["c"])})) == json.dumps(
    ...     {"a": [1, {}], "b": ["c"]}, indent=2
    ... )
    True
    """
    if isinstance(value, Mapping):
        (begin, end), items = "{}", ((f"{json.dumps(key)}: ", own) for key, own in value.items())
    elif isinstance(value, list | tuple | Iterator):
        (begin, end), items = "[]", (("", own) for own in value)
    else:
        yield json.dumps(_finite(value), allow_nan=False)
        return
    before = begin
    for name, own in items:
        yield f"{before}{indent}  {name}"
        yield from _indented(own, f"{indent}  ")
        before = ","
    yield begin + end if before == begin else indent + end


def _csv_cell(value: Any) -> Any:
    value = _finite(value)
    return plain(value) if isinstance(value, str) else value


def _finite(value: Any) -> Any:
    """The value with Python's own numbers, and None for those that are not finite."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(text: str) -> None:
    """Writes UTF-8, whatever the locale: programs read it."""
    sys.stdout.flush()
    binary = getattr(sys.stdout, "buffer", None)
    if binary is None:
        sys.stdout.write(text)
    else:
        binary.write(text.encode())
        binary.flush()
    sys.stdout.flush()
