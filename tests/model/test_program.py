"""The traced program: the same outputs as the model, every kernel found, a reason for every other parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jpfq.model.adapters import adapt
from jpfq.model.canonical import canonical
from jpfq.model.program import trace
from jpfq.model.segments import Segment
from jpfq.model.sites import find_sites
from tests.network import zoo


def program_of(case):
    functional = adapt(case.model, case.variables, None, None)
    return functional, trace(functional.fn, functional.paths, functional.leaves, case.batches[0])


def evaluate(program, leaves, batch):
    """All equations, one after the other, as one segment."""
    env = dict(program.constants) | dict(zip(program.params, leaves)) | dict(zip(program.inputs, [batch]))
    outputs = set(program.outputs)
    out = Segment(program.equations, lambda v: v in outputs)(lambda v: env[v])
    return [out[v] for v in program.outputs]


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.CASES)
def test_outputs_equal_the_models(name):
    case = zoo.CASES[name]()
    functional, program = program_of(case)
    (out,) = evaluate(program, functional.leaves, case.batches[1])
    expected = case(case.variables or case.model, case.batches[1])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", zoo.CASES)
def test_every_parameter_is_a_site_or_has_a_reason(name):
    case = zoo.CASES[name]()
    functional, program = program_of(case)
    sites, reasons = find_sites(program)
    trainable = {path for path, ok in zip(functional.paths, functional.trainable) if ok}
    assert {site.path for site in sites} == case.kernels
    assert {path for path in reasons if path in trainable} == case.left


def test_reasons_say_what_is_in_the_way():
    reasons = find_sites(program_of(zoo.computed())[1])[1]
    assert "computed from it" in reasons["standardised"]
    assert "cond with products" in reasons["branch"]
    assert "shared: used by 2 products" in reasons["shared"]
    assert "that depends on data" in reasons["picked"]
    assert "tied" in find_sites(program_of(zoo.lm())[1])[1]["Embed_0/embedding"]
    assert "scan loop" in find_sites(program_of(zoo.recurrent())[1])[1]["SimpleCell_0/h/kernel"]


def test_sites_that_read_the_same_input_share_it():
    sites = find_sites(program_of(zoo.lm())[1])[0]
    reads = {site.path: site.reads for site in sites}
    attention = "block_0/MultiHeadDotProductAttention_0"
    assert reads[f"{attention}/query/kernel"] == reads[f"{attention}/key/kernel"] == reads[f"{attention}/value/kernel"]
    assert reads[f"{attention}/query/kernel"] != reads[f"{attention}/out/kernel"]


def test_equal_equations_are_merged_and_dead_ones_dropped():
    def fn(params, x):
        unused = x @ params[1]
        return jnp.sin(x) @ params[0] + jnp.sin(x), unused.shape[0]

    program = trace(fn, ("a", "b"), [jnp.ones((4, 4))] * 2, jnp.ones((3, 4)))
    names = [eqn.primitive.name for eqn in program.equations]
    assert names.count("sin") == 1
    assert names.count("dot_general") == 1
    assert find_sites(program)[1] == {"b": "not used by the outputs"}


def test_a_partly_used_parameter_is_left_alone():
    program = trace(lambda p, x: x @ p[0][:, :3], ("half",), [jnp.ones((4, 6))], jnp.ones((2, 4)))
    assert find_sites(program)[1] == {"half": "only 12 of its 24 entries are weights of a product"}


def test_slices_that_cover_a_parameter_are_sites():
    def fn(p, x):
        a, b = jnp.split(p[0], 2, axis=1)
        return jnp.sin(x @ a) @ b

    program = trace(fn, ("both",), [jnp.ones((4, 8))], jnp.ones((2, 4)))
    sites, reasons = find_sites(program)
    assert [site.path for site in sites] == ["both", "both"]
    assert not reasons


def test_segments_with_different_constants_do_not_collide():
    def scan_with(constant):
        table = np.arange(3, dtype=np.float32) * constant

        def fn(p, x):
            step = lambda c, t: (c + jnp.asarray(table) * t, None)
            return jax.lax.scan(step, x, jnp.arange(4.0))[0] @ p[0]

        return trace(fn, ("w",), [jnp.eye(3)], jnp.zeros(3))

    one, two = scan_with(1.0), scan_with(2.0)
    results = [evaluate(program, [jnp.eye(3)], jnp.zeros(3))[0] for program in (one, two)]
    np.testing.assert_allclose(results[0] * 2, results[1])
    assert float(results[0][1]) == 6.0


def test_canonical_forms_tell_types_apart():
    values = [1, 1.0, True, "1", np.float32(1), np.float64(1), np.ones(1), np.ones((1, 1)), (1,), [1]]
    assert len({canonical(v) for v in values}) == len(values)


@pytest.mark.parametrize("noise", [lambda key: jax.random.normal(key, (3, 4)), lambda key: jax.random.bernoulli(key)])
def test_random_numbers_are_refused(noise):
    fn = lambda p, x: (x + noise(jax.random.key(0))) @ p[0]
    with pytest.raises(ValueError, match=r"random numbers.*deterministic=True"):
        trace(fn, ("w",), [jnp.ones((4, 4))], jnp.ones((3, 4)))


def test_unused_random_numbers_are_no_matter():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x):
            jax.random.normal(jax.random.key(0), (3,))
            return nn.Dense(2)(x)

    model, x = Dropped(), jnp.ones((3, 4))
    functional = adapt(model, model.init(jax.random.key(0), x), None, None)
    assert len(find_sites(trace(functional.fn, functional.paths, functional.leaves, x))[0]) == 1
