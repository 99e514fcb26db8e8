"""What a unit of work costs: ``rates.yaml``, each number with its source, and what a command lays over it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import Field

from training.config import Config, ConfigError

RATES = Path(__file__).parent / "rates.yaml"
OVERRIDDEN = "given on the command line"


class Rate(Config):
    """One number, what it is of, and where it comes from."""

    value: float = Field(ge=0)
    unit: str = Field(min_length=1)
    measured: bool
    source: str = Field(min_length=1)


class Rates:
    """All rates by name; which of them were asked for is kept, so that an estimate can name what it rests on."""

    def __init__(self, rates: Mapping[str, Rate]) -> None:
        self._rates = dict(rates)
        self.used: dict[str, Rate] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._rates

    def __getitem__(self, name: str) -> float:
        self.used[name] = self._rates[name]
        return self._rates[name].value

    def seconds(self, name: str, amount: float) -> float:
        """Seconds that an amount takes: of rows or pictures at a rate in ms or s, of GFLOP at one in GFLOP/s."""
        value = self[name]
        unit = self._rates[name].unit
        if "GFLOP/s" in unit:
            if amount and not value:
                raise ConfigError(f"--rate {name}: got 0, allowed: above 0 ({unit})")
            return amount / value if amount else 0.0
        return amount * value / (1000.0 if " ms " in unit else 1.0)

    def of_model(self, kind: str, name: str) -> str:
        """The rate of a model: of its name, of what stands before the colon, or of any other."""
        mine = (f"{kind}.{one}" for one in (name, name.partition(":")[0]))
        return next((one for one in mine if one in self._rates), f"{kind}.other")

    def with_value(self, name: str, value: float) -> Rates:
        """The same with another value of one rate, none asked for yet."""
        return Rates({**self._rates, name: self._rates[name].model_copy(update={"value": value})})

    @property
    def names(self) -> list[str]:
        """Of all rates, in the order of the file."""
        return list(self._rates)

    def source(self, name: str) -> Rate:
        """A rate with its source; not counted as asked for."""
        return self._rates[name]


def load_rates(overrides: Sequence[str] = (), path: Path = RATES) -> Rates:
    """The rates of the file, under ``NAME=VALUE`` overrides.

    Raises:
        ConfigError: there is no such rate, or the value is no number from 0 on.
    """
    rates = {name: Rate.model_validate(values) for name, values in yaml.safe_load(path.read_text("utf-8")).items()}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--rate {override!r}: write it as NAME=VALUE")
        if name not in rates:
            near = difflib.get_close_matches(name, rates, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"--rate {name!r} is not known; {hint}names stand in {path.name} beside {__name__}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"--rate {name}: got {text!r}, allowed: a number from 0 on ({rates[name].unit})")
        rates[name] = Rate(value=value, unit=rates[name].unit, measured=False, source=OVERRIDDEN)
    return Rates(rates)
