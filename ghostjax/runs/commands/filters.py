"""Which training examples a command is about."""

import dataclasses
import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import tyro

from ghostjax.runs.analysis.values import Valued, Verdict
from ghostjax.runs.commands.options import check_choice
from ghostjax.runs.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Filter:
    """A run, and the options that choose examples of it: those that fit all that are given.

    Attributes:
      run: The run directory.
      domain: Only the examples of this domain.
      id: Only the examples whose id fits this pattern, or one of these: * is any text, ? any
        character.
      text: Only the examples in whose excerpt (as --csv has it, the beginning of the text) this
        regular expression is found; upper and lower case are the same.
      min_visits: Only the examples with so many scored visits or more.
      verdict: Only the examples of this verdict, or one of these.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    domain: str | None = None
    id: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GLOB [GLOB ...]")] = ()
    text: Annotated[str | None, tyro.conf.arg(metavar="PATTERN")] = None
    min_visits: int = 0
    verdict: tuple[Verdict, ...] = ()

    def check(self) -> None:
        """Raises ``UsageError`` for the first option that cannot be used."""
        if self.min_visits < 0:
            raise UsageError(f"--min-visits must be at least 0, got {self.min_visits}")
        if self.text is not None:
            try:
                re.compile(self.text)
            except re.error as error:
                raise UsageError(f"--text {self.text!r}: no regular expression, {error}") from error

    def mask(self, valued: Valued) -> np.ndarray:
        """Which of the examples of a run are chosen, [n] bool.

        Raises:
          UsageError: the run has no such domain, or no id that fits.
        """
        found = valued.visits >= self.min_visits
        if self.domain is not None:
            check_choice(
                "domain", self.domain, sorted(pa.array(valued.domains).unique().to_pylist())
            )
            found &= valued.domains == self.domain
        if self.id:
            globs = "|".join(rf"\A{fnmatch.translate(glob)}" for glob in self.id)
            fits = _matches(re.compile(globs), valued.ids)
            if not fits.any():
                raise UsageError(f"--id: no example has an id like {' or '.join(self.id)}")
            found &= fits
        if self.text is not None:
            found &= _matches(re.compile(self.text, re.IGNORECASE), valued.excerpts)
        if self.verdict:
            found &= np.logical_or.reduce([valued.verdicts == one for one in self.verdict])
        return found

    @property
    def words(self) -> str:
        """What was asked for, to be told: empty if nothing was."""
        told = [
            f"domain {self.domain}" if self.domain is not None else "",
            f"id {' or '.join(self.id)}" if self.id else "",
            f"text {self.text}" if self.text is not None else "",
            f"{self.min_visits} visits or more" if self.min_visits else "",
            " or ".join(self.verdict),
        ]
        return ", ".join(part for part in told if part)


def _matches(pattern: re.Pattern[str], texts: Sequence[str]) -> np.ndarray:
    return np.fromiter((pattern.search(text) is not None for text in texts), bool, len(texts))
