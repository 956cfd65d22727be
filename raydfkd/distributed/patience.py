"""How long a unit may stand still before its worker is taken to hang."""

from __future__ import annotations

LEAST_S = 180.0
"""Time that every unit may stand still: what a store that is away costs an attempt before that is called an outage."""
TIMES = 10.0
"""Times the longest silence of units that went on after it."""


class Patience:
    """Follows from how long units have stood still that went on afterwards: one that takes far longer hangs.

    While no unit has got on at all nothing is known, and nobody is taken to hang. It is no proof: so a unit is only
    given to another worker as well, and the patience doubles with each worker that was ended for it. So units whose
    steps have become slow are all made in the end.
    """

    def __init__(self) -> None:
        self._longest_s = 0.0
        self._times = TIMES

    def saw(self, silent_s: float) -> None:
        """A unit has got on, or is done, after it stood still for so long."""
        self._longest_s = max(self._longest_s, silent_s)

    def double(self) -> None:
        """A worker was ended whose unit stood still for too long."""
        self._times *= 2

    def is_over(self, silent_s: float) -> bool:
        """Whether a unit that has stood still for so long has to be given to another worker."""
        return self._longest_s > 0 and silent_s > max(LEAST_S, self._times * self._longest_s)
