"""The pictures of the README: charts of the report of a run, as SVG files.

    python -m benchmarks.report_pictures runs/first pictures

They are those of the page, drawn from the run's own log, on a light ground; no browser is needed.
"""

import argparse
import re
from pathlib import Path

from ghostjax.runs.report.html import LIGHT, style
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store.run import read_run

CHARTS = ("distribution", "domains", "time", "steps")


def pictures(page: str, place: str) -> dict[str, str]:
    """By name, the charts of one validation set, each with the style it needs."""
    found = {}
    for chart in CHARTS:
        picture = re.search(
            rf'<svg [^>]*aria-labelledby="{place}-{chart}-title.*?</svg>', page, re.S
        )
        if picture is not None:
            rules = f"<style>svg {{ background: {LIGHT.page}; }}\n{style(LIGHT)}</style>"
            found[chart] = re.sub(r"(<svg [^>]*>)", rf"\1\n{rules}", picture[0], count=1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", type=int, default=1, help="which validation set, from 1")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures(make_report(read_run(options.run)), f"v{options.set}").items():
        (options.folder / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
