"""Save and load: everything comes back to the bit, nothing half-written loads, and no file does harm."""

import ast
import collections
import dataclasses
import json
import os
import pathlib
import pickle
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jpfq
import jpfq.storage.info as infos
import jpfq.storage.store as store
from jpfq.calibrate.activation import ActivationQuantizer
from jpfq.matrix.layout import DotLayout
from jpfq.scalar.step_types import StepStorage, step_type
from jpfq.storage.codec import FIELDS
from tests.network import zoo
from tests.network.saved import assert_same, plain, reached, result, tensor

GRIDS = [
    *(jpfq.Integer(b) for b in (2, 3, 4, 7, 8, 12, 16)),
    *(jpfq.Asymmetric(b) for b in (1, 4, 8)),
    jpfq.Offset(4),
    *(jpfq.Symmetric(4), jpfq.Equispaced(4), jpfq.Equispaced(5), jpfq.Ternary(), jpfq.Binary(), jpfq.Infinite()),
    *(jpfq.Levels([-4, -1, 0, 1.5], reach=5.5), jpfq.Levels([-1, 2])),
    *(jpfq.E2M1(), jpfq.E2M3(), jpfq.E3M2(), jpfq.E4M3(), jpfq.E5M2(), jpfq.NF4(), jpfq.PowersOfTwo(4)),
    jpfq.TwoRanges(4, fine=5, ratio=4),
    *(jpfq.Integer(4, narrow=True), jpfq.scalar.Codes(-2.0, 3.0, 0.5, 2.5), jpfq.Symmetric(2**15)),
]
Pair = collections.namedtuple("Pair", "second first")


def linear(params, x):
    """A function whose parameters are many."""
    return sum(x @ w.astype(x.dtype) for w in jax.tree.leaves(params) if getattr(w, "ndim", 0) == 2)


def rotation(shape):
    return jpfq.Hadamard(3), DotLayout(shape, (0,), (), (1,), (), False)


def bounded(quantized, reaches):
    """A result whose sums are known to go so far."""
    known = {path: dataclasses.replace(quantized.info[path], reach=reach) for path, reach in reaches.items()}
    return dataclasses.replace(quantized, info=quantized.info | known)


@pytest.fixture(scope="module")
def small():
    """Two quantized kernels, of which one has bounded sums, and a bias."""
    params = {"a": {"kernel": jnp.ones((12, 4)), "bias": jnp.arange(4.0)}, "b/c": [jnp.ones((3, 2))]}
    tensors = {
        "a/kernel": tensor((12, 4), (3, 4), jpfq.Asymmetric(4)),
        "b/c/0": tensor((3, 2), (1, 2), jpfq.Integer(4)),
    }
    return bounded(result(linear, tensors, params=params), {"b/c/0": reached(14, 2, (1, 2, 2))})


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "small"
    small.save(folder)
    return folder


