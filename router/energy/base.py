"""The contract of energy meters."""

from __future__ import annotations

from typing import Protocol


class MeterError(RuntimeError):
    """A meter that this machine lacks or does not let us read; the message says what would help."""


class Meter(Protocol):
    """Counts the energy of the device an engine runs on, other programs' share included."""

    @property
    def method(self) -> str:
        """How it measures: "measured:nvml" or "measured:rapl"."""
        ...

    def read_wh(self) -> float:
        """Return watt-hours since the meter was opened; never falls. Raises `MeterError`."""
        ...
