"""The steps that methods alternate: diagonals, the choice from a bank, and the loop."""

import numpy as np
import pytest
import torch

import rasa_theory as rt
from rasa_theory.methods import Diagonals, Shards, Steps, alternate, best_step, choose_vectors, cluster_means
from tests.helpers.problems import noise


def instance():
    """Layers (3, 5, 4), random factors of rank 2, and M_i A^T with the norms of the layers."""
    M, r = torch.as_tensor(noise(3, 5, 4)), 2
    shapes = (3, 5), (5, r), (3, r), (r, 4)
    f = Diagonals(*(torch.as_tensor(noise(1, *shape, n)[0]) for n, shape in enumerate(shapes)))
    return M, f, M @ f.A.mT, torch.linalg.matrix_norm(M)


def least_squares(design, values):
    return torch.linalg.lstsq(design, values.reshape(len(design), -1)).solution


def test_each_diagonal_is_the_least_squares_solution():
    M, f, MA, norms = instance()
    u, v = f.refit_u(MA, norms).u, f.refit_v(MA, norms).v
    for i in range(3):
        design = torch.stack([(f.v[i, :, None] * f.B[:, j, None] * f.A[j]).flatten() for j in range(2)], 1)
        torch.testing.assert_close(u[i], least_squares(design, M[i].flatten())[:, 0])
        rows = (f.B * f.u[i]) @ f.A
        torch.testing.assert_close(v[i], (M[i] * rows).sum(1) / (rows * rows).sum(1))


def test_each_common_factor_is_the_least_squares_solution():
    M, f, MA, norms = instance()
    size = norms.norm() + f.norms().norm()
    B = f.refit_B(MA, size).B
    for s in range(5):
        design = torch.cat([(f.v[i, s] * f.u[i, :, None] * f.A).mT for i in range(3)])
        torch.testing.assert_close(B[s], least_squares(design, M[:, s].flatten())[:, 0])
    W = f.scaled_B()
    A = f.refit_A((M.mT @ W).sum(0), size).A
    torch.testing.assert_close(A, least_squares(W.reshape(-1, 2), M.reshape(-1, 4)))


def test_evened_factors_have_the_same_updates_and_unit_columns():
    _, f, _, _ = instance()
    even = f.evened()
    for i in range(3):
        torch.testing.assert_close(even.update(i), f.update(i))
        torch.testing.assert_close(f.norms()[i], torch.linalg.matrix_norm(f.update(i)))
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(even.B.norm(dim=0), ones)
    torch.testing.assert_close(even.A.norm(dim=1), ones)
    torch.testing.assert_close(even.v.square().mean(1), torch.ones(3, dtype=torch.float64))


def test_a_pool_of_shards_is_the_least_squares_solution():
    """Three layers of 6 x 5; every column of B_i is two of nine shards of length 3, and one shard is used by nobody."""
    M, A, pool = (torch.as_tensor(x) for x in (noise(3, 6, 5), noise(3, 2, 5, 1), noise(1, 9, 3, 2)[0]))
    places = torch.tensor([[[0, 1], [2, 3]], [[1, 4], [5, 0]], [[6, 7], [4, 6]]])
    found = Shards(pool, places).refit(A, M @ A.mT, torch.linalg.vector_norm(M)).pool
    design = torch.zeros(90, 27, dtype=torch.float64)  # the entries of all updates, as functions of those of the pool
    for n in range(27):
        unit = torch.zeros(27, dtype=torch.float64).index_fill(0, torch.tensor([n]), 1).reshape(9, 3)
        design[:, n] = (Shards(unit, places).vectors().mT @ A).flatten()
    expected = np.linalg.lstsq(design.numpy(), M.flatten().numpy())[0].reshape(9, 3)
    np.testing.assert_allclose(found[:8], expected[:8])
    torch.testing.assert_close(found[8], pool[8])


def test_a_step_to_another_vector_is_the_best_one():
    x, y, V = (torch.as_tensor(noise(1, n, 3, n)[0]) for n in (5, 5, 7))
    none = torch.zeros(5, 0, dtype=torch.long)
    index, t = best_step(x, y, V, none)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None, None]
    for n in range(5):
        reachable = ((x[n] - (1 - grid) * y[n] - grid * V) ** 2).sum(2)
        reached = ((x[n] - (1 - t[n]) * y[n] - t[n] * V[index[n]]) ** 2).sum()
        assert reached <= reachable.min() + 1e-12
    second, _ = best_step(x, y, V, index[:, None])
    assert not (second == index).any()


