"""One thread and reproducible examples: a red test is red again on the next run."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("default")
