"""A fused ensemble inside vLLM: an out-of-tree model that plain `vllm serve FOLDER` runs.

    `folder` writes and reads FOLDER (`shoal stack`) → `plugin` tells vLLM about it
    → `model` runs all members as one wide model, with weights from the members' own checkpoints,
      and `feed_forward` within it
    → `request` reads what a request asks for → `processor` hears of it from vLLM's batch and keeps
      it per row → `model` fuses with it

vLLM's own parts stay in charge of everything else: scheduling, paged KV cache, prefix caching,
torch.compile, CUDA graphs, sampling and the API. `folder` and `request` need no vLLM.
"""
