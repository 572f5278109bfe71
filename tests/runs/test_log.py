import numpy as np
import pyarrow as pa
import pytest

from ghostjax.runs import log
from ghostjax.runs.config import UsageError
from tests.runs.conftest import BATCH_SIZE, LENGTH, STEPS


def test_the_run_directory_holds_what_is_documented(micro_run):
    names = {path.name for path in micro_run.out.iterdir()}
    assert names == {"documents.parquet", "scores.parquet", "steps.parquet", "summary.json"}
    assert micro_run.documents.column_names == [
        *("id", "domain", "tokens", "visits", "score", "excerpt")
    ]
    assert micro_run.steps.column_names == ["step", "loss", "val_loss"]
    assert micro_run.scores.column_names == ["step", "id", "start", "learning_rate", "score"]
    assert (len(micro_run.steps), len(micro_run.scores)) == (STEPS, STEPS * BATCH_SIZE)


@pytest.mark.parametrize("name", ["documents", "steps", "scores"])
def test_schemas_have_a_version_and_describe_every_column(micro_run, name):
    schema = getattr(micro_run, name).schema
    assert schema.metadata[b"schema_version"] == b"1"
    assert schema.metadata[b"table"] == f"ghostjax.{name}".encode()
    for field in schema:
        assert field.metadata[b"description"]
        assert not field.nullable


def test_scores_say_their_scale(micro_run):
    for table in (micro_run.documents, micro_run.scores):
        text = table.schema.field("score").metadata[b"description"].decode()
        assert "share of the optimizer's update" in text
        assert "nats per token" in text


def test_document_scores_are_the_sums_of_their_visits(micro_run):
    visits = micro_run.scores.to_pylist()
    for document in micro_run.documents.to_pylist():
        own = [visit["score"] for visit in visits if visit["id"] == document["id"]]
        assert document["visits"] == len(own)
        np.testing.assert_allclose(document["score"], sum(own), rtol=1e-12)
    counts = micro_run.documents["visits"].to_numpy()
    assert counts.max() - counts.min() <= 1


def test_scores_are_not_zero(micro_run):
    assert any(visit["score"] != 0 for visit in micro_run.scores.to_pylist())


def test_windows_lie_inside_their_documents(micro_run):
    tokens = dict(zip(*(micro_run.documents[name].to_pylist() for name in ("id", "tokens"))))
    for visit in micro_run.scores.to_pylist():
        assert 0 <= visit["start"] <= max(0, tokens[visit["id"]] - (LENGTH + 1))
    assert any(visit["start"] > 0 for visit in micro_run.scores.to_pylist())


def test_the_summary_agrees_with_the_tables(micro_run):
    summary = micro_run.summary
    last = micro_run.steps.to_pylist()[-1]
    np.testing.assert_allclose(
        (summary["loss"], summary["val_loss"]), (last["loss"], last["val_loss"])
    )
    assert summary["auc"] is None
    assert set(summary["domains"]) == {"forum", "wiki"}
    total = sum(domain["score"] for domain in summary["domains"].values())
    np.testing.assert_allclose(total, micro_run.documents["score"].to_numpy().sum(), rtol=1e-12)
    assert sum(domain["visits"] for domain in summary["domains"].values()) == STEPS * BATCH_SIZE
    assert summary["options"]["length"] == LENGTH
    assert summary["options"]["learning_rate"] == 5e-3


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    tables = {"documents": pa.table({"id": ["a"]}), "scores": "no table"}
    with pytest.raises(AttributeError):
        log.write_run(tmp_path, tables, {})
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_json_cannot_hold_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write_run(tmp_path, {}, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_filled_meanwhile_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        log.write_run(tmp_path, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_places_that_cannot_be_a_run_directory_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="is not a directory"):
        log.check_out(file)
    with pytest.raises(UsageError, match="cannot create"):
        log.create_out(file / "below")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a directory"):
        log.check_out(tmp_path / "link")
    log.check_out(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    log.check_out(tmp_path / "empty")
