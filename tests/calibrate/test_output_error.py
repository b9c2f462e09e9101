"""The error of a network's outputs: what is NaN or infinite is said, and hides nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.calibrate.output_error import Comparison, in_words
from jpfq.study.compare import Subject, attempt, trial_table
from jpfq.study.evaluate import evaluate
from jpfq.study.inspect import as_text, inspect
from tests.network import zoo

inf, nan = np.inf, np.nan
ROW = [1.0, 2.0, -inf, nan, 4.0]


def of(pairs):
    """What is said of output arrays (float, quantized), each in its type."""
    return Comparison.of(*([jnp.asarray(x) for x in side] for side in zip(*pairs, strict=True)))


def f32(*x):
    return np.asarray(x, np.float32)


CASES = {  # float, quantized, error, unmatched
    "equal infinities and NaN agree": (f32(*ROW), f32(1.5, 2, -inf, nan, 4), 0.5 / np.sqrt(21), 0),
    "NaN that the float network has not": (f32(*ROW), f32(1, nan, -inf, nan, 5), 1 / np.sqrt(17), 1),
    "infinity of the other sign": (f32(3, inf), f32(3, -inf), 0, 1),
    "a mask that is lost": (f32(3, -inf), f32(3.3, -1e9), 0.1, 1),
    "a number for NaN": (f32(3, nan), f32(3, 0), 0, 1),
    "NaN for infinity": (f32(3, inf), f32(3, nan), 0, 1),
    "nothing finite": (f32(nan, inf), f32(nan, inf), nan, 0),
    "squares overflow": (f32(1e25, 2e25), f32(1e25, 2.2e25), 0.2 / np.sqrt(5), 0),
    "differences overflow": (f32(3e38, 1e37), f32(-3e38, 1e37), 2 * 3 / np.sqrt(9.01), 0),
    "squares underflow": (f32(1e-25, 2e-25), f32(1e-25, 2.2e-25), 0.2 / np.sqrt(5), 0),
    "small outputs, large error": (f32(1e-20, 0), f32(1e-20, 1e10), 1e30, 0),
    "no energy": (f32(0, 0), f32(0, 1), inf, 0),
    "no energy, no error": (f32(0, 0), f32(0, 0), 0, 0),
    "empty": (f32().reshape(0, 3), f32().reshape(0, 3), nan, 0),
    "integers": (np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32), nan, 0),
    "booleans": (np.array([True]), np.array([False]), nan, 0),
    "complex": (np.array([3 + 4j], np.complex64), np.array([3 + 3j], np.complex64), 0.2, 0),
    "complex NaN": (np.array([3 + 4j], np.complex64), np.array([complex(3, nan)], np.complex64), 0, 1),
    "half": (np.array([6e4, 3], np.float16), np.array([inf, 3.3], np.float16), 0.1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_one_output(name):
    exact, made, error, unmatched = CASES[name]
    found = of([(exact, made)]).error
    np.testing.assert_allclose(found.error, [error], rtol=5e-3 if exact.dtype == np.float16 else 1e-5, atol=1e-7)
    assert found.unmatched == [unmatched]
    whole = found.overall
    assert np.isnan(whole.error_or_nan) == bool(unmatched or np.isnan(error))


def test_batches_and_outputs():
    """Batches of very different size add; of several outputs the worst counts, and those that cannot be compared do not."""
    a, b = f32(1, 2), f32(1.1, 2)
    total = (of([(a, b), (a, a)]) + of([(a * f32(1e20), b * f32(1e20)), (a, b)])).error
    np.testing.assert_allclose(total.error, [0.1 / np.sqrt(5), 0.1 / np.sqrt(10)], rtol=1e-5)
    assert of([(a, b), (np.arange(2), np.arange(2)), (a, a)]).error.overall.error_or_nan == pytest.approx(
        0.1 / np.sqrt(5), rel=1e-5
    )
    bfloat = jnp.asarray([1.0, 3e38], jnp.bfloat16)
    assert of([(bfloat, (bfloat * 2).at[0].set(1))]).error.overall == (0, 1, 2)


X = zoo.normal(0, 48, 8) * 3
PARAMS = {"kernel": zoo.normal(1, 8, 4)}


def masked(params, x):
    """Logits with a class left out, an output that is NaN where its argument is below 0, and labels."""
    logits = x @ params["kernel"]
    return jnp.where(jnp.arange(4) == 2, -jnp.inf, logits), logits.argmax(-1)


def rooted(params, x):
    return *masked(params, x), jnp.sqrt(x @ params["kernel"] + 7)


def expected(fn, quantized):
    """Of all outputs: entries that only one network has finite, how many there are, and the error of the rest."""
    unmatched, count, errors = 0, 0, []
    for a, b in zip(fn(PARAMS, X), fn(quantized.params, X), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            same, both = (a == b) | (np.isnan(a) & np.isnan(b)), np.isfinite(a) & np.isfinite(b)
            unmatched, count = unmatched + int((~same & ~both).sum()), count + a.size
            errors.append(np.linalg.norm(a[both] - b[both]) / np.linalg.norm(a[both]))
    return unmatched, count, max(errors)


def test_a_masked_class_hides_no_other():
    quantized = jpfq.quantize(masked, [X[:30], X[30:]], zoo.plain(bits=2), params=PARAMS)
    unmatched, _, error = expected(masked, quantized)
    assert unmatched == 0
    assert quantized.output_error == pytest.approx(error, rel=1e-5)
    assert 0.05 < error < 1


def test_nan_is_said_everywhere(tmp_path):
    """In the result, its summary, its page, the saved result, evaluate, the comparison and the sweep."""
    rules = zoo.plain(bits=2)
    quantized = jpfq.quantize(rooted, [X], rules, params=PARAMS)
    unmatched, count, error = expected(rooted, quantized)
    assert unmatched > 0
    assert np.isnan(quantized.output_error)
    assert quantized.outputs[1:] == (unmatched, count)
    assert quantized.outputs.error == pytest.approx(error, rel=1e-5)
    words = f"nan, as {unmatched} of {count} outputs are NaN or infinite in one of the two networks only"
    assert f"{words}; error of the others: {error:.2%}" in quantized.summary()
    quantized.report(tmp_path / "page.html")
    assert words.removeprefix("nan, ") in (tmp_path / "page.html").read_text()
    quantized.save(tmp_path / "saved")
    again = jpfq.load(tmp_path / "saved", rooted, params=PARAMS)
    assert again.outputs == quantized.outputs
    assert words in again.summary()
    assert words in as_text(inspect(tmp_path / "saved"))
    subject = Subject("model", rooted, PARAMS, [X], None)
    figures = evaluate(subject, quantized)
    assert np.isnan(figures["output_error"])
    assert figures["output_unmatched"] == figures["weights_unmatched"] == unmatched
    trial, _ = attempt(subject, jpfq.Integer(2), "MSQ", [rules] if isinstance(rules, jpfq.Rule) else rules)
    assert trial.as_record()["unmatched"] == unmatched
    assert f"{unmatched} outputs are NaN or infinite" in trial_table([trial], {"model": None})


@pytest.mark.slow
def test_a_sweep_prefers_what_is_finite():
    swept = jpfq.sweep(rooted, [X], jpfq.Space(lambda bits: zoo.plain(bits=bits), bits=[2, 12]), params=PARAMS)
    assert np.isnan(swept.records[0]["output_error"])
    assert swept.front == [1]
    assert "nan: some outputs are NaN or infinite" in str(swept)
    assert swept[0].outputs.unmatched == expected(rooted, swept[0])[0]


def test_words_of_what_is_not_known():
    labels = jpfq.quantize(lambda p, x: masked(p, x)[1], [X], zoo.plain(bits=2), params=PARAMS)
    assert np.isnan(labels.output_error)
    assert "unknown, as there is no finite floating output to compare" in labels.summary()
    assert in_words(nan, None) == "unknown since training"
    assert evaluate(Subject("model", lambda p, x: masked(p, x)[1], PARAMS, [X], None), labels)["output_error"] is None
    trained = labels.tuned(labels.tunable)
    assert "unknown since training" in trained.summary()
    assert dataclasses.replace(labels, output_error=0.5).summary() != labels.summary()


def test_no_more_programs(compilations):
    """One program tells all that is said of outputs of a shape, and none is made by looking at the result."""
    a, b = jnp.ones((5, 7)), jnp.zeros((5, 7))
    before = len(compilations)
    first = Comparison.of([a, a], [b, a]) + Comparison.of([a, b], [b, b])
    assert len(compilations) == before + 1
    assert first.error.overall.error_or_nan == 1
    assert len(compilations) == before + 1
    jax.block_until_ready(a)
