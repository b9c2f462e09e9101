"""What `solve` refuses, and that the message names what was given and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import recipe_of
from tests.helpers import PLAIN, problem

N, OUT = 40, 6
NAN = float("nan")


def problem32(seed, **kwargs):
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(seed, n=N, out=OUT, **kwargs))
    return W, jpfq.Rows(X, Xq)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"W": c["W"].at[1, 2].set(NAN)}, "W holds NaN or infinity"),
        (lambda c: c | {"W": c["W"].at[1, 2].set(jnp.inf)}, "W holds NaN or infinity"),
        (lambda c: c | {"W": c["W"].astype(jnp.int32)}, r"real floating matrix.*int32"),
        (lambda c: c | {"W": c["W"].astype(jnp.complex64)}, r"real floating matrix.*complex64"),
        (lambda c: c | {"W": c["W"][0]}, r"matrix \(in, out\); got shape \(6,\)"),
        (lambda c: c | {"W": c["W"][:-1]}, "W has 39 input coordinates.*the data have 40"),
        (lambda c: c | {"data": c["X"]}, r"jpfq\.Gram or jpfq\.Rows.*from_data\(X, Xq\)"),
        (lambda c: c | {"data": jpfq.Gram.from_data(c["X"].at[0, 0].set(NAN))}, "holds NaN or infinity"),
        (lambda c: c | {"data": jpfq.Rows(c["X"].at[0, 0].set(NAN))}, "holds NaN or infinity"),
        (
            lambda c: c | {"data": jpfq.Gram.from_data(c["X"].at[0, 0].set(NAN), c["X"])},
            "The Gram holds NaN or infinity",
        ),
        (lambda c: c | {"data": jax.jit(jpfq.Gram.from_data)(c["X"] * 1e25)}, "infinity"),
        (lambda c: c | {"data": jpfq.Rows(c["X"].astype(jnp.complex64))}, "real numbers; got complex64"),
        (lambda c: c | {"bits": None}, "bits=... or grid=..., one of them"),
        (lambda c: c | {"grid": jpfq.Ternary()}, "bits=... or grid=..., one of them"),
        (lambda c: c | {"bits": 17}, "from 1 to 16; got 17"),
        (lambda c: c | {"bits": None, "grid": jpfq.Ternary}, r"grid takes a Grid.*did you mean jpfq\.Ternary\(\)"),
        (lambda c: c | {"bits": None, "grid": 4}, r"grid takes a Grid, such as jpfq\.Ternary\(\); got 4"),
        (lambda c: c | {"scale": jpfq.scale.Median}, r"scale takes a Scale.*did you mean jpfq\.scale\.Median\(\)"),
        (lambda c: c | {"scale": 0.5}, r"scale takes a Scale, such as jpfq\.scale\.AbsMax\(\); got 0\.5"),
        (lambda c: c | {"method": jpfq.GPFQ}, r"method takes a Method.*did you mean jpfq\.GPFQ\(\)"),
        (lambda c: c | {"method": "GPFQ"}, r"method takes a Method, such as jpfq\.GPFQ\(\); got 'GPFQ'"),
        (
            lambda c: c | {"order": jpfq.order.Descending},
            r"order takes an Order.*did you mean jpfq\.order\.Descending\(\)",
        ),
        (
            lambda c: c | {"rounding": jpfq.rounding.Nearest},
            r"rounding takes a Rounding.*did you mean jpfq\.rounding\.Nearest\(\)",
        ),
        (lambda c: c | {"form": "data"}, r"form='data' needs the calibration rows: pass jpfq\.Rows\(X, Xq\)"),
        (lambda c: c | {"form": "data", "method": jpfq.OPTQ(), "data": jpfq.Rows(c["X"])}, "OPTQ.*no data form"),
        (lambda c: c | {"form": "rows"}, "form is 'auto', 'gram' or 'data'; got 'rows'"),
        (lambda c: c | {"block": 0}, "block is a positive number of coordinates, or None.*got 0"),
        (lambda c: c | {"block": 2.5}, "block is a positive number of coordinates, or None.*got 2.5"),
        (
            lambda c: c | {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(7))},
            r"PerGroup\(7\) does not divide its 40",
        ),
        (
            lambda c: c | {"bits": None, "grid": jpfq.Asymmetric(4), "scale": jpfq.scale.Median()},
            "Asymmetric needs two ends",
        ),
        (lambda c: c | {"bits": None, "grid": jpfq.Infinite()}, r"Infinite has no largest level.*Fixed\(step\)"),
    ],
)
def test_mistakes_are_named(change, message):
    W, rows = problem32(55)
    call = change({"W": W, "data": rows.gram(), "bits": 4, "X": rows.X})
    del call["X"]
    with pytest.raises(ValueError, match=message):
        jpfq.solve(call.pop("W"), call.pop("data"), **call)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpfq.prepare.Align(0), "order of at least 1 pass; got 0"),
        (lambda: jpfq.prepare.Align(True), "order of at least 1 pass; got True"),
        (lambda: jpfq.UNI(0.5), "scaling C of at least 1; got 0.5"),
        (lambda: jpfq.QEP(1.5), r"QEP takes alpha in \[0, 1\]; got 1.5"),
        (lambda: jpfq.GPTAQ(-0.1), r"GPTAQ takes alpha in \[0, 1\]; got -0.1"),
        (lambda: jpfq.prepare.LeastSquares(2), r"LeastSquares takes alpha in \[0, 1\]; got 2"),
        (lambda: jpfq.prepare.MagR(0), "positive alpha; got 0"),
        (lambda: jpfq.prepare.MagR(iterations=0), "at least one iteration; got 0"),
        (lambda: jpfq.damping.MeanDiagonal(-0.01), "MeanDiagonal takes a share of 0 or more; got -0.01"),
        (lambda: jpfq.damping.TopEigenvalue("1"), "TopEigenvalue takes a share of 0 or more; got '1'"),
        (lambda: jpfq.finish.Descend(0), "Descend takes at least one pass; got 0"),
        (lambda: jpfq.finish.CosineDescend(1.5), "CosineDescend takes at least one pass; got 1.5"),
        (lambda: jpfq.Hadamard("0"), "integer seed; got '0'"),
        (lambda: jpfq.rounding.SoftThreshold(-1.0), "SoftThreshold: lam must be a number, 0 or more; got -1.0"),
        (lambda: jpfq.rounding.HardThreshold(NAN), "HardThreshold: lam must be a number, 0 or more; got nan"),
        (lambda: jpfq.rounding.Prune("0.1"), "Prune: c must be a number, 0 or more; got '0.1'"),
        (lambda: jpfq.rounding.Prune(0.1, unit="bits"), "unit is 'weight', 'step' or 'radius'; got 'bits'"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


REFIT = jpfq.scale.PerGroup(8, refit=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "data", "method": jpfq.OPTQ()}, r"OPTQ\(.*has no data form; use form='gram'"),
        ({"form": "data", "finish": jpfq.finish.Descend()}, r"Descend\(.*has no data form; use form='gram'"),
        ({"form": "data", "prepare": jpfq.prepare.Align()}, r"Align\(.*has no data form; use form='gram'"),
        ({"form": "data", "scale": jpfq.scale.MinError()}, r"MinError\(.*has no data form; use form='gram'"),
        ({"form": "data", "rotation": jpfq.Hadamard()}, r"Hadamard\(.*has no data form; use form='gram'"),
        ({"form": "data", "scale": jpfq.scale.AbsMax(per=REFIT)}, r"AbsMax\(.*has no data form; use form='gram'"),
        (
            {"grid": jpfq.Binary(), "rounding": jpfq.rounding.Prune(0.1)},
            r"Prune.*no level of Binary\(\): take a grid with 0",
        ),
        ({"grid": jpfq.Equispaced(4), "rounding": jpfq.rounding.SoftThreshold(0.1)}, r"no level of Equispaced\(4\)"),
        (
            {"rounding": jpfq.rounding.Prune(0.1), "finish": jpfq.finish.Descend()},
            r"Descend.*bring back.*Prune.*finish=Refit\(\) or None",
        ),
        (
            {"rounding": jpfq.rounding.HardThreshold(0.1), "finish": jpfq.finish.CosineDescend()},
            "CosineDescend.*bring back.*HardThreshold",
        ),
        (
            {"scale": jpfq.scale.Fixed(0.1), "finish": jpfq.finish.Refit()},
            r"Refit.*changes the step.*finish=Descend\(\) or None",
        ),
        (
            {"scale": jpfq.scale.Fixed(0.1), "finish": jpfq.finish.CosineDescend()},
            "CosineDescend.*changes the step that Fixed gives",
        ),
        ({"scale": jpfq.scale.MinError(jpfq.scale.AbsMax(per=REFIT))}, "MinError.*beforehand.*chooses on the way"),
        ({"scale": jpfq.scale.AbsMax(per=REFIT), "order": jpfq.order.Descending()}, r"it needs order=Natural\(\)"),
        (
            {"prepare": (jpfq.prepare.Align(), jpfq.prepare.MalySaab())},
            "MalySaab.*works on the calibration rows: alone",
        ),
        (
            {"prepare": (jpfq.prepare.MalySaab(), jpfq.prepare.Align())},
            "MalySaab.*works on the calibration rows: alone",
        ),
        ({"prepare": jpfq.prepare.MalySaab(), "rotation": jpfq.Hadamard()}, "MalySaab.*alone, without a rotation"),
        (
            {"prepare": (jpfq.prepare.Align(), jpfq.prepare.MagR)},
            r"prepare takes a Prepare.*did you mean jpfq\.prepare\.MagR\(\)",
        ),
        ({"finish": "polish"}, r"finish takes a Finish, such as jpfq\.finish\.Refit\(\); got 'polish'"),
        ({"rotation": jpfq.order.Natural()}, r"rotation takes a Hadamard, such as jpfq\.Hadamard\(\); got Natural"),
    ],
    ids=str,
)
def test_contradictions_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(None, **{"grid": jpfq.Integer(4)} | settings)


def test_what_fits_is_not_refused():
    for settings in (
        {"grid": jpfq.Equispaced(5), "rounding": jpfq.rounding.Prune(0.1), "finish": jpfq.finish.Refit()},
        {"grid": jpfq.Asymmetric(2), "rounding": jpfq.rounding.SoftThreshold(0.1), "finish": jpfq.finish.Descend()},
        {"grid": jpfq.Infinite(), "scale": jpfq.scale.Fixed(0.1)},
        {"grid": jpfq.Ternary(), "scale": jpfq.scale.AbsMax(per=REFIT)},
        {"grid": jpfq.Binary(), "prepare": jpfq.prepare.MalySaab(), "method": jpfq.MSQ()},
        {"grid": jpfq.Ternary(), "form": "data"},
    ):
        recipe_of(None, **settings)


def test_a_setting_that_does_not_exist():
    with pytest.raises(TypeError, match="methd"):
        recipe_of(4, None, methd=jpfq.GPFQ())


def test_a_median_of_zero_under_other_weights():
    W, rows = problem32(53)
    W = W.at[: N - 5].set(0)
    settings = {"scale": jpfq.scale.Median(), "method": jpfq.GPFQ(), "finish": None}
    with pytest.raises(ValueError, match=r"Median.*step of zero under weights of the matrix.*AbsMax\(\)"):
        jpfq.solve(W, rows.gram(), bits=4, **settings)


@pytest.mark.parametrize("rounding", [jpfq.rounding.Stochastic(), jpfq.rounding.Prune(0.1)], ids=str)
def test_what_draws_needs_a_key(rounding):
    W, rows = problem32(54)
    with pytest.raises(ValueError, match="random numbers: pass key="):
        jpfq.solve(W, rows, bits=4, rounding=rounding)


def test_a_walk_without_a_kernel():
    W, rows = problem32(54)  # 64 rows, 40 inputs
    settings = {"prepare": jpfq.prepare.MalySaab(), "method": jpfq.MSQ(), "bits": 1}
    message = "the matrix has n = 40 inputs and m = 64 calibration rows.*fewer rows than inputs.*GPFQ"
    with pytest.raises(ValueError, match=message):
        jpfq.solve(W, rows, **settings)
    with pytest.raises(ValueError, match=r"MalySaab\(\) needs the calibration rows: pass jpfq\.Rows"):
        jpfq.solve(W, rows.gram(), **settings)


def test_an_odd_number_of_inputs_has_no_hadamard_matrix():
    W, rows = problem32(54)
    with pytest.raises(ValueError, match="the matrix has an odd number of inputs, 39"):
        jpfq.solve(W[:39], rows.permute(jnp.arange(39)).gram(), bits=4, rotation=jpfq.Hadamard())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": jpfq.OPTQ(jpfq.damping.MeanDiagonal(0.0))},
        {"prepare": jpfq.prepare.LeastSquares(damping=jpfq.damping.TopEigenvalue(0.0)), "method": jpfq.GPFQ()},
    ],
    ids=str,
)
def test_a_factorisation_that_fails(settings):
    """Eight rows of small integers, each input twice: pivots of exactly 0."""
    X = np.random.default_rng(0).integers(-3, 4, (8, N // 2)).repeat(2, axis=1).astype(np.float32)
    W, _ = problem32(54)
    message = (
        r"failed for the matrix, where H has the condition number (inf|\d\.\de\+\d+).*MeanDiagonal\(0\.05\).*GPFQ\(\)"
    )
    settings = PLAIN | {"scale": jpfq.scale.AbsMax()} | settings
    with pytest.raises(ValueError, match=message):
        jpfq.solve(W, jpfq.Gram.from_data(X, 2 * X), bits=4, **settings)


@pytest.mark.slow
def test_what_is_known_while_tracing_is_checked():
    """Weights that a traced function closes over have values; its arguments have none."""
    W, rows = problem32(70)
    of = lambda W: jax.jit(lambda gram: jpfq.solve(W, gram, bits=3, **PLAIN)[0].codes)
    np.testing.assert_array_equal(of(W)(rows.gram()), jpfq.solve(W, rows.gram(), bits=3, **PLAIN)[0].codes)
    with pytest.raises(ValueError, match="W holds NaN or infinity"):
        of(W.at[0, 0].set(NAN))(rows.gram())
