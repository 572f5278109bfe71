"""Every Python snippet of the README runs, in order, as one program."""

import pathlib
import re

import jax
import jax.numpy as jnp

from ghostjax.runs.store.run import read_run

README = pathlib.Path(__file__).parent.parent / "README.md"


def snippets(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_python_snippets(standard_promotion):
    namespace = {}
    found = snippets(README.read_text())
    assert len(found) >= 3
    for snippet in found:
        exec(compile(snippet, str(README), "exec"), namespace)
    assert namespace["scores"].shape == (16,)
    assert namespace["dots"]["scale"].shape == (16,)
    assert namespace["by_document"].total().shape == (4,)
    batch, is_real = namespace["val"], jnp.arange(40) < 30
    arrays = namespace["params"], namespace["state"], batch, jax.random.key(0), is_real
    after, _, loss = namespace["private_step"](*arrays)
    assert jnp.isfinite(loss)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after, namespace["params"])
    assert all(jax.tree.leaves(moved))
    assert read_run(pathlib.Path(namespace["out"])).summary["scored_steps"] == 10
    assert namespace["summary"]["steps"] == 8
    assert namespace["of_pairs"].total().shape == (6,)
    assert (namespace["values"].visits == 1).all()
    assert (namespace["values"].of("val") != 0).sum() > 140  # the first step of Adam is rounding


def test_the_loop_is_short():
    loop = snippets(README.read_text())[0]
    assert "InRunValues" in loop
    assert len([line for line in loop.splitlines() if line.strip()]) <= 40


def test_a_broken_snippet_would_be_run():
    assert snippets("text\n```python\nraise SystemError\n```\n") == ["raise SystemError\n"]


def test_both_commands_are_single_lines_that_ci_runs():
    text = README.read_text()
    for pattern in (r"^python3 -m venv .*ghostjax train --out", r"^python3 -m venv .*pytest -n"):
        assert len(re.findall(pattern, text, flags=re.MULTILINE)) == 1
    ci = (README.parent / ".ci" / "run").read_text()
    assert "grep -m1 'ghostjax train --out' README.md" in ci
    assert "grep -m1 'ghostjax report runs/first' README.md" in ci
    assert "grep -m1 'ghostjax tokens runs/first' README.md" in ci
    assert "grep -E '^\\.venv/bin/ghostjax (rank|duplicates|export) runs/first' README.md" in ci
    assert "grep -m1 'pytest -n' README.md" in ci
