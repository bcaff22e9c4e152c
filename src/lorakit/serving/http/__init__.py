"""The HTTP server: OpenAI's routes for completions, chat and models, and lorakit's for classes and adapters."""
