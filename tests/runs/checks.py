"""What tests of several commands ask."""

import hashlib
from pathlib import Path

from ghostjax.cli import main


def files(path: Path) -> dict[str, str]:
    """Digests of all files below a directory."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def fails(argv, capsys) -> str:
    """Runs a command that is to be refused; returns its one line."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("ghostjax: error: ")
    return err
