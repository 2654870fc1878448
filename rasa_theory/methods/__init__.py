"""RaSA's neighbours: the errors of other ways to share parameters, at the same number of parameters."""

from rasa_theory.methods.allocated import fit_allocated
from rasa_theory.methods.alternate import Steps, alternate
from rasa_theory.methods.bank import Bank, best_step, choose_vectors, cluster_means
from rasa_theory.methods.block_lora import fit_allocated_blocks, fit_block_lora
from rasa_theory.methods.compare import METHODS, allowed, at_parameters, pareto
from rasa_theory.methods.diagonals import Diagonals
from rasa_theory.methods.fit import Evidence, Fit, Settings, residual
from rasa_theory.methods.independent import fit_lora
from rasa_theory.methods.joint import fit_joint, joint_floor
from rasa_theory.methods.method import Method, largest
from rasa_theory.methods.mos import Shards, fit_mos
from rasa_theory.methods.one_sided import fit_one_sided
from rasa_theory.methods.pooled import fit_rasa
from rasa_theory.methods.share_basis import fit_share_basis
from rasa_theory.methods.share_lora import fit_share_lora
from rasa_theory.methods.tied_lora import fit_tied_lora
from rasa_theory.methods.vb_lora import fit_vb_lora
from rasa_theory.methods.vera import fit_vera
from rasa_theory.problem import lora_parameters

__all__ = [
    "METHODS",
    "Bank",
    "Diagonals",
    "Evidence",
    "Fit",
    "Method",
    "Settings",
    "Shards",
    "Steps",
    "allowed",
    "alternate",
    "at_parameters",
    "best_step",
    "choose_vectors",
    "cluster_means",
    "fit_allocated",
    "fit_allocated_blocks",
    "fit_block_lora",
    "fit_joint",
    "fit_lora",
    "fit_mos",
    "fit_one_sided",
    "fit_rasa",
    "fit_share_basis",
    "fit_share_lora",
    "fit_tied_lora",
    "fit_vb_lora",
    "fit_vera",
    "joint_floor",
    "largest",
    "lora_parameters",
    "pareto",
    "residual",
]
