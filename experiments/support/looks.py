"""One look for each method, sweep and code in all pictures: its name, colour, marker and dashes."""

from __future__ import annotations

from dataclasses import dataclass

from rasa_theory import methods
from rasa_theory.plotting import style


@dataclass(frozen=True)
class Look:
    """`line` is matplotlib's format: a marker, then dashes."""

    name: str
    color: str
    line: str

    @property
    def marker(self) -> str:
        return self.line[0]


# Methods of one idea have one colour: LoRA of layers and of blocks black, with ranks allocated grey, joint bases
# purple, shared bases of trained factors blue, one side shared orange.
METHODS = {
    "lora": Look(methods.METHODS["lora"].title, style.INK, "o-"),
    "allocated": Look(methods.METHODS["allocated"].title, style.GREY, "s-"),
    "block_lora": Look(methods.METHODS["block_lora"].title, style.INK, "d--"),
    "allocated_blocks": Look(methods.METHODS["allocated_blocks"].title, style.GREY, "d--"),
    "rasa": Look(methods.METHODS["rasa"].title, style.VERMILION, "D-"),
    "joint_diagonal": Look(methods.METHODS["joint_diagonal"].title, style.PURPLE, "v-"),
    "joint_full": Look(methods.METHODS["joint_full"].title, style.PURPLE, "^--"),
    "share_columns": Look("SHARE, lorashare", style.BLUE, "h-"),
    "share_whole": Look("SHARE, vlora", style.BLUE, "p--"),
    "share_basis": Look(methods.METHODS["share_basis"].title, style.BLUE, "h:"),
    "tied_lora": Look(methods.METHODS["tied_lora"].title, style.SKY, "P-"),
    "vb_lora": Look(methods.METHODS["vb_lora"].title, style.GREEN, "X-"),
    "mos": Look(methods.METHODS["mos"].title, style.GREEN, "X--"),
    "one_sided": Look(methods.METHODS["one_sided"].title, style.ORANGE, "<-"),
    "share_lora": Look(methods.METHODS["share_lora"].title, style.ORANGE, ">--"),
    "vera": Look(methods.METHODS["vera"].title, style.GREY, "*:"),
}
"""The methods of `rasa_theory.methods` by their titles, and SHARE as the packages of others compute it."""

SWEEPS = {
    "joint": Look("joint sweep", style.BLUE, "o-"),
    "core": Look("core sweep", style.GREEN, "^-"),
    "paper": Look("paper sweep", style.SKY, "P-"),
    "products": Look("two products", style.ORANGE, "s--"),
}
"""The sweeps of the solver; `products` are the two products with M of a joint sweep, and nothing else."""

CODES = {
    "tensorly parafac": Look("tensorly", style.VERMILION, "^--"),
    "pyttb cp_als": Look("pyttb", style.PURPLE, "D--"),
    "pygenten cp_als": Look("pygenten", style.GREY, "v--"),
}
"""The CP codes of others."""
