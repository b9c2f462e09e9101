"""`like=`: names, config and tokenizer of the float model's folder, whose tensors are found by value."""

import itertools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpfq
from tests.export.test_awq import half, weight
from tests.export.test_compressed_tensors import weight as weight_of_words
from tests.network.saved import result

EMBED, HEADS, SIZE = 32, 4, 16


class Net(nn.Module):
    """Kernels of rank 2 and 3, with one and with two axes of inputs, a norm, an embedding, and a square kernel."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(48, EMBED, name="words")(tokens)
        x = nn.RMSNorm(name="norm")(x)
        x = nn.DenseGeneral((HEADS, SIZE), name="split")(x)
        x = nn.DenseGeneral(EMBED, axis=(-2, -1), use_bias=False, name="join")(x)
        x = nn.Dense(EMBED, name="square")(x)
        return nn.Dense(48, use_bias=False, name="top")(x)


NAMES = {  # of the folder, by path; and from our array to the folder's
    "words/embedding": ("wte.weight", lambda x: x),
    "norm/scale": ("h.ln.weight", lambda x: x),
    "split/kernel": ("h.q.weight", lambda x: x.reshape(EMBED, -1).T),
    "split/bias": ("h.q.bias", lambda x: x.reshape(-1)),
    "join/kernel": ("h.o.weight", lambda x: x.reshape(-1, EMBED).T),
    "square/kernel": ("h.sq.weight", lambda x: x.T),
    "square/bias": ("h.sq.bias", lambda x: x),
    "top/kernel": ("logits.weight", lambda x: x.T),
}
QUANTIZED = {
    "split/kernel": half((EMBED, HEADS, SIZE), (1, HEADS, SIZE), jpfq.Integer(4), seed=1),
    "join/kernel": half((HEADS, SIZE, EMBED), (HEADS // 2, 1, EMBED), jpfq.Asymmetric(4), seed=2),
    "square/kernel": half((EMBED, EMBED), (1, EMBED), jpfq.Integer(4), seed=3),
}
BATCH = jnp.zeros((2, 8), int)


def drawn(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make(folder, *, swap=(), same=()):
    """A folder of a float model and its variables. Kernels in `swap` lie (in, out), and those in `same` are alike."""
    seeds = itertools.count(100)
    params = jax.tree.map(lambda x: drawn(next(seeds), x.shape), dict(Net().init(jax.random.key(0), BATCH)["params"]))
    for path, kernel in QUANTIZED.items():
        exact = np.asarray(kernel.dequantize())
        params[path.split("/")[0]]["kernel"] = exact + 0.2 * exact.std() * drawn(9, exact.shape)
    params["norm"]["scale"] = 1 + 0.1 * params["norm"]["scale"]
    params["square"]["bias"] = np.zeros(EMBED, np.float32)
    params["words"]["embedding"] = params["words"]["embedding"].astype(jnp.bfloat16).astype(np.float32)
    for path in same:
        params[path.split("/")[0]]["kernel"] = params["square"]["kernel"]
    tensors = {}
    for path, (name, turn) in NAMES.items():
        layer, leaf = path.split("/")
        value = turn(params[layer][leaf])
        tensors[name] = np.ascontiguousarray(value.T if path in swap else value)
    tensors["wte.weight"] = tensors["wte.weight"].astype(jnp.bfloat16)
    tensors["rotary.inv_freq"] = np.arange(7, dtype=np.float32)
    folder.mkdir()
    first = {name: x for name, x in tensors.items() if name.startswith("h.")}
    files = {"a.safetensors": first, "b.safetensors": {k: x for k, x in tensors.items() if k not in first}}
    for file, own in files.items():
        save_file(own, folder / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "architectures": ["Mine"]}))
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    (folder / "merges.txt").write_text("a b")
    (folder / "README.md").write_text("of the float model")
    return {"params": params}, tensors


def quantized_of(variables, tensors=QUANTIZED):
    return result(Net(), tensors, variables=variables)


def matrix(path, kernel):
    return np.asarray(NAMES[path][1](np.asarray(kernel.dequantize())))


@pytest.mark.parametrize("kind", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("changed", [False, True], ids=["as it was", "with corrected biases"])
def test_names_and_orders_are_those_of_the_folder(kind, changed, tmp_path):
    variables, floats = make(tmp_path / "float")
    if changed:  # one bias was 0, and cannot be known by its values
        variables["params"]["square"]["bias"] = variables["params"]["square"]["bias"] + 0.25
        variables["params"]["split"]["bias"] = variables["params"]["split"]["bias"] * 1.1
    left = quantized_of(variables).export(
        kind, tmp_path / "o", like=tmp_path / "float", batch=BATCH, config={"model_type": "ours"}
    )
    assert left == {}
    arrays = load_file(tmp_path / "o" / "model.safetensors")
    for path, kernel in QUANTIZED.items():
        stem = NAMES[path][0].removesuffix(".weight")
        found = weight(arrays, stem).T if kind == "awq" else weight_of_words(arrays, stem, 4)
        np.testing.assert_array_equal(found, matrix(path, kernel), err_msg=path)
    kept = {name for name in floats if name not in {NAMES[path][0] for path in QUANTIZED}}
    assert kept == {
        name for name in arrays if "weight_" not in name and not re.search(r"\.(qweight|qzeros|scales)$", name)
    }
    for name in kept - ({"h.sq.bias", "h.q.bias"} if changed else set()):
        assert arrays[name].dtype == floats[name].dtype
        np.testing.assert_array_equal(arrays[name], floats[name], err_msg=name)
    if changed:
        np.testing.assert_array_equal(arrays["h.sq.bias"], np.full(EMBED, 0.25))
        np.testing.assert_array_equal(arrays["h.q.bias"], variables["params"]["split"]["bias"].reshape(-1))
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("ours", ["Mine"])
    settings = config["quantization_config"]
    assert sorted(settings["ignore" if kind == "compressed-tensors" else "modules_to_not_convert"]) == ["logits", "wte"]
    files = {file.name: file.read_text() for file in (tmp_path / "o").iterdir() if file.suffix in (".txt", ".md")}
    assert files == {"merges.txt": "a b"}
    assert (tmp_path / "o" / "tokenizer.json").read_text() == '{"tokens": []}'


def test_what_the_folder_holds_the_other_way_round_is_said(tmp_path):
    """As the layers of GPT-2 do, (in, out): servers do not look for quantized linear layers there."""
    variables, _ = make(tmp_path / "float", swap=["square/kernel", "join/kernel"])
    left = quantized_of(variables).export("awq", tmp_path / "o", like=tmp_path / "float", batch=BATCH)
    why = "and not as outputs times inputs"
    assert left == {
        "square/kernel": f"{tmp_path / 'float'} holds it in shape (32, 32), {why}",
        "join/kernel": f"{tmp_path / 'float'} holds it in shape (64, 32), {why}",
    }
    arrays = load_file(tmp_path / "o" / "model.safetensors")
    for path in left:
        np.testing.assert_array_equal(arrays[NAMES[path][0]], matrix(path, QUANTIZED[path]).T)


def test_heads_without_a_batch_are_written_where_they_belong(tmp_path):
    variables, _ = make(tmp_path / "float")
    left = quantized_of(variables).export("awq", tmp_path / "o", like=tmp_path / "float")
    assert left.keys() == {"split/kernel", "join/kernel"}
    assert all("only if batch=" in why for why in left.values())
    arrays = load_file(tmp_path / "o" / "model.safetensors")
    for path in left:
        np.testing.assert_array_equal(arrays[NAMES[path][0]], matrix(path, QUANTIZED[path]))


def test_several_that_may_be_meant_are_told_apart_by_names(tmp_path):
    variables, _ = make(tmp_path / "float", same=["square/kernel"])
    twin = {**QUANTIZED, "twin/kernel": QUANTIZED["square/kernel"]}
    both = {**variables["params"], "twin": {"kernel": variables["params"]["square"]["kernel"]}}
    extra = load_file(tmp_path / "float" / "b.safetensors")
    save_file(extra | {"h.twin.weight": both["twin"]["kernel"].T.copy()}, tmp_path / "float" / "b.safetensors")
    index = json.loads((tmp_path / "float" / "model.safetensors.index.json").read_text())
    index["weight_map"]["h.twin.weight"] = "b.safetensors"
    (tmp_path / "float" / "model.safetensors.index.json").write_text(json.dumps(index))
    fn = lambda params, x: x @ params["square"]["kernel"] @ params["twin"]["kernel"]
    quantized = result(fn, twin, params=both)
    options = {"like": tmp_path / "float", "config": {"a": 1}}
    with pytest.raises(ValueError, match=r"may be square/kernel or twin/kernel, which are alike\. Give names="):
        quantized.export("awq", tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()
    table = {path: name for path, (name, _) in NAMES.items()} | {"twin/kernel": "h.twin.weight"}
    left = quantized.export("awq", tmp_path / "o", names=table.get, **options)
    assert left.keys() == {"split/kernel", "join/kernel"}  # of rank 3
    arrays = load_file(tmp_path / "o" / "model.safetensors")
    for stem in ("h.sq", "h.twin"):
        np.testing.assert_array_equal(weight(arrays, stem).T, matrix("square/kernel", QUANTIZED["square/kernel"]))
    for wrong, message in (
        ({"twin/kernel": "h.none.weight"}, "gives twin/kernel the name h.none.weight, which .* has not"),
        ({"twin/kernel": "h.sq.weight"}, "gives twin/kernel the name h.sq.weight, which is taken"),
        ({"twin/kernel": "logits.weight", "top/kernel": "h.twin.weight"}, "is of shape .*, and .*, its name, of"),
        (
            {"words/embedding": "logits.weight", "top/kernel": "wte.weight"},
            "is not like .*, the name that names= gives it",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            quantized.export("awq", tmp_path / "p", names=(table | wrong).get, **options)


def test_parameters_that_became_alike_are_not_taken_for_each_other(tmp_path):
    """A norm that was folded away is 1, as another one may have been all along: which is which is not to be seen."""
    variables, _ = make(tmp_path / "float")
    ones = {"norm": {"scale": np.ones(EMBED, np.float32)}, "second": {"scale": np.ones(EMBED, np.float32)}}
    quantized = result(lambda p, x: x, {}, params={**variables["params"], **ones})
    with pytest.raises(
        ValueError, match=r"(norm|second)/scale is none of the tensors of .*float: like= is the folder that"
    ):
        quantized.export("awq", tmp_path / "o", like=tmp_path / "float")
    floats = load_file(tmp_path / "float" / "a.safetensors") | {"h.ln.weight": np.ones(EMBED, np.float32)}
    save_file(floats, tmp_path / "float" / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"has 1 tensors equal to norm/scale, second/scale: which ones changed\? Give names="
    ):
        quantized.export("awq", tmp_path / "o", like=tmp_path / "float")


def test_the_folder_of_another_model_is_refused(tmp_path):
    variables, _ = make(tmp_path / "float")
    other = {path: half(t.shape, t.step.shape, t.grid, seed=50 + i) for i, (path, t) in enumerate(QUANTIZED.items())}
    with pytest.raises(
        ValueError, match=r"kernel is none of the tensors of .*float: like= is the folder that the model was"
    ):
        quantized_of(variables, other).export("awq", tmp_path / "o", like=tmp_path / "float", batch=BATCH)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_folders_that_are_none_are_refused(tmp_path):
    variables, _ = make(tmp_path / "float")
    quantized = quantized_of(variables)
    (tmp_path / "bare").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("no json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    (tmp_path / "half" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{}")
    (tmp_path / "damaged" / "model.safetensors").write_text("none")
    quantized.export("awq", tmp_path / "small", batch=BATCH)
    for name, message in {
        "missing": r"has no config\.json: give the Hugging Face folder of the float model",
        "bare": r"has no config\.json",
        "text": "is no JSON",
        "empty": r"lacks \*\.safetensors: give the folder",
        "half": r"lacks x\.safetensors: give the folder",
        "damaged": "cannot be read",
        "small": "is quantized: give the folder of the float model",
    }.items():
        with pytest.raises(ValueError, match=message):
            quantized.export("awq", tmp_path / "o", like=tmp_path / name, batch=BATCH)
    assert not (tmp_path / "o").exists()
