"""How the vectors of a text's tokens become one: sentence-transformers' module `Pooling`.

Its folders say which way, for routers' encoders and for the engine that serves such models alike.

Shape legend: B texts, T tokens, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from policies.errors import PolicyError

if TYPE_CHECKING:
    from torch import Tensor

Pooling: TypeAlias = Literal["mean", "cls", "max", "lasttoken", "weightedmean"]

_KEYS: Final[Mapping[Pooling, str]] = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}


def pooling_of(config: Mapping[str, Any], file: Path) -> Pooling:
    """Return what `config`, read from `file`, asks for; raises `PolicyError` unless it is one."""
    modes: tuple[Pooling, ...] = get_args(Pooling)
    chosen = [m for m in modes if config.get(_KEYS[m]) or config.get("pooling_mode") == m]
    if len(chosen) != 1:
        raise PolicyError(f"{file}: one of {', '.join(_KEYS.values())} must be true, and no more")
    return chosen[0]


def pooling_config(pooling: Pooling) -> dict[str, bool]:
    """Return the configuration that asks for `pooling`."""
    return {key: mode == pooling for mode, key in _KEYS.items()}


def pool(hidden_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector per text, [B, D]; `mask_BT` is 1 where a token is no padding."""
    mask_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if pooling == "max":
        return hidden_BTD.masked_fill(mask_BT1 == 0, float("-inf")).amax(1)
    if pooling == "lasttoken":
        last_B11 = (mask_BT.sum(1) - 1)[:, None, None]
        return hidden_BTD.take_along_dim(last_B11, 1)[:, 0]
    if pooling == "weightedmean":
        mask_BT1 = mask_BT1 * mask_BT1.new_ones(mask_BT.shape[1], 1).cumsum(0)
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9)
