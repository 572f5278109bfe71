import dataclasses

import pytest

from ghostjax.runs.data.documents import Document, read_documents
from ghostjax.runs.errors import UsageError


def read(paths, **options):
    return [dataclasses.astuple(document) for document in read_documents(paths, **options)]


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
    assert read(paths.values(), text_field="body") == [("forum:0", "forum", b"one")]


def test_lone_surrogates_are_replaced(write_data):
    paths = write_data(forum_jsonl='{"text": "one \\ud800"}')
    assert read(paths.values()) == [("forum:0", "forum", b"one ?")]


BAD_FILES = {
    "empty": ("a_txt", "", "no documents in it"),
    "blank": ("a_txt", " \n\n", "no documents in it"),
    "empty jsonl": ("a_jsonl", "", "no documents in it"),
    "suffix": ("a_csv", "x,y", r"expected a \.txt or \.jsonl file"),
    "not UTF-8": ("a_txt", b"ab\xff", r"not UTF-8 text \(byte 2\)"),
    "one byte": ("a_txt", "one\n\nb\n", "line 3: a document of 1 bytes, needs at least 2"),
    "no text": ("a_jsonl", '{"text": ""}', "line 1: a document of 0 bytes"),
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
