"""Work that NumPy does in place of a program, in a whole network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import host
from tests.network import zoo


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"correct_bias": True}, {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerTensor())}]
)
def test_a_network_is_quantized_alike_either_way(settings, dtype, monkeypatch):
    case = zoo.cnn()
    variables = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, case.variables)
    rules = [zoo.plain(bits=4, **settings)]
    near = jpfq.quantize(case.model, case.batches, rules, variables=variables)
    monkeypatch.setattr(host, "_is_near", lambda x: False)
    compiled = jpfq.quantize(case.model, case.batches, rules, variables=variables)
    assert near.tensors.keys() == compiled.tensors.keys()
    for path, tensor in near.tensors.items():
        np.testing.assert_array_equal(tensor.codes, compiled.tensors[path].codes)
    exact = not settings.get("correct_bias")  # means are divided by their count, for which XLA may multiply
    outcomes = ((r.tensors, r.info, r.params) for r in (near, compiled))
    for a, b in zip(*map(jax.tree.leaves, outcomes), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        a, b = np.float64(a), np.float64(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 1e-5 * np.abs(np.nan_to_num(b)).max())
