import pytest

from ghostjax.runs.errors import UsageError
from ghostjax.runs.store import files


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"loss": "ä"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    with pytest.raises(AttributeError):
        files.write_table(path, "no table")
    assert files.read_json(path) == {"loss": "ä"}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    files.write_json(path, {"folder": "ä\udcff"})  # of a name that is not UTF-8
    assert files.read_json(path) == {"folder": "ä\udcff"}
    assert r'"ä\udcff"' in path.read_text()


def test_places_that_cannot_be_a_run_directory_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="is not a directory"):
        files.check_out(file)
    with pytest.raises(UsageError, match="cannot create"):
        files.create_out(file / "below")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a directory"):
        files.check_out(tmp_path / "link")
    files.check_out(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    files.check_out(tmp_path / "empty")
    with pytest.raises(UsageError, match="not empty"):
        files.check_out(tmp_path)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot write to"):
        files.create_out(tmp_path / "run")