def test_cluster_means_are_the_means_of_their_points():
    points = torch.as_tensor(noise(1, 6, 3, 1)[0]).repeat(8, 1) + 1e-4 * torch.as_tensor(noise(1, 48, 3, 2)[0])
    centres = cluster_means(points, points[:6])
    nearest = torch.cdist(points, centres).argmin(1)
    torch.testing.assert_close(centres, torch.stack([points[nearest == n].mean(0) for n in range(6)]))
    started_twice = cluster_means(points, points[[0, 0, 1, 2, 3, 4]])  # one centre is empty, and moves
    assert torch.cdist(points, started_twice).amin(1).max() < 1e-2


def test_each_further_vector_of_a_bank_brings_nearer_and_none_is_taken_twice():
    points, vectors = torch.as_tensor(noise(1, 40, 4, 1)[0]), torch.as_tensor(noise(1, 12, 4, 2)[0])
    distances = []
    for count in (1, 2, 3):
        bank = choose_vectors(points, vectors, count)
        assert all(len(set(row)) == count for row in bank.indices.tolist())
        distances.append(float((bank.sub_vectors() - points).square().sum()))
    assert distances[2] < distances[1] < distances[0]
    nearest = torch.cdist(points, vectors).argmin(1)
    assert torch.equal(choose_vectors(points, vectors, 1).indices[:, 0], nearest)


def greedy(x, vectors, count):
    """What `choose_vectors` does for one point, by a search over all vectors and a fine grid of t."""
    t = np.linspace(0, 1, 4001)[:, None]
    used = [int(((vectors - x) ** 2).sum(1).argmin())]
    y, weights = vectors[used[0]], [1.0]
    for _ in range(count - 1):
        losses = {n: ((x - (1 - t) * y - t * v) ** 2).sum(1) for n, v in enumerate(vectors) if n not in used}
        best = min(losses, key=lambda n: losses[n].min())
        step = float(t[losses[best].argmin(), 0])
        y, weights = (1 - step) * y + step * vectors[best], [w * (1 - step) for w in weights] + [step]
        used.append(best)
    return used, weights, y


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_vector_is_chosen_for_the_mixture_of_those_before_it(count):
    """From the third on, the mixture is no longer the nearest vector."""
    points, vectors = noise(1, 30, 4, 1)[0], noise(1, 12, 4, 2)[0]
    bank = choose_vectors(torch.as_tensor(points), torch.as_tensor(vectors), count)
    mixtures = bank.sub_vectors().numpy()
    for n, x in enumerate(points):
        used, weights, y = greedy(x, vectors, count)
        if min(weights) > 2e-3:  # smaller weights are raised, and which vector has the weight 0 is arbitrary
            assert bank.indices[n].tolist() == used
            np.testing.assert_allclose(bank.logits[n].softmax(0), weights, atol=1e-3)
            np.testing.assert_allclose(mixtures[n], y, atol=5e-3)


def test_the_loop_keeps_every_error_and_goes_on_from_the_lowest_start():
    s, starts = rt.LayerStack(noise(1, 4, 4)).unit(), [(torch.tensor(9.0),), (torch.tensor(4.0),)]
    state, history = alternate(s, Steps(lambda x: (x[0] / 2,), lambda x: float(x[0])), starts, 10)
    assert history == tuple(4.0 / 2**n for n in range(11))
    assert float(state[0]) == history[-1]
    assert alternate(s, Steps(lambda x: x, lambda x: float(x[0])), starts, 10)[1] == (4.0, 4.0)


def test_a_sweep_from_beyond_that_is_not_lower_is_done_again_from_the_state_itself():
    s, asked = rt.LayerStack(noise(1, 4, 4)).unit(), []

    def beyond(x, before, stride):
        asked.append(stride)
        return (x[0] * (100 if len(asked) == 2 else 1 - stride / 4),)

    steps = Steps(lambda x: (x[0] / 2,), lambda x: float(x[0]), beyond)
    _, history = alternate(s, steps, [(torch.tensor(8.0),)], 4)
    assert asked == [1.0, 1.3, 0.65]
    assert history == pytest.approx((8.0, 4.0, 1.5, 0.75, 0.75 / 2 * (1 - 0.65 / 4)))
