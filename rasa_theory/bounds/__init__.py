"""Bounds on e_rasa(k) from both sides that need no solver, each with its proof."""

from rasa_theory.bounds.allocation import RankTarget, allocate_pool, allocate_ranks, largest_terms
from rasa_theory.bounds.closed import Bound, allocation_bound, cappings, closed_floors, common_space_floor, floor_slack
from rasa_theory.bounds.dual import dual_value, rounding_allowance, search_dual
from rasa_theory.bounds.floor import CERTIFICATES, lower_bound
from rasa_theory.bounds.search import FloorOptions, Search, SearchProgress, capped_weights, smoothed_ky_fan
from rasa_theory.bounds.two_sided import Division, search_two_sided, two_sided_value

__all__ = [
    "CERTIFICATES",
    "Bound",
    "Division",
    "FloorOptions",
    "RankTarget",
    "Search",
    "SearchProgress",
    "allocate_pool",
    "allocate_ranks",
    "allocation_bound",
    "capped_weights",
    "cappings",
    "closed_floors",
    "common_space_floor",
    "dual_value",
    "floor_slack",
    "largest_terms",
    "lower_bound",
    "rounding_allowance",
    "search_dual",
    "search_two_sided",
    "smoothed_ky_fan",
    "two_sided_value",
]