@pytest.mark.parametrize("entropy_coded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_grid_comes_back_to_the_bit(tmp_path, entropy_coded):
    if entropy_coded:
        pytest.importorskip("constriction", reason="entropy coding takes constriction: pip install 'jpfq[entropy]'")
    tensors = {f"k{i}": tensor((12, 4), (1, 4), grid, seed=i) for i, grid in enumerate(GRIDS)}
    steps = tensor((12, 4), (3, 4), jpfq.Integer(4))  # of codes that are all alike
    tensors["constant"] = dataclasses.replace(steps, codes=jnp.zeros((12, 4), jnp.int8))
    tensors["half"] = tensor((12, 4), (1, 1), jpfq.Integer(3), jnp.bfloat16)
    tensors["turned"] = tensor((12, 4), (1, 4), jpfq.Integer(4), rotated=rotation((12, 4)))
    tensors["stack"] = tensor((3, 12, 4), (3, 2, 4), jpfq.Asymmetric(3))
    tensors["conv"] = tensor((3, 3, 2, 5), (1, 1, 1, 5), jpfq.Ternary())
    for name in ("bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn"):
        t = tensor((12, 4), (3, 4), jpfq.E2M1())
        step = StepStorage.over(t.step, step_type(name), 6, jnp.max)(t.step)
        tensors[name] = dataclasses.replace(t, step=step, step_dtype=step_type(name))
    for name in ("uint6_float16", "int8_float16"):
        t = tensor((64, 4), (16, 4), jpfq.Offset(4))
        levels = StepStorage(step_type(name)).levels(t.levels.with_steps(t.step, t.zero))
        tensors[name] = dataclasses.replace(t, step=levels.step, zero=levels.zero, step_dtype=step_type(name))
    params = {name: jnp.ones(t.shape, t.dtype) for name, t in tensors.items()}
    quantized = result(linear, tensors, params=params)
    quantized.save(tmp_path / "r", entropy_coded=entropy_coded)
    loaded = jpfq.load(tmp_path / "r")
    assert_same(loaded.params, quantized.params)
    assert list(loaded.tensors) == list(tensors)
    for name, t in tensors.items():
        assert_same(loaded.tensors[name], t)
        assert loaded.tensors[name].grid == t.grid
        assert loaded.tensors[name].step_dtype == t.step_dtype
    assert loaded.summary() == quantized.summary()
    assert_same(loaded.info, quantized.info)
    for name in ("skipped", "inputs", "biases", "output_error", "peak_bytes", "nbytes"):
        assert getattr(loaded, name) == getattr(quantized, name)


def test_files_know_every_field_of_every_setting():
    inside = {jpfq.scalar.Codes: {"table", "unit", "offset"}}  # of programs: results hold the grids these stand for
    for kind, checks in FIELDS.items():
        assert {field.name for field in dataclasses.fields(kind)} - inside.get(kind, set()) == checks.keys(), kind


def test_every_leaf_and_structure_comes_back(tmp_path):
    names = "bfloat16 float16 int4 uint2 float8_e4m3fn bool int8 uint32 complex64"
    params = {
        "mlp/linear": {"w": jnp.ones((12, 4)), "kinds": [jnp.asarray([1, 0, 1], name) for name in names.split()]},
        "tuple": (jnp.zeros(()), None, {}, [], np.arange(3.0, dtype=np.float32), jnp.zeros((0, 3))),
        "numbers": [1, 2.5, True, float("inf")],
        "key": jax.random.split(jax.random.key(3), 2),
        "pair": Pair(jnp.ones(2), jnp.zeros(1)),
        "a/b": jnp.ones(1),
        "a": {"b": jnp.zeros(1)},
    }
    quantized = result(linear, {"mlp/linear/w": tensor((12, 4), (1, 4), jpfq.Integer(4))}, params=params)
    quantized.save(tmp_path / "r")
    loaded = jpfq.load(tmp_path / "r").params
    assert jax.tree.structure(loaded["tuple"]) == jax.tree.structure(params["tuple"])
    assert loaded["pair"].keys() == {"first", "second"}  # a class of the user's comes back as a dict ..
    assert_same(loaded["pair"]["second"], quantized.params["pair"].second)
    rest = lambda tree: {k: v for k, v in tree.items() if k != "pair"}
    assert_same(rest(loaded), rest(quantized.params))
    structured = jpfq.load(tmp_path / "r", linear, params=params)  # .. and as itself if one says so
    assert_same(structured.params, quantized.params)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


def test_a_linen_module_comes_back_with_its_state(tmp_path):
    x, model = zoo.normal(0, 5, 12), Normed()
    variables = model.init(jax.random.key(0), x)
    quantized = result(model, {"Dense_0/kernel": tensor((12, 4), (1, 4), jpfq.Integer(4))}, variables=variables)
    quantized.save(tmp_path / "r")
    bare = jpfq.load(tmp_path / "r")
    assert_same(bare.variables, quantized.variables)
    assert_same(bare.params, quantized.params)
    with pytest.raises(ValueError, match="without its model"):
        bare.apply(x)
    loaded = jpfq.load(tmp_path / "r", model)
    assert_same(loaded.variables, quantized.variables)
    np.testing.assert_array_equal(loaded.apply(x), quantized.apply(x))
    with pytest.raises(ValueError, match="made of a Linen module; got a function"):
        jpfq.load(tmp_path / "r", linear)
    with pytest.raises(ValueError, match="changes its variables"):
        jpfq.load(tmp_path / "r", model, kwargs={"train": True}).apply(x)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(12, 4, rngs=rngs, param_dtype=jnp.bfloat16)
        self.rest = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])

    def __call__(self, x):
        x = self.first(x)
        for layer in self.rest:
            x = layer(x)
        return x


