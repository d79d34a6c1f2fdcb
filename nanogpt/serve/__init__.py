"""`nanogpt serve`: a model behind OpenAI's completions API, and a web page."""

KEY = "NANOGPT_API_KEY"  # the environment variable with the key that clients must send
