"""The `pool.yaml` of the default pool: two stacked engines, prices in proportion to parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from models.tasks import DOMAINS

_KV_MEMORY_BYTES: Final = 256 * 2**20
# The dearest model's price; the others cost their share of its parameters.
_USD_PER_MILLION_INPUT_TOKENS: Final = 0.04
_USD_PER_MILLION_OUTPUT_TOKENS: Final = 0.12
_HEADING: Final = "# Written by models.training.default_pool; prices are examples.\n"


def write_pool_file(num_parameters: Mapping[str, int], out: Path) -> None:
    """Write `out/pool.yaml`; a model named like a domain is that domain's chunk."""
    largest = max(num_parameters.values())
    engines = [
        {
            "name": name,
            "kind": "stacked",
            "device": "auto",
            "dtype": "float32",
            "kv_memory_bytes": _KV_MEMORY_BYTES,
        }
        for name in ("chunks", "base")
    ]
    models: list[dict[str, Any]] = []
    for name, count in num_parameters.items():
        is_chunk = name in DOMAINS
        share = count / largest
        models.append(
            {
                "name": name,
                "checkpoint": name,
                "engine": "chunks" if is_chunk else "base",
                "domains": [name] if is_chunk else list(DOMAINS),
                "usd_per_million_input_tokens": round(_USD_PER_MILLION_INPUT_TOKENS * share, 4),
                "usd_per_million_output_tokens": round(_USD_PER_MILLION_OUTPUT_TOKENS * share, 4),
            }
        )
    policies = {"auto": {"kind": "fixed", "plan": {"answer": {"members": ["base"]}}}}
    content = {"name": "default", "engines": engines, "models": models, "policies": policies}
    (out / "pool.yaml").write_text(_HEADING + yaml.safe_dump(content, sort_keys=False))
