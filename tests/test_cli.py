import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from importlib import metadata

import pytest
from jax.errors import JaxRuntimeError

from ghostjax.cli import main
from ghostjax.runs.analysis.values import sum_visits
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.report.output import make_console
from ghostjax.runs.report.terminal import print_summary
from ghostjax.runs.store.run import read_run
from ghostjax.runs.store.schema import LOG_TABLES
from tests.runs.checks import fails
from tests.runs.conftest import micro_config, micro_run, write_data

__all__ = ["micro_config", "micro_run", "write_data"]  # fixtures


# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def command(config: TrainConfig, **changes) -> list[str]:
    """The command line of a configuration."""
    argv = ["train"]
    for name, value in dataclasses.asdict(dataclasses.replace(config, **changes)).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            is_default = value == getattr(TrainConfig(config.out), name)
            argv += [] if is_default else [option if value else f"--no-{option[2:]}"]
        elif isinstance(value, tuple):
            argv += [option, *map(str, value)] if value else []
        elif value is not None:
            argv += [option, str(value)]
    return argv


BAD_OPTIONS = {
    "score every": ({"score_every": 0}, "--score-every must be at least 1, got 0"),
    "nothing scored": ({"score_every": 7}, "--score-every 7 is more than --steps 6: no step would"),
    "no steps": ({"steps": 0}, "--steps must be at least 1, got 0"),
    "negative steps": ({"steps": -3}, "--steps must be at least 1, got -3"),
    "no batch": ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
    "no validation": ({"val_batch_size": 0}, "--val-batch-size must be at least 2, got 0"),
    "no halves": ({"val_batch_size": 3}, "--val-batch-size must be even, got 3"),
    "microbatches": ({"microbatches": 3}, "--batch-size 4 cannot be divided into --microbatches 3"),
    "clip": ({"clip": -1.0}, "--clip must be positive, or 0 not to clip, got -1"),
    "audit": ({"audit_every": -1}, "--audit-every must be at least 0, got -1"),
    "checkpoint": ({"checkpoint_every": 0}, "--checkpoint-every must be at least 1, got 0"),
    "optimizer": ({"optimizer": "adamm"}, "optax has no optimizer 'adamm'"),
    "sign-based": (
        {"optimizer": "lion"},
        "--optimizer lion: the optimizer's update has derivative",
    ),
    "set name": ({"val": ("a_b=x.txt",)}, "--val a_b=x.txt: a validation set's name has letters"),
    "no length": ({"length": 0}, "--length must be from 1 to 32"),
    "length": ({"length": 33}, "--length must be from 1 to 32, the positions of model micro"),
    "rate zero": ({"learning_rate": 0.0}, "--learning-rate must be positive, got 0"),
    "rate nan": ({"learning_rate": float("nan")}, "--learning-rate must be positive, got nan"),
    "seed": ({"seed": -1}, "--seed must be from 0 to 4294967295, got -1"),
    "train alone": ({"val": ()}, "--train needs --val"),
    "val alone": ({"train": ()}, "--val needs --train"),
    "batch": ({"batch_size": 11}, "--batch-size 11 is more than the 10 training examples"),
    "val batch": ({"val_batch_size": 4}, "4 is more than the 3 examples of validation set other"),
    "text field": ({"text_field": "body"}, "line 1: no field 'body' (set --text-field)"),
    "file": ({"val": ("none.txt",)}, "none.txt: No such file or directory"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_that_cannot_be_used(micro_config, tmp_path, capsys, changes, message):
    out = tmp_path / "new" / "run"
    assert message in fails(command(micro_config, out=out, **changes), capsys)
    assert not out.parent.exists()


BAD_DATA = {
    "empty": ("a_txt", "", "no documents in it"),
    "bad JSON": ("a_jsonl", '{"text": "one"}\n{', "line 2: not valid JSON"),
    "short": ("a_txt", "x", "no documents in it of at least 2 bytes"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_DATA.values(), ids=BAD_DATA)
@pytest.mark.parametrize("option", ["train", "val"])
def test_data_that_cannot_be_used(
    micro_config, write_data, tmp_path, capsys, option, name, content, message
):
    path = write_data(**{name: content})[name]
    argv = command(micro_config, out=tmp_path / "run", **{option: (str(path),)})
    assert f"{path}" in fails(argv, capsys)
    assert message in fails(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_refused_with_the_choices(micro_config, tmp_path, capsys):
    argv = command(micro_config, out=tmp_path / "run", model="huge")
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == 2
    assert "'tiny'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_directory_with_something_in_it_is_left_alone(micro_config, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    message = fails(command(micro_config, out=tmp_path), capsys)
    assert f"{tmp_path} is not empty: give a new directory" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_file_names_cannot_forge_output(micro_config, tmp_path, capsys):
    message = fails(command(micro_config, out=tmp_path / "run", val=("a\x1b\nb.txt",)), capsys)
    assert "a??b.txt" in message


@pytest.mark.parametrize("module", ["tyro", "pyarrow", "rich"])
def test_missing_extras_are_named_with_the_remedy(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    message = fails(["train", "--out", str(tmp_path / "run")], capsys)
    assert message == f'ghostjax: error: needs {module}: pip install "ghostjax[train]"\n'


@pytest.mark.slow
def test_two_runs_of_one_seed_are_equal_and_plain_output_is_plain(
    micro_config, micro_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "run").mkdir()  # empty, so it may be used
    assert main(command(micro_config, out=tmp_path / "run", quiet=False)) == 0
    out, err = capsys.readouterr()
    for line in (out + err).split("\n"):
        assert line.isprintable(), line
    assert "step 6/6  loss " in err
    assert "forum:0" in out
    assert "By domain: validation set held" in out

    again = read_run(tmp_path / "run")
    for name in ("examples", *LOG_TABLES):
        assert getattr(again, name).equals(getattr(micro_run, name), check_metadata=True)


@pytest.mark.slow
def test_one_quiet_step_is_a_run_that_prints_nothing(micro_config, tmp_path, capsys):
    assert main(command(micro_config, out=tmp_path / "run", steps=1)) == 0
    assert capsys.readouterr() == ("", "")
    assert sum_visits(read_run(tmp_path / "run"))[0].tolist().count(1) == 4


@pytest.mark.quick("error2-1-error: out of memory: lower --batch-")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted; ghostjax train --resume goes on\n"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 1, "error: out of memory: lower --batch-"),
    ],
)
def test_exit_codes_of_a_run_that_stops(
    micro_config, tmp_path, capsys, monkeypatch, error, code, message
):
    def stop(*args):
        raise error

    monkeypatch.setattr("ghostjax.runs.training.trainer.Trainer.steps", stop)
    assert main(command(micro_config, out=tmp_path / "run")) == code
    assert message in capsys.readouterr().err
    assert main(["rank", str(tmp_path / "run")]) == 2
    assert "no steps in the log yet" in capsys.readouterr().err


def test_interrupted_before_there_is_a_run(micro_config, tmp_path, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ghostjax.runs.commands.train.load_task", stop)
    assert main(command(micro_config, out=tmp_path / "run")) == 130
    assert capsys.readouterr().err == "ghostjax: error: interrupted\n"


@pytest.mark.quick("pyarrow", "jax")
@pytest.mark.parametrize("module", ["pyarrow", "jax", "ghostjax.runs.commands.train"])
def test_interrupted_while_modules_are_imported(module):
    """Wherever Ctrl-C comes, also where what it raises is lost, as in a callback of JAX."""
    code = f"""
import os, signal, sys
from ghostjax.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass

sys.meta_path.insert(0, Finder())
sys.exit(main(["train", "--out", "run"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "ghostjax: error: interrupted\n"


def test_the_command_line_is_there_before_jax_is():
    code = "import sys, ghostjax.cli; print({'jax', 'numpy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_public_names_are_those_of_the_package():
    import ghostjax
    from ghostjax import _public

    assert set(ghostjax.__all__) <= set(dir(ghostjax))
    for name in ghostjax.__all__:
        assert getattr(ghostjax, name) is getattr(_public, name)
    assert ghostjax.values.InRunValues is ghostjax.InRunValues
    for name in ("nothing", "_nothing", "__nothing__"):
        with pytest.raises(AttributeError, match=f"module 'ghostjax' has no attribute '{name}'"):
            getattr(ghostjax, name)


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ghostjax {metadata.version('ghostjax')}\n"
    with pytest.raises(SystemExit) as raised:
        main(["train", "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "ghostjax train --out run --train forum.jsonl" in text
    for field in dataclasses.fields(TrainConfig):
        no = "no-" if field.default is True else ""
        assert f"--{no}" + field.name.replace("_", "-") in text
    assert "\x1b" not in text


def without_test_flags() -> dict[str, str]:
    """The environment but for XLA_FLAGS, with which the tests make compiled code slow."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def test_importing_the_package_does_not_import_the_extras():
    code = "import ghostjax, sys; print({'pyarrow', 'tyro', 'rich'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pyarrow" not in done.stdout
    assert "tyro" not in done.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "ghostjax", "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.slow
def test_the_default_job_puts_prose_above_code(tmp_path, capsys):
    """Of a run that there is already, where ``GHOSTJAX_FIRST_RUN`` names one."""
    out = pathlib.Path(os.environ.get("GHOSTJAX_FIRST_RUN", tmp_path / "run"))
    if out.parent == tmp_path:
        command = [sys.executable, "-m", "ghostjax", "train", "--out", str(out)]
        subprocess.run(command, check=True, env=without_test_flags())
    summary = json.loads((out / "summary.json").read_text())
    print_summary(make_console(sys.stdout), read_run(out))
    printed = capsys.readouterr().out
    for own, other in (("prose", "code"), ("code", "prose")):
        assert summary["auc"][own] > 0.9
        assert summary["val_loss"][own] < 2.6
        domains = summary["domains"][own]
        assert domains[own]["value"] > domains[other]["value"]
        assert f"AUC of {own} above all else" in printed
