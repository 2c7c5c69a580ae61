"""RAPL: the energy of CPU packages and their memory, from Linux's powercap interface."""

from __future__ import annotations

from pathlib import Path

from router.energy.base import MeterError

POWERCAP = Path("/sys/class/powercap")
_MICROJOULES_PER_WH = 3.6e9


class RaplMeter:
    """Sums the package and DRAM counters of all sockets; counters that wrap are unwrapped.

    Packages cover the whole socket, so what other programs burn is counted too. A counter must be
    read at least once per wrap (minutes at full load).
    """

    method = "measured:rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        """Open every package below `root`; raises `MeterError` if there is none to read."""
        zones = [
            zone
            for zone in sorted(root.glob("intel-rapl:*"))
            if _text(zone / "name").startswith(("package", "dram"))
        ]
        if not zones:
            raise MeterError(f"{root} holds no RAPL package; this machine has no such meter")
        self._counters = [_Counter(zone) for zone in zones]

    def read_wh(self) -> float:
        """Return watt-hours since the meter was opened."""
        return sum(counter.advance() for counter in self._counters) / _MICROJOULES_PER_WH


class _Counter:
    """One zone's microjoules since it was opened."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range_uj = int(_text(zone / "max_energy_range_uj"))
        self._last_uj = int(_text(self._file))
        self._total_uj = 0

    def advance(self) -> int:
        now_uj = int(_text(self._file))
        step_uj = now_uj - self._last_uj
        if step_uj < 0:
            step_uj += self._range_uj
        self._last_uj = now_uj
        self._total_uj += step_uj
        return self._total_uj


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError:
        raise MeterError(
            f"{file} may not be read; allow it with `chmod a+r {file}` (Linux keeps it to root)"
        ) from None
    except OSError as error:
        raise MeterError(f"{file}: {error.strerror}") from None
