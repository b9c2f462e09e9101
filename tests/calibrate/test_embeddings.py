"""Embeddings by rows: codes of loops in NumPy, one set of them for both uses of a tied one, and layers that see them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from tests.hub import tiny
from tests.network import zoo
from tests.reference import gpfq as reference

ABSMAX = jpfq.scale.AbsMax()
GROUPS = jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4))
ROWS, WIDTH = 23, 8


def rule(pattern="E", bits=4, **settings):
    return zoo.plain(pattern, bits=bits, **{"scale": ABSMAX} | settings)


def data(tied=False, out=9):
    """A table, two layers and tokens, of which the last three rows of the table are never among."""
    generator = np.random.default_rng(0)
    params = {"E": generator.normal(size=(ROWS, WIDTH)), "W": generator.normal(size=(WIDTH, WIDTH))}
    params |= {} if tied else {"V": generator.normal(size=(WIDTH, out))}
    tokens = [jnp.asarray(generator.integers(0, ROWS - 3, (6, 5))) for _ in range(3)]
    return jax.tree.map(jnp.asarray, params), tokens


def untied(params, tokens):
    return jnp.tanh(params["E"][tokens] @ params["W"]) @ params["V"]


def tied(params, tokens):
    return jnp.tanh(params["E"][tokens] @ params["W"]) @ params["E"].T


def follow(W, X, Xq, step):
    """Codes -8 .. 7 by the reference loop, with one step per neuron, and what they stand for."""
    levels = reference.level_lists(W.shape, step[None], range(-8, 8), np.zeros((1, 1)))
    path = reference.gpfq_state(W, X, Xq, levels)
    return path.index - 8, path.q


def nearest(E, step):
    return np.clip(np.floor(E / step + 0.5), -8, 7)


@pytest.mark.parametrize("scale", [ABSMAX, pytest.param(GROUPS, marks=pytest.mark.slow)])
def test_rows_are_rounded_to_nearest_and_layers_see_them(scale, x64):
    """Also the rows that the data never read; and the codes of the next layers are those of the reference on Q[t]."""
    params, tokens = data()
    rules = [rule(scale=scale), rule("W|V")]
    quantized = jpfq.quantize(untied, tokens, rules, params=params)
    E = np.asarray(params["E"])
    size = 4 if scale is GROUPS else WIDTH
    step = np.abs(E.reshape(ROWS, -1, size)).max(2) / 7
    tensor = quantized.tensors["E"]
    assert tensor.step.shape == (ROWS, WIDTH // size)
    np.testing.assert_allclose(tensor.step, step, rtol=1e-12)
    step = np.repeat(step, size, 1)
    np.testing.assert_array_equal(tensor.codes, nearest(E, step))
    Q = np.asarray(tensor.dequantize())
    np.testing.assert_array_equal(quantized.params["E"], Q)
    error = np.linalg.norm(E - Q) / np.linalg.norm(E)
    np.testing.assert_allclose(quantized.info["E"].relative_error, error, rtol=1e-9)

    every = np.concatenate(tokens).ravel()
    X, Xq = E[every], Q[every]
    for name in "WV":
        W = np.asarray(params[name])
        codes, q = follow(W, X, Xq, np.abs(W).max(0) / 7)
        np.testing.assert_array_equal(quantized.tensors[name].codes, codes)
        X, Xq = np.tanh(X @ W), np.tanh(Xq @ q)
    exact, lossy = (np.asarray(untied(p, np.concatenate(tokens))) for p in (params, quantized.params))
    np.testing.assert_allclose(quantized.output_error, np.linalg.norm(exact - lossy) / np.linalg.norm(exact), rtol=1e-9)


def test_a_tied_table_has_one_set_of_codes_for_both_uses(x64):
    """They follow the path on the rows of the head's float inputs, and of each feature at the weight of both uses."""
    params, tokens = data(tied=True)
    quantized = jpfq.quantize(tied, tokens, [rule(), rule("W")], params=params)
    E, W = (np.asarray(params[name]) for name in "EW")
    X = np.tanh(E[np.concatenate(tokens).ravel()] @ W)
    unit = np.sum((X @ E.T) ** 2) / np.sum(E**2)
    both = np.concatenate([X, np.sqrt(unit) * np.eye(WIDTH)])
    codes, Q = follow(E.T, both, both, np.abs(E).max(1) / 7)
    np.testing.assert_array_equal(quantized.tensors["E"].codes, codes.T)
    assert (nearest(E, np.abs(E).max(1, keepdims=True) / 7) != codes.T).any()
    errors = [np.linalg.norm(X @ (E.T - Q)) / np.linalg.norm(X @ E.T), np.linalg.norm(E.T - Q) / np.linalg.norm(E)]
    mean = np.sqrt(np.mean(np.square(errors)))
    np.testing.assert_allclose(quantized.info["E"].relative_error, mean, rtol=1e-9)
    assert quantized.embeddings == {"E": 1}
    exact, lossy = (np.asarray(tied(p, np.concatenate(tokens))) for p in (params, quantized.params))
    np.testing.assert_allclose(quantized.output_error, np.linalg.norm(exact - lossy) / np.linalg.norm(exact), rtol=1e-9)


