"""The pretrained models, their training texts, the encoder, and the parts of a training loop."""
