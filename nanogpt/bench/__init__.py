"""Measures speed: of any OpenAI-compatible server, of our engine, and of our front end."""
