"""All blocks by name: the functions of the other modules, and the gallery of the registry."""

from __future__ import annotations

from collections.abc import Callable

from experiments.pages import crossings, methods, ranks, reconstruction, sets, sharing, speed, training, training_runs
from experiments.registry import EXPERIMENTS


def gallery() -> str:
    """Every picture with its data, and the command and the time that they take."""
    sections = []
    for experiment in EXPERIMENTS.values():
        for name, picture in experiment.pictures.items():
            time = picture.takes or experiment.takes
            takes = f" It takes {time}." if time else ""
            needs = f" It needs {experiment.needs}." if experiment.needs else ""
            sections += [
                f"## {name}",
                f"![{picture.shows}](../../figures/{name}.png)",
                f"{picture.shows[0].upper()}{picture.shows[1:]}.",
                f"Data: `figures/{picture.data}`, made by this command.{takes}{needs}",
                f"```\n{experiment.written_command(picture)}\n```",
            ]
    return "\n\n".join(sections)


BLOCKS: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *reconstruction.BLOCKS, *crossings.BLOCKS, *sharing.BLOCKS, *sets.BLOCKS, *ranks.BLOCKS, *methods.BLOCKS,
        *training.BLOCKS, *training_runs.BLOCKS, *speed.BLOCKS, gallery,
    )
}  # fmt: skip


def block(name: str) -> str:
    """The text of a block. Raises ValueError for a name that is none."""
    if name not in BLOCKS:
        raise ValueError(f"there is no block {name}; `python -m experiments.pages --list` names all")
    return BLOCKS[name]()