@pytest.mark.slow
def test_padding_counts_for_nothing_in_a_tied_table(x64):
    params, tokens = data(tied=True)
    rules = [rule(), rule("W")]
    whole = jpfq.quantize(tied, [x[:4] for x in tokens], rules, params=params)
    padded = [jpfq.Weighted(x, jnp.arange(6) < 4) for x in tokens]
    for path, tensor in jpfq.quantize(tied, padded, rules, params=params).tensors.items():
        np.testing.assert_array_equal(tensor.codes, whole.tensors[path].codes)


USES = {  # a network of params E (23, 8), W (8, 8) and tokens, and how many products its table is tied to
    "a row at a time": (lambda p, t: jax.vmap(jax.vmap(lambda i: p["E"][i]))(t) @ p["W"], 0),
    "in bfloat16": (lambda p, t: jnp.take(p["E"].astype(jnp.bfloat16), t, 0) @ p["W"].astype(jnp.bfloat16), 0),
    "read twice": (lambda p, t: p["E"][t] @ p["W"] + p["E"][t[::-1]], 0),
    "two products": (lambda p, t: (p["E"][t] @ p["E"].T) @ jnp.ones((23, 8)) @ p["W"] @ p["E"].T, 2),
    "columns": (lambda p, t: jnp.moveaxis(jnp.take(p["E"].T, t, 1), 0, -1) @ p["W"], 0),
}
NOT = {  # and the reason why a table cannot be quantized
    "constant indices": (lambda p, t: (p["E"][jnp.arange(5)] + t[..., None]) @ p["W"], "used by gather"),
    "added too": (lambda p, t: (p["E"][t] + p["E"].sum(0)) @ p["W"], "used by gather, reduce_sum"),
    "scaled": (lambda p, t: (p["E"] * 2)[t] @ p["W"], "used by gather"),
    "contracts the rows": (
        lambda p, t: p["E"][t] @ p["W"] @ p["E"].T @ p["E"],
        "tied: used by a product and by gather",
    ),
    "part of a row": (lambda p, t: jnp.tile(p["E"][t, :4], 2) @ p["W"], "used by gather"),
    "integers": (lambda p, t: p["E"].astype(int)[t] @ p["W"], "used by"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "a row at a time")) for n in USES])
