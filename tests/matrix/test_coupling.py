"""Coupled neurons: the substitution over neurons, what it minimises, and that it is `solve_all` where F is diagonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import recipe_of, solve_all
from jpfq.matrix.coupling import feedback, solve_coupled

PLAIN = {
    "method": jpfq.OPTQ(),
    "order": jpfq.order.Natural(),
    "scale": jpfq.scale.AbsMax(0.8),
    "finish": None,
    "shrinkage": None,
}
N, OUT = 12, 7


def problem(B=2, C=True):
    """Weights, a Gram of unequal networks and a curvature far from the identity."""
    random = np.random.default_rng(0)
    W, X = random.normal(size=(B, N, OUT)), random.normal(size=(B, 60, N))
    Xq = X + 0.2 * random.normal(size=X.shape)
    mix = random.normal(size=(B, OUT, OUT)) * np.geomspace(1, 0.03, OUT)
    F = np.einsum("boi,bpi->bop", mix, mix)
    gram = (
        jax.vmap(jpfq.Gram.from_data)(*map(jnp.asarray, (X, Xq)))
        if C
        else jax.vmap(jpfq.Gram.from_data)(jnp.asarray(X))
    )
    return jnp.asarray(W), gram, jnp.asarray(F)


def solved(W, gram, F, recipe, block=1, damping=0.01):
    return solve_coupled(W, gram, F, recipe, None, jnp.asarray(damping), block)


def effect(F, H, E):
    """tr(F E^T H E)."""
    return float(jnp.sum(F * (E.T @ H @ E)))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 9])
def test_the_effect_is_a_sum_over_blocks_of_their_own_errors(block, x64):
    """With D = E + E T^T, the errors that blocks make for their aims: tr(F E^T H E) = sum_b tr(V_bb V_bb^T D_b^T H D_b)."""
    _, gram, F = problem(1)
    H, F, E = (
        gram.H[0],
        F[0] + 0.01 * jnp.trace(F[0]) / OUT * jnp.eye(OUT),
        np.random.default_rng(1).normal(size=(N, OUT)),
    )
    T = feedback(F, jnp.asarray(0.0), block)[:OUT, :OUT]
    D = E + E @ T.T
    own = 0.0
    for first in range(0, OUT, block):
        here, later = np.s_[first : first + block], np.s_[first + block :]
        left = F[here, here] - F[here, later] @ np.linalg.solve(F[later, later], F[later, here])  # Schur: V_bb V_bb^T
        own += effect(left, H, D[:, here])
    assert own == pytest.approx(effect(F, H, E), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "settings"), [(1, PLAIN), (3, {}), (16, PLAIN)])
def test_neurons_that_are_not_coupled_get_their_own_codes(block, settings, x64):
    W, gram, _ = problem(C=False)
    F = jnp.stack([jnp.diag(jnp.arange(1.0, OUT + 1))] * 2)
    recipe = recipe_of(3, None, **settings)
    one, two = solved(W, gram, F, recipe, block), solve_all(W, gram, recipe, None)
    np.testing.assert_array_equal(one.codes, two.codes)
    for a, b in zip(one[1:4], two[1:4], strict=True):
        np.testing.assert_allclose(a, jnp.broadcast_to(b, a.shape), rtol=1e-12)
    for name in ("square_error", "energy", "saturation", "dead", "sparsity", "entropy", "failed", "zero_steps"):
        assert float(getattr(one.info, name)) == pytest.approx(float(getattr(two.info, name)), rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 3])
def test_blocks_of_neurons_one_after_the_other(block, x64):
    """The codes of a loop that aims each block at weights that make up for those before it."""
    W, gram, F = problem()
    recipe, damping = recipe_of(3, None, **PLAIN), 0.01
    made = solved(W, gram, F, recipe, block, damping)
    for b in range(2):
        H, C, w = (np.asarray(x[b]) for x in (gram.H, gram.C, W))
        goal = w + np.linalg.solve(H + 0.01 * np.mean(np.diag(H)) * np.eye(N), C @ w)
        order = np.argsort(-np.diag(F[b]), kind="stable")
        f = np.asarray(F[b])[order][:, order]
        f = f + damping * np.trace(f) / OUT * np.eye(OUT)
        E, own = np.zeros((N, OUT)), jpfq.Gram(gram.H[b], None, None, gram.sum_Xq[b], gram.sum_Xq[b], gram.count[b])
        for first in range(0, OUT, block):
            here, later = order[first : first + block], np.s_[first + block :]
            # what the later neurons, unrounded, would leave: their best given the error of those before and of this block
            left = lambda rows, columns: (
                f[rows, columns] - f[rows, later] @ np.linalg.solve(f[later, later], f[later, columns])
            )
            now, before = np.s_[first : first + block], np.s_[:first]
            T = np.linalg.solve(left(now, now), left(now, before))
            aim = goal[:, here] + E[:, order[:first]] @ T.T
            tensor, _ = jpfq.solve(jnp.asarray(aim), own, bits=3, **PLAIN)
            np.testing.assert_array_equal(made.codes[b][:, here], tensor.codes)
            E[:, here] = goal[:, here] - np.asarray(tensor.dequantize())


@pytest.mark.slow
def test_the_effect_on_the_outputs_shrinks():
    """Though the layer's own error grows."""
    W, gram, F = problem()
    recipe = recipe_of(3, None, **PLAIN)
    alone = solve_all(W, gram, recipe, None)
    coupled = [solved(W, gram, F, recipe, block) for block in (3, 1)]
    target = W + jnp.linalg.solve(gram.H, gram.C @ W)
    effects = [sum(effect(F[b], gram.H[b], target[b] - s.q[b]) for b in range(2)) for s in (alone, *coupled)]
    assert max(effects[1:]) < 0.7 * effects[0]
    assert coupled[1].info.square_error > alone.info.square_error
