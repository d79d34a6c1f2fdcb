"""`nanogpt serve`: a model behind OpenAI's completions interface, and a page to play on."""
