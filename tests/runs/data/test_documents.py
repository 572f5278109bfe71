import dataclasses
import json
import tempfile
from pathlib import Path

import grain
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data import text
from ghostjax.runs.data.documents import Document, read_documents
from ghostjax.runs.data.kept import KeptTokens
from ghostjax.runs.data.load import load_task
from ghostjax.runs.data.shards import Fields
from ghostjax.runs.data.task import Skipped
from ghostjax.runs.errors import UsageError
from ghostjax.runs.store.fingerprint import fingerprints
from ghostjax.runs.training.placement import Placement
from ghostjax.runs.training.trainer import batches, val_choice

FULL = Path("/dev/full")


def read(paths, fields=None, **more):
    found = read_documents(paths, fields, **more)
    assert list(found) == [found[n] for n in range(len(found))]
    assert (
        [document.id for document in found]
        == list(found.ids())
        == list(map(found.id, range(len(found))))
    )
    return [dataclasses.astuple(document) for document in found]


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
    "records": ("a_array_record", "x", "such as ArrayRecord, give --task a function that returns"),
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
    with pytest.raises(
        UsageError, match=r'is a directory: give .* a pattern of them, as ".*\*\.jsonl"'
    ):
        read_documents([tmp_path])
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
    skipped = Skipped()
    found = read(paths.values(), skipped=skipped)
    assert [name for name, *_ in found] == ["forum:1", "forum:3", "wiki:0", "wiki:2"]
    forum, wiki = paths.values()
    assert skipped == Skipped(3, [f"{forum}, line 1", f"{forum}, line 4", f"{wiki}, line 3"])


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
    skipped = Skipped()
    found = read([path], Fields("body", "key", "source"), skipped=skipped)
    assert found == [("1", "a", b"one"), ("3", "b", b"three")]
    assert skipped == Skipped(1, [f"{path}, row 1"])
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
    "no Unicode": (
        "a_jsonl",
        '{"text": "one", "key": "\\ud800"}',
        Fields(id="key"),
        r"line 1: its id '\\ud800' is no Unicode text: change it, or the name of the file",
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


def test_documents_of_too_few_tokens_are_skipped(write_data):
    def encode(texts):
        return [np.array(text.split()) for text in texts]

    coder, skipped = text.Coder(encode, text.byte_pieces, 9), Skipped()
    paths = write_data(a_txt="one\n\none two")
    documents = [Document(f"a:{n}", "a", content) for n, content in enumerate([b"one", b"one two"])]
    for given in (documents, read_documents(paths.values(), None, coder.sizes, skipped)):
        texts = text._texts(coder, given, "--train", skipped)
        assert [tuple(example) for example in texts] == [("a:1", "a", 2, "one two")]
    assert skipped == Skipped(2, [f"{paths['a_txt']}, line 1", "a:0"])
    with pytest.raises(UsageError, match="--train: no documents of at least 2 tokens"):
        text._texts(coder, documents[:1], "--train", skipped)


def test_a_tokenizer_is_asked_once_for_every_text(write_data, tmp_path, monkeypatch):
    """The digests are those of ids and tokens, the same where they are asked for again."""
    contents = ["one two three", "one", "x", "a b " * 300, "six seven"]
    paths = write_data(a_txt="\n\n".join(contents[:4]), b_txt=contents[4])
    config = TrainConfig(
        tmp_path, train=(paths["a_txt"],), val=(f"b={paths['b_txt']}",), tokenizer=tmp_path,
        batch_size=1, val_batch_size=1,
    )  # fmt: skip
    calls = []

    def encode(texts):
        calls.extend(own.decode().strip() for own in texts)
        return [np.array([len(word) for word in own.split()], np.int32) for own in texts]

    monkeypatch.setattr(text, "_load_tokenizer", lambda path: text.Coder(encode, None, 9))
    task = load_task(config)
    found = fingerprints(task.contents())
    assert calls == list(map(str.strip, contents))
    train, (held_out,) = task.examples, task.val_examples.values()
    tokens = [encode([own.text for own in texts.documents]) for texts in (train, held_out)]
    expected = {
        "training examples": ["a:0", "a:3", *tokens[0]],
        "validation set b": [1, *tokens[1]],
    }
    assert found == fingerprints(expected) == fingerprints(task.contents())


def test_tokens_that_cannot_be_kept_name_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"none: No such .* set TMPDIR to a folder .* 4 bytes a"):
        KeptTokens(lambda texts: [])


