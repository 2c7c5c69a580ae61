"""How energy is known, where that is from, and how far it may be off.

A figure of a method lies between `low` and `high` times what is printed. Errors of one method are
systematic, so that the ranges of sums are the sums of the ranges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to know energy: its error as factors, where they come from, and since when.

    `guesses_time` says that the device's busy seconds are guessed too, and are off alike.
    """

    name: str
    low: float
    high: float
    source: str
    date: str
    guesses_time: bool = False


# What a GPU's counter was found to miss of a steady draw on more than seventy GPUs; NVIDIA's own
# reference of NVML says the same of Fermi and Kepler. One short request may be off by more.
NVML = Method(
    name="measured:nvml",
    low=0.95,
    high=1.05,
    source="a GPU's own counter, whole board; 5% of a steady draw against meters (Yang et al., "
    "arXiv 2312.02741). Of short work an A100 or H100 samples a quarter: there they cut errors by "
    "35% in the mean and by 65% at most",
    date="2024-11",
)
# The worst mean error that a comparison of such counters with meters found, in either direction.
RAPL = Method(
    name="measured:rapl",
    low=0.58,
    high=1.73,
    source="a CPU's own counters, package and memory. They follow the plug closely (Khan et al., "
    "RAPL in Action, 2018), but the energy that work adds was off by up to 73% in the mean (Fahad "
    "et al., Energies 12(11) 2204, 2019); power supply and fans are not in it",
    date="2019-06",
)
# The least and the most that a busy vCPU draws by the same tables, against the table's 3.97 W.
CPU_TIME = Method(
    name="modelled:cpu-time",
    low=0.40,
    high=2.16,
    source="seconds of vCPUs times their power; cloud-carbon-coefficients: 1.58 (EPYC, 2nd "
    "generation) to 8.58 W (Sandy Bridge) a busy vCPU; state yours (`shoal calibrate energy`)",
    date="2023-09",
)
# Low: LLMCarbon's own residuals (actual over predicted energy of the five training runs of its
# table 4: 0.93 to 1.04) times 0.35, which is assumed, over the best efficiency there (0.39). High:
# a published measurement of serving, 0.12 J a token of Llama-3.1-8B on an H100 at batch 64
# (ML.ENERGY 3.0), against the 0.0325 J that these equations give.
_LOW, _HIGH = 0.83, 3.7
LLMCARBON = Method(
    name="modelled:llmcarbon",
    low=_LOW,
    high=_HIGH,
    source="LLMCarbon's equations (Faiz et al. 2024), efficiency assumed; its residuals, and "
    "ML.ENERGY 3.0 at batch 64. One request alone on a large GPU takes many times more",
    date="2026-11",
    guesses_time=True,
)
STATED = Method(
    name="modelled:stated",
    low=_LOW,
    high=_HIGH,
    source="LLMCarbon's equations with the size and the hardware that were stated of a remote "
    "model; errors as LLMCarbon's",
    date="2026-11",
    guesses_time=True,
)
UNKNOWN = Method(
    name="unknown",
    low=1.0,
    high=1.0,
    source="nobody knows: not in the figures, so that these are too low",
    date="",
)

METHODS = {m.name: m for m in (NVML, RAPL, CPU_TIME, LLMCARBON, STATED, UNKNOWN)}


def method_of(name: str) -> Method:
    """Return the method called `name`; one without error where there is none of that name."""
    return METHODS.get(name) or Method(name=name, low=1.0, high=1.0, source="", date="")


def explain_methods(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what is known of the methods in `names`, each of which may join several by "+"."""
    single = sorted({part for name in names for part in name.split("+") if part})
    return {
        name: {
            k: v for k, v in asdict(method_of(name)).items() if k not in ("name", "guesses_time")
        }
        for name in single
    }