def test_an_nnx_model_comes_back_with_its_state(tmp_path):
    model, fresh = Layers(nnx.Rngs(0)), Layers(nnx.Rngs(7))
    model.eval()
    fresh.eval()
    kernel = tensor((12, 4), (1, 4), jpfq.Ternary(), jnp.bfloat16)
    quantized = result(model, {"first/kernel": kernel})
    quantized.save(tmp_path / "r")
    loaded = jpfq.load(tmp_path / "r", fresh)
    assert_same(nnx.state(loaded.model), nnx.state(quantized.model))
    assert_same(loaded.params, quantized.params)
    x = zoo.normal(0, 5, 12)
    np.testing.assert_array_equal(loaded.model(x), quantized.model(x))
    params = jpfq.load(tmp_path / "r").params  # without the model: plain dicts, with the numbers of layers as keys
    assert_same(params["first"]["kernel"], kernel.dequantize())
    assert params["rest"].keys() == {1}
    assert_same(params, quantized.params, structure=False)
    with pytest.raises(ValueError, match=r"another one. Only saved: first/bias.* Only in the model: bias, kernel"):
        jpfq.load(tmp_path / "r", nnx.Linear(12, 4, rngs=nnx.Rngs(0)))
    fresh.first.kernel = nnx.Param(jnp.ones((12, 8)))
    with pytest.raises(ValueError, match=r"first/kernel is \(\(12, 8\).* in it, and was \(\(12, 4\)"):
        jpfq.load(tmp_path / "r", fresh)


def test_quantized_inputs_come_back_and_run(tmp_path):
    params = {"a": zoo.normal(1, 12, 4), "b": zoo.normal(2, 12, 4), "c": zoo.normal(3, 12, 4)}
    fn = lambda params, x: x @ params["a"] + x @ params["b"] + x @ params["c"]
    layout = DotLayout((12, 4), (0,), (), (1,), (), False)
    levels = jpfq.scalar.ScaledGrid(*map(jnp.asarray, ([0.03], [7.0], 0.0, 255.0)))
    inputs = {
        "a": [ActivationQuantizer(jpfq.Activations(jpfq.Integer(8), jpfq.ranges.Max(), per="row"), layout, None)],
        "b": [ActivationQuantizer(jpfq.Activations(range=jpfq.ranges.Percentile(0.99)), layout, levels)],
        "c": [ActivationQuantizer(jpfq.Activations(range=jpfq.ranges.KL(7)), layout, levels)],
    }
    quantized = result(fn, {"a": tensor((12, 4), (1, 4), jpfq.Integer(4))}, params=params, inputs=inputs)
    quantized.save(tmp_path / "r")
    loaded = jpfq.load(tmp_path / "r", fn)
    assert jax.tree.structure(loaded.inputs) == jax.tree.structure(quantized.inputs)
    assert_same(loaded.inputs, quantized.inputs)
    x = zoo.normal(0, 5, 12)
    np.testing.assert_array_equal(loaded.apply(x), quantized.apply(x))
    np.testing.assert_array_equal(loaded.serve()(x), quantized.apply(x))


REACHES = {  # by name, the shape of its kernel and how far its sums go
    "tiles": ((20, 6), reached(16, 8, (1, 3, 6))),
    "whole": ((20, 6), reached(32, None, (1, 1, 6), (-128, 127))),
    "signs": ((20, 6), reached(12, 5, (1, 4, 6), (-7, 7))),
    "stack": ((3, 20, 6), reached(16, 64, (3, 1, 6))),
    "zeros": (
        (20, 6),
        jpfq.scalar.WorstCase(jpfq.scalar.SumSpec(*map(jnp.asarray, (9, 0, 255)), 4), jnp.zeros((1, 5, 6, 2), int)),
    ),
}