def test_tables_are_found_however_they_are_read(name):
    fn, count = USES[name]
    params, tokens = data(tied=True)
    quantized = jpfq.quantize(fn, tokens[:1], [rule(), rule("W")], params=params)
    assert quantized.embeddings == {"E": count}
    exact, lossy = (np.asarray(fn(p, tokens[0]), np.float32) for p in (params, quantized.params))
    error = np.linalg.norm(exact - lossy) / np.linalg.norm(exact)
    assert quantized.output_error == pytest.approx(error, rel=0.02 if name == "in bfloat16" else 1e-3)
    assert 0 < error < 0.3
    np.testing.assert_allclose(quantized.apply(tokens[0]), lossy, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", NOT)
def test_other_uses_have_a_reason(name):
    fn, reason = NOT[name]
    params, tokens = data(tied=True)
    plan = jpfq.plan(fn, tokens[0], 4, params=params)
    assert plan.skipped["E"].startswith(reason)
    with pytest.raises(ValueError, match="cannot be quantized"):
        jpfq.plan(fn, tokens[0], [rule(), rule("W")], params=params)


def test_rules_leave_an_embedding_that_they_do_not_name():
    params, tokens = data(tied=True)
    skipped = lambda *rules: jpfq.plan(tied, tokens[0], list(rules), params=params).skipped
    reason = {"E": "tied: an embedding that a product uses too; add Rule('E', bits=8)"}
    assert skipped(rule(".*")) == skipped(rule("E|W")) == skipped(rule(".")) == reason
    assert skipped(rule("[A-U]"), rule("W")) == {}
    assert "skips it" in skipped(jpfq.Rule("E", skip=True), rule(".*"))["E"]
    params, tokens = data()
    assert jpfq.plan(untied, tokens[0], 4, params=params).skipped == {"E": "an embedding; add Rule('E', bits=8)"}
    with pytest.raises(ValueError, match=r"(?s)cannot be quantized.*E: an embedding; add Rule\('E', bits=8\)"):
        jpfq.plan(untied, tokens[0], [rule("W|V"), rule(".*")], params=params)


@pytest.mark.parametrize(
    "settings",
    [{"activation_bits": 8}, {"patches": jpfq.patches.All()}, {"correct_bias": True}, {"form": "data"}],
)
def test_settings_for_the_inputs_of_a_layer_are_refused(settings):
    params, tokens = data()
    with pytest.raises(
        ValueError, match=rf"matches E, an embedding, whose inputs are integers: .*{next(iter(settings))}"
    ):
        jpfq.plan(untied, tokens[0], [rule(**settings), rule("W|V")], params=params)


@pytest.mark.slow
def test_codes_of_the_rest_are_as_before_without_such_a_rule():
    """The layers behind a table that is quantized to many bits, and behind one that is left, have the same codes."""
    params, tokens = data()
    left = jpfq.quantize(untied, tokens, rule("[A-Z]"), params=params)
    fine = jpfq.quantize(untied, tokens, [rule(bits=16), rule("W|V")], params=params)
    for name in "WV":
        np.testing.assert_array_equal(left.tensors[name].codes, fine.tensors[name].codes)


@pytest.mark.slow
def test_one_token_that_is_never_read_and_one_of_zeros():
    params, tokens = data()
    params["E"] = params["E"].at[2].set(0)
    quantized = jpfq.quantize(untied, tokens, [jpfq.Rule("E", bits=4), rule("W|V")], params=params)
    rows = np.linalg.norm(np.asarray(params["E"] - quantized.params["E"]), axis=1)
    assert rows[2] == 0
    assert (rows <= 0.15 * np.linalg.norm(np.asarray(params["E"]), axis=1)).all()


@pytest.mark.slow
def test_searched_steps_are_no_worse_than_those_of_the_largest_weight():
    params, tokens = data()
    error = lambda **settings: jpfq.quantize(
        untied, tokens, [jpfq.Rule("E", bits=3, **settings), jpfq.Rule("W|V", skip=True)], params=params
    ).info["E"]
    assert float(error().relative_error) < 0.97 * float(error(plain=True, scale=ABSMAX).relative_error)


class Linen(nn.Module):
    """A tied decoder in Linen."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(29, 16, name="embed")
        return embed.attend(nn.tanh(nn.Dense(16, name="hidden")(embed(tokens))))


LINEN = [rule("embed/.*"), rule(".*")]


@pytest.fixture(scope="module")
def linen():
    tokens = [jnp.asarray(np.random.default_rng(i).integers(0, 29, (6, 7))) for i in range(3)]
    variables = Linen().init(jax.random.key(0), tokens[0])
    quantized = jpfq.quantize(Linen(), tokens[:2], LINEN, variables=variables, held_out=tokens[2:])
    return quantized, tokens, variables


def test_a_result_with_a_table_is_whole(linen, tmp_path):
    quantized, tokens, variables = linen
    outputs = Linen().apply(quantized.variables, tokens[2])
    for run in (quantized.apply, quantized.serve()):
        np.testing.assert_allclose(run(tokens[2]), outputs, atol=1e-5)
    exact = Linen().apply(variables, tokens[2])
    assert quantized.held_out_error == pytest.approx(
        float(jnp.linalg.norm(exact - outputs) / jnp.linalg.norm(exact)), rel=1e-4
    )
    told = quantized.summary()
    assert "embed/embedding (tied: also the weight of 1 product)" in told
    assert quantized.skipped == {}
    assert quantized.size == jpfq.plan(Linen(), tokens[0], LINEN, variables=variables).size
    quantized.save(tmp_path / "saved")
    again = jpfq.load(tmp_path / "saved", Linen())
    assert again.embeddings == quantized.embeddings == {"embed/embedding": 1}
    np.testing.assert_array_equal(again.params["embed"]["embedding"], quantized.params["embed"]["embedding"])
    left = quantized.export("compressed-tensors", tmp_path / "served")
    assert left == {"embed/embedding": "an embedding, which servers read as floating numbers"}
    tuned = quantized.tuned(quantized.tunable)
    np.testing.assert_array_equal(tuned.params["embed"]["embedding"], quantized.params["embed"]["embedding"])


@pytest.mark.slow
def test_a_second_run_compiles_nothing(linen, compilations):
    _, tokens, variables = linen
    for bits in (4, 3):
        rules = [dataclasses.replace(one, bits=bits) for one in LINEN]
        compilations.clear()
        jpfq.quantize(Linen(), tokens[:2], rules, variables=variables)
    assert compilations == []


def test_a_sweep_says_that_it_leaves_tables(linen):
    _, tokens, variables = linen
    space = jpfq.Space(lambda bits: [dataclasses.replace(one, bits=bits) for one in LINEN], bits=[3, 4])
    with pytest.raises(ValueError, match=r"a sweep leaves embeddings in float, and a rule names embed/embedding"):
        jpfq.sweep(Linen(), tokens[:1], space, variables=variables)


@pytest.mark.slow
def test_a_run_that_is_resumed_has_the_same_codes(linen, tmp_path):
    quantized, tokens, variables = linen
    for _ in range(2):
        again = jpfq.quantize(Linen(), tokens[:2], LINEN, variables=variables, checkpoint=tmp_path / "run")
        for path, tensor in quantized.tensors.items():
            np.testing.assert_array_equal(again.tensors[path].codes, tensor.codes)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fresh", "block", "offload", "shapes"])
def test_a_table_goes_with_every_way_to_run(linen, how):
    """The float network is the same in all of them, and with it what a tied table is chosen by."""
    quantized, tokens, variables = linen
    batches, options = tokens[:2], {}
    if how == "fresh":
        batches = lambda stop: tokens[:2]
    elif how == "shapes":
        batches = [tokens[0], tokens[1][:4], tokens[1][4:]]
    else:
        options = {"offload": True} if how == "offload" else {"reference": "block"}
    other = jpfq.quantize(Linen(), batches, LINEN, variables=variables, **options)
    np.testing.assert_array_equal(other.tensors["embed/embedding"].codes, quantized.tensors["embed/embedding"].codes)
    outputs = Linen().apply(other.variables, tokens[0])
    exact = Linen().apply(variables, tokens[0])
    assert float(jnp.linalg.norm(exact - outputs) / jnp.linalg.norm(exact)) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_a_decoder_is_quantized_whole_and_written_as_gguf(shared, tmp_path):
    gguf = pytest.importorskip("gguf", reason="takes gguf: pip install 'jpfq[hub]'")
    from tests.hub import gguf_files

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    model = tiny.decoder(dataclasses.replace(tiny.LLAMA, tie_word_embeddings=shared, **sizes))
    file, tokens = tmp_path / "float.gguf", jnp.asarray(tiny.tokens(16, 8))
    gguf_files.write(file, model)
    plain = {"plain": True, "method": jpfq.MSQ()}
    rules = [*jpfq.formats.q8_0(pattern="embed.*", **plain), *jpfq.formats.q4_0(**plain)]
    quantized = jpfq.quantize(model, [tokens], rules)
    assert quantized.skipped == {}
    assert quantized.export("gguf", tmp_path / "w4.gguf", like=file, batch=tokens) == {}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "w4.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    again = jpfq.hub.load(tmp_path / "w4.gguf").model
    found, ours = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (again, quantized.model))
    for (path, x), (_, y) in zip(found, ours, strict=True):
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))
