"""Members that vLLM runs: one checkpoint, or several of one shape fused in its batch.

    `options` checks what the pool file says, without vLLM → `engine` starts vLLM's `AsyncLLM` and
    streams from it → `translate` turns our requests into its parameters and its outputs into ours

vLLM brings paged KV cache, prefix caching, continuous batching, quantization, CUDA graphs and
tensor parallelism. It is an optional dependency, imported when an engine of this kind starts.
"""
