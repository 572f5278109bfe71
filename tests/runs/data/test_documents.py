import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghostjax.runs.data import text
from ghostjax.runs.data.documents import Document, Fields, read_documents
from ghostjax.runs.errors import UsageError


def read(paths, fields=None):
    return [dataclasses.astuple(document) for document in read_documents(paths, fields).documents]


def test_text_files_have_one_document_per_block(write_data):
    paths = write_data(wiki_txt="one\nline two\n \t\n\n\nanother\n", notes_txt="über")
    assert read(paths.values()) == [
        ("wiki:0", "wiki", b"one\nline two"),
        ("wiki:1", "wiki", b"another"),
        ("notes:0", "notes", "über".encode()),
    ]


def test_windows_line_ends_and_a_byte_order_mark_are_no_text(write_data):
    paths = write_data(wiki_txt=b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    assert [text for _, _, text in read(paths.values())] == [b"one\ntwo", b"three"]


def test_json_lines_have_one_document_each(write_data):
    paths = write_data(forum_jsonl='{"text": "one\\n\\ntwo"}\n\n{"text": "three", "n": 1}\n')
    assert read(paths.values()) == [
        ("forum:0", "forum", b"one\n\ntwo"),
        ("forum:1", "forum", b"three"),
    ]


def test_the_text_field_has_a_name(write_data):
    paths = write_data(forum_jsonl='{"body": "one", "text": 2}')
    assert read(paths.values(), Fields("body")) == [("forum:0", "forum", b"one")]


def test_lone_surrogates_are_replaced(write_data):
    paths = write_data(forum_jsonl='{"text": "one \\ud800"}')
    assert read(paths.values()) == [("forum:0", "forum", b"one ?")]


BAD_FILES = {
    "empty": ("a_txt", "", "no documents in it of at least 2 bytes"),
    "blank": ("a_txt", " \n\n", "no documents in it"),
    "empty jsonl": ("a_jsonl", "", "no documents in it"),
    "suffix": ("a_csv", "x,y", r"expected a \.txt, \.jsonl or \.parquet file"),
    "not UTF-8": ("a_txt", b"ab\xff", r"not UTF-8 text \(byte 2\)"),
    "one byte": ("a_txt", "b\n", "no documents in it of at least 2 bytes"),
    "no text": ("a_jsonl", '{"text": ""}', "no documents in it of at least 2 bytes"),
    "no Parquet": ("a_parquet", "text", "not a Parquet file"),
    "bad JSON": ("a_jsonl", '{"text": "one"}\n{"text": \n', "line 2: not valid JSON"),
    "no object": ("a_jsonl", '["one"]', "line 1: expected a JSON object, found list"),
    "no field": ("a_jsonl", '\n{"body": "one"}', "line 2: no field 'text' .set --text-field"),
    "no string": ("a_jsonl", '{"text": 1}', "line 1: field 'text' is not a string but int"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_cannot_be_used_are_refused(write_data, name, content, message):
    paths = write_data(**{name: content})
    with pytest.raises(UsageError, match=message) as raised:
        read_documents(paths.values())
    assert str(paths[name]) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none\.txt: No such file"):
        read_documents([tmp_path / "none.txt"])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UsageError, match=r"folder\.txt: Is a directory"):
        read_documents([tmp_path / "folder.txt"])


def test_two_files_with_one_stem_are_refused(write_data):
    paths = write_data(a_txt="one", a_jsonl='{"text": "one"}')
    with pytest.raises(UsageError, match="the same name up to the suffix"):
        read_documents(paths.values())


def test_excerpts_are_short_and_printable():
    document = Document("a:0", "a", "é".encode()[:1] + b"\x1b[31m\x00red \n" + b"x" * 500)
    assert document.excerpt().isprintable()
    assert document.excerpt().startswith("\ufffd [31m red xxx")
    assert len(document.excerpt()) <= 120


def test_short_documents_are_skipped_and_told_and_keep_their_index(write_data):
    paths = write_data(
        forum_jsonl='{"text": ""}\n\n{"text": "one"}\n{"text": "x"}\n{"text": "two"}',
        wiki_txt="one\n\nb\n\nthree",
    )
    found = read_documents(paths.values())
    ids = [document.id for document in found.documents]
    assert ids == ["forum:1", "forum:3", "wiki:0", "wiki:2"]
    forum, wiki = paths.values()
    assert found.skipped == [f"{forum}, line 1", f"{forum}, line 4", f"{wiki}, line 3"]


RECORDS = [
    {"text": "one", "key": 7, "source": "web"},
    {"text": "two", "key": "b", "source": "book"},
]


def test_ids_and_domains_have_fields(write_data):
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    paths = write_data(forum_jsonl=lines)
    assert read(paths.values(), Fields("text", "key", "source")) == [
        ("7", "web", b"one"),
        ("b", "book", b"two"),
    ]
    assert read(paths.values(), Fields(domain="source"))[0] == ("forum:0", "web", b"one")
    assert read(paths.values(), Fields(id="key"))[1] == ("b", "forum", b"two")


def test_rows_of_parquet_are_documents(tmp_path):
    path = tmp_path / "forum.parquet"
    columns = {"body": ["one", "", "three"], "key": [1, 2, 3], "source": ["a", "b", "b"]}
    pq.write_table(pa.table(columns), path)
    found = read_documents([path], Fields("body", "key", "source"))
    documents = [dataclasses.astuple(document) for document in found.documents]
    assert documents == [("1", "a", b"one"), ("3", "b", b"three")]
    assert found.skipped == [f"{path}, row 1"]
    with pytest.raises(UsageError, match=r"parquet, row 0: no field 'text' .set --text-field"):
        read_documents([path])
    with pytest.raises(UsageError, match=r"row 0: field 'key' is not a string but int"):
        read_documents([path], Fields("key"))
    pq.write_table(pa.table({"text": ["one", None]}), path)
    with pytest.raises(UsageError, match=r"row 1: field 'text' is not a string but NoneType"):
        read_documents([path])


BAD_FIELDS = {
    "no id": ("a_jsonl", '{"text": "one"}', Fields(id="key"), r"no field 'key' .set --id-field"),
    "no domain": ("a_jsonl", '{"text": "one"}', Fields(domain="key"), r"set --domain-field"),
    "float": (
        "a_jsonl",
        '{"text": "one", "key": 1.5}',
        Fields(id="key"),
        "line 1: field 'key' is not a string or an integer but float",
    ),
    "bool": ("a_jsonl", '{"text": "one", "key": true}', Fields(id="key"), "an integer but bool"),
    "twice": (
        "a_jsonl",
        '{"text": "one", "key": 1}\n{"text": "two", "key": "1"}',
        Fields(id="key"),
        "line 2: id '1' is that of .*line 1 too",
    ),
    "txt": ("a_txt", "one", Fields(id="key"), "--id-field is for .jsonl and .parquet, a .txt has"),
    "txt domain": ("a_txt", "one", Fields(domain="key"), "--domain-field is for .jsonl and .parq"),
}


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS
)
def test_fields_that_cannot_be_used_are_refused(write_data, name, content, fields, message):
    paths = write_data(**{name: content})
    with pytest.raises(UsageError, match=message) as raised:
        read_documents(paths.values(), fields)
    assert str(paths[name]) in str(raised.value)


def test_files_of_one_name_may_have_fields_for_ids(write_data):
    paths = write_data(a_txt="one", a_jsonl='{"text": "one", "key": "k"}')
    (found,) = read([paths["a_jsonl"]], Fields(id="key"))
    assert found == ("k", "a", b"one")


def test_documents_of_too_few_tokens_are_skipped():
    coder = text.Coder(lambda text: np.array(text.split(), str), text.byte_pieces, 9)
    documents = [Document(f"a:{n}", "a", content) for n, content in enumerate([b"one", b"one two"])]
    kept, tokens, skipped = text._encode(coder, documents, "--train")
    assert (kept, len(tokens), skipped) == (documents[1:], 1, ["a:0"])
    with pytest.raises(UsageError, match="--train: no documents of at least 2 tokens"):
        text._encode(coder, documents[:1], "--train")