def test_how_far_sums_go_comes_back_to_the_bit_in_few_bits(tmp_path):
    tensors = {name: tensor(shape, (1,) * len(shape), jpfq.Integer(4)) for name, (shape, _) in REACHES.items()}
    tensors["free"] = tensor((20, 6), (1, 6), jpfq.Integer(4))
    free = result(linear, tensors, params={name: jnp.ones(t.shape) for name, t in tensors.items()})
    quantized = bounded(free, {name: reach for name, (_, reach) in reversed(REACHES.items())})
    sizes = free.save(tmp_path / "free"), quantized.save(tmp_path / "r")
    loaded = jpfq.load(tmp_path / "r")
    assert_same(loaded.info, quantized.info)
    assert loaded.summary() == quantized.summary()
    document, arrays = store.read(tmp_path / "r")
    held = {name.removesuffix(".reach"): x.nbytes for name, x in arrays.items() if name.endswith(".reach")}
    for name, (_, reach) in REACHES.items():
        unit = 1 if int(reach.sums.lo) == -128 else int(reach.sums.hi)
        most = (2 ** (int(reach.sums.bits) - 1) - 1) // unit
        assert held.pop(name) <= -(-reach.ends.size * most.bit_length() // 8)
    assert not held
    before, others = store.read(tmp_path / "free")  # without accumulators: nothing of it, in the format of before
    assert (before["format"], document["format"]) == (1, 2)
    assert document["info"].keys() - before["info"].keys() == {"reach"}
    assert not [name for name in others if name.endswith(".reach")]
    assert_same(jpfq.load(tmp_path / "free").info, free.info)
    assert sizes[0] < sizes[1]


def test_sharded_parameters_are_saved_whole_and_loaded_where_one_says(small, tmp_path):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    put = lambda shape: jax.device_put(jnp.ones(shape), split)
    params = {"a": {"kernel": put((12, 4)), "bias": jax.device_put(jnp.arange(4.0), whole)}, "b/c": [jnp.ones((3, 2))]}
    quantized = result(linear, small.tensors, params=params)
    quantized.save(tmp_path / "r")
    assert_same(jpfq.load(tmp_path / "r").params, small.params)
    as_given = jpfq.load(tmp_path / "r", linear, params=params).params
    assert as_given["a"]["kernel"].sharding == split
    for shardings in (whole, {"a": {"kernel": split, "bias": whole}, "b/c": whole}):
        placed = jpfq.load(tmp_path / "r", linear, shardings=shardings).params
        assert_same(placed, small.params)
        at = split if isinstance(shardings, dict) else whole
        assert placed["a"]["kernel"].sharding == at
        assert placed["b/c"][0].sharding == whole


def test_the_bytes_on_disk_are_those_returned(small, tmp_path):
    size = small.save(tmp_path / "r")
    assert size == sum(path.stat().st_size for path in (tmp_path / "r").iterdir())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "r").iterdir()}
    assert len(modes) == 1  # who may read the one may read the other


def test_entropy_coding_comes_near_the_entropy_and_below_the_packed_file(tmp_path):
    pytest.importorskip("constriction", reason="entropy coding takes constriction: pip install 'jpfq[entropy]'")
    shape = (256, 64)
    for grid in (jpfq.Ternary(), jpfq.Integer(2), jpfq.Integer(3), jpfq.Integer(4)):
        lo, hi, *_ = grid.alphabet()
        drawn = np.random.default_rng(0).standard_normal(shape) * (hi + 0.5) / 2.2
        codes = np.clip(np.rint(drawn), lo, hi).astype(np.int8)
        kernel = jpfq.QTensor(jnp.asarray(codes), jnp.ones((1, 64)), jnp.zeros((1, 64)), grid, np.dtype(np.float32))
        quantized = result(linear, {"w": kernel}, params={"w": jnp.zeros(shape)})
        packed = quantized.save(tmp_path / f"{grid}")
        coded = quantized.save(tmp_path / f"{grid}-coded", entropy_coded=True)
        share = np.bincount(codes.ravel() - int(lo)) / codes.size
        ideal = -(share * np.log2(share)).sum() * codes.size / 8
        words = store.read(tmp_path / f"{grid}-coded")[1]["w.codes"]
        assert ideal <= words.nbytes <= 1.01 * ideal + 4 * 17
        assert coded < packed
        assert_same(jpfq.load(tmp_path / f"{grid}-coded").params, quantized.params)


