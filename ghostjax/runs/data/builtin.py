"""The default data: documents cut from the Python installation, so that nothing is downloaded."""

import ast
import importlib
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ghostjax.runs.data.documents import MIN_BYTES, Document
from ghostjax.runs.errors import UsageError

DOCUMENTS = 256  # per domain
VAL_DOCUMENTS = 256  # per validation set
HELD_OUT_EVERY = 5  # topics and modules, in alphabetical order


def default_documents(size: int) -> tuple[list[Document], dict[str, list[Document]]]:
    """Training and held-out documents of at most ``size`` bytes, from the Python installation.

    Training: equally many of domain prose (sentences of the reference in ``pydoc_data.topics``,
    without its grammar and examples) and of domain code (source of the standard library's top-level
    modules, without docstrings and comment lines). Held out, as validation sets prose and code:
    other topics and other modules. The reference repeats passages under several topics; what a
    held-out topic says is in no training document.

    Ids are ``domain:topic:index`` and ``domain:module:index``. The choice depends on the Python
    version and ``size`` alone, not on any seed.

    Raises:
      UsageError: the installation has no reference texts or no sources.
    """
    held_topics, topics = _split_topics(_reference_topics())
    modules = _module_sources()
    held_modules = {name: modules.pop(name) for name in sorted(modules)[::HELD_OUT_EVERY]}
    prose = _cut_all("prose", topics, size)
    code = _cut_all("code", modules, size)
    count = min(DOCUMENTS, len(prose), len(code))
    held_out = {
        "prose": _spread(_cut_all("prose", held_topics, size), VAL_DOCUMENTS),
        "code": _spread(_cut_all("code", held_modules, size), VAL_DOCUMENTS),
    }
    return _spread(prose, count) + _spread(code, count), held_out


def _reference_topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UsageError(
            "this Python installation has no pydoc_data.topics, which the default data is cut "
            "from: give --train and --val files"
        ) from error


def _split_topics(topics: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Held-out and training topics; a passage stays only where it comes first."""
    names = sorted(topics)
    held_out = names[::HELD_OUT_EVERY]
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name in held_out + [name for name in names if name not in held_out]:
        passages = []
        for passage in re.split(r"\n\s*\n", topics[name]):
            key = " ".join(passage.split())
            if _is_prose(key) and key not in seen:
                seen.add(key)
                passages.append(passage)
        kept[name] = "\n\n".join(passages)
    return ({name: kept.pop(name) for name in held_out}, kept)


def _is_prose(passage: str) -> bool:
    """Sentences, that is: no grammar, no examples, no headings."""
    return passage.endswith((".", ":")) and "::=" not in passage and ">>>" not in passage


def _module_sources() -> dict[str, str]:
    """Source of the public top-level modules of the standard library, in alphabetical order."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = {
        name: folder / f"{name}.py" for name in sorted(sys.stdlib_module_names) if name[0] != "_"
    }
    sources = {
        name: _without_prose(path.read_text(encoding="utf-8", errors="replace"))
        for name, path in paths.items()
        if path.is_file()
    }
    if not sources:
        raise UsageError(
            f"no standard-library sources in {folder}, which the default data is cut from: "
            "give --train and --val files"
        )
    return sources


def _without_prose(source: str) -> str:
    """Source without docstrings and comment lines, which are prose."""
    dropped = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            dropped.update(range(node.lineno - 1, node.end_lineno))
    # Not splitlines: to the parser, a form feed does not end a line.
    return "\n".join(
        line
        for number, line in enumerate(source.split("\n"))
        if number not in dropped and line.strip() and not line.lstrip().startswith("#")
    )


def _cut_all(domain: str, texts: dict[str, str], size: int) -> list[Document]:
    return [
        Document(f"{domain}:{name}:{index}", domain, piece)
        for name, text in texts.items()
        for index, piece in enumerate(cut(text.encode(), size))
    ]


def cut(text: bytes, size: int) -> list[bytes]:
    """Cuts a text into pieces of more than half of ``size`` and at most ``size`` bytes.

    Pieces end after a space or line end where the second half of a piece has one; a rest that is
    too short at the end of the text is left out.

    >>> cut(b"one two three four", 9)
    [b'one two ', b'three ']
    """
    pieces = []
    start = 0
    while len(text) - start > size // 2:
        stop = start + size
        if stop < len(text):
            space = max(text.rfind(b" ", start, stop), text.rfind(b"\n", start, stop)) + 1
            if space - start > size // 2:
                stop = space
        piece = text[start:stop]
        if len(piece) >= MIN_BYTES and not piece.isspace():
            pieces.append(piece)
        start = stop
    return pieces


def _spread(documents: Sequence[Document], count: int) -> list[Document]:
    """``count`` documents at even distances, so that every topic and module has its share."""
    count = min(count, len(documents))
    return [documents[index * len(documents) // count] for index in range(count)]