@pytest.mark.skipif(not FULL.exists(), reason="a disk that is always full")
@pytest.mark.parametrize("size", [2, 2**20])
def test_a_full_disk_says_so_at_the_latest_when_tokens_are_read(size, monkeypatch):
    """And no second time when the file is closed, although it is written once more then."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: FULL.open("w+b", buffering))
    kept = KeptTokens(lambda texts: [np.zeros(size, np.int32)])
    with pytest.raises(UsageError, match="No space left on device; set TMPDIR"):
        list(kept.read(kept.sizes([b"text"])))
    kept._close()  # as when nobody has it any more


def test_a_carriage_return_ends_a_line_too(write_data):
    paths = write_data(
        a_txt=b"\xef\xbb\xbfone\rtwo\r\rthree \xe2\x80\xa8 x\n\x0c\r\nfour",
        b_jsonl=b'{"text": "five"}\r{"text": "six"}',
    )
    assert [content for _, _, content in read(paths.values())] == [
        b"one\ntwo",
        "three \u2028 x".encode(),
        b"four",
        b"five",
        b"six",
    ]


def shards(folder, suffix, count=11, size=4):
    """Files of so many documents together."""
    folder.mkdir()
    for n in range(0, count, size):
        records = [{"text": f"document {m} " * (m + 1), "key": f"k{m}"} for m in range(count)]
        path, own = folder / f"part-{n // size}.{suffix}", records[n : n + size]
        if suffix == "jsonl":
            path.write_text("\n\n".join(map(json.dumps, own)))
        else:
            pq.write_table(pa.Table.from_pylist(own), path, row_group_size=3)
    return f"{folder}/*.{suffix}"


def test_a_pattern_of_shards_is_one_file_and_jsonl_is_parquet(tmp_path):
    """The same examples, digests, and rows of every step."""
    patterns = [shards(tmp_path / name, name) for name in ("jsonl", "parquet")]
    patterns.append(shards(tmp_path / "one", "jsonl", size=11))
    found, several = [], len(patterns)
    for pattern in patterns * 2:
        own = {"id_field": "key"} if len(found) < several else {}
        config = TrainConfig(
            tmp_path, train=(Path(pattern),), val=(f"a={pattern}",), length=8, batch_size=4,
            val_batch_size=2, domain_field="key", **own,
        )  # fmt: skip
        task = load_task(config)
        steps = [batch for batch, _ in zip(batches(config, task), range(6))]
        leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(steps)]
        found.append((fingerprints(task.contents()), list(task.examples), leaves))
    assert found[0] == found[1] == found[2]
    assert found[3] == found[4]  # ids have the files' names
    assert found[3][0] != found[5][0]
    files = [str(path) for path in TrainConfig(tmp_path, train=(Path(patterns[0]),)).train_files]
    assert files == [patterns[0].replace("*", f"part-{n}") for n in range(3)]


def test_shards_without_a_document_are_skipped_and_told(write_data, tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    paths = write_data(a_jsonl="", b_jsonl='{"text": "one"}\r\n', d_jsonl='{"text": "x"}')
    paths = [paths["a_jsonl"], paths["b_jsonl"], tmp_path / "c.parquet", paths["d_jsonl"]]
    skipped = Skipped()
    assert read(paths, skipped=skipped) == [("b:0", "b", b"one")]
    assert skipped == Skipped(3, [str(paths[0]), str(paths[2]), f"{paths[3]}, line 1"])
    with pytest.raises(
        UsageError, match=r"a\.jsonl: no documents in it of .*, nor in 2 other files"
    ):
        read_documents([paths[0], *paths[2:]])


def test_a_pattern_that_fits_nothing_is_an_error_and_a_file_of_that_name_a_file(tmp_path):
    for given in ({"train": (tmp_path / "*.jsonl",)}, {"val": (f"a={tmp_path}/*.jsonl",)}):
        with pytest.raises(
            UsageError, match=rf"--{next(iter(given))} {tmp_path}/\*\.jsonl: no file"
        ):
            TrainConfig(tmp_path, **given).as_json()
    (tmp_path / "a[0].txt").write_text("one")
    config = TrainConfig(tmp_path, train=(tmp_path / "a[0].txt",))
    assert config.train_files == [tmp_path / "a[0].txt"]
    (tmp_path / "b[1]").mkdir()
    (tmp_path / "b[1]" / "c.txt").write_text("one")
    with pytest.raises(UsageError, match=r"no file fits this pattern; a \[ that is in a name"):
        _ = TrainConfig(tmp_path, train=(tmp_path / "b[1]" / "*.txt",)).train_files
    escaped = TrainConfig(tmp_path, train=(tmp_path / "b[[]1]" / "*.txt",))
    assert escaped.train_files == [tmp_path / "b[1]" / "c.txt"]
    with pytest.raises(UsageError, match=r"a path with = in it needs a name before it, as val=/x"):
        _ = TrainConfig(tmp_path, val=("/x/lang=de/a.txt",)).val_files


def test_a_file_that_changes_is_noticed(write_data):
    path = write_data(a_jsonl='{"text": "one"}\n{"text": "two"}')["a_jsonl"]
    found = read_documents([path])
    path.write_text('{"text": "other"}\n{"text": "two"}')
    for read_again in (lambda: found[1], lambda: list(found)):
        with pytest.raises(UsageError, match=r"a\.jsonl changed while it was used"):
            read_again()
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.jsonl: No such file .*; it was read before: put it"):
        _ = found[0]


def test_documents_are_a_source_of_grain(write_data):
    found = read_documents(write_data(a_txt="one\n\ntwo\n\nthree").values())
    assert isinstance(found, grain.sources.RandomAccessDataSource)
    data = grain.MapDataset.source(found).shuffle(seed=0).map(lambda document: document.text)
    assert sorted(data[n] for n in range(len(data))) == [b"one", b"three", b"two"]


def test_of_several_groups_of_rows_the_latest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("ghostjax.runs.data.shards.RECENT_BYTES", 2**10)
    pattern = shards(tmp_path / "parquet", "parquet", size=11)
    (path,) = TrainConfig(tmp_path, train=(Path(pattern),)).train_files
    found = read_documents([path])
    order = np.random.default_rng(0).permutation(11)
    assert [found[n].text.split()[1] for n in order] == [b"%d" % n for n in order]


def test_a_process_reads_its_own_rows(micro_config, monkeypatch):
    """Of validation rows those in the same places of either part."""
    config = dataclasses.replace(micro_config, val_batch_size=4, val=micro_config.val[:1])
    task, whole = load_task(config), next(batches(config, load_task(config)))
    monkeypatch.setattr(Placement, "read_rows", lambda self, count: np.arange(count)[1:3])
    read, (chosen, _) = {}, val_choice(config, "held", 4, 0)
    for name, texts in (("train", task.examples), *task.val_examples.items()):
        own = read[name] = []
        monkeypatch.setattr(
            texts, "tokens", lambda of, own=own, tokens=texts.tokens: own.extend(of) or tokens(of)
        )
    batch = next(batches(config, task))
    assert read == {"train": whole.indices[1:3].tolist(), "held": chosen[[1, 3]].tolist()}
    for name, rows in batch.train_rows.items():
        np.testing.assert_array_equal(rows[1:3], whole.train_rows[name][1:3])
        assert not rows[[0, 3]].any()
    for name, rows in batch.val_rows.items():
        np.testing.assert_array_equal(rows[:, :, 1], whole.val_rows[name][:, :, 1])
        assert not rows[:, :, 0].any()