def test_nothing_is_overwritten_unasked(small, saved, tmp_path):
    with pytest.raises(ValueError, match="already holds a saved result: pass overwrite=True"):
        small.save(saved)
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="something else: save into another folder"):
            small.save(tmp_path, overwrite=overwrite)
    with pytest.raises(ValueError, match="There is no folder"):
        small.save(tmp_path / "none" / "r")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_interrupted_anywhere_the_old_result_or_the_new_one_loads_whole(small, tmp_path, monkeypatch):
    other = result(linear, {"a/kernel": tensor((12, 4), (3, 4), jpfq.Asymmetric(4), seed=5)}, params=small.params)
    steps = [(store, "to_disk"), (store, "digest"), (pathlib.Path, "replace"), (pathlib.Path, "unlink")]
    steps += [(pathlib.Path, "write_text"), (pathlib.Path, "rename")]
    left = [0]

    def counted(do):
        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return do(*args, **kwargs)

        return step

    def attempt(folder, count, **how):
        left[0] = count
        with monkeypatch.context() as patched:
            for owner, name in steps:
                patched.setattr(owner, name, counted(getattr(owner, name)))
            try:
                other.save(folder, **how)
            except KeyboardInterrupt:
                return False
            return True

    outcomes = []
    for count in range(30):
        fresh, old = tmp_path / f"fresh{count}", tmp_path / f"old{count}"
        small.save(old)
        done = attempt(fresh, count), attempt(old, count, overwrite=True)
        if fresh.exists():
            assert_same(jpfq.load(fresh).params, other.params)
        loaded = jpfq.load(old)
        new = int(loaded.tensors["a/kernel"].codes.sum()) == int(other.tensors["a/kernel"].codes.sum())
        assert_same(loaded.params, (other if new else small).params)
        outcomes.append((fresh.exists(), new, *done))
        if all(done):
            assert new
            assert len(list(old.iterdir())) == 2
            break
    assert (False, False, False, False) in outcomes
    assert outcomes[-1] == (True, True, True, True)


def test_orbax_keeps_parameters_and_packed_kernels_in_both_directions(small, tmp_path):
    packed = small.serve().params
    for name, tree in (("params", small.params), ("packed", packed)):
        with ocp.StandardCheckpointer() as keeper:
            keeper.save(tmp_path / name, tree)
            keeper.wait_until_finished()
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
            restored = keeper.restore(tmp_path / name, shapes)
        assert_same(restored, tree)
        assert_same(jpfq.dequantize(restored), small.params)


def _reseal(folder, document):
    (folder / store.MANIFEST).write_text(store.seal(document))


