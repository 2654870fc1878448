"""Keys of adapters are spelt in one room: everything else asks `rasa_theory.formats` for them."""

from pathlib import Path

import pytest

import rasa_theory

PACKAGE = Path(rasa_theory.__file__).parent
EXPERIMENTS = PACKAGE.parent / "experiments"


@pytest.mark.parametrize("key", ["base_model.model", r"base_model\.model", "lora_A", "lora_B", "rasa_A", "rasa_shared"])
def test_keys_are_spelt_in_formats_alone(key):
    files = [*PACKAGE.rglob("*.py"), *EXPERIMENTS.rglob("*.py")]
    spelling = {path.parent for path in files if key in path.read_text(encoding="utf-8")}
    assert spelling <= {PACKAGE / "formats"}
