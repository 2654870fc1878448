"""The number of threads that suits a decomposition on the CPU.

Two libraries compute here, each with threads of its own: torch with its BLAS and LAPACK, and the OpenBLAS that SciPy
and NumPy bring along. `torch.set_num_threads` governs the first alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from threadpoolctl import LibController, ThreadpoolController
from torch import Tensor

# Entries of a matrix up to which one thread is as fast as several, or nearly so. Threads meet at a barrier after every
# few microseconds of such work. Where another process has a core, the others wait there until the scheduler gives it
# back, which takes milliseconds. They wait by spinning, so the wait also takes the core that is waited for. Measured
# beside two busy processes on two cores: the leading eigenpairs of 384 x 384 took 5 ms on one thread of OpenBLAS and
# 770 ms on two, QR of 16 matrices of 192 x 64 took 3 ms on one thread of MKL and 380 ms on two. `OMP_WAIT_POLICY`
# cures neither, since both libraries have barriers of their own.
_SMALL = 512 * 512

# The same for the work beside the products with M in a stack of such layers. It is on thin matrices, in hundreds of
# steps. On several threads each step waits for the scheduler: a core sweep of 16 x 768^2 took 3.7 s beside others, and
# 1.3 s on one thread. For larger layers one thread would lose more on idle cores than the products with M take.
_SMALL_STACK = 1024 * 1024

# The same for decompositions by SciPy. OpenBLAS computes them with a barrier for each column, and its threads wait
# longest. The leading eigenpairs of 1536 x 1536 took 0.17 s at best on two threads, 0.31 s on one, and 1.3 s on two
# threads beside others.
_SMALL_FOR_SCIPY = 2048 * 2048


# What `one_thread` has taken from torch for the context that it is in, for `all_threads` to give back. Threads are a
# setting of the whole process, and so is this.
_taken: list[int] = []


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within this context, torch and the BLAS of SciPy and NumPy compute on one thread of the CPU."""
    several = [(library, count) for library in _other_blas() if (count := library.get_num_threads()) > 1]
    threads = torch.get_num_threads()
    if not several and threads == 1:
        yield
        return
    torch.set_num_threads(1)
    for library, _ in several:
        library.set_num_threads(1)
    _taken.append(threads)
    try:
        yield
    finally:
        _taken.pop()
        for library, count in several:
            library.set_num_threads(count)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Within this context, torch computes on the threads that it had before `one_thread`, if that is in force."""
    now = torch.get_num_threads()
    if not _taken or _taken[-1] == now:
        yield
        return
    torch.set_num_threads(_taken[-1])
    try:
        yield
    finally:
        torch.set_num_threads(now)


def suitable_threads(matrix: Tensor) -> contextlib.AbstractContextManager[None]:
    """Context for work on matrices (..., b, a): on one thread of the CPU if b a <= 512^2, else on all.

    Work on a GPU is left as it is.
    """
    if matrix.device.type != "cpu":
        return contextlib.nullcontext()
    return one_thread() if _entries(matrix) <= _SMALL else all_threads()


def suitable_threads_for_scipy(matrix: Tensor) -> contextlib.AbstractContextManager[None]:
    """Context for a decomposition of matrices (..., b, a) by SciPy: on one thread if b a <= 2048^2."""
    return one_thread() if _entries(matrix) <= _SMALL_FOR_SCIPY else contextlib.nullcontext()


def suitable_threads_for_stack(device: torch.device, shape: tuple[int, int]) -> contextlib.AbstractContextManager[None]:
    """Context for all work on layers (b, a) of a stack: on one thread of the CPU if b a <= 1024^2.

    Products with M and large decompositions within it have `suitable_threads` of their own.
    """
    is_small = device.type == "cpu" and math.prod(shape) <= _SMALL_STACK
    return one_thread() if is_small else contextlib.nullcontext()


def _entries(matrix: Tensor) -> int:
    return math.prod(matrix.shape[-2:])


@functools.cache
def _other_blas() -> list[LibController]:
    """Libraries beside torch's own. They are looked for once, after `linalg.dense` has loaded SciPy's, in 7 ms."""
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)
