"""Row weights follow the data: padded batches give the codes of the same rows without padding, or are refused."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import jpfq
from tests.network import zoo

RULE = zoo.plain(grid=jpfq.Symmetric(7), scale=jpfq.scale.AbsMax(0.8))
BATCH, LENGTH, WIDTH = 3, 8, 4


def kernels(*shapes):
    return {f"k{i}": zoo.normal(i, *shape) / 2 for i, shape in enumerate(shapes)}


def codes(fn, batches, params, rule=RULE):
    found = jpfq.quantize(fn, batches, rule, params=params)
    return {path: np.asarray(tensor.codes) for path, tensor in found.tensors.items()}, found


def masked_attention(h, mask):
    scores = jnp.einsum("bqd,bkd->bqk", h, h)
    if mask is not None:
        scores = jnp.where(mask[:, None, :] > 0, scores, -1e9)
    return jax.nn.softmax(scores) @ h


def convolve(h, kernel, stride=1, padding="VALID"):
    return lax.conv_general_dilated(h, kernel, (stride,), padding, dimension_numbers=("NWC", "WIO", "NWC"))


# name -> (shape of its kernel or None, what it does to data (batch, position, width), its kernel, the mask, another input)
STEPS = {
    "dense": ((WIDTH, WIDTH), lambda h, k, mask, y: jnp.tanh(h @ k)),
    "merged axes": ((WIDTH, WIDTH), lambda h, k, mask, y: jnp.tanh(h.reshape(-1, WIDTH) @ k).reshape(h.shape)),
    "positions first": (
        (WIDTH, WIDTH),
        lambda h, k, mask, y: jnp.tanh(h.transpose(1, 0, 2) @ k).transpose(1, 0, 2),
    ),
    "patches": (
        (2 * WIDTH, WIDTH),
        lambda h, k, mask, y: jnp.tanh(h.reshape(BATCH, -1, 2 * WIDTH) @ k),
    ),
    "heads": (
        (2, WIDTH // 2, WIDTH // 2),
        lambda h, k, mask, y: (
            jnp.einsum("bphd,hde->bhpe", h.reshape(*h.shape[:2], 2, -1), k).transpose(0, 2, 1, 3).reshape(h.shape)
        ),
    ),
    "windows": ((2, WIDTH, WIDTH), lambda h, k, mask, y: jnp.tanh(convolve(h, k))),
    "strided": ((3, WIDTH, WIDTH), lambda h, k, mask, y: jnp.tanh(convolve(h, k, 2))),
    "causal": ((3, WIDTH, WIDTH), lambda h, k, mask, y: jnp.tanh(convolve(h, k, 1, [(2, 0)]))),
    "same": ((3, WIDTH, WIDTH), lambda h, k, mask, y: jnp.tanh(convolve(h, k, 1, "SAME"))),
    "attention": ((WIDTH, WIDTH), lambda h, k, mask, y: h + masked_attention(h @ k, mask)),
    "open attention": ((WIDTH, WIDTH), lambda h, k, mask, y: h + masked_attention(h @ k, None)),
    "memory": (None, lambda h, k, mask, y: h + jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", h, y)) @ y),
    "norm": (None, lambda h, k, mask, y: h / (1 + jnp.square(h).mean(-1, keepdims=True))),
    "norm of positions": (None, lambda h, k, mask, y: h / (1 + jnp.square(h).mean(1, keepdims=True))),
    "sum so far": (None, lambda h, k, mask, y: h.cumsum(1) / 4),
    "backwards": (None, lambda h, k, mask, y: h[:, ::-1]),
    "later positions": (None, lambda h, k, mask, y: h[:, 1:]),
    "pairs": (None, lambda h, k, mask, y: h + (h[:, :, None] * h[:, None]).mean(2)),
    "two halves": (None, lambda h, k, mask, y: jnp.concatenate(jnp.split(h, 2, -1)[::-1], -1)),
}
ENDS = {
    "rows": lambda h, mask: h,
    "first": lambda h, mask: h[:, 0],
    "mean": lambda h, mask: h.mean(1),
    "masked mean": lambda h, mask: jnp.einsum("bpd,bp->bd", h, mask) / mask.sum(1, keepdims=True),
}
REFUSALS = ("rows of weight 0", "rows that count", "be followed", "positive weight")
LENGTHS = {  # how many positions a step leaves of so many; None where it cannot take them
    "patches": lambda n: n // 2 if n % 2 == 0 else None,
    "windows": lambda n: n - 1 if n > 1 else None,
    "strided": lambda n: (n - 3) // 2 + 1 if n > 2 else None,
    "later positions": lambda n: n - 1 if n > 1 else None,
}


def runs(names, length):
    """Whether data of that length can take these steps."""
    for name in names:
        length = LENGTHS.get(name, lambda n: n)(length)
        if length is None:
            return False
    return True


def program(names, end):
    """A function of parameters, data, mask and another input, which takes a mask as long as nothing changes positions."""

    def fn(params, x, mask, y):
        h, own = x @ params["start"], True
        for i, name in enumerate(names):
            h = STEPS[name][1](h, params.get(f"k{i}"), mask if own else None, y)
            own = own and name not in LENGTHS and name != "backwards"
        return ENDS[end](h, mask if own else jnp.ones(h.shape[:2])) @ params["end"]

    shapes = {f"k{i}": STEPS[name][0] for i, name in enumerate(names) if STEPS[name][0]}
    shapes |= {"start": (WIDTH, WIDTH), "end": (WIDTH, WIDTH)}
    return fn, {name: zoo.normal(i, *shape) / 2 for i, (name, shape) in enumerate(shapes.items())}


def as_without_padding(names, end, length, garbage):
    """None where the padded call is refused; else whether its codes are those of the batch cut short."""
    fn, params = program(names, end)
    x, y, mask = zoo.normal(50, BATCH, LENGTH, WIDTH), zoo.normal(51, BATCH, 5, WIDTH), np.ones((BATCH, LENGTH))
    mask[:, length:] = 0
    x = jnp.where(mask[..., None] > 0, x, garbage)
    batch, weights = {"x": x, "mask": jnp.asarray(mask), "y": y}, {"x": mask, "mask": mask, "y": None}
    short = {"x": x[:, :length], "mask": jnp.ones((BATCH, length)), "y": y}
    expected, whole = codes(fn, [short], params)
    try:
        found, padded = codes(fn, [jpfq.Weighted(batch, weights)], params)
    except ValueError as error:
        if not any(words in str(error) for words in REFUSALS):
            raise
        return None
    same = all((found[path] == expected[path]).all() for path in expected)
    return same and abs(padded.output_error - whole.output_error) < 1e-6


@st.composite
def cases(draw):
    names = draw(st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=4))
    length = draw(st.integers(4, LENGTH - 1))
    hypothesis.assume(runs(names, LENGTH) and runs(names, length))
    end = draw(st.sampled_from(["rows", "rows", "first", "masked mean", "mean"]))
    return names, end, length, draw(st.sampled_from([1000.0, np.nan, np.inf]))


def holds_for_all(examples):
    """The property, and that it says something: of the programs some are refused, and some are not."""
    found = []

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(cases())
    def check(case):
        result = as_without_padding(*case)
        found.append(result)
        assert result is not False

    with jax.enable_x64(True):
        check()
    return found


@pytest.mark.slow
def test_random_programs():
    found = holds_for_all(80)
    assert len(found) >= 70
    assert {True, None} <= set(found)


@pytest.mark.parametrize("name", ["attention", "strided", "positions first", "causal", "memory", "heads", "patches"])
def test_what_can_be_followed_is_not_refused(x64, name):
    assert as_without_padding([name, "dense"], "rows", 4, np.nan)


@pytest.mark.parametrize("name", ["open attention", "same", "norm of positions", "pairs"])
def test_what_mixes_rows_is_refused(x64, name):
    assert as_without_padding([name, "dense"], "rows", 4, 1000.0) is None


@pytest.mark.slow
def test_a_stride_and_rounded_inputs():
    """The range of the inputs, the codes and the error of the outputs are those of the positions that count."""

    def fn(p, x):
        return convolve(x, p["conv"], 2) @ p["dense"]

    params = {"conv": zoo.normal(0, 2, 4, 8) / 3, "dense": zoo.normal(1, 8, 4) / 3}
    mask = np.arange(8) < 4
    x = jnp.where(mask[:, None], zoo.normal(2, 16, 8, 4), 1000.0)
    rules = [jpfq.Rule("conv", skip=True), zoo.plain("dense", bits=8, activation_bits=8)]
    padded = jpfq.quantize(fn, [jpfq.Weighted(x, np.broadcast_to(mask, (16, 8)))], rules, params=params)
    short = jpfq.quantize(fn, [x[:, :4]], rules, params=params)
    exact = fn(params, x[:, :4])
    error = lambda q: float(jnp.linalg.norm(q.apply(x[:, :4]) - exact) / jnp.linalg.norm(exact))
    assert error(padded) == pytest.approx(error(short), rel=1e-4)
    assert error(padded) < 0.01
    assert padded.output_error == pytest.approx(error(short), rel=1e-3)


@pytest.mark.slow
def test_two_inputs_have_masks_of_their_own(x64):
    """Of one length, so that sizes do not tell them apart."""

    fn = lambda p, x, y: (x @ p["x"], y @ p["y"])
    params = {"x": zoo.normal(0, WIDTH, WIDTH), "y": zoo.normal(1, WIDTH, WIDTH)}
    x, y = (zoo.normal(i, BATCH, LENGTH, WIDTH) for i in (3, 4))
    both = {"x": np.arange(LENGTH) < 3, "y": np.arange(LENGTH) < 5}
    masks = {name: np.broadcast_to(mask, (BATCH, LENGTH)) for name, mask in both.items()}
    data = {"x": jnp.where(masks["x"][..., None], x, np.nan), "y": jnp.where(masks["y"][..., None], y, 1e3)}
    found, _ = codes(fn, [jpfq.Weighted(data, masks)], params)
    expected, _ = codes(fn, [{"x": x[:, :3], "y": y[:, :5]}], params)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])
    with pytest.raises(ValueError, match="Give a tree of weights"):
        codes(fn, [jpfq.Weighted((x, y[:, :5]), masks["x"])], params)
    with pytest.raises(ValueError, match="do not have the structure of its inputs"):
        codes(fn, [jpfq.Weighted((x, y), (masks["x"],))], params)


def graph(p, nodes, edges, senders, receivers):
    messages = jnp.tanh(edges @ p["edge"] + nodes[senders] @ p["sender"])
    gathered = jnp.zeros_like(nodes).at[receivers].add(messages)
    return jnp.tanh(nodes @ p["node"] + gathered @ p["gathered"]) @ p["out"]


@pytest.mark.slow
@pytest.mark.parametrize("nodes_last", [5, 6])
def test_a_graph_with_padded_nodes_and_edges(x64, nodes_last):
    """Padding edges lead from and to a padding node, as is usual; nodes and edges may be as many."""
    params = {
        name: zoo.normal(i, WIDTH, WIDTH) / 2 for i, name in enumerate(("edge", "sender", "node", "gathered", "out"))
    }
    rng = np.random.default_rng(0)
    nodes, edges = rng.standard_normal((nodes_last, WIDTH)), rng.standard_normal((9, WIDTH))
    senders, receivers = (
        np.concatenate([np.arange(nodes_last), rng.integers(0, nodes_last, 9 - nodes_last)]) for _ in "sr"
    )
    spoil = lambda x, n: np.concatenate([x, np.full((n - len(x), x.shape[1]), np.nan)])
    pad = lambda x, n: np.concatenate([x, np.full(n - len(x), n - 1)])
    padded = {
        "nodes": spoil(nodes, 12), "edges": spoil(edges, 12),
        "senders": pad(senders, 12), "receivers": pad(receivers, 12),
    }  # fmt: skip
    of_nodes, of_edges = np.arange(12) < nodes_last, np.arange(12) < 9
    weights = {"nodes": of_nodes, "edges": of_edges, "senders": of_edges, "receivers": of_edges}
    whole = {"nodes": nodes, "edges": edges, "senders": senders, "receivers": receivers}
    found, one = codes(graph, [jpfq.Weighted(padded, weights)], params)
    expected, two = codes(graph, [whole], params)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])
    assert one.output_error == pytest.approx(two.output_error, rel=1e-9)


def language_model(masked):
    def fn(p, ids, mask):
        h = p["table"][ids] + p["position"][: ids.shape[1]]
        h = h + masked_attention(h @ p["k0"], mask if masked else None)
        return jnp.tanh(h @ p["k1"]) @ p["k2"]

    params = {name: zoo.normal(i, WIDTH, WIDTH) / 2 for i, name in enumerate(("k0", "k1", "k2"))}
    return fn, params | {"table": zoo.normal(7, 11, WIDTH), "position": zoo.normal(8, LENGTH, WIDTH)}


def test_tokens(x64):
    """Padding tokens are no data of floating numbers: their embeddings are what must not reach rows that count."""
    ids = np.random.default_rng(0).integers(1, 11, (BATCH, LENGTH))
    mask = np.broadcast_to(np.arange(LENGTH) < 5, ids.shape)
    padded = jpfq.Weighted({"ids": np.where(mask, ids, 0), "mask": mask.astype(np.int32)}, mask)
    fn, params = language_model(masked=True)
    found, _ = codes(fn, [padded], params)
    expected, _ = codes(fn, [{"ids": ids[:, :5], "mask": np.ones((BATCH, 5), np.int32)}], params)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])
    with pytest.raises(ValueError, match=r"changes rows that count at k1: .*Pass the model a mask"):
        codes(language_model(masked=False)[0], [padded], params)


def test_recurrence_over_time(x64):
    """The states of an opaque loop count as far as their steps do; padding comes last, as usual."""

    def fn(p, x):
        step = lambda h, x: (jnp.tanh(x + h @ p["carry"]),) * 2
        _, states = lax.scan(step, jnp.zeros((len(x), WIDTH)), (x @ p["k0"]).transpose(1, 0, 2))
        return states.transpose(1, 0, 2) @ p["k1"]

    params = kernels((WIDTH, WIDTH), (WIDTH, WIDTH)) | {"carry": zoo.normal(9, WIDTH, WIDTH) / 2}
    x, mask = zoo.normal(1, BATCH, LENGTH, WIDTH), np.broadcast_to(np.arange(LENGTH) < 5, (BATCH, LENGTH))
    found, _ = codes(fn, [jpfq.Weighted(jnp.where(mask[..., None], x, jnp.inf), mask)], params)
    expected, _ = codes(fn, [x[:, :5]], params)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])


@pytest.mark.slow
def test_experts_that_take_sorted_tokens(x64):
    """Tokens sorted by their expert, half to each: rows of each matrix have weights of their own."""

    def fn(p, x, choice):
        order = jnp.argsort(choice, stable=True)
        return jnp.einsum("ecd,edf->ecf", (x @ p["k0"])[order].reshape(2, -1, WIDTH), p["experts"])

    params = kernels((WIDTH, WIDTH)) | {"experts": zoo.normal(5, 2, WIDTH, WIDTH)}
    x, choice, mask = zoo.normal(1, 12, WIDTH), np.arange(12) % 2, np.arange(12) < 8
    padded = jpfq.Weighted((jnp.where(mask[:, None], x, np.nan), choice), mask)
    found, _ = codes(fn, [padded], params)
    expected, _ = codes(fn, [(x[:8], choice[:8])], params)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path])


def test_weights_that_are_lost_are_refused():
    def fn(p, x):
        h = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1])), (0, x @ p["k0"]))[1]
        return h @ p["k1"]

    params, x = kernels((WIDTH, WIDTH), (WIDTH, WIDTH)), zoo.normal(0, 8, WIDTH)
    with pytest.raises(ValueError, match=r"cannot be followed to k1, because .* through while"):
        codes(fn, [jpfq.Weighted(x, np.arange(8) < 5)], params)
    codes(fn, [jpfq.Weighted(x, np.full(8, 0.5))], params)  # all rows count alike, wherever they are


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gram", "data"])
def test_a_unit_of_weight_does_not_matter(x64, form):
    fn, params = lambda p, x: jnp.tanh(x @ p["k0"] + p["bias"]) @ p["k1"], kernels((WIDTH, WIDTH), (WIDTH, WIDTH))
    params["bias"], weights = zoo.normal(3, WIDTH), np.array([2.0, 1.0, 0.0, 0.5])
    x, rule = zoo.normal(2, 4, WIDTH), zoo.plain(bits=4, correct_bias=True, form=form)
    small, large = (codes(fn, [jpfq.Weighted(x, weights * unit)], params, rule)[1] for unit in (1e-3, 8.0))
    for path in params:
        np.testing.assert_allclose(small.params[path], large.params[path], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["budget", "coupling"])
def test_derivatives_of_padding_do_not_count(x64, how):
    fn, params = language_model(masked=True)
    ids = np.random.default_rng(0).integers(1, 11, (BATCH, LENGTH))
    mask = np.broadcast_to(np.arange(LENGTH) < 5, ids.shape)
    padded = lambda token: jpfq.Weighted({"ids": np.where(mask, ids, token), "mask": mask.astype(np.int32)}, mask)
    if how == "budget":
        settle = lambda batch: jpfq.budget(fn, [batch], 4, params=params, candidates=(2, 4, 6))
        assert settle(padded(0)) == settle(padded(7))
        return
    rule = zoo.plain(bits=3, coupling=jpfq.Coupling(block=2))
    first, second = (codes(fn, [padded(token)], params, rule)[0] for token in (0, 7))
    for path in first:
        np.testing.assert_array_equal(first[path], second[path])


@pytest.mark.slow
def test_sequences_of_several_lengths_are_several_shapes(x64):
    fn, params = program(["causal", "dense"], "rows")
    short, long = zoo.normal(1, BATCH, 5, WIDTH), zoo.normal(2, BATCH, LENGTH, WIDTH)
    mask = np.ones((2 * BATCH, LENGTH))
    mask[:BATCH, 5:] = 0
    together = jnp.concatenate([jnp.pad(short, [(0, 0), (0, 3), (0, 0)]), long])
    batch = lambda x: {"x": x, "mask": jnp.ones(x.shape[:2]), "y": jnp.zeros((1, 1, WIDTH))}
    weights = {"x": mask, "mask": mask, "y": None}
    apart, _ = codes(fn, [batch(short), batch(long)], params)
    padded, _ = codes(fn, [jpfq.Weighted(batch(together), weights)], params)
    for path in apart:
        np.testing.assert_array_equal(apart[path], padded[path])
