"""`nanogpt serve`: a model behind OpenAI's completions interface, and a page to play on."""

KEY = "NANOGPT_API_KEY"  # the environment variable with the key that clients must send
