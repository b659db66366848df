"""OpenAI's HTTP interface to an engine, with vLLM's names for what goes beyond it."""
