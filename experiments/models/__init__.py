"""all-MiniLM-L6-v2: its training texts, the encoder, and the parts of a training loop."""
