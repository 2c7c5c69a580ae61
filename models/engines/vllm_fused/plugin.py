"""What vLLM calls in each of its processes before it reads a model's config.

Entry point of the group `vllm.general_plugins`, so that plain `vllm serve FOLDER` works wherever
Shoal is installed beside vLLM. Other models are not touched.
"""

from __future__ import annotations

from models.engines.vllm_fused.folder import ARCHITECTURE


def register() -> None:
    """Register architecture, settings and weight loader; may be called more than once."""
    from vllm import ModelRegistry  # noqa: PLC0415 - vLLM is there when it calls this
    from vllm.model_executor.model_loader import register_model_loader  # noqa: PLC0415
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # noqa: PLC0415

    from models.engines.vllm_fused.settings import LOAD_FORMAT, FusedSettings, MembersLoader  # noqa: PLC0415

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    ModelRegistry.register_model(
        ARCHITECTURE, "models.engines.vllm_fused.model:ShoalFusedForCausalLM"
    )
    MODELS_CONFIG_MAP[ARCHITECTURE] = FusedSettings
    register_model_loader(LOAD_FORMAT)(MembersLoader)
