"""What the pool's models cost: money, energy and carbon per token, as the grid is now."""

from __future__ import annotations

import time
from collections.abc import Mapping

from models.pool import Pool
from policies.carbon.grid import GridReading
from policies.carbon.live import LiveModels
from policies.carbon.settings import CarbonSettings
from policies.footprint import Rates


class Prices:
    """The models' facts with their present rates.

    `grid` is where the grid's intensity comes from; its readings follow a live feed, where one is
    configured and started. `facts` are what policies know of each model, by name.
    """

    def __init__(self, pool: Pool, carbon: CarbonSettings) -> None:
        self.grid = carbon.grid(pool.folder)
        self.facts = LiveModels(
            pool.facts(),
            engine_of={model.name: model.spec.engine for model in pool.models},
            settings=carbon,
            grid=self.grid,
            clock=time.time,
        )

    @property
    def rates(self) -> Mapping[str, Rates]:
        """What each model costs per token, at the grid's present intensity."""
        return self.facts.rates()

    def grid_reading(self) -> GridReading:
        """Return the grid's present intensity and where the figure comes from."""
        return self.grid.at(time.time())
