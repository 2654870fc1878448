"""Linear algebra on batches of layers: exact if that is cheap, otherwise with a certificate."""

from rasa_theory.linalg import batched, lanczos, orthogonal
from rasa_theory.linalg.dense import (
    LinAlgError,
    best_low_rank,
    ky_fan,
    largest_nonnegative,
    leading_eigenpairs,
    leading_part_from,
    not_above,
    pencil_eigenvectors,
    product,
    rounding,
    singular_values,
    svd,
    svd_by_qr_iteration,
    symmetric_eigenpairs,
    symmetric_eigenvalues,
    tail_energy,
    terms_reaching,
    tf32,
    widened,
)
from rasa_theory.linalg.krylov import Operator
from rasa_theory.linalg.lanczos import worth_it
from rasa_theory.linalg.majorant import Majorant, closest_majorant, depth_within, leading_guess, majorant
from rasa_theory.linalg.orthogonal import thin_qr
from rasa_theory.linalg.recording import Algebra, Checked, Recorded, Unchecked
from rasa_theory.linalg.solve import (
    increment_by_cholesky,
    solve_by_cholesky,
    solve_by_eigenvectors,
    solve_increment,
    solve_layers,
)
from rasa_theory.linalg.streams import stream
from rasa_theory.linalg.threads import one_thread, suitable_threads, suitable_threads_for_stack

__all__ = [
    "Algebra",
    "Checked",
    "LinAlgError",
    "Majorant",
    "Operator",
    "Recorded",
    "Unchecked",
    "batched",
    "best_low_rank",
    "closest_majorant",
    "depth_within",
    "increment_by_cholesky",
    "ky_fan",
    "lanczos",
    "largest_nonnegative",
    "leading_eigenpairs",
    "leading_guess",
    "leading_part_from",
    "majorant",
    "not_above",
    "one_thread",
    "orthogonal",
    "pencil_eigenvectors",
    "product",
    "rounding",
    "singular_values",
    "solve_by_cholesky",
    "solve_by_eigenvectors",
    "solve_increment",
    "solve_layers",
    "stream",
    "suitable_threads",
    "suitable_threads_for_stack",
    "svd",
    "svd_by_qr_iteration",
    "symmetric_eigenpairs",
    "symmetric_eigenvalues",
    "tail_energy",
    "terms_reaching",
    "tf32",
    "thin_qr",
    "widened",
    "worth_it",
]
