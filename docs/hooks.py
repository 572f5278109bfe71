"""What mkdocs calls while it builds the pages."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import drawings  # noqa: E402
import tables  # noqa: E402


def on_pre_build(config):
    drawings.draw(HERE / "pages" / "drawings")


def on_page_markdown(markdown, page, config, files):
    return tables.filled(markdown)
