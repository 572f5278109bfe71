"""ghostjax report RUN."""

import dataclasses
import re

import pytest

from ghostjax.cli import main
from ghostjax.runs.commands.report import ReportConfig
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store.run import read_run
from tests.runs.checks import fails, files
from tests.runs.made_up import SETS, write_run


@pytest.mark.slow
def test_the_command_writes_one_file_and_prints_its_path(tmp_path, capsys):
    path = write_run(tmp_path / "run")
    before = files(path)
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr() == (f"{path / 'report.html'}\n", "")
    after = files(path)
    assert after.pop("report.html")
    assert after == before
    text = (path / "report.html").read_text(encoding="utf-8")
    note = "Texts are shown from their beginning, not in windows: "
    assert note in text
    (told,) = re.findall(f"<p>{note}.*?</p>\n", text)
    assert text.replace(told, "") == make_report(read_run(path))

    assert main(["report", str(path), "--quiet", "--count", "3", "--no-windows"]) == 0
    assert capsys.readouterr() == ("", "")
    shorter = (path / "report.html").read_text(encoding="utf-8")
    assert shorter.count('<p class="excerpt"') == 2 * 3 * len(SETS)


def test_out_names_the_file_and_nothing_else_is_written(tmp_path, capsys):
    path, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    before = files(path)
    assert main(["report", str(path), "--out", str(out), "--no-windows"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert out.read_text(encoding="utf-8") == make_report(read_run(path))
    assert files(path) == before
    assert f"--out {path} is a directory: name a file in it" in fails(
        ["report", path, "--out", path], capsys
    )
    nowhere = tmp_path / "none" / "page.html"
    message = fails(["report", path, "--out", nowhere], capsys)
    assert f"--out {nowhere}: there is no directory {tmp_path / 'none'}" in message
    assert main(["report", str(path), "--out", "/proc/page.html"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_directories_that_cannot_be_used(tmp_path, capsys):
    assert "does not exist" in fails(["report", tmp_path / "none"], capsys)
    path = write_run(tmp_path / "run", steps=0, finished=False)
    before = files(path)
    assert "no steps in the log yet" in fails(["report", path], capsys)
    assert "--count must be at least 1" in fails(["report", path, "--count", "0"], capsys)
    assert files(path) == before


def test_a_report_that_cannot_be_written_leaves_the_last_one(tmp_path, capsys, monkeypatch):
    path = write_run(tmp_path / "run")
    (path / "report.html").write_text("the last one")
    before = files(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["report", str(path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert files(path) == before


def test_help_has_examples_and_every_option(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["report", "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "ghostjax report run" in text
    for field in dataclasses.fields(ReportConfig):
        option = "no-windows" if field.name == "windows" else field.name
        assert field.name == "run" or "--" + option in text
