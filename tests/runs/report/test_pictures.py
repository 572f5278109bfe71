"""The pictures of the README are made by the command that it names."""

import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests.runs.made_up import write_run

ROOT = Path(__file__).parents[3]


def test_the_command_of_the_readme_makes_the_pictures(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"python -m (benchmarks\.report_pictures) (\S+) (\S+)`", readme)
    run, folder = write_run(tmp_path / command[2]), tmp_path / command[3]
    monkeypatch.setattr(sys, "argv", ["report_pictures", str(run), str(folder)])
    monkeypatch.syspath_prepend(ROOT)
    charts = runpy.run_module(command[1], run_name="__main__")["CHARTS"]
    assert {path.stem for path in folder.iterdir()} == set(charts)
    for path in folder.iterdir():
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    shown = re.findall(r"!\[[^]]+\]\((\S+\.svg)\)", readme)
    assert shown
    for name in shown:
        assert (ROOT / name).is_file()
        assert (tmp_path / name).is_file()
