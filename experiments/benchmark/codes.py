"""The CP codes of others: tensorly, pyttb and pygenten, where they are installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of compiled code."""
    kept, nowhere = [os.dup(n) for n in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    for n in (1, 2):
        os.dup2(nowhere, n)
    try:
        yield
    finally:
        for n, old in zip((1, 2), kept, strict=True):
            os.dup2(old, n)
            os.close(old)
        os.close(nowhere)


def their_sweeps(M: torch.Tensor, factors: list[torch.Tensor]) -> dict[str, Callable[[int], Any]]:
    """CP by alternating least squares on the tensor M, as others compute it: name -> function of the number of sweeps.

    All start from `factors`, (n, R) per axis, and all but pygenten's return factors.
    """
    sweeps: dict[str, Callable[[int], Any]] = {}
    R = factors[0].shape[1]
    if importlib.util.find_spec("tensorly"):
        import tensorly
        from tensorly.decomposition import parafac

        tensorly.set_backend("pytorch")
        start = tensorly.cp_tensor.CPTensor((torch.ones(R, dtype=M.dtype), factors))

        def parafacs(n: int) -> list[torch.Tensor]:
            weights, (first, *others) = parafac(M, R, n_iter_max=n, init=start, tol=0, normalize_factors=False)
            return [first * weights, *others]

        sweeps["tensorly parafac"] = parafacs
    if M.dtype == torch.float64 and importlib.util.find_spec("pyttb"):
        import pyttb

        tensor = pyttb.tensor(M.numpy())
        begin = pyttb.ktensor([np.asfortranarray(F.numpy()) for F in factors])

        def cp_als(n: int) -> list[torch.Tensor]:
            found = pyttb.cp_als(tensor, R, maxiters=n, init=begin, printitn=0, stoptol=0)[0]
            first, *others = (torch.as_tensor(F) for F in found.factor_matrices)
            return [first * torch.as_tensor(found.weights), *others]

        sweeps["pyttb cp_als"] = cp_als
        if importlib.util.find_spec("pygenten"):
            with quiet():
                import pygenten

                given = pygenten.make_gt_tensor(tensor)
                guess = pygenten.Ktensor(np.ones(R), [F.numpy() for F in factors])
            method = {"mttkrp_method": pygenten.MttkrpPhan, "printitn": 0, "tol": 0}  # Phan's, for dense tensors

            def genten(n: int) -> None:
                with quiet():
                    pygenten.cp_als(given, rank=R, init=guess, maxiters=n, **method)

            sweeps["pygenten cp_als"] = genten
    return sweeps
