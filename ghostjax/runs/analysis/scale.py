"""Numbers for readers: short, and those of one kind in one unit, a power of a thousand."""

import math
from typing import NamedTuple

import numpy as np

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """A number for readers, to so many digits, with a real minus and no exponent where it fits.

    >>> number(0.01234), number(1234.6), number(0.0), number(float("nan"))
    ('0.0123', '1235', '0', 'undefined')
    """
    if not math.isfinite(value):
        return "undefined"
    size = abs(value)
    if size and not 1e-4 <= size < 1e7:
        text, power = f"{value:.{digits - 1}e}".split("e")
        text += f"\u00d7{power_of_ten(int(power))}"
    else:
        places = max(0, digits - 1 - math.floor(math.log10(size))) if size else 0
        text = f"{value:.{places}f}"
    return text.replace("-", "\u2212")


def power_of_ten(exponent: int) -> str:
    """
    >>> power_of_ten(-3)
    '10⁻³'
    """
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


class Scale(NamedTuple):
    """Numbers in units of ``10 ** exponent``; ``places`` after the point where they are listed."""

    exponent: int
    places: int = 2

    @classmethod
    def of(cls, values: np.ndarray) -> "Scale":
        """The unit in which the largest of the values is from 1 to 1000, in three digits.

        >>> Scale.of(np.array([0.0123, -0.002]))
        Scale(exponent=-3, places=1)
        """
        sizes = np.abs(values[np.isfinite(values)])
        largest = float(sizes.max()) if len(sizes) else 0.0
        if not largest > 0:
            return cls(0)
        power = math.floor(math.log10(largest))
        return cls(3 * (power // 3), 2 - power % 3)

    @classmethod
    def typical(cls, values: np.ndarray) -> "Scale":
        """The unit for all but the largest tenth, so that a few large ones do not hide the rest."""
        sizes = np.abs(values[np.isfinite(values) & (values != 0)])
        return cls.of(np.quantile(sizes, [0.9])) if len(sizes) else cls(0)

    @property
    def words(self) -> str:
        """The unit, as text: ``10⁻³``, or nothing where it is one."""
        return power_of_ten(self.exponent) if self.exponent else ""

    def label(self, what: str) -> str:
        """What an axis shows, with the unit."""
        return f"{what} ({self.words})" if self.exponent else what

    def within(self, what: str) -> str:
        """What a table holds, with the unit."""
        return f"{what}, in {self.words}" if self.exponent else what

    def number(self, value: float) -> str:
        """A value in this unit, as ``number``."""
        return number(float(self(value)))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The values in this unit."""
        return np.asarray(values, float) / 10.0**self.exponent

    def plain(self, value: float) -> str:
        """A value in this unit: all have as many places, so that they can be compared."""
        scaled = float(self(value))
        if not math.isfinite(scaled):
            return number(scaled)
        text = f"{scaled:.{self.places}f}"
        return (text if float(text) else text.lstrip("-")).replace("-", "\u2212")

    def signed(self, value: float) -> str:
        """As ``plain``, with a plus for positive values."""
        text = self.plain(value)
        return f"+{text}" if text[0].isdigit() and float(text) else text
