"""When a method becomes how strong while a model trains (Zhu & Gupta 2017, arXiv:1710.01878)."""

from __future__ import annotations

from dataclasses import dataclass

Moment = int | float  # a number of steps, or a share of all steps in [0, 1]


@dataclass(frozen=True)
class Ramp:
    """From ``begin`` to ``end`` of a training, what stays of a weight, and its grid, are chosen anew every ``every`` steps, by
    milder methods first; from ``end`` on they are held, and the optimizer trains what is there.

    The strength rises from ``start`` to 1 as ``1 - (1 - start) (1 - t)^power``, t the share of the way: fast first, and slow where
    little is left. A power of 3 is the usual one; 0 is the whole strength from ``begin`` on.

    Args:
        begin, end: a number of steps, or, as a float, a share of all of them. Before ``begin`` the strength is ``start``.
        every: steps.
        power: at least 0.
        start: in [0, 1]: where what is trained is pruned in part already.
    Raises:
        TypeError, ValueError: another value, or an end before the beginning.
    """

    begin: Moment = 0
    end: Moment = 0.5
    every: int = 100
    power: float = 3.0
    start: float = 0.0

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Ramp: {name} is {value!r}, expected a number of steps or a share of them")
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"Ramp: {name} is {value!r}, expected a number of steps, or a share of them in [0, 1]")
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"Ramp: every is {self.every!r}, expected a number of steps from 1")
        if not self.power >= 0:
            raise ValueError(f"Ramp: power is {self.power!r}, expected a number from 0")
        if not 0 <= self.start <= 1:
            raise ValueError(f"Ramp: start is {self.start!r}, expected a strength in [0, 1]")

    def of(self, steps: int) -> Ramp:
        """The same for a training of so many steps, with numbers of steps. Raises ValueError where it does not fit in there."""
        begin, end = (round(value * steps) if isinstance(value, float) else value for value in (self.begin, self.end))
        if not begin <= end <= steps:
            raise ValueError(f"Ramp: it goes from step {begin} to {end}, expected one that fits into {steps} steps")
        return Ramp(begin, end, self.every, self.power, self.start)

    def strength(self, step: int) -> float:
        """After a number of steps; for a ramp with numbers of steps."""
        if step < self.begin:
            return self.start
        if step >= self.end:
            return 1.0
        way = (step - self.begin) / (self.end - self.begin)
        return 1 - (1 - self.start) * (1 - way) ** self.power if self.power else 1.0

    def due(self, step: int) -> bool:
        """Whether the method is chosen anew after a number of steps."""
        if not self.begin <= step <= self.end:
            return False
        return step == self.end or (step - int(self.begin)) % self.every == 0

    @classmethod
    def constant(cls, begin: Moment = 0, end: Moment = 0, every: int = 100) -> Ramp:
        """The whole strength from ``begin`` on, chosen anew until ``end``."""
        return cls(begin, end, every, power=0.0)
