"""The number of threads: small decompositions run on one, in torch and in the BLAS of SciPy, and all come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController

from rasa_theory import linalg
from rasa_theory.linalg import threads


def blas_threads() -> set[int]:
    """Numbers of threads of all BLAS libraries beside torch's own."""
    return {one["num_threads"] for one in ThreadpoolController().info() if one["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def several() -> Iterator[None]:
    torch.set_num_threads(3)
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        assert blas_threads() == {2}
        yield
    torch.set_num_threads(1)


def counts() -> tuple[int, set[int]]:
    return torch.get_num_threads(), blas_threads()


def test_one_thread_holds_for_torch_and_blas_until_the_context_ends() -> None:
    with linalg.one_thread():
        assert counts() == (1, {1})
        with linalg.one_thread():
            assert counts() == (1, {1})
        assert counts() == (1, {1})
    assert counts() == (3, {2})


def test_blas_is_on_one_thread_even_where_torch_already_is() -> None:
    torch.set_num_threads(1)
    with linalg.one_thread():
        assert counts() == (1, {1})
    assert counts() == (1, {2})


def test_threads_come_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), linalg.one_thread(), threads.all_threads():
        raise ZeroDivisionError
    assert counts() == (3, {2})


def test_large_work_gets_all_threads_within_small_work() -> None:
    small, large = torch.empty(9, 512, 512), torch.empty(512, 513)
    with linalg.suitable_threads_for_stack(torch.device("cpu"), (1024, 1024)):
        assert torch.get_num_threads() == 1
        with linalg.suitable_threads(large):
            assert torch.get_num_threads() == 3
            with linalg.suitable_threads(small):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    with linalg.suitable_threads_for_stack(torch.device("cpu"), (1024, 1025)), linalg.suitable_threads(large):
        assert torch.get_num_threads() == 3


def test_a_product_with_large_layers_is_on_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    product = torch.Tensor.__matmul__

    def watched(X: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return product(X, M)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    with linalg.one_thread():
        linalg.product(torch.zeros(2, 513, 512), torch.zeros(512, 3))
        linalg.product(torch.zeros(2, 512, 512), torch.zeros(512, 3))
    assert seen == [3, 1]


def test_decompositions_by_scipy_are_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.set_num_threads` does not reach the BLAS of SciPy."""
    seen = []
    for name in ("eigh", "eig", "svd"):
        real = getattr(scipy.linalg, name)

        def watched(*arguments, real=real, **options):  # type: ignore[no-untyped-def]
            seen.append(blas_threads())
            return real(*arguments, **options)

        monkeypatch.setattr(scipy.linalg, name, watched)
    gram = torch.diag(torch.arange(9.0, dtype=torch.float64))
    linalg.leading_eigenpairs(gram, 1)
    linalg.pencil_eigenvectors(gram, torch.eye(9, dtype=torch.float64))
    linalg.svd_by_qr_iteration(gram)
    assert seen == [{1}, {1}, {1}]
