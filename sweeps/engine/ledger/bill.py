"""The price of a sweep's machines over time, split by what they did for it: training, work that was lost, idling."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter

from inflora.config import ConfigError
from inflora.errors import one_line

PRICE_LABEL = "price-per-hour"
"""The label by which a machine declares its price, in whatever currency: ``ray start --labels price-per-hour=1.21``."""

_MOST = 1e6
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Machine(NamedTuple):
    """A machine with a price per hour, and the share of it that is taken."""

    price: float
    used: float


class Bill(NamedTuple):
    """The cost so far. ``unfinished``: of each trial, since its last report, which may yet be lost."""

    training: _Amount = 0.0
    lost: _Amount = 0.0
    idle: _Amount = 0.0
    unfinished: Mapping[int, _Amount] = {}

    @property
    def total(self) -> float:
        """All of it."""
        return self.training + self.lost + self.idle + sum(self.unfinished.values())

    @property
    def line(self) -> str:
        """All of it in words; empty where nothing has declared a price."""
        if not self.total:
            return ""
        training = self.training + sum(self.unfinished.values())
        return f"cost {self.total:.2f}: {training:.2f} training, {self.lost:.2f} lost, {self.idle:.2f} idle"

    def after(self, hours: float, machines: Sequence[Machine], at_work: Collection[int]) -> "Bill":
        """The bill so much later: what is taken of machines is shared by the trials at work, the rest is idle.

        A sweep's trials all ask for the same. What is taken while none is at work is not training yet.
        """
        total = hours * sum(machine.price for machine in machines)
        if not at_work:
            return self._replace(idle=self.idle + total)
        used = hours * sum(machine.price * machine.used for machine in machines)
        more = {number: self.unfinished.get(number, 0.0) + used / len(at_work) for number in at_work}
        return self._replace(idle=self.idle + total - used, unfinished={**self.unfinished, **more})

    def paid(self, number: int) -> "Bill":
        """A trial has reported a task: what was spent on it was for training."""
        return self._replace(
            training=self.training + self.unfinished.get(number, 0.0), unfinished=self._without(number)
        )

    def wasted(self, number: int) -> "Bill":
        """A trial's try was lost, or has told what was known: what was spent on that is lost."""
        return self._replace(lost=self.lost + self.unfinished.get(number, 0.0), unfinished=self._without(number))

    def interrupted(self) -> "Bill":
        """The driver has ended: what no report tells of is lost."""
        return self._replace(lost=self.lost + sum(self.unfinished.values()), unfinished={})

    def _without(self, number: int) -> dict[int, float]:
        return {each: amount for each, amount in self.unfinished.items() if each != number}

    def kept(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**self._asdict(), "unfinished": {str(number): amount for number, amount in self.unfinished.items()}}


_BILL = TypeAdapter(Bill)


def bill_from(kept: Any) -> Bill:
    """The bill that was kept; an empty one where none was.

    Raises:
        ValueError: None that a driver writes.
    """
    return _BILL.validate_python(kept or {})


def price_of(labels: Mapping[str, str]) -> float:
    """The price per hour that a machine's labels declare, 0 where they declare none.

    Raises:
        ConfigError: It is no price.
    """
    text = labels.get(PRICE_LABEL, "0")
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price <= _MOST:
        raise ConfigError(f"label {PRICE_LABEL} must be a number from 0 to {_MOST:g}, got {one_line(text, 100)!r}")
    return price


def share(amount: float, total: float) -> float:
    """The share of a machine that so much of what it has is."""
    return min(1.0, max(0.0, amount / total)) if total else 0.0
