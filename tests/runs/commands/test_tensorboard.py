"""The event file, read back record by record."""

import struct
import sys

import numpy as np
import pytest

from ghostjax import RunLog
from ghostjax.cli import main
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.commands.tensorboard import NAME
from ghostjax.runs.store.run import Run, read_run
from tests.runs.checks import fails, files
from tests.runs.made_up import DOMAINS, EXAMPLES, KINDS, SETS, STEPS, write_run

crc32c = pytest.importorskip("tensorboardX.crc32c", reason="it is in the extra test").crc32c
Event = pytest.importorskip("tensorboardX.proto.event_pb2").Event


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("tensorboard") / "run")


def records(content):
    """The records of a file in the format TFRecord, whose sums are checked."""
    at = 0

    def take(count):
        nonlocal at
        data, at = content[at : at + count], at + count
        (told,) = struct.unpack("<I", content[at : at + 4])
        own = crc32c(data)
        assert told == ((own >> 15 | own << 17) + 0xA282EAD8) % 2**32
        at += 4
        return data

    while at < len(content):
        (length,) = struct.unpack("<Q", take(8))
        yield take(length)


def exported(path, *options):
    """By tag, {step: number}."""
    assert main(["tensorboard", str(path), "--quiet", *map(str, options)]) == 0
    folder = options[options.index("--out") + 1] if "--out" in options else path / "tensorboard"
    first, *events = map(Event.FromString, records((folder / NAME).read_bytes()))
    assert first.file_version == "brain.Event:2"
    found = {}
    for event in events:
        (value,) = event.summary.value
        steps = found.setdefault(value.tag, {})
        assert event.step > max(steps, default=-1)
        steps[event.step] = value.simple_value
    return found


def test_scalars_are_those_of_the_log(made_up, tmp_path):
    before = files(made_up)
    found, source = exported(made_up, "--out", tmp_path / "new" / "folder"), read_run(made_up)
    assert files(made_up) == before
    columns = {"loss/train": "loss", "loss/prose": "val_loss_prose", "learning_rate": None}
    columns |= {f"decrease/code/{which}": f"{which}_code" for which in ("predicted", "actual")}
    for tag, column in columns.items():
        numbers = source.numbers("steps", column or tag)
        assert list(found[tag]) == [*range(STEPS)]
        np.testing.assert_array_equal(list(found[tag].values()), np.float32(numbers))
    assert list(found["fidelity/prose/audit_error"]) == [0, 10, 20]
    norms = source.numbers("scores", "norm").reshape(STEPS, -1).mean(1)
    np.testing.assert_allclose(list(found["norm/train"].values()), norms, rtol=1e-6)
    for kind in KINDS:
        rows = [
            row for row in source.kinds.to_pylist() if (row["kind"], row["set"]) == (kind, "code")
        ]
        expected = {row["step"]: row["score"] for row in rows}
        assert found[f"kinds/code/{kind}"] == expected


def test_values_are_those_of_the_visits_up_to_a_step(made_up):
    found, values = exported(made_up, "--count", 2), read_values(read_run(made_up))
    for name, valued in values.items():
        total, domains = valued.values, valued.domains
        assert found[f"value/{name}/all"][STEPS - 1] == pytest.approx(total.sum(), rel=1e-5)
        for domain in DOMAINS:
            last = list(found[f"value/{name}/domain_{domain}"].values())[-1]
            assert last == pytest.approx(total[domains == domain].sum(), rel=1e-5)
        ranked = valued.ranked()
        tags = [tag for tag in found if tag.startswith(f"examples/{name}/")]
        chosen = [*range(2), EXAMPLES - 1, EXAMPLES - 2]
        assert tags == [f"examples/{name}/{ranked.ids[n].replace(':', '_')}" for n in chosen]
        for tag, n in zip(tags, chosen):
            last = list(found[tag].values())[-1]
            assert (len(found[tag]), last) == (
                *(ranked.visits[n], pytest.approx(ranked.values[n], rel=1e-5)),
            )
    assert len(SETS) == len(values)


def test_what_a_log_does_not_have_is_left_out_and_names_stay_apart(tmp_path):
    with RunLog(tmp_path / "run") as log:
        log.add(0, ["a b", "a:b"], [1.0, -2.0])
        log.add(1)
        log.add(2, ["a b", "a b", "a:b"], [4.0, 8.0, -16.0], loss=0.5)
    assert exported(tmp_path / "run") == {
        "loss/train": {2: 0.5},
        "value/val/all": {0: -1.0, 2: -5.0},
        "value/val/domain_unknown": {0: -1.0, 2: -5.0},
        "examples/val/a_b": {0: 1.0, 2: 13.0},
        "examples/val/a_b_2": {0: -2.0, 2: -18.0},
    }


def test_another_call_replaces_the_file_as_a_whole(tmp_path, capsys, monkeypatch):
    path = write_run(tmp_path / "run")
    assert main(["tensorboard", str(path), "--count", "1"]) == 0
    file = path / "tensorboard" / NAME
    assert capsys.readouterr() == (f"{file}\n", "")
    before = files(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
        assert main(["tensorboard", str(path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert files(path) == before
    assert len(exported(path)) > 20
    assert [own.name for own in file.parent.iterdir()] == [NAME]


def test_what_cannot_be_used_is_told(made_up, tmp_path, capsys, monkeypatch):
    assert "--count must be at least 1, got 0" in fails(
        ["tensorboard", made_up, "--count", 0], capsys
    )
    (tmp_path / "file").touch()
    message = fails(["tensorboard", made_up, "--out", tmp_path / "file"], capsys)
    assert f"--out {tmp_path / 'file'} is not a directory" in message
    empty = write_run(tmp_path / "run", steps=0, finished=False)
    assert "no steps in the log yet" in fails(["tensorboard", empty], capsys)
    monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)
    message = fails(["tensorboard", made_up, "--out", tmp_path / "tb"], capsys)
    assert 'needs tensorboardX: pip install "ghostjax[tensorboard]"' in message
    assert not (tmp_path / "tb").exists()


def test_the_log_is_read_in_parts(made_up, tmp_path, monkeypatch):
    whole = exported(made_up, "--out", tmp_path / "whole")
    monkeypatch.setattr("ghostjax.runs.store.run.SMALL", 0)
    monkeypatch.setattr("ghostjax.runs.store.run.ROW_GROUP", 1)
    monkeypatch.setattr(Run, "scores", property(lambda self: pytest.fail("all of it was read")))
    assert exported(made_up, "--out", tmp_path / "parts") == whole
