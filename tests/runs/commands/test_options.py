"""The compilation cache, in processes of their own: tests have one that is not the user's."""

import os
import subprocess
import sys

import pytest

CODE = """
import jax
from ghostjax.runs.commands.options import use_compilation_cache
use_compilation_cache(%s)
print(jax.config.jax_compilation_cache_dir)
jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda n, x: x @ x, x))(jax.numpy.ones((3, 3)))
"""


def where(tmp_path, wanted, **environment):
    environment = {**os.environ, "HOME": str(tmp_path), **environment}
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        if not environment.get(name):
            environment.pop(name, None)
    run = [sys.executable, "-c", CODE % wanted]
    return subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.quick("False")
@pytest.mark.parametrize("xdg", [False, True])
def test_compiled_programs_are_kept_in_the_users_cache(tmp_path, xdg):
    home = {"XDG_CACHE_HOME": str(tmp_path / "xdg") if xdg else "", "JAX_COMPILATION_CACHE_DIR": ""}
    expected = tmp_path / ("xdg" if xdg else ".cache") / "ghostjax" / "compiled"
    assert where(tmp_path, True, **home) == f"{expected}\n"
    assert expected.is_dir()


@pytest.mark.slow
def test_none_is_kept_if_it_is_switched_off(tmp_path):
    assert where(tmp_path, False, JAX_COMPILATION_CACHE_DIR="") == "None\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_cache_that_was_chosen_stays(tmp_path):
    chosen = str(tmp_path / "own")
    assert where(tmp_path, True, JAX_COMPILATION_CACHE_DIR=chosen) == f"{chosen}\n"
    assert not (tmp_path / ".cache").exists()
