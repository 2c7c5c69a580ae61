"""Anthropic's Messages API, translated to a chat completion and back."""
