"""One changed byte, anywhere in a run directory, is noticed; what is older is read."""

import hashlib
import io
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghostjax.runs.analysis.values import sum_visits
from ghostjax.runs.errors import UsageError
from ghostjax.runs.store import checkpoints, files, schema, seal
from ghostjax.runs.store.run import read_run
from tests.runs import made_up
from tests.runs.store.test_checkpoints import small

KINDS = {
    "run.json": "run.json",
    "summary": "summary.json",
    "examples": "examples.parquet",
    "values": "values.parquet",
    **{table: f"log/{schema.part_name(table, 16, 30)}" for table in schema.LOG_TABLES},
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return made_up.write_run(tmp_path_factory.mktemp("damage") / "run")


def read_all(out):
    run = read_run(out)
    values = files.read_table(out / "values.parquet", "values", run.sets)
    return run.metadata, run.summary, run.examples, run.scores, run.steps, run.kinds, values


def what_is_wrong(out):
    try:
        read_all(out)
    except UsageError as error:
        return str(error)
    return "nothing"


@pytest.mark.quick("run.json", "summary", "values")
@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_a_changed_byte_anywhere_is_noticed(out, name):
    path = out / name
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    ends = [*range(12), *range(len(content) - 200, len(content))]  # heads and footers
    offsets = {*rng.integers(len(content), size=120).tolist(), *ends}
    seal_at = content.rindex(b"ghostjax sha256 ")
    offsets |= set(range(seal_at, seal_at + 80, 3))
    missed = []
    try:
        for offset in sorted(offsets):
            damaged = bytearray(content)
            damaged[offset] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            problem = what_is_wrong(out)
            if str(path) not in problem or "\n" in problem:
                missed.append((offset, problem))
    finally:
        path.write_bytes(content)
    assert missed == []
    read_all(out)


def test_a_changed_byte_in_a_checkpoint_is_noticed(tmp_path):
    checkpoints.save(tmp_path, 5, small(1), {"run": "a"})
    rng = np.random.default_rng(0)
    for path in (tmp_path / "checkpoints" / "5").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for offset in rng.integers(len(content), size=8) if content else ():
            damaged = bytearray(content)
            damaged[offset] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            with pytest.raises(UsageError, match=r"5 is damaged .*: put it back as it was, or s"):
                checkpoints.restore(tmp_path, 5, small(0), {"run": "a"})
            path.write_bytes(content)
    checkpoints.restore(tmp_path, 5, small(0), {"run": "a"})


def test_other_readers_find_the_checksums_of_pages(out):
    content = (out / KINDS["scores"]).read_bytes()
    rows = pq.read_table(pa.BufferReader(content))
    column = pq.read_metadata(pa.BufferReader(content)).row_group(0).column(0)
    damaged = bytearray(content)
    damaged[column.dictionary_page_offset + column.total_compressed_size - 3] ^= 1
    assert len(rows) > 0
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(pa.BufferReader(bytes(damaged)), page_checksum_verification=True)


def test_a_seal_has_its_place():
    with pytest.raises(ValueError, match="no place for a digest"):
        seal.seal(io.BytesIO(b"no place"))
    assert not seal.is_intact(io.BytesIO(b"no seal"))


@pytest.mark.parametrize("size", [81, 100, 160, 2**20])
def test_a_seal_is_the_same_however_much_is_read_at_once(monkeypatch, size):
    """In memory that does not grow with the file, and wherever the seal is."""
    monkeypatch.setattr(seal, "_BLOCK", size)
    for before, after in ((0, 0), (79, 1), (80, 300), (300, 79)):
        content = b"a" * before + seal.BLANK.encode() + b"b" * after
        file = io.BytesIO(seal.BLANK.encode() + content)
        seal.seal(file)
        digest = hashlib.sha256(seal.BLANK.encode() + content).hexdigest()
        assert file.getvalue()[80 + before + 16 :][:64].decode() == digest
        assert seal.is_intact(file)
        for place in (0, 80 + before, len(file.getvalue()) - 1):
            changed = bytearray(file.getvalue())
            changed[place] ^= 1
            assert not seal.is_intact(io.BytesIO(bytes(changed)))


def as_first_version(out):
    """Rewrites a run as it was before digests, without the columns that came later."""
    for path in out.rglob("*.parquet"):
        table = re.split(r"[-.]", path.name)[0]
        rows = pq.read_table(path).select(schema.table_schema(table, made_up.SETS, 1).names)
        stated = {**rows.schema.metadata, b"schema_version": b"1"}
        pq.write_table(rows.replace_schema_metadata(stated), path)
    for name in ("run.json", "summary.json"):
        value = files.read_json(out / name) | {"schema_version": 1}
        (out / name).write_text(json.dumps(value))


def test_a_run_from_before_digests_is_read(out, tmp_path):
    old = shutil.copytree(out, tmp_path / "old")
    as_first_version(old)
    for found, expected in zip(sum_visits(read_run(old)), sum_visits(read_run(out))):
        np.testing.assert_array_equal(found, expected)
    assert read_run(old).steps.equals(read_run(out).steps)


def test_a_digest_that_was_taken_out_is_missed(out, tmp_path):
    new = shutil.copytree(out, tmp_path / "new")
    path = new / KINDS["steps"]
    pq.write_table(pq.read_table(path), path)
    with pytest.raises(UsageError, match=r"steps-.*parquet cannot be read: its digest is missing"):
        _ = read_run(new).steps
    (new / "summary.json").write_text(json.dumps(files.read_json(new / "summary.json")))
    with pytest.raises(UsageError, match=r"summary\.json: its digest is missing"):
        read_run(new)


@pytest.fixture
def added_columns(monkeypatch):
    """The next schema version, with a column of each kind more."""
    version = schema.SCHEMA_VERSION + 1
    columns = [("warmth_{}", pa.float32(), "A number."), ("note", pa.string(), "A text.")]
    fields = {**schema._FIELDS, "steps": [*schema._FIELDS["steps"], *columns]}
    since = {("steps", name): version for name, *_ in columns}
    monkeypatch.setattr(schema, "_FIELDS", fields)
    monkeypatch.setattr(schema, "_SINCE", {**schema._SINCE, **since})
    monkeypatch.setattr(schema, "SCHEMA_VERSION", version)


def test_an_older_log_is_read_after_columns_were_added(out, tmp_path, request):
    old = shutil.copytree(out, tmp_path / "old")
    first = shutil.copytree(out, tmp_path / "first")
    as_first_version(first)
    before = read_run(out).steps
    request.getfixturevalue("added_columns")
    for path in (old, first):
        run = read_run(path)
        assert run.steps.select(before.column_names).equals(before)
        assert np.isnan(run.numbers("steps", "warmth_prose")).all()
        assert run.steps["note"].null_count == made_up.STEPS


def test_a_log_of_two_schema_versions_is_read(out, tmp_path, request):
    """An older run that a newer ghostjax went on with."""
    mixed = shutil.copytree(out, tmp_path / "mixed")
    path = mixed / KINDS["steps"]
    rows = read_run(mixed).steps.slice(16)
    request.getfixturevalue("added_columns")
    fields = schema.table_schema("steps", made_up.SETS)
    new = {"warmth_prose": [1.0] * 14, "warmth_code": [2.0] * 14, "note": ["x"] * 14}
    arrays = [
        rows[f.name] if f.name in rows.column_names else pa.chunked_array([new[f.name]], f.type)
        for f in fields
    ]
    files.write_table(path, pa.table(arrays, schema=fields))
    found = read_run(mixed).numbers("steps", "warmth_code")
    assert np.isnan(found[:16]).all()
    assert (found[16:] == 2).all()


def test_a_part_of_a_newer_schema_is_refused(out, tmp_path, monkeypatch):
    new = shutil.copytree(out, tmp_path / "new")
    monkeypatch.setattr(schema, "SCHEMA_VERSION", schema.SCHEMA_VERSION - 1)
    with pytest.raises(UsageError, match=r"steps-.* has schema version .*: update ghostjax"):
        files.read_table(new / KINDS["steps"], "steps", made_up.SETS)
