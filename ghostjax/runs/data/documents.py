"""Documents, and reading them from files."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

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


def read_documents(paths: Collection[Path], text_field: str = "text") -> list[Document]:
    """The documents of .txt files (blocks between blank lines) and .jsonl files (lines).

    Ids are ``stem:index`` with the document's index in its file, from 0; the domain is the stem.

    Raises:
      UsageError: a file is missing, unreadable, empty or of another kind, two files have one stem,
        a line is not a JSON object with a string in ``text_field``, or a text is shorter than two
        bytes. The message names the file and, where there is one, the line.
    """
    check_stems(paths)
    return [document for path in paths for document in _read_file(path, text_field)]


def _read_file(path: Path, text_field: str) -> list[Document]:
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"{path}: expected a .txt or .jsonl file")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    texts = _blocks(content) if path.suffix == ".txt" else _json_texts(path, content, text_field)
    if not texts:
        raise UsageError(f"{path}: no documents in it")
    documents = []
    for index, (line, text) in enumerate(texts):
        # JSON can hold lone surrogates, which UTF-8 cannot.
        encoded = text.encode(errors="replace")
        if len(encoded) < MIN_BYTES:
            raise UsageError(
                f"{path}, line {line}: a document of {len(encoded)} bytes, "
                f"needs at least {MIN_BYTES}"
            )
        documents.append(Document(f"{path.stem}:{index}", path.stem, encoded))
    return documents


def _blocks(content: str) -> list[tuple[int, str]]:
    """The blocks between blank lines, with the numbers of their first lines."""
    blocks: list[tuple[int, list[str]]] = []
    blank = True
    # Not splitlines: a form feed or a Unicode line separator does not end a line.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            if blank:
                blocks.append((number, []))
            blocks[-1][1].append(line)
        blank = not line.strip()
    return [(number, "\n".join(lines)) for number, lines in blocks]


def _json_texts(path: Path, content: str, text_field: str) -> list[tuple[int, str]]:
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}: expected a JSON object, found {type(record).__name__}")
        if text_field not in record:
            raise UsageError(f"{where}: no field {text_field!r} (set --text-field)")
        if not isinstance(record[text_field], str):
            found = type(record[text_field]).__name__
            raise UsageError(f"{where}: field {text_field!r} is not a string but {found}")
        texts.append((number, record[text_field]))
    return texts
