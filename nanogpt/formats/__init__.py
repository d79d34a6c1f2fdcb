"""Other projects' formats: Hugging Face's, and the original nanoGPT's."""
