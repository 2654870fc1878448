"""A pool of processes, started once, and a pair of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.problems import noise
from tests.helpers.processes import Pool


@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Two checkpoints of five kinds of unequal size, and an embedding, which no adapter can name."""
    made = {f"layers.{i}.{kind}.weight": noise(1, 12 + 2 * n, 10, 10 * n + i)[0]
            for n, kind in enumerate("abcde") for i in range(2)}  # fmt: skip
    made["embed.weight"] = noise(1, 30, 8, 99)[0]
    save_file({key: torch.as_tensor(M) for key, M in made.items()}, tmp_path / "tuned.safetensors")
    save_file(
        {key: torch.zeros(M.shape, dtype=torch.float64) for key, M in made.items()}, tmp_path / "base.safetensors"
    )
    return ["--base", str(tmp_path / "base.safetensors"), "--tuned", str(tmp_path / "tuned.safetensors"), "--quiet"]
