"""Certificates: the exact worst case of the stored codes, found by brute force where that is possible."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import jpfq
from tests.network import zoo

RULE = {"activation_bits": 2, "accumulator": jpfq.Accumulator(8, 4)}
PARAMS = {"a": zoo.normal(0, 6, 3), "b": zoo.normal(1, 3, 4)}


def fn(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def small(**changes):
    rule = zoo.plain(**{"bits": 3} | RULE | changes)
    return jpfq.quantize(fn, [zoo.normal(2, 30, 6)], rule, params=PARAMS)


def by_brute_force(k, inputs, tile):
    """Per tile and neuron the largest and least sum on the way, over all inputs."""
    k, levels = np.asarray(k, np.int64), range(inputs[0], inputs[1] + 1)
    most, least = [], []
    for t in range(0, len(k), tile):
        part = k[t : t + tile]
        x = np.array(list(itertools.product(levels, repeat=len(part))))
        sums = np.cumsum(x[..., None] * part, 1)  # (inputs, on the way, out)
        most.append(sums.max((0, 1)))
        least.append(sums.min((0, 1)))
    return np.stack(most), np.stack(least)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [jpfq.Asymmetric(2), jpfq.Integer(2)], ids=["unsigned", "signed"])
def test_equals_brute_force(grid):
    quantized = small(activation_bits=None, activations=jpfq.Activations(grid))
    lo, hi, *_ = grid.alphabet()
    for tile in (4, 1, None):
        certificate = jpfq.certify(quantized, tile=tile)
        assert [site.path for site in certificate.sites] == ["a", "b"]
        for site in certificate.sites:
            k = quantized.tensors[site.path].codes
            most, least = by_brute_force(k, (lo, hi), tile or len(k))
            np.testing.assert_array_equal(site.most[0], np.maximum(most, 0))
            np.testing.assert_array_equal(site.least[0], np.minimum(least, 0))
            for o in range(k.shape[1]):  # the worst input attains it in every tile
                x = site.worst_input(0, o)
                assert x.min() >= lo
                assert x.max() <= hi
                sums = np.add.reduceat(x * np.asarray(k, np.int64)[:, o], np.arange(0, len(k), site.tile))
                worst = np.maximum(site.most[0, :, o], -site.least[0, :, o])
                np.testing.assert_array_equal(np.abs(sums), worst)
                expected = [next(b for b in range(1, 64) if 2 ** (b - 1) - 1 >= x) for x in worst.tolist()]
                assert site.widths[0, :, o].tolist() == expected


@pytest.mark.slow
def test_what_was_asked_for_holds_and_one_more_does_not():
    quantized = small(activation_bits=8, bits=4, accumulator=jpfq.Accumulator(11, 4))
    certificate = jpfq.certify(quantized, bits=11, tile=4)
    assert certificate.holds
    assert certificate.failing == []
    assert "no input overflows" in str(certificate)
    for site in certificate.sites:
        reach = quantized.info[site.path].reach
        assert (site.bits, site.outer_bits) == (reach.bits, reach.outer_bits)
    free = jpfq.certify(small(activation_bits=8, bits=4, accumulator=None), bits=11, tile=4)
    assert not free.holds
    path, matrix, tile, neuron = free.failing[0]
    site = next(s for s in free.sites if s.path == path)
    assert max(site.most[matrix, tile, neuron], -site.least[matrix, tile, neuron]) > 2**10 - 1
    assert "some input may overflow" in str(free)
    summary = quantized.summary()
    assert "sums of" in summary
    assert "sums of" not in small(accumulator=None).summary()


@pytest.mark.slow
def test_a_change_of_one_neuron_is_seen():
    """The check does not ask how the codes were made."""
    quantized = small(activation_bits=8, bits=4, accumulator=jpfq.Accumulator(11, 4))
    tensor = quantized.tensors["a"]
    broken = dataclasses.replace(
        tensor, codes=tensor.codes.at[4:, 1].set(7)
    )  # the second tile: 2 * 255 * 7 > 2**10 - 1
    changed = dataclasses.replace(quantized, tensors=quantized.tensors | {"a": broken})
    assert jpfq.certify(quantized, bits=11, tile=4).failing == []
    assert jpfq.certify(changed, bits=11, tile=4).failing == [("a", 0, 1, 1)]


@pytest.mark.slow
def test_kernels_of_all_shapes():
    """Convolutions with groups, experts, a stack of layers: each as the matrices that the solver saw."""
    for name in ("cnn", "scanned"):
        case = zoo.CASES[name]()
        rule = zoo.plain(bits=4, activation_bits=8, accumulator=jpfq.Accumulator(13, 16))
        quantized = jpfq.quantize(case.model, case.batches, rule, **case.given)
        certificate = jpfq.certify(quantized, bits=13, tile=16)
        assert certificate.holds
        assert {site.path for site in certificate.sites} == set(quantized.tensors)
        for path, info in quantized.info.items():
            sites = [site for site in certificate.sites if site.path == path]
            ends = np.concatenate([np.stack([s.most, -s.least], -1) for s in sites])
            np.testing.assert_array_equal(ends, info.reach.ends)


def test_kernels_without_quantized_inputs_are_named():
    rules = [zoo.plain("a", bits=3), zoo.plain(bits=3, **RULE)]
    certificate = jpfq.certify(jpfq.quantize(fn, [zoo.normal(2, 30, 6)], rules, params=PARAMS), bits=8)
    assert certificate.left == ("a",)
    assert not certificate.holds
    assert "Inputs of a are not quantized" in str(certificate)


@pytest.mark.slow
def test_refused():
    quantized = small()
    for bits in (1, 64, True, 8.0):
        with pytest.raises(ValueError, match="from 2 to 63"):
            jpfq.certify(quantized, bits=bits)
    for tile in (0, 2.0, True):
        with pytest.raises(ValueError, match="positive number"):
            jpfq.certify(quantized, tile=tile)
    with pytest.raises(ValueError, match="activation_bits=8"):
        jpfq.certify(small(activation_bits=None, accumulator=None))
    with pytest.raises(ValueError, match="does not have the shapes of a batch"):
        jpfq.certify(dataclasses.replace(quantized, _shapes=None))
    with pytest.raises(ValueError, match="zero point"):
        jpfq.certify(small(bits=None, grid=jpfq.Asymmetric(3), accumulator=None))


def test_a_rule_without_activations_is_refused():
    with pytest.raises(ValueError, match=r"Rule\('.\*'\): .*activation_bits=8"):
        jpfq.Rule(".*", bits=4, accumulator=jpfq.Accumulator(16))
    with pytest.raises(ValueError, match="mean nothing"):
        jpfq.Rule(".*", skip=True, accumulator=jpfq.Accumulator(16))
    rule = jpfq.Rule(
        ".*",
        bits=4,
        activation_bits=8,
        scale=jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(3)),
        accumulator=jpfq.Accumulator(16),
    )
    with pytest.raises(ValueError, match="of a sums"):
        jpfq.plan(fn, zoo.normal(2, 30, 6), rule, params=PARAMS)
