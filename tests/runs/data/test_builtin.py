import hashlib
import os
import re
import subprocess
import sys

import pytest

from ghostjax.runs.data import builtin
from ghostjax.runs.data.builtin import cut, default_documents
from ghostjax.runs.errors import UsageError

SIZE = 65


@pytest.fixture(scope="module")
def defaults():
    return default_documents(SIZE)


def topics(documents):
    """The topics of prose and the modules of code."""
    return {document.id.rsplit(":", 1)[0] for document in documents}


@pytest.mark.slow
def test_no_topic_or_module_is_in_both_sets(defaults):
    train, held_out = defaults
    assert list(held_out) == ["prose", "code"]
    for name, documents in held_out.items():
        assert {document.domain for document in documents} == {name}
        assert len(topics(documents)) > 10
        assert not topics(train) & topics(documents)


def test_what_a_held_out_topic_says_is_in_no_training_topic():
    shared = "A sentence under\n  two topics."
    names = ["a", "b", "c", "d", "e", "f"]
    told = {name: f"Own sentence of {name}.\n\n{shared}\n" for name in names}
    held_out, train = builtin._split_topics(told)
    assert held_out == {"a": f"Own sentence of a.\n\n{shared}\n", "f": "Own sentence of f."}
    assert train == {name: f"Own sentence of {name}." for name in "bcde"}


def test_no_passage_of_the_reference_is_in_both_sets():
    held_out, train = builtin._split_topics(builtin._reference_topics())

    def passages(texts):
        found = [re.split(r"\n\s*\n", text) for text in texts.values()]
        return {" ".join(passage.split()) for text in found for passage in text} - {""}

    assert len(passages(held_out)) > 50
    assert not passages(held_out) & passages(train)


def test_ids_are_unique_and_domains_balanced(defaults):
    train, held_out = defaults
    ids = [document.id for document in sum(held_out.values(), train)]
    assert len(set(ids)) == len(ids)
    domains = [document.domain for document in train]
    assert domains.count("prose") == domains.count("code") == builtin.DOCUMENTS
    assert {len(part) for part in held_out.values()} == {builtin.VAL_DOCUMENTS}


def test_documents_are_about_one_row(defaults):
    train, held_out = defaults
    documents = sum(held_out.values(), train)
    assert all(SIZE // 2 < len(document.text) <= SIZE for document in documents)


@pytest.mark.slow
def test_the_choice_does_not_depend_on_the_process(defaults):
    code = f"from tests.runs.data.test_builtin import *; print(digest(default_documents({SIZE})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest(defaults)


def digest(documents):
    return hashlib.sha256(repr(documents).encode()).hexdigest()


def test_domains_are_what_their_names_say():
    source = (
        '"""Doc."""\n# note\n\ndef f():\n    """More\n    doc."""\n    return "#kept"  # kept\n'
    )
    assert builtin._without_prose(source) == 'def f():\n    return "#kept"  # kept'
    assert not builtin._is_prose('assert_stmt ::= "assert" expression.')
    assert not builtin._is_prose(">>> 1 + 1 2.")
    assert not builtin._is_prose("x = y")
    assert builtin._is_prose("Names refer to objects.")


def test_a_form_feed_does_not_shift_the_lines_that_are_dropped():
    assert builtin._without_prose('x = 1\n\f\ndef f():\n    "doc"\n    y') == (
        "x = 1\ndef f():\n    y"
    )


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (b"", []),
        (b"abc", [b"abc"]),
        (b"ab", []),
        (b"abcdefgh", [b"abcd", b"efgh"]),
        (b"abc defg", [b"abc ", b"defg"]),
        (b"a bcdefg", [b"a bc", b"defg"]),
        (b"abcd    ef g", [b"abcd", b"ef g"]),
    ],
)
def test_cutting(text, pieces):
    assert cut(text, 4) == pieces


def test_installations_without_the_texts_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match=r"no pydoc_data\.topics.*give --train and --val"):
        default_documents(SIZE)
    monkeypatch.undo()
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"no standard-library sources.*give --train and --val"):
        default_documents(SIZE)
