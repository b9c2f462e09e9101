"""Claim: certified bounds of the difference, far narrower than those of both networks apart. Run: python bench/verify.py

`jpfq.verify` on boxes around test images, of radius 1, 2, 4 and 8 / 255: the mean width of the bounds of an output's
difference, beside the width that gradient search finds inside, and beside subtracting the bounds of two networks, by
intervals and linear.
Then the share of images whose class is certified to be the same in both networks, beside the share for which search finds no
input of the box where the classes differ. The MNIST MLP (784-500-300-10) and the digits CNN of the demo, 4 and 8 bits, and
the MLP with 8-bit inputs of layers. ResNet20 by intervals: seconds and memory.
"""

import argparse
import resource
import time

import jax
import jax.numpy as jnp
import mnist_mlp
import networks
import numpy as np
from common import add_data, needed, report, table, verdict

import jpfq
from jpfq.study import demo

RADII = (1, 2, 4, 8)


def searched(quantized, apply, x, radius, steps=12):
    """The width of each output's difference that signed gradients find, and whether classes agree at all points."""
    exact = jnp.asarray(x)
    q = lambda z: quantized.apply(z)
    off = lambda z: q(z) - apply(z)
    outputs = off(exact).shape[1]
    # one copy for each output and sign
    start = jnp.tile(exact, (2 * outputs, *[1] * (exact.ndim - 1)))
    signs = jnp.repeat(jnp.concatenate([jnp.eye(outputs), -jnp.eye(outputs)]), len(x), 0)
    climb = jax.jit(jax.grad(lambda z: jnp.sum(signs * off(z))))
    key = jax.random.key(0)
    z = start + radius * jax.random.uniform(key, start.shape, minval=-1, maxval=1)
    best, alike = jnp.sum(signs * off(z), 1), np.ones(len(x), bool)
    for i in range(steps):
        z = jnp.clip(z + radius * (1 - i / steps) * jnp.sign(climb(z)), start - radius, start + radius)
        best = jnp.maximum(best, jnp.sum(signs * off(z), 1))
        same = np.asarray(jnp.argmax(q(z), 1) == jnp.argmax(apply(z), 1)).reshape(-1, len(x))
        alike &= same.all(0)
    found = np.asarray(best).reshape(2, outputs, len(x))
    return float((found[0] + found[1]).mean()), alike


def separate(found) -> float:
    """The mean width of the difference of two separate bounds."""
    return float((found.float_outputs.width + found.quantized_outputs.width).mean())


def measured(name, bits, quantized, model, given, apply, x):
    """One row for each radius."""
    rows, facts = [], []
    for r in RADII:
        radius = r / 255
        width, alike = searched(quantized, apply, x, radius)
        kinds, start = {}, time.perf_counter()
        for mode in ("interval", "linear"):
            settings = jpfq.Bounding(mode=mode)
            kinds[mode] = jpfq.verify(quantized, model, around=x, radius=radius, settings=settings, **given)
        taken = (time.perf_counter() - start) / len(x)
        certified = jpfq.predicts_alike(quantized, model, x, radius, **given)
        assert not (certified & ~alike).any(), "a certified class was found to change"
        ours = {mode: float(found.difference.width.mean()) for mode, found in kinds.items()}
        apart = {mode: separate(found) for mode, found in kinds.items()}
        numbers = (width, ours["linear"], ours["interval"], apart["linear"], apart["interval"])
        shares = f"{100 * certified.mean():.0f}", f"{100 * alike.mean():.0f}"
        rows.append((name, bits, f"{r}/255", *(f"{n:.3g}" for n in numbers), *shares, f"{taken:.1f}"))
        facts.append((apart["interval"] / ours["linear"], apart["linear"] / ours["linear"]))
        print(*rows[-1], flush=True)
    return rows, facts


def mlp(args) -> str:
    """Rows for the MNIST MLP."""
    model = mnist_mlp.MLP()
    variables = mnist_mlp.variables_of(needed(args.data, "mlp_mnist_500_300_trained_here.npz"))
    mnist = np.load(needed(args.data, "mnist.npz"))
    batches, x = [mnist_mlp.pixels(mnist["x_train"][:2000])], mnist_mlp.pixels(mnist["x_test"][: args.images])
    rules = {"4": 4, "8": 8, "8, inputs 8": jpfq.Rule(".*", bits=8, activation_bits=8)}
    return compared(args, "MLP", rules, model, batches, variables, x)


def cnn(args) -> str:
    """Rows for the digits CNN."""
    images, labels, test, _ = demo.digits()
    model, variables = demo.train_cnn(images, labels)
    x = jnp.asarray(test[: args.images])
    return compared(args, "CNN", {"4": 4, "8": 8}, model, [jnp.asarray(images[:512])], variables, x)


def compared(args, name, rules, model, batches, variables, x) -> str:
    """The table of a network, and verdicts."""
    rows, facts = [], []
    for bits, rule in rules.items():
        quantized = jpfq.quantize(model, batches, rule, variables=variables, progress=False)
        apply = lambda z: model.apply(variables, z)
        more, found = measured(name, bits, quantized, model, {"variables": variables}, apply, x)
        rows, facts = rows + more, facts + found
    head = ("network", "bits", "radius", "found", "linear", "interval", "two linear", "two interval")
    head = (*head, "% alike", "% at most", "s")
    interval, linear = (np.array([fact[i] for fact in facts]) for i in (0, 1))
    claims = (
        (interval.min() >= 10, f"at least 10 times narrower than two interval bounds: {interval.min():.1f} at least"),
        (linear.min() >= 3, f"at least 3 times narrower than two linear bounds: {linear.min():.1f} at least"),
    )
    note = f"{args.images} test images; mean widths over outputs and images; seconds per image in both modes, with compiling"
    return "\n\n".join([note, table(head, rows).strip("\n"), "\n".join(verdict(*claim) for claim in claims)])


PARTS = {"mlp": mlp, "cnn": cnn, "resnet20": lambda args: resnet(*networks.resnet20(args.data))}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--part", choices=PARTS, help="one alone; else all, one after the other")
    add_data(parser)
    args = parser.parse_args()
    parts, args.part = [args.part] if args.part else list(PARTS), None
    for part in parts:
        report(f"verify_{part}", parser, args, PARTS[part](args))


def resnet(model, variables) -> str:
    """ResNet20 by intervals."""
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.uniform(size=(16, 32, 32, 3)).astype(np.float32))]
    quantized = jpfq.quantize(model, batches, jpfq.Rule(".*", bits=8, plain=True), variables=variables, progress=False)
    settings, x = jpfq.Bounding(mode="interval"), batches[0][:1]

    def timed():
        start = time.perf_counter()
        found = jpfq.verify(quantized, model, around=x, radius=1 / 255, settings=settings, variables=variables)
        return time.perf_counter() - start, found

    (first, _), (again, found) = timed(), timed()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    width = found.difference.width.mean()
    apart = separate(found) / width
    return (
        f"ResNet20, 8 bits, 1/255, intervals: {first:.1f} s with compiling, {again:.1f} s without, peak {peak:.1f} "
        f"GiB of the process; width {width:.3g}, {apart:.1f} times narrower than two intervals"
    )


if __name__ == "__main__":
    main()
