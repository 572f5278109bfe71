"""The report in a real browser, where there is one."""

import html
import json
import re
import shutil
import subprocess

import pytest

from ghostjax.runs.report.page import make_report
from ghostjax.runs.store.run import read_run
from tests.runs.made_up import EXAMPLES, write_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
]

# The page itself may not run scripts. A page around it measures it, in a frame of the width wanted.
_FRAME = """<meta charset="utf-8">
<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{report}"></iframe>
<pre id="found"></pre>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const style = page.defaultView.getComputedStyle(page.body);
  document.querySelector("#found").textContent = JSON.stringify({{
    width: page.documentElement.clientWidth,
    content: page.scrollingElement.scrollWidth,
    background: style.backgroundColor,
    charts: [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
    smallest: Math.min(...[...page.querySelectorAll("svg")].map(
      svg => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)),
    cut: [...page.querySelectorAll("svg text")].filter(text => {{
      const box = text.getBBox(), all = text.ownerSVGElement.viewBox.baseVal;
      return box.x < -1 || box.x + box.width > all.width + 1 || box.y < -1
        || box.y + box.height > all.height + 1;
    }}).map(text => text.textContent),
  }});
}};
</script>"""


def measured(report, width, folder, *options):
    """What a browser makes of the page, with everything that can be unfolded unfolded."""
    text = html.escape(report.replace("<details>", "<details open>"), quote=True)
    (folder / "frame.html").write_text(_FRAME.format(width=width, report=text), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER,
            *OPTIONS,
            *options,
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
            "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """An ordinary run, and one of names and texts that are hard to fit."""
    folder = tmp_path_factory.mktemp("browser")
    names = tuple(f"{'a_name_without_any_end' * 4}{n % 12}" for n in range(EXAMPLES))
    return {
        "ordinary": make_report(read_run(write_run(folder / "run"))),
        "wide": make_report(
            read_run(
                write_run(
                    folder / ("run" * 30),
                    domains=names,
                    sets=("a-validation-set-with-a-long-name", *"bcdefgh"),
                    excerpts=dict.fromkeys(range(EXAMPLES), "x" * 300),
                    changes={f"{names[0]}:0": -1e4},
                )
            )
        ),
    }


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["ordinary", "wide"])
def test_nothing_is_wider_than_the_window(reports, tmp_path, name, width):
    found = measured(reports[name], width, tmp_path)
    assert found["width"] == width
    assert found["content"] <= width
    assert found["charts"]
    assert max(found["charts"]) <= width
    assert found["smallest"] >= 10  # CSS pixels of the letters in charts
    assert found["cut"] == []


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_dark_mode_is_dark(reports, tmp_path):
    for scheme, background in ((0, "rgb(20, 23, 28)"), (1, "rgb(255, 255, 255)")):
        option = f"--blink-settings=preferredColorScheme={scheme}"
        folder = tmp_path / str(scheme)
        folder.mkdir()
        assert measured(reports["ordinary"], 390, folder, option)["background"] == background
