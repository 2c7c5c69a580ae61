"""Makes what the frontier bench learned the pool's own: cascade.npz and three policies."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from models.pool import Pool
from policies.cascade.learned import LearnedCascade
from policies.evidence import Calibration
from policies.files import write_atomic


def install(
    pool: Pool, cascade: LearnedCascade, chunks: Sequence[str], evidence: Calibration
) -> None:
    """Write the cascade and the policies that use it into the pool's folder."""
    cascade.save(pool.folder / "cascade.npz")
    file = pool.folder / "pool.yaml"
    text = file.read_text()
    heading = text.partition("\n")[0] + "\n" if text.startswith("#") else ""
    content = yaml.safe_load(text)
    router = {"kind": "frugal", "path": "cascade.npz"}
    content.setdefault("policies", {})
    content["policies"]["cascade"] = dict(router)
    content["policies"]["fused"] = {
        "kind": "fused",
        "answer": {
            "members": list(chunks),
            "weights": "evidence",
            "temperature": round(evidence.temperature, 3),
        },
        "prior_power": round(evidence.prior_power, 3),
        "router": dict(router),
    }
    content["policies"]["best-of"] = {
        "kind": "fixed",
        "plan": {"best": {"candidates": list(chunks), "select": "scorer", "scorer": "cascade"}},
    }
    write_atomic(file, heading + yaml.safe_dump(content, sort_keys=False))
