"""Bounds on e_rasa(k) from both sides that need no solver, each with its proof."""

from rasa_theory.bounds.allocation import (
    RankTarget,
    allocate_pool,
    allocate_ranks,
    largest_terms,
    terms_among_largest,
    terms_within_reach,
)
from rasa_theory.bounds.bound import PROBABLE, Bound, BoundName
from rasa_theory.bounds.closed import (
    allocation_bound,
    cappings,
    clipped_floor,
    closed_floors,
    common_space_floor,
    floor_slack,
    rank_floor,
    split_floor,
    stack_floor,
)
from rasa_theory.bounds.dual import dual_value, rounding_allowance, search_dual
from rasa_theory.bounds.floor import CERTIFICATES, check_certificate, lower_bound
from rasa_theory.bounds.probable import FAILURE, common_count, estimates, probable_floor
from rasa_theory.bounds.search import Evaluation, FloorOptions, Search, SearchProgress, SearchScale
from rasa_theory.bounds.smoothing import capped_weights, smoothed_ky_fan
from rasa_theory.bounds.two_sided import Division, ProjectedProblem, search_two_sided, two_sided_value

__all__ = [
    "CERTIFICATES",
    "FAILURE",
    "PROBABLE",
    "Bound",
    "BoundName",
    "Division",
    "Evaluation",
    "FloorOptions",
    "ProjectedProblem",
    "RankTarget",
    "Search",
    "SearchProgress",
    "SearchScale",
    "allocate_pool",
    "allocate_ranks",
    "allocation_bound",
    "capped_weights",
    "cappings",
    "check_certificate",
    "clipped_floor",
    "closed_floors",
    "common_count",
    "common_space_floor",
    "dual_value",
    "estimates",
    "floor_slack",
    "largest_terms",
    "lower_bound",
    "probable_floor",
    "rank_floor",
    "rounding_allowance",
    "search_dual",
    "search_two_sided",
    "smoothed_ky_fan",
    "split_floor",
    "stack_floor",
    "terms_among_largest",
    "terms_within_reach",
    "two_sided_value",
]
