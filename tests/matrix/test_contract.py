"""One battery over prepare x method x rounding x finish: what every combination of settings keeps."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.helpers import Dither, assert_close, assert_codes_equal, assert_on_grid, problem

N, OUT, DEAD = 40, 6, (3, 17)

SCALES = {
    "groups": jpfq.scale.AbsMax(1.1, per=jpfq.scale.PerGroup(8)),
    "channel": jpfq.scale.AbsMax(1.1),
    "tensor": jpfq.scale.AbsMax(1.1, per=jpfq.scale.PerTensor()),
    "search": jpfq.scale.MinError(candidates=3),
    "refit": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(8, refit=True)),
    "mse": jpfq.scale.MinMSE(candidates=5, per=jpfq.scale.PerGroup(8), weighted=True),
}
# Every part at least twice, each next to others every time; "rows" asks for the calibration rows, "X = Xq" has no drift.
COMBINATIONS = {
    "data form": ("groups", (), jpfq.GPFQ(), jpfq.rounding.Nearest(), None, "rows"),
    "data form, drawn": ("channel", (), jpfq.UNI(2.0), jpfq.rounding.Stochastic(), None, "rows"),
    "MSQ": ("mse", (), jpfq.MSQ(), jpfq.rounding.Nearest(), jpfq.finish.Descend(1), "X = Xq"),
    "SPFQ": ("channel", jpfq.prepare.Align(2), jpfq.UNI(), jpfq.rounding.Stochastic(), jpfq.finish.Refit(), "natural"),
    "sparse": (
        "groups",
        jpfq.prepare.LeastSquares(),
        jpfq.GPFQ(),
        jpfq.rounding.SoftThreshold(0.1),
        jpfq.finish.Descend(1),
        "",
    ),
    "pruned": (
        "channel",
        jpfq.prepare.Align(),
        jpfq.UNI(2.0),
        jpfq.rounding.Prune(0.5, "step"),
        jpfq.finish.Refit(),
        "",
    ),
    "OPTQ": ("refit", (), jpfq.OPTQ(), jpfq.rounding.Nearest(), jpfq.finish.CosineDescend(1), "natural"),
    "QEP": ("mse", (), jpfq.QEP(), jpfq.rounding.HardThreshold(0.2, "step"), jpfq.finish.Refit(), "rotated"),
    "GPTAQ": (
        "groups",
        jpfq.prepare.MagR(iterations=5),
        jpfq.GPTAQ(),
        jpfq.rounding.Stochastic(),
        jpfq.finish.CosineDescend(1),
        "",
    ),
    "Qronos": ("search", (), jpfq.Qronos(), jpfq.rounding.Nearest(), jpfq.finish.CosineDescend(1), ""),
    "Qronos exact": (
        "tensor",
        jpfq.prepare.Align(),
        jpfq.Qronos(exact=True),
        jpfq.rounding.HardThreshold(0.1),
        jpfq.finish.Descend(1),
        "rotated",
    ),
    "all": (
        "search",
        (jpfq.prepare.MagR(iterations=5), jpfq.prepare.LeastSquares(0.5)),
        jpfq.MSQ(),
        Dither(),
        jpfq.finish.Refit(),
        "rotated",
    ),
}
GRIDS = [jpfq.Integer(3), jpfq.Integer(3, narrow=True), jpfq.Symmetric(4), jpfq.Equispaced(5), jpfq.Ternary()]
GRIDS += [jpfq.Equispaced(4), jpfq.Binary()]
FITTED = jpfq.Asymmetric(3)  # its zero point is no number of the grid, which takes a program of its own
WIDE = jpfq.Integer(9)
DEFAULT = ("GPFQ", "OPTQ", "Qronos", "pruned", "data form")  # the others run with -m slow
each_combination = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in COMBINATIONS]
)


def drawn(name, seed=60):
    """Weights, and their data in the form that the combination takes."""
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(seed, n=N, out=OUT, dead=DEAD))
    rows = jpfq.Rows(Xq) if COMBINATIONS[name][-1] == "X = Xq" else jpfq.Rows(X, Xq)
    return W, rows if COMBINATIONS[name][-1] == "rows" else rows.gram()


def settings(name):
    """What `solve` is called with."""
    scale, prepare, method, rounding, finish, how = COMBINATIONS[name]
    parts = {"scale": SCALES[scale], "prepare": prepare, "method": method, "rounding": rounding, "finish": finish}
    parts |= {"order": jpfq.order.Natural() if how == "natural" else jpfq.order.Descending(), "block": 16}
    parts |= {"rotation": jpfq.Hadamard() if how == "rotated" else None, "form": "data" if how == "rows" else "auto"}
    return parts | {"shrinkage": None, "key": jax.random.key(0) if rounding.random else None}


def solved(name, seed=60, grid=GRIDS[0], **changes):
    return jpfq.solve(*drawn(name, seed), grid=grid, **settings(name) | changes)


def grids(name):
    """Those that the combination takes, with levels for zero where it sends weights to zero; the fitted one for some."""
    *_, rounding, _, _ = COMBINATIONS[name]
    fitted = [FITTED] if name in ("OPTQ", "Qronos") else []
    return fitted + [grid for grid in GRIDS if not rounding.sparse or grid not in (jpfq.Equispaced(4), jpfq.Binary())]


def spread(x):
    """A step or zero of each weight (in, out)."""
    return np.broadcast_to(np.repeat(np.asarray(x), N // x.shape[0], 0), (N, OUT))


def assert_own(tensor, W, rounding, finish):
    """What calibration has not seen is rounded by itself: to the nearest level, or by what the rounding is for."""
    at = list(DEAD)
    w, step, zero = np.float64(W)[at], spread(tensor.step)[at].astype(np.float64), spread(tensor.zero)[at]
    lo, hi, *_ = tensor.grid.alphabet()
    codes = np.asarray(tensor.codes)[at]
    if rounding.random and not (finish is not None and finish.descends):
        reach = rounding.c if isinstance(rounding, jpfq.rounding.Prune) else 0
        assert (np.abs(codes - np.clip(w / step + zero, lo, hi)) <= 1 + reach + 1e-5).all()
        return
    if isinstance(rounding, jpfq.rounding.SoftThreshold):
        w = np.sign(w) * np.maximum(np.abs(w) - rounding.lam, 0)
    if isinstance(rounding, jpfq.rounding.HardThreshold):
        w = np.where(np.abs(w) <= rounding.lam * (step if rounding.unit == "step" else 1), 0, w)
    assert_codes_equal(codes, np.clip(np.floor(w / step + zero + 0.5), lo, hi))


@each_combination
def test_every_combination(name):
    """On all grids by one program: shapes, dtypes, codes and figures, and what becomes of dead coordinates."""
    compiled = importlib.import_module("jpfq.matrix.stages")._solve_all
    W, data = drawn(name)
    scale, _, _, rounding, finish, how = COMBINATIONS[name]
    X, Xq = (np.float64(x) for x in problem(60, n=N, out=OUT, dead=DEAD)[:2])
    X, before = Xq if how == "X = Xq" else X, None
    for grid in grids(name):
        tensor, info = jpfq.solve(W, data, grid=grid, **settings(name))
        before = compiled._cache_size() if before is None or grid is GRIDS[0] else before
        assert tensor.shape == tensor.codes.shape == (N, OUT)
        groups = N // 8 if scale in ("groups", "refit", "mse") else 1
        assert tensor.step.shape == tensor.zero.shape == (groups, 1 if scale == "tensor" else OUT)
        assert tensor.dequantize().dtype == tensor.dtype == W.dtype
        assert tensor.step.dtype == info.relative_error.dtype == jnp.float32
        if how != "rotated":
            assert_on_grid(tensor)
        finite = [x for field, x in vars(info).items() if field not in ("square_bound", "square_floor")]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((tensor.codes, tensor.step, finite)))
        assert info.failed == info.zero_steps == 0
        values = spread(tensor.step) * (np.asarray(tensor.codes) - spread(tensor.zero))
        assert_close(info.sparsity, (values == 0).mean(), scale=1)
        q = np.float64(tensor.dequantize())
        error = np.linalg.norm(X @ W - Xq @ q) / np.linalg.norm(X @ W)
        assert abs(info.relative_error - error) < 1e-4 * (1 + error)
        assert error < (4 if COMBINATIONS[name][3].random else 1.5)  # one bit, drawn, is coarse
        if how == "rotated":
            continue
        assert info.dead == len(DEAD)
        assert_own(tensor, W, rounding, finish)
    for weights in (W.astype(jnp.bfloat16), drawn(name, 61)[0]):
        tensor, _ = jpfq.solve(weights, data, grid=WIDE, **settings(name))
        assert tensor.dequantize().dtype == weights.dtype
    assert compiled._cache_size() == before


@each_combination
def test_the_bound_holds_before_hand(name):
    """On a grid that is wide enough, whatever the parts; there is none for GPTAQ and in the data form."""
    *_, method, _, _, how = COMBINATIONS[name]
    for seed in (60, 61):
        _, info = solved(name, seed, WIDE)
        if how == "rows" or isinstance(method, jpfq.GPTAQ):
            assert np.isnan(info.relative_bound)
            assert np.isnan(info.relative_floor) == (how == "rows")
        elif info.saturation == 0:
            assert info.relative_error <= info.relative_bound * (1 + 1e-5)
            assert info.relative_floor < info.relative_bound < 10


def number(x):
    return jnp.asarray(x, jnp.float32)


SWEEPS = {
    "GPTAQ": lambda alpha, share, lam, c: {
        "method": jpfq.GPTAQ(alpha, jpfq.damping.MeanDiagonal(share)),
        "rounding": jpfq.rounding.SoftThreshold(lam, "step"),
        "scale": jpfq.scale.AbsMax(c),
        "finish": jpfq.finish.Descend(1),
    },
    "pruned": lambda scaling, c, share, alpha: {
        "method": jpfq.UNI(1 + scaling),
        "rounding": jpfq.rounding.Prune(c, "step"),
        "prepare": jpfq.prepare.LeastSquares(alpha, jpfq.damping.TopEigenvalue(share)),
        "finish": jpfq.finish.Refit(),
        "key": jax.random.key(1),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_jit_of_vmap_over_numbers_and_matrices_is_the_loop(name):
    numbers = np.float32([[0.2, 0.01, 0.3, 0.9], [0.9, 0.1, 0.6, 0.7], [0.5, 0.05, 0.1, 0.4]])
    cases = [drawn(name, seed) for seed in (60, 61, 62)]

    def solve(W, data, x):
        return jpfq.solve(W, data, grid=jpfq.Integer(3), **settings(name) | SWEEPS[name](*x))

    tensors, infos = jax.jit(jax.vmap(solve))(*jax.tree.map(lambda *x: jnp.stack(x), *cases), list(numbers.T))
    compiled, before = importlib.import_module("jpfq.matrix.stages")._solve_all, None
    for i, case in enumerate(cases):
        tensor, info = solve(*case, [number(x) for x in numbers[i]])
        before = before or compiled._cache_size()
        assert_codes_equal(tensors.codes[i], tensor.codes)
        assert_close(tensors.dequantize()[i], tensor.dequantize())
        assert_close(infos.relative_error[i], info.relative_error)
    assert compiled._cache_size() == before  # numbers do not compile anew
