"""Scales that ask the data: weighted MinMSE gets diag(H), MinError finds the multiple of least output error."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.helpers import PLAIN, assert_close, assert_codes_equal, problem, recursed

N, OUT, SIZE = 40, 6, 8


def case(seed=85):
    X, Xq, W = problem(seed, n=N, out=OUT, drift=0.2, dead=(7,))
    return X, Xq, jnp.asarray(W), jpfq.Gram.from_data(X, Xq)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "per"),
    [(jpfq.Qronos(), jpfq.scale.PerGroup(SIZE)), (jpfq.GPFQ(), jpfq.scale.PerTensor())],
    ids=["groups", "tensor"],
)
def test_minerror_is_the_plain_search(x64, method, per):
    """Eight multiples, then eight between the neighbours of the best. A neuron's groups share a multiple; one step for the
    whole matrix takes the best for all neurons together."""
    X, Xq, W, gram = case()
    base, grid, shared = jpfq.scale.AbsMax(per=per), jpfq.Asymmetric(2), isinstance(per, jpfq.scale.PerTensor)
    p = np.asarray(jpfq.order.Descending()(gram))
    system, levels = method(W[p], gram.permute(p)), base(W, grid)
    best, chosen, codes = np.full(OUT, np.inf), np.zeros(OUT), np.zeros((N, OUT))
    first = [np.full(OUT, c) for c in np.linspace(0.3, 1, 8)]
    for turn in range(2):
        middle = chosen.copy()
        for c in first if turn == 0 else [middle + 0.1 * x for x in np.linspace(-1, 1, 10)[1:-1]]:
            step = levels.step * (c[:1] if shared else c)[None]
            path = recursed(system, dataclasses.replace(levels, step=step), p)
            error = ((X @ np.asarray(W) - Xq[:, p] @ np.asarray(path.q)) ** 2).sum(0)
            error = np.full(OUT, error.sum()) if shared else error
            better = error < best
            codes[:, better] = np.asarray(path.codes)[np.argsort(p)][:, better]
            chosen, best = np.where(better, c, chosen), np.minimum(error, best)
        assert turn == 1 or shared or len(set(chosen)) > 1
    settings = PLAIN | {"scale": jpfq.scale.MinError(base), "method": method, "order": jpfq.order.Descending()}
    tensor, info = jpfq.solve(W, gram, grid=grid, **settings)
    assert_codes_equal(tensor.codes, codes)
    assert_close(tensor.step, np.asarray(levels.step) * (chosen[:1] if shared else chosen))
    assert_codes_equal(tensor.zero, levels.zero)
    assert_close(info.square_error, best[0] if shared else best.sum())


def test_multiples_zoom_in(x64):
    scale = jpfq.scale.MinError(
        jpfq.scale.Quantile(0.9, per=jpfq.scale.PerGroup(SIZE)), least=0.5, most=2.0, candidates=4, rounds=3
    )
    assert scale.per == jpfq.scale.PerGroup(SIZE)
    found = scale.multiples(jnp.float64)
    assert found is not None
    least, rounds = found
    assert least == 0.5
    for x, expected in zip(rounds, ([0, 0.5, 1, 1.5], [-0.3, -0.1, 0.1, 0.3], [-0.12, -0.04, 0.04, 0.12]), strict=True):
        assert_close(x, expected)
    assert jpfq.scale.MinMSE().multiples(jnp.float64) is None


def test_weighted_minmse_is_given_the_energies(x64):
    """Whatever the order of the recursion, a weight keeps the energy of its own input."""
    _, Xq, W, gram = case()
    scale, grid = jpfq.scale.MinMSE(per=jpfq.scale.PerGroup(SIZE), weighted=True), jpfq.Integer(3)
    energy = jnp.broadcast_to((jnp.asarray(Xq) ** 2).sum(0)[:, None], W.shape)
    settings = PLAIN | {"scale": scale, "method": jpfq.MSQ(), "order": jpfq.order.Descending()}
    tensor, _ = jpfq.solve(W, gram, grid=grid, **settings)
    assert_close(tensor.step, scale(W, grid, energy).step)
    plain = jpfq.scale.MinMSE(per=jpfq.scale.PerGroup(SIZE))(W, grid)
    assert (np.asarray(plain.step) != np.asarray(tensor.step)).mean() > 0.1
