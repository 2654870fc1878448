"""Linear algebra on batches of layers."""

from rasa_theory.linalg.dense import (
    LinAlgError,
    best_low_rank,
    increment_by_cholesky,
    ky_fan,
    largest_nonnegative,
    leading_eigenpairs,
    not_above,
    pencil_eigenvectors,
    product,
    rounding,
    singular_values,
    solve_increment,
    solve_layers,
    suitable_threads,
    svd,
    symmetric_eigenpairs,
    symmetric_eigenvalues,
    tail_energy,
    tf32,
)
