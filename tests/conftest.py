"""One thread and reproducible examples: a red test is red again on the next run. And a pair of checkpoints to share.

With HYPOTHESIS_PROFILE=thorough in the environment, as in CI, five times as many examples are tried.

One thread is the fastest for the small matrices of the tests, and leaves the other cores to other test processes. It is
set before torch is imported, and in the environment, so that processes that tests start have it, too. Passive waiting
matters where processes outnumber cores: a thread that spins keeps a core from the thread that it waits for.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, derandomize=True, max_examples=20)
settings.register_profile("thorough", deadline=None, derandomize=True, max_examples=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def llamas(tmp_path_factory):
    """The folder of a small Llama, saved before and after a change of its matrices, and the model after it."""
    from tests.helpers.models import llama, saved_pair  # here, since transformers may be missing

    folder = tmp_path_factory.mktemp("llama")
    return folder, saved_pair(folder, llama, ".layers.")
