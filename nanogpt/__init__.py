"""nanoGPT and GPT-2 behind OpenAI's completions API."""

__version__ = "0.1.0"
