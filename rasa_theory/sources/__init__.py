"""Sources of stacks: bundled sets, numpy files, checkpoints and pairs of them, adapters, generators, null models."""

from rasa_theory.sources import null_models
from rasa_theory.sources.bundled import BUNDLED, DEFAULT, is_bundled, provenance
from rasa_theory.sources.catalogue import Catalogue, StackSource
from rasa_theory.sources.grouping import Group, group
from rasa_theory.sources.open import load, open_source
from rasa_theory.sources.pair import Prefix
from rasa_theory.sources.sizes import left_out_lines, memory_line, size_line
from rasa_theory.sources.synthetic import (
    check_synthetic,
    planted_stack,
    power_law_stack,
    singular_values,
    synthetic_catalogue,
    synthetic_stack,
)
from rasa_theory.sources.tensor_updates import Norms, Updates, pair_warning

__all__ = [
    "BUNDLED",
    "DEFAULT",
    "Catalogue",
    "Group",
    "Norms",
    "Prefix",
    "StackSource",
    "Updates",
    "check_synthetic",
    "group",
    "is_bundled",
    "left_out_lines",
    "load",
    "memory_line",
    "null_models",
    "open_source",
    "pair_warning",
    "planted_stack",
    "power_law_stack",
    "provenance",
    "singular_values",
    "size_line",
    "synthetic_catalogue",
    "synthetic_stack",
]
