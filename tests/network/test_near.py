"""Work that NumPy does in place of a program, in a whole network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import host
from tests.network import zoo


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"correct_bias": True}, {"scale": jpfq.AbsMax(per=jpfq.PerTensor())}])
def test_a_network_is_quantized_alike_either_way(settings, dtype, monkeypatch):
    case = zoo.cnn()
    variables = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, case.variables)
    rules = [zoo.plain(bits=4, **settings)]
    near = jpfq.quantize(case.model, case.batches, rules, variables=variables)
    monkeypatch.setattr(host, "_is_near", lambda x: False)
    compiled = jpfq.quantize(case.model, case.batches, rules, variables=variables)
    leaves = lambda *trees: zip(*map(jax.tree.leaves, trees), strict=True)
    for a, b in leaves((near.tensors, near.info), (compiled.tensors, compiled.info)):
        np.testing.assert_array_equal(a, b)
        assert jnp.result_type(a) == jnp.result_type(b)
    for a, b in leaves(near.params, compiled.params):  # biases take means, which XLA may divide by a multiplication
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=1e-6 * float(jnp.abs(b).max()))
        assert a.dtype == b.dtype
