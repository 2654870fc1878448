"""Training texts from every tenth file of the standard library alone, since parsing all of it takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.models import sentences


@pytest.fixture(autouse=True)
def _small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    every_file = sentences.standard_library_files

    def some_files() -> Iterator[tuple[str, Path]]:
        return (file for n, file in enumerate(every_file()) if n % 10 == 0)

    monkeypatch.setattr(sentences, "standard_library_files", some_files)
