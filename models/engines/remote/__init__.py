"""Members that another OpenAI-compatible server runs: a vLLM, another Shoal, a hosted API.

One engine is one server: its key, its connections and its circuit breaker. An attempt is one HTTP
request; `engine` makes as many as the request's deadline allows, until the first text is on its
way.
"""
