"""Claim: on merged branches two ranges lose less than one at equal bits stored. Run: python bench/coarse_fine.py

A small RepVGG is trained on scikit-learn's digits: each block adds a convolution of 3 x 3, one of 1 x 1 and the identity,
each with its BatchNorm. Then the three are merged into one convolution of 3 x 3, whose centre has a few large weights. All
kernels of the merged network are quantized, with a step per neuron, in codes of as many bits:

one    integers, `jpfq.Integer(bits)`
two    a fine and a coarse range, `jpfq.formats.two_ranges(bits)`, chosen for each kernel by the error of its weights;
       the two numbers that say which are not counted as stored

by plain rounding (with the best step for the weights), by GPFQ on the same steps, and by the recommended settings. Error: of
the logits on test pictures, ||f - fq|| / ||f||, and points of top-1 lost; means over networks from several seeds.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import report, table, verdict

import jpfq
from jpfq.study.demo import digits

WIDTHS = (16, 16, 16, 32, 32)  # of the blocks; one that widens halves the picture, and has no identity
METHODS = {
    "rounding": {"plain": True, "method": jpfq.MSQ(), "scale": jpfq.scale.MinMSE()},
    "GPFQ": {"plain": True, "method": jpfq.GPFQ(), "scale": jpfq.scale.MinMSE()},
    "recommended": {},
}


def conv(x, kernel, stride):
    """A convolution that keeps the size of the picture, or halves it."""
    pad = (kernel.shape[0] - 1) // 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=layout)


def strides():
    """(inputs, outputs, stride) of each block."""
    return [(a, b, 1 if a == b or a == 1 else 2) for a, b in zip((1, *WIDTHS), WIDTHS)]


def fresh(key) -> dict:
    """Parameters of the branches: kernels, and the scales of their BatchNorms, with one bias for all."""
    blocks = []
    for a, b, _ in strides():
        key, one, three = jax.random.split(key, 3)
        branches = {"three": jax.random.normal(three, (3, 3, a, b)) * np.sqrt(2 / (9 * a))}
        branches["one"] = jax.random.normal(one, (1, 1, a, b)) * np.sqrt(2 / a)
        scales = {name: jnp.ones(b) for name in (*branches, *(["same"] if a == b else []))}
        blocks.append({"kernels": branches, "scales": scales, "bias": jnp.zeros(b)})
    return {"blocks": blocks, "head": jax.random.normal(key, (WIDTHS[-1], 10)) * 0.2, "bias": jnp.zeros(10)}


def branches_of(block, x, stride) -> dict:
    """The outputs of each branch before its BatchNorm."""
    found = {name: conv(x, kernel, stride) for name, kernel in block["kernels"].items()}
    return found | ({"same": x} if "same" in block["scales"] else {})


def forward(params, x, moments=None):
    """Logits, and the mean and variance of each branch: those given, or of this batch."""
    used = []
    for i, (block, (_, _, stride)) in enumerate(zip(params["blocks"], strides())):
        total, own = block["bias"], {}
        for name, y in branches_of(block, x, stride).items():
            own[name] = moments[i][name] if moments is not None else (y.mean((0, 1, 2)), y.var((0, 1, 2)))
            mean, variance = own[name]
            total = total + block["scales"][name] * (y - mean) / jnp.sqrt(variance + 1e-5)
        x = jax.nn.relu(total)
        used.append(own)
    return x.mean((1, 2)) @ params["head"] + params["bias"], used


def merged(params, moments) -> dict:
    """One kernel of 3 x 3 and a bias for each block."""
    found = {}
    for i, (block, own) in enumerate(zip(params["blocks"], moments)):
        kernel, bias = 0.0, block["bias"]
        for name, (mean, variance) in own.items():
            factor = block["scales"][name] / jnp.sqrt(variance + 1e-5)
            size = factor.size
            branch = jnp.eye(size)[None, None] if name == "same" else block["kernels"][name]
            pad = (3 - branch.shape[0]) // 2
            kernel = kernel + factor * jnp.pad(branch, [(pad, pad)] * 2 + [(0, 0)] * 2)
            bias = bias - factor * mean
        found[f"block{i}"] = {"kernel": kernel, "bias": bias}
    return found | {"head": {"kernel": params["head"], "bias": params["bias"]}}


def apply(params, x):
    """The merged network."""
    for i, (_, _, stride) in enumerate(strides()):
        x = jax.nn.relu(conv(x, params[f"block{i}"]["kernel"], stride) + params[f"block{i}"]["bias"])
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def trained(seed, x, y, epochs) -> dict:
    """The merged network after training."""
    params, size = fresh(jax.random.key(seed)), 64
    steps = epochs * (len(x) // size)
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, steps), weight_decay=1e-3)

    def step(state, rows):
        params, memory = state
        loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(
            forward(params, x[rows])[0], y[rows]
        ).mean()
        change, memory = optimizer.update(jax.grad(loss)(params), memory, params)
        return (optax.apply_updates(params, change), memory), None

    orders = [jax.random.permutation(key, len(x)) for key in jax.random.split(jax.random.key(seed + 1000), epochs)]
    rows = jnp.concatenate(orders)[: steps * size].reshape(steps, size)
    params = jax.jit(lambda state: jax.lax.scan(step, state, rows)[0][0])((params, optimizer.init(params)))
    logits, moments = forward(params, x)
    one = merged(params, moments)
    np.testing.assert_allclose(apply(one, x), logits, atol=1e-3 * float(jnp.abs(logits).max()))
    return one


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    args = parser.parse_args()

    x, y, test, labels = map(jnp.asarray, digits())
    batches = list(jnp.split(x, 4))
    run = jax.jit(apply)
    found: dict = {}
    for seed in range(args.seeds):
        params = trained(seed, x, y, args.epochs)
        exact = run(params, test)
        right = lambda logits: 100 * float(jnp.mean(logits.argmax(-1) == labels))
        ratio = [
            float(jnp.median(jnp.abs(p["kernel"]).max((0, 1, 2)) / p["kernel"].std((0, 1, 2))))
            for p in list(params.values())[:-1]
        ]
        found.setdefault("float", []).append((right(exact), float(np.median(ratio))))
        for bits in args.bits:
            for method, settings in METHODS.items():
                rules = {
                    "one": jpfq.Rule(".*", bits=bits, **settings),
                    "two": jpfq.formats.two_ranges(bits, apply, x[:2], params=params, **settings),
                }
                for ranges, rule in rules.items():
                    result = jpfq.quantize(apply, batches, rule, params=params, progress=False)
                    logits = run(result.params, test)
                    stored = sum(tensor.nbytes for tensor in result.tensors.values())
                    error = float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact))
                    found.setdefault((bits, method, ranges), []).append((error, right(exact) - right(logits), stored))
                    for tensor in result.tensors.values() if ranges == "two" else ():
                        fine, coarse = tensor.split()
                        assert (fine.dequantize() + coarse.dequantize() == tensor.dequantize()).all()
                    print(seed, bits, method, ranges, *found[bits, method, ranges][-1], flush=True)
    mean = {key: np.mean(values, axis=0) for key, values in found.items()}
    rows, verdicts = [], []
    for bits in args.bits:
        for method in METHODS:
            one, two = mean[bits, method, "one"], mean[bits, method, "two"]
            assert one[2] == two[2]
            cells = [f"{100 * one[0]:.2f}", f"{100 * two[0]:.2f}", f"{one[1]:.2f}", f"{two[1]:.2f}", f"{one[2]:,.0f}"]
            rows.append([f"{bits} bits", method, *cells])
            claim = f"{bits} bits, {method}: the error of two ranges is {two[0] / one[0]:.2f} of that of one"
            verdicts.append(verdict(two[0] < one[0], claim))
    accuracy, peak = mean["float"]
    note = (
        f"float {accuracy:.2f} %, {args.seeds} networks of {len(WIDTHS)} blocks, {args.epochs} epochs; the largest weight "
        f"of a neuron is {peak:.1f} standard deviations (median)"
    )
    head = ["codes", "method", "error one, %", "two, %", "points lost one", "two", "bytes of both"]
    report("coarse_fine", parser, args, note, table(head, rows), "\n".join(verdicts))


if __name__ == "__main__":
    main()
