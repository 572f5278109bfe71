"""The command line: parses, calls, and turns errors into one line and an exit code.

0  done      1  the run failed      2  options or data cannot be used
130  interrupted by Ctrl-C      143  ended by SIGTERM
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata

_DESCRIPTION = """Which training examples help and which hurt, while training runs.

'ghostjax train --help' lists a command's options; 'ghostjax --version' prints the version."""

_OUT_OF_MEMORY = (
    "out of memory: lower --batch-size, --val-batch-size or --length, take more --microbatches, "
    "or --remat"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in ``argv`` (default: ``sys.argv[1:]``) and returns the exit code.

    Raises:
      SystemExit: after ``--help`` (code 0), or for arguments that do not parse (code 2).

    >>> main(["--version"])  # doctest: +ELLIPSIS
    ghostjax ...
    0
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version"]:
        print(f"ghostjax {metadata.version('ghostjax')}")
        return 0
    try:
        code = _run(argv)
    except KeyboardInterrupt:  # while modules are imported, too
        code = _fail("interrupted", 130)
    except Exception:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        code = 1
    if code and _is_one_of_several():
        # The others have ended, or are about to: JAX would wait for them, and complain.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_one_of_several() -> bool:
    together = sys.modules.get("ghostjax.runs.processes.together")
    return together is not None and together.has_joined()


def _run(argv: list[str]) -> int:
    with _ctrl_c_exits():
        try:
            import pyarrow  # noqa: F401
            import rich  # noqa: F401
            import tyro
        except ModuleNotFoundError as error:
            return _fail(f'needs {error.name}: pip install "ghostjax[train]"', 2)

        from jax.errors import JaxRuntimeError

        from ghostjax.runs.commands import (
            diff,
            duplicates,
            export,
            rank,
            report,
            show,
            tensorboard,
            tokens,
            train,
            validate,
        )
        from ghostjax.runs.config import TrainConfig
        from ghostjax.runs.errors import StoppedError, TerminatedError, UsageError

    commands = {
        "train": (TrainConfig, lambda config: train.run(config, _given(argv))),
        "report": (report.ReportConfig, report.run),
        "rank": (rank.RankConfig, rank.run),
        "show": (show.ShowConfig, show.run),
        "duplicates": (duplicates.DuplicatesConfig, duplicates.run),
        "export": (export.ExportConfig, export.run),
        "tokens": (tokens.TokensConfig, tokens.run),
        "tensorboard": (tensorboard.TensorboardConfig, tensorboard.run),
        "validate": (validate.ValidateConfig, validate.run),
        "diff": (diff.DiffConfig, diff.run),
    }
    config = None
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {name: options for name, (options, _) in commands.items()},
            prog="ghostjax",
            description=_DESCRIPTION,
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        call = next(call for options, call in commands.values() if isinstance(config, options))
        call(config)
    except UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        # The reader has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (StoppedError, OSError) as error:
        return _fail(str(error), 1)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(_OUT_OF_MEMORY, 1)
    except KeyboardInterrupt as error:
        is_begun = isinstance(config, TrainConfig) and (config.out / "run.json").exists()
        what, code = ("ended", 143) if isinstance(error, TerminatedError) else ("interrupted", 130)
        return _fail(f"{what}{'; ghostjax train --resume goes on' * is_begun}", code)
    return 0


@contextlib.contextmanager
def _ctrl_c_exits() -> Iterator[None]:
    """Ctrl-C ends the process at once. Raised in a callback of JAX, it would be lost."""

    def leave(number, frame):
        os._exit(_fail("interrupted", 130))

    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _given(argv: list[str]) -> set[str]:
    """The names of the options in a command line. Tyro takes no abbreviations.

    >>> sorted(_given(["train", "--steps", "8", "--batch-size=4"]))
    ['batch_size', 'steps']
    """
    options = (word.partition("=")[0] for word in argv if word.startswith("--"))
    return {option.removeprefix("--").replace("-", "_") for option in options}


def _fail(message: str, code: int) -> int:
    """One line on stderr, whatever characters a file name in it may have."""
    line = "".join(c if c.isprintable() else "?" for c in message)
    print(f"ghostjax: error: {line}", file=sys.stderr, flush=True)
    return code
