"""The base model of an adapter, as the adapter's configuration names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rasa_theory.formats.model_config import model_config

# the tasks whose AutoPeftModel saves the head of a model whole, and the names that it knows for heads
_HEADS = {
    "SequenceClassification": ("classifier", "score"),
    "TokenClassification": ("classifier", "score"),
    "QuestionAnswering": ("qa_outputs",),
}
OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", *(head for heads in _HEADS.values() for head in heads)})


def task_heads(architecture: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The task in the name of a class whose head PEFT saves whole, and the names of such heads; None without one."""
    task = (architecture or "").rpartition("For")[2]
    return (task, _HEADS[task]) if task in _HEADS else (None, ())


@dataclass(frozen=True)
class BaseModel:
    """The name or path of a base model, its type, and the class of `library` that loads it; None where unknown."""

    name: str | None
    architecture: str | None = None
    library: str = "transformers"
    model_type: str | None = None

    @classmethod
    def of(cls, name: str | None, checkpoints: Iterable[Path]) -> BaseModel:
        """The model with the class that the first config.json says which names one, of these checkpoints.

        A class whose code comes with the checkpoint is none that a library has. Raises InputError if a config.json
        holds no JSON object.
        """
        for path in checkpoints:
            config = model_config(path)
            kind = config.get("model_type") if isinstance(config.get("model_type"), str) else None
            if isinstance(diffusers := config.get("_class_name"), str):
                return cls(name, diffusers, "diffusers")
            match config.get("architectures"):
                case [str(architecture), *_] if "auto_map" not in config:
                    return cls(name, architecture, model_type=kind)
            if kind is not None:
                return cls(name, model_type=kind)
        return cls(name)

    def fields(self) -> dict[str, Any]:
        """The fields of adapter_config.json by which PEFT's AutoPeftModel finds the class.

        `task_type` stays empty: AutoPeftModel refuses a configuration that has one, and the classes for one task take
        a configuration without. Those of `task_heads` also want the head of the model in the file.
        """
        mapping = None
        if self.architecture is not None:
            mapping = {"base_model_class": self.architecture, "parent_library": self.library}
        return {"base_model_name_or_path": self.name, "task_type": None, "auto_mapping": mapping}