@pytest.fixture
def copied(saved, tmp_path):
    """A copy to damage: its folder, record, and file of arrays."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    document, _ = store.read(folder)
    return folder, document, folder / store.arrays_name(document)


def test_truncated_or_flipped_anywhere_it_does_not_load(copied):
    folder, _, arrays = copied
    rng = np.random.default_rng(0)
    for file in (folder / store.MANIFEST, arrays):
        whole = file.read_bytes()
        damaged = [whole[:n] for n in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}] + [whole + b" ", whole + whole]
        for at in rng.integers(0, len(whole), 150):
            damaged.append(whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :])
        for content in damaged:
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"cannot be loaded|no saved result"):
                jpfq.load(folder)
        file.write_bytes(whole)
    jpfq.load(folder)
    arrays.unlink()
    with pytest.raises(ValueError, match="has 0"):
        jpfq.load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "1e999",
        '{"format":1}',
        '{"format":true}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "\ud800",
        "9" * 5000,
    ]
    + [pickle.dumps(os.getcwd, 0).decode(), "__import__('os').abort()"],
)
def test_what_is_no_record_is_refused(copied, text):
    folder, *_ = copied
    (folder / store.MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        jpfq.load(folder)


def test_another_format_is_refused(copied):
    folder, document, _ = copied
    _reseal(folder, document | {"format": 3})
    with pytest.raises(ValueError, match="of format 3, and this jpfq reads 1 and 2"):
        jpfq.load(folder)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../b", "a\0b", "a\\b", "__metadata__"])
def test_names_that_leave_the_folder_are_refused(copied, small, name, tmp_path):
    folder, document, _ = copied
    document["leaves"][0]["path"] = name
    _reseal(folder, document)
    with pytest.raises(ValueError, match="under the name"):
        jpfq.load(folder)
    document["order"] = [[name, True], ["a/bias", True], ["b/c/0", True]]
    _reseal(folder, document)
    with pytest.raises(ValueError, match="under the name"):
        jpfq.load(folder)
    document["arrays"]["sha256"] = name
    _reseal(folder, document)
    with pytest.raises(ValueError, match="wrong kind of model or of arrays"):
        jpfq.load(folder)
    with pytest.raises(ValueError, match="under the name"):
        result(linear, {}, params={name: jnp.ones(2)}).save(tmp_path / "new")


@pytest.mark.parametrize(
    "shape", [[10**9, 10**9], [2**39, 2**39], [0, 10**11], [-12, -4], [12, 5], [48], [10**400, 4], [12.0, 4]]
)
def test_shapes_that_the_file_does_not_hold_are_refused_before_anything_is_made(copied, shape):
    folder, document, _ = copied
    record = next(leaf for leaf in document["leaves"] if "grid" in leaf)
    for grid in (record["grid"], {"": "Integer", "bits": 16, "narrow": False}, {"": "Infinite"}):
        record |= {"shape": shape, "grid": grid}
        _reseal(folder, document)
        tracemalloc.start()
        with pytest.raises(ValueError, match="cannot be loaded"):
            jpfq.load(folder)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


def test_a_coded_stream_cannot_declare_more_than_a_multiple_of_what_it_holds():
    pytest.importorskip("constriction", reason="entropy coding takes constriction: pip install 'jpfq[entropy]'")
    from jpfq.storage import entropy

    constant = entropy.encode(np.zeros(10**6, np.int32), 16)
    assert constant.nbytes < 1100
    np.testing.assert_array_equal(entropy.decode(constant, 16, 10**6), 0)
    rng = np.random.default_rng(0)
    for words, count in (
        (np.array([2**31, *[0] * 15, 5], np.uint32), 2**31),  # all codes are 0, which takes no bits at all
        (constant[:16], 10**6),
        (constant, 10**6 - 1),
        (np.zeros(17, np.uint32), 0),
        (np.concatenate([np.full(16, 64, np.uint32), rng.integers(0, 2**32, 200, dtype=np.uint32)]), 1024),
        (np.concatenate([np.full(16, 64, np.uint32), np.full(200, 2**32 - 1, np.uint32)]), 1024),
    ):
        with pytest.raises(ValueError, match=r"do not hold|damaged|does not hold"):
            entropy.decode(words, 16, count)


NASTY = [None, True, -1, 10**18, 1e300, "x", "nan", [], {}, [[]], {"": "Integer"}, {"": "os.system"}, {"": "array"}]


def places(tree, at=()):
    """Where every value of a record is."""
    yield at
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from places(value, (*at, key))


@pytest.mark.slow
def test_a_record_with_any_value_replaced_and_resealed_loads_as_such_or_is_refused(copied):
    """Whoever writes a right checksum may still lie in all else. Nothing but ValueError, and nothing is made in vain."""
    folder, document, _ = copied
    spots = [at for at in places(document) if at and at[0] not in ("sha256", "versions")]
    rng = np.random.default_rng(0)
    refused = 0
    tracemalloc.start()
    for _ in range(400):
        changed = json.loads(json.dumps(document))
        at = spots[rng.integers(len(spots))]
        inner = changed
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = NASTY[rng.integers(len(NASTY))]
        _reseal(folder, changed)
        try:
            jpfq.load(folder).summary()
        except ValueError:
            refused += 1
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    assert refused > 200


def test_sums_that_are_not_those_of_their_kernel_are_refused(copied, small):
    """One by one; and whatever else stands in their place makes sums that an accumulator could hold, or is refused."""
    folder, document, _ = copied
    reach, kernel = document["info"]["reach"], small.tensors["b/c/0"]
    words = np.asarray(store.read(folder)[1]["b/c/0.reach"])
    wrong = [
        ({"kernels": [2]}, "numbers of 2 kernels"),
        ({"kernels": [0]}, "a/kernel.reach is missing"),
        ({"shape": [[1, 2, 3]]}, "has no sums of shape"),
        ({"shape": [[1, 1, 2]]}, "has no sums of shape"),
        ({"tile": [1]}, "has no sums of shape"),
        ({"width": [reach["width"][0] + 1]}, "has 8 sums of .* in .* bytes of uint8"),
        ({"unit": [2**31 - 1]}, "that no accumulator holds"),
        ({"bits": [33]}, "sums of 2 to 32 bits"),
        ({"lo": [1]}, "inputs from 1 to 255"),
        ({"hi": [2**31]}, "sums of 2 to 32 bits"),
    ]
    for change, message in wrong:
        _reseal(folder, document | {"info": document["info"] | {"reach": reach | change}})
        with pytest.raises(ValueError, match=f"cannot be loaded: .*{message}"):
            jpfq.load(folder)
    pointed = dataclasses.replace(kernel, grid=jpfq.Asymmetric(4))
    noted = infos.read_noted({"reach": reach}, 2)[1]
    with pytest.raises(ValueError, match="has no sums"):
        infos.read_reach(noted, words, pointed, "b/c/0")
    refused = 0
    for at in [at for at in places(reach) if at]:
        for value in NASTY:
            changed = json.loads(json.dumps(reach))
            inner = changed
            for key in at[:-1]:
                inner = inner[key]
            inner[at[-1]] = value
            try:
                for other in infos.read_noted({"reach": changed}, 2).values():
                    made = infos.read_reach(other, words, kernel, "b/c/0")
                    assert made.ends.shape == (1, 2, 2, 2)
                    assert 0 <= int(made.ends.min()) <= int(made.ends.max()) < 2**31
            except ValueError:
                refused += 1
    assert refused > 200


def test_reading_can_run_nothing():
    """No name of what could: in the files that read, nothing unpickles, evaluates, imports by name or starts a process."""
    runs = {"eval", "exec", "compile", "pickle", "marshal", "subprocess", "import_module", "__import__"}
    for file in ("save.py", "store.py", "info.py", "leaves.py", "codec.py", "structure.py", "entropy.py"):
        tree = ast.parse((pathlib.Path(store.__file__).parent / file).read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        assert not names & runs
        assert names & {"ValueError"}


def test_what_is_not_ours_is_not_saved(small, tmp_path):
    class Mine(jpfq.Integer):
        pass

    kernel = tensor((12, 4), (1, 4), jpfq.Integer(4))
    own = result(
        linear,
        {"w": jpfq.QTensor(*jax.tree.leaves(kernel)[:3], Mine(4), kernel.dtype)},
        params={"w": jnp.ones((12, 4))},
    )
    with pytest.raises(ValueError, match="none of jpfq's own settings"):
        own.save(tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert plain(small.params["a"]["bias"]).tolist() == [0, 1, 2, 3]


def test_arrays_of_one_name_are_not_saved_as_one(tmp_path):
    kernel = tensor((12, 4), (1, 4), jpfq.Integer(4))
    quantized = result(linear, {"w": kernel}, params={"w": jnp.ones((12, 4)), "w.codes": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"Two parameters cannot both be saved: .* w\.codes"):
        quantized.save(tmp_path / "r")


def test_there_must_be_a_result(tmp_path):
    with pytest.raises(ValueError, match=r"no saved result in .*: it has no quantized.json"):
        jpfq.load(tmp_path)


def test_64_bit_numbers_need_jax_to_hold_them(tmp_path):
    with jax.enable_x64(True):
        quantized = result(linear, {}, params={"w": jnp.ones((12, 4))})
        assert quantized.params["w"].dtype == jnp.float64
        quantized.save(tmp_path / "r")
        assert_same(jpfq.load(tmp_path / "r").params, quantized.params)
    with pytest.raises(ValueError, match=r"float64: .*jax_enable_x64"):
        jpfq.load(tmp_path / "r")
