"""HTTP: OpenAI-compatible completions, health and metrics."""
