"""The pool's models at today's carbon intensity: facts whose rates follow the grid."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from policies.base import ModelFacts
from policies.carbon.grid import GridIntensity
from policies.carbon.settings import CarbonSettings
from policies.footprint import Rates


class LiveModels(Mapping[str, ModelFacts]):
    """A pool's `ModelFacts` by name, repriced whenever the grid's intensity changes.

    Handed to policies in place of a plain dictionary. Between changes the same objects come back,
    so that a policy may cache what it derived from a `Rates` object until it sees another one.
    Thread-safe.
    """

    def __init__(
        self,
        models: Mapping[str, ModelFacts],
        *,
        engine_of: Mapping[str, str],
        settings: CarbonSettings,
        grid: GridIntensity,
        clock: Callable[[], float],
    ) -> None:
        """Price `models`; `engine_of` maps them to engines, `clock` returns Unix time."""
        self._models = dict(models)
        self._engine_of = dict(engine_of)
        self._settings = settings
        self._grid = grid
        self._clock = clock
        self._lock = threading.Lock()
        self._gco2e_per_kwh = -1.0
        self._priced: dict[str, ModelFacts] = {}
        self._rates: dict[str, Rates] = {}
        self._refresh()

    def rates(self) -> Mapping[str, Rates]:
        """Return every model's current rates; the same object until the intensity changes."""
        self._refresh()
        return self._rates

    def announced_gco2e_per_kwh(self, then_s: float) -> float | None:
        """Return the intensity announced for a time to come; None where nothing is."""
        return self._grid.announced(then_s)

    def __getitem__(self, name: str) -> ModelFacts:
        self._refresh()
        return self._priced[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def _refresh(self) -> None:
        gco2e_per_kwh = self._grid.at(self._clock()).gco2e_per_kwh
        if gco2e_per_kwh == self._gco2e_per_kwh:
            return
        with self._lock:
            rates = self._settings.rates(self._models, self._engine_of, gco2e_per_kwh=gco2e_per_kwh)
            self._priced = {
                name: replace(facts, rates=rates[name]) for name, facts in self._models.items()
            }
            self._rates = rates
            self._gco2e_per_kwh = gco2e_per_kwh
