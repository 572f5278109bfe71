"""Documents, and reading them from files."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ghostjax.runs.data.task import check_stems
from ghostjax.runs.errors import UsageError

MIN_BYTES = 2

EXCERPT = 120  # bytes


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, encoded in UTF-8, with its id and domain."""

    id: str
    domain: str
    text: bytes

    def excerpt(self) -> str:
        """The beginning, on one line and printable: what is not becomes a blank.

        >>> Document("a:0", "a", b"one\\n  two\\x1b[0m").excerpt()
        'one two [0m'
        """
        text = self.text[:EXCERPT].decode(errors="replace")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class Fields(NamedTuple):
    """Which fields of a record have its text, id and domain. None: those of the file's name."""

    text: str = "text"
    id: str | None = None
    domain: str | None = None


class Record(NamedTuple):
    """What a file says of a document, and where in the file it says so."""

    place: str
    fields: dict[str, Any]


class Documents(NamedTuple):
    """Documents, and where there were others that are too short, such as ``a.txt, line 3``."""

    documents: list[Document]
    skipped: list[str]


def read_documents(paths: Collection[Path], fields: Fields | None = None) -> Documents:
    """The documents of .txt (blocks between blank lines), .jsonl (lines) and .parquet (rows) files.

    Where ``fields``, by default ``Fields()``, has none for them, ids are ``stem:index`` with the
    document's index in its file, from 0, and the domain is the stem. Texts of fewer than two bytes
    are skipped, and keep their index.

    Raises:
      UsageError: a file is missing, unreadable, of another kind or without a document, two files
        have one stem, two documents have one id, a line is not a JSON object, or a field is missing
        or of another type. The message names the file and, where there is one, the line or row.
    """
    fields = fields or Fields()
    if fields.id is None:
        check_stems(paths)
    found = Documents([], [])
    ids: dict[str, str] = {}
    for path in paths:
        before = len(found.documents)
        for index, record in enumerate(_read_file(path, fields)):
            place = f"{path}, {record.place}"
            document = _document(place, record.fields, fields, path.stem, index)
            if document.id in ids:
                raise UsageError(f"{place}: id {document.id!r} is that of {ids[document.id]} too")
            ids[document.id] = place
            if len(document.text) < MIN_BYTES:
                found.skipped.append(place)
            else:
                found.documents.append(document)
        if len(found.documents) == before:
            raise UsageError(f"{path}: no documents in it of at least {MIN_BYTES} bytes")
    return found


def _document(
    place: str, record: dict[str, Any], fields: Fields, stem: str, index: int
) -> Document:
    def value(field: str, option: str, kinds: type | UnionType) -> Any:
        if field not in record:
            raise UsageError(f"{place}: no field {field!r} (set --{option})")
        found = record[field]
        if not isinstance(found, kinds) or isinstance(found, bool):
            wanted = "a string" if kinds is str else "a string or an integer"
            raise UsageError(f"{place}: field {field!r} is not {wanted} but {type(found).__name__}")
        return found

    text = value(fields.text, "text-field", str)
    return Document(
        f"{stem}:{index}" if fields.id is None else str(value(fields.id, "id-field", str | int)),
        stem if fields.domain is None else str(value(fields.domain, "domain-field", str | int)),
        # JSON can hold lone surrogates, which UTF-8 cannot.
        text.encode(errors="replace"),
    )


def _read_file(path: Path, fields: Fields) -> list[Record]:
    readers = {".txt": _blocks, ".jsonl": _lines, ".parquet": _rows}
    if path.suffix not in readers:
        raise UsageError(f"{path}: expected a .txt, .jsonl or .parquet file")
    try:
        return readers[path.suffix](path, fields)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _blocks(path: Path, fields: Fields) -> list[Record]:
    """The blocks between blank lines, with the numbers of their first lines."""
    if fields.id is not None or fields.domain is not None:
        option = "--domain-field" if fields.id is None else "--id-field"
        raise UsageError(f"{path}: {option} is for .jsonl and .parquet, a .txt has no fields")
    content = _read_text(path)
    blocks: list[tuple[int, list[str]]] = []
    blank = True
    # Not splitlines: a form feed or a Unicode line separator does not end a line.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            if blank:
                blocks.append((number, []))
            blocks[-1][1].append(line)
        blank = not line.strip()
    return [Record(f"line {number}", {fields.text: "\n".join(lines)}) for number, lines in blocks]


def _lines(path: Path, fields: Fields) -> list[Record]:
    """The objects of JSON lines; which fields they have is up to each."""
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}: expected a JSON object, found {type(record).__name__}")
        records.append(Record(f"line {number}", record))
    return records


def _rows(path: Path, fields: Fields) -> list[Record]:
    """The rows of a Parquet file, in the columns that are asked for."""
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as source:
            wanted = [name for name in fields if name is not None]
            names = [name for name in dict.fromkeys(wanted) if name in source.schema_arrow.names]
            rows = source.read(columns=names).to_pylist()
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a Parquet file ({reason})") from error
    return [Record(f"row {number}", row) for number, row in enumerate(rows)]
