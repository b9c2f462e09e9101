"""Claim: on the same weights, inputs and grids jpfq errs as the peers do or less, in less time. Run: python bench/peers.py

Peers are Brevitas 0.13 (GPFQ, GPTQ, Qronos), qwix 0.1.8 (GPTQ, QEP) and the published loop of GPFQ; `pip install
jpfq[peers]` brings them. Layers are compared one by one: the peer quantizes a whole network, then jpfq is given the inputs
that the peer had at each layer (X in the float network, Xq behind the peer's own quantized layers) and the peer's own
steps, so only the codes are left to choose. Errors are ||X W - Xq q|| / ||X W||. Times are taken turn by turn. Ours
are of `jpfq.solve` under `jit`, asked for the weights alone, after a first call, whose extra time, mostly compilation, has
a column of its own; "with Info" is the plain call with all its metrics. Whole models are compared by peers_models.py.
"""

import argparse
import copy
import os
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix
import torch
from common import report, table, verdict
from qwix.contrib import gptq, qep

import jpfq
from jpfq.matrix.arrays import matmul

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # one that a kernel for Hadamard products is not installed
    import brevitas.nn as qnn
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.qronos import Qronos
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8WeightPerChannelFloat

CLOSE = 1.005  # our error over the peer's, at most
FASTER = {"Brevitas GPFQ": 50, "Brevitas GPTQ": 10, "Brevitas Qronos": 10, "GPFQ loop": 200}  # their time over ours
DAMPING = jpfq.damping.MeanDiagonal(0.01)  # of Brevitas' GPTQ and of qwix
OURS = {
    "GPFQ": {"": jpfq.GPFQ()},
    "GPTQ": {"": jpfq.OPTQ(damping=DAMPING)},
    "Qronos": {
        "exact": jpfq.Qronos(exact=True, damping=jpfq.damping.TopEigenvalue(1e-6)),
        "least squares": jpfq.Qronos(damping=jpfq.damping.TopEigenvalue(1e-6)),
    },
    "QEP": {"": jpfq.QEP(alpha=0.5, damping=DAMPING)},
}
THEIRS = {  # Brevitas' modes
    "GPFQ": lambda model, act_order: gpfq_mode(model, act_order=act_order),
    "GPTQ": lambda model, act_order: gptq_mode(model, act_order=act_order),
    "Qronos": lambda model, act_order: gpfq_mode(model, algorithm_impl=Qronos, act_order=act_order),
}


class Done(NamedTuple):
    """One layer that a peer has quantized."""

    q: jax.Array  # (in, out)
    step: jax.Array  # (groups, out)


class Pair(NamedTuple):
    """A peer's way and ours to the same end, each as seconds of one run."""

    peer: str
    part: str
    theirs: Callable[[], float]
    ours: Callable[[], float]
    first: float  # our first run: seconds beyond those of the second


def problem(rows: int, n: int, out: int, depth: int, dead: int, seed: int) -> tuple[jax.Array, list[jax.Array]]:
    """Correlated inputs, `dead` of them always 0, and the weights of layers with ReLU between them."""
    keys = jax.random.split(jax.random.key(seed), 3 + depth)
    mix = jnp.eye(n) + jax.random.normal(keys[0], (n, n)) / n**0.5
    X = jax.nn.relu(jax.random.normal(keys[1], (rows, n)) @ mix)
    X = X.at[:, jax.random.permutation(keys[2], n)[:dead]].set(0)
    widths = [n, *(out for _ in range(depth))]
    return X, [jax.random.normal(k, (i, o)) * (2 / i) ** 0.5 for k, i, o in zip(keys[3:], widths, widths[1:])]


def inputs(Ws, X) -> list[jax.Array]:
    """The input of every layer, and the output of the last."""
    found = [X]
    for W in Ws:
        y = matmul(found[-1], W)
        found.append(y if len(found) == len(Ws) else jax.nn.relu(y))
    return found


def solved(W, gram, done: Done, grid, method, order=None) -> jax.Array:
    """Our values on a peer's steps."""
    plain = {"order": order or jpfq.order.Natural(), "finish": None, "shrinkage": None}
    return jpfq.solve(W, gram, grid=grid, scale=jpfq.scale.Fixed(done.step), method=method, **plain)[0].dequantize()


def error(W, X, Xq, q) -> float:
    """||X W - Xq q|| / ||X W||."""
    goal = matmul(X, W)
    return float(jnp.linalg.norm(goal - matmul(Xq, q)) / jnp.linalg.norm(goal))


class Compared(NamedTuple):
    """Relative errors layer by layer, and the share of codes that are the same."""

    theirs: list[float]
    ours: list[float]
    same: float

    @property
    def worst(self) -> float:
        return max(a / b for a, b in zip(self.ours, self.theirs))

    def row(self) -> tuple[str, ...]:
        """For a table."""
        listed = lambda errors: " ".join(f"{e:.4f}" for e in errors)
        return (listed(self.theirs), listed(self.ours), f"{self.worst:.4f}", f"{self.same:.1%}")


ERRORS = ("their errors, layer by layer", "ours", "worst ratio", "same codes")


def compare(Ws, floats, quantized, layers: list[Done], grid, method, order=None) -> Compared:
    """Our answers to the tasks a peer had; `floats` and `quantized` are the inputs of the layers in the two networks."""
    theirs, ours, same = [], [], []
    for W, X, Xq, done in zip(Ws, floats, quantized, layers):
        gram = jpfq.Gram.from_data(X, None if Xq is X else Xq)
        q = solved(W, gram, done, grid, method, order)
        theirs.append(error(W, X, Xq, done.q))
        ours.append(error(W, X, Xq, q))
        steps = jnp.repeat(done.step, len(W) // len(done.step), axis=0)
        same.append(float(jnp.mean(jnp.abs(q - done.q) < steps / 2)))
    return Compared(theirs, ours, float(np.mean(same)))


# Brevitas


class Frozen(Int8WeightPerChannelFloat):
    """Narrow symmetric levels per neuron, whose step is set from the largest weight once and then stays."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS


def in_torch(Ws, bits: int, X) -> torch.nn.Sequential:
    """The network with Brevitas' layers, its steps set."""
    parts = []
    for W in Ws:
        layer = qnn.QuantLinear(*W.shape, bias=False, weight_quant=Frozen, weight_bit_width=bits)
        layer.weight.data = as_torch(W.T)
        parts += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*parts[:-1]).eval()
    model(as_torch(X[:2]))
    return model


def as_torch(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))  # a copy that may be written to


def by_brevitas(Ws, X, name: str, act_order: bool, bits: int, batches: int) -> list[Done]:
    """The layers, quantized in turn by Brevitas. Checks that the steps have stayed and that the values are on the grid."""
    model = in_torch(Ws, bits, X)
    linears = [part for part in model if isinstance(part, qnn.QuantLinear)]
    before = [layer.quant_weight().scale.clone() for layer in linears]
    with THEIRS[name](model, act_order) as mode:
        for _ in range(mode.num_layers):
            for batch in as_torch(X).chunk(batches):
                mode.model(batch)
            mode.update()
    layers, top = [], 2 ** (bits - 1) - 1
    for layer, scale in zip(linears, before):
        made = layer.quant_weight()
        codes = made.value / scale
        off = (codes - codes.round()).abs().max()
        if not torch.equal(made.scale, scale) or off > 1e-3 or codes.abs().max() > top + 1e-3:
            raise SystemExit(f"Brevitas' {name} left the fixed grid at {bits} bits: the comparison would not be fair.")
        layers.append(Done(jnp.asarray(made.value.numpy().T), jnp.asarray(scale.numpy().reshape(1, -1))))
    return layers


def brevitas_errors(args) -> tuple[str, list[str]]:
    """Every method, order and width of Brevitas against ours."""
    lines, worst = [], {}
    X, Ws = problem(args.rows, args.width, args.width, args.depth, args.width // 32, args.seed)
    floats = inputs(Ws, X)
    orders = [("natural", False, jpfq.order.Natural()), ("descending", True, jpfq.order.Descending())]
    for name in THEIRS:
        for label, act_order, order in orders:
            for bits in args.bits:
                layers = by_brevitas(Ws, X, name, act_order, bits, args.batches)
                quantized = [X, *inputs([done.q for done in layers], X)[1:]]
                for form, method in OURS[name].items():
                    grid = jpfq.Integer(bits, narrow=True)
                    found = compare(Ws, floats, quantized, layers, grid, method, order)
                    title = f"{name}, {form}" if form else name
                    worst[title] = max(worst.get(title, 0), found.worst)
                    lines.append((title, label, str(bits), *found.row()))
    says = [verdict(r <= CLOSE, f"{k}: error at most {CLOSE} of Brevitas': {r:.4f} at worst") for k, r in worst.items()]
    return table(("method", "order", "bits", *ERRORS), lines), says


# Time


def clock(run: Callable, least: float = 0.2) -> float:
    """Seconds of one run, over as many runs as take `least` seconds."""
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < least:
        jax.block_until_ready(run())
        count += 1
    return (time.perf_counter() - start) / count


def again(run: Callable) -> float:
    """Runs a function twice: the seconds that the first run took more than the second."""
    first, second = clock(run, 0), clock(run, 0)
    return first - second


def brevitas_seconds(model, X, name: str, batches: int) -> tuple[float, float]:
    """Seconds in which Brevitas collects the statistics of its one layer, and updates it."""
    with THEIRS[name](copy.deepcopy(model), False) as mode:
        start = time.perf_counter()
        for batch in X.chunk(batches):
            mode.model(batch)
        middle = time.perf_counter()
        mode.update()
        return middle - start, time.perf_counter() - middle


def published_loop(W, X, Xq, step, top: int) -> torch.Tensor:
    """GPFQ as published: U = X w - Xq q of all neurons, one input after the other. W (out, in); X, Xq (in, rows)."""
    U, Q = torch.zeros(W.shape[0], X.shape[1]), torch.zeros_like(W)
    for t in range(W.shape[1]):
        U += W[:, t].unsqueeze(1) * X[t].unsqueeze(0)
        argument = U @ Xq[t] / (Xq[t] @ Xq[t])
        Q[:, t] = step * torch.clamp(torch.floor(argument / step + 0.5), -top, top)
        U -= Q[:, t].unsqueeze(1) * Xq[t].unsqueeze(0)
    return Q


def pairs(args) -> tuple[list[Pair], str]:
    """The times of one layer, each part next to ours, and the error of the published loop against ours."""
    n, bits = args.layer, 4
    X, (W,) = problem(args.samples, n, n, 1, 0, args.seed)
    Xq = X + 0.05 * jax.random.normal(jax.random.key(args.seed + 1), X.shape)
    grid, step = jpfq.Integer(bits, narrow=True), jnp.abs(W).max(0, keepdims=True) / (2 ** (bits - 1) - 1)
    done = Done(W, step)
    model, data = in_torch([W], bits, X), as_torch(X)
    collect, taken = jax.jit(jpfq.Gram.from_data), {}
    found = []
    for name in THEIRS:
        method = next(iter(OURS[name].values()))
        rows = (Xq,) if name == "GPTQ" else (X, Xq)  # GPTQ knows one network only
        gram = collect(*rows)
        codes = jax.jit(lambda W, gram, method=method: solved(W, gram, done, grid, method))
        update = lambda gram=gram, codes=codes: codes(W, gram)
        whole = lambda rows=rows, codes=codes: codes(W, collect(*rows))
        reported = lambda gram=gram, method=method: solved(W, gram, done, grid, method)
        first = again(update)

        def theirs(name=name):
            taken[name] = brevitas_seconds(model, data, name, args.batches)
            return taken[name][1]

        both = lambda name=name: sum(taken[name])  # of the run that was just timed
        found.append(Pair(f"Brevitas {name}", "update", theirs, lambda run=update: clock(run), first))
        found.append(
            Pair(
                f"Brevitas {name}",
                "update, with Info",
                lambda name=name: taken[name][1],
                lambda run=reported: clock(run),
                again(reported),
            )
        )
        found.append(Pair(f"Brevitas {name}", "with Gram", both, lambda run=whole: clock(run), again(whole) + first))

    torches = [as_torch(x) for x in (W.T, X.T, Xq.T)]
    height = as_torch(step[0])

    def loop():
        start = time.perf_counter()
        taken["Q"] = published_loop(*torches, height, 2 ** (bits - 1) - 1)
        taken["loop"] = time.perf_counter() - start
        return taken["loop"]

    codes = jax.jit(lambda W, gram: solved(W, gram, done, grid, jpfq.GPFQ()))
    gram, same = collect(X, Xq), collect(X)
    update, first = lambda: codes(W, gram), lambda: codes(W, same)
    whole = lambda: codes(W, collect(X, Xq))
    found.append(Pair("GPFQ loop", "update", loop, lambda: clock(update), again(update)))
    found.append(Pair("GPFQ loop", "update, X = Xq", lambda: taken["loop"], lambda: clock(first), again(first)))
    found.append(Pair("GPFQ loop", "with Gram", lambda: taken["loop"], lambda: clock(whole), again(whole)))
    loop()
    errors = error(W, X, Xq, jnp.asarray(taken["Q"].numpy().T)), error(W, X, Xq, update())
    return found, f"errors at 4 bits of the loop and of ours: {errors[0]:.5f}, {errors[1]:.5f}"


def times(args) -> tuple[str, list[str]]:
    """One layer: their seconds over ours, turn by turn."""
    found, note = pairs(args)
    taken = [[] for _ in found]
    for _ in range(args.rounds):
        for pair, spent in zip(found, taken):
            spent.append((pair.theirs(), pair.ours()))
    lines, ratios = [], {}
    for pair, spent in zip(found, taken):
        theirs, ours = np.array(spent).T
        ratio = theirs / ours
        ratios.setdefault(pair.peer, {})[pair.part] = np.median(ratio)
        spread = (f"{f(ratio):.1f}" for f in (np.median, np.min, np.max))
        lines.append(
            (pair.peer, pair.part, f"{np.median(theirs):.3f}", f"{np.median(ours):.4f}", *spread, f"{pair.first:.1f}")
        )
    says = []
    for peer, parts in ratios.items():
        claim = f"{peer}: ours at least {FASTER[peer]} times as fast, Gram given: {parts['update']:.1f}"
        says.append(verdict(parts["update"] >= FASTER[peer], f"{claim} (with Gram: {parts['with Gram']:.1f})"))
    head = ("peer", "part", "their s", "our s", "ratio", "least", "most", "our first, s")
    return f"{table(head, lines)}\n{note}", says


# qwix


class MLP(nn.Module):
    """Dense layers without bias, ReLU between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, use_bias=False)(x if i == 0 else nn.relu(x))
        return x


def by_qwix(Ws, X, name: str, group: int | None, batches: int) -> list[Done]:
    """The layers, quantized to int4 by qwix: GPTQ with the statistics of the float network, or QEP."""
    model = MLP(tuple(W.shape[1] for W in Ws))
    params = {f"Dense_{i}": {"kernel": W} for i, W in enumerate(Ws)}
    settings = {"module_path": ".*", "weight_qtype": jnp.int4, "tile_size": group}
    split = jnp.split(X, batches)
    if name == "QEP":
        made = qep.quantize(model, split, [qep.QepRule(**settings)], variables={"params": params}).params
    else:
        rules = [gptq.GptqRule(**settings)]
        watched, variables = qwix.quantize_model(model, gptq.GptqCalibrationProvider(rules)), {"params": params}
        for batch in split:
            _, seen = watched.apply(variables, batch, mutable="quant_stats")
            variables = {"params": params, **seen}
        ready = qwix.quantize_model(model, qwix.PtqProvider(rules))
        shapes = jax.eval_shape(ready.init, jax.random.key(0), X)["params"]
        made = gptq.quantize_params(params, shapes, variables["quant_stats"])
    arrays = [made[f"Dense_{i}"]["kernel"].array for i in range(len(Ws))]
    return jax.block_until_ready([Done(qwix.dequantize(array), array.scale) for array in arrays])


def layer_by_layer(Ws, X, layers: list[Done], method, mismatch: bool) -> list[jax.Array]:
    """Our layers, quantized in turn on the peer's steps; without `mismatch` by the float network's inputs only."""
    floats, found, Xq = inputs(Ws, X), [], X
    for i, (W, done) in enumerate(zip(Ws, layers)):
        gram = jpfq.Gram.from_data(floats[i], Xq if mismatch and i else None)
        found.append(solved(W, gram, done, jpfq.Integer(4), method))
        Xq = jax.nn.relu(matmul(Xq, found[-1]))
    return jax.block_until_ready(found)


def qwix_errors(args) -> tuple[str, list[str]]:
    """GPTQ and QEP of qwix against ours: layer by layer, at the network's output, and in seconds."""
    X, Ws = problem(args.rows, args.width, args.width, args.depth, args.width // 32, args.seed)
    floats = inputs(Ws, X)
    lines, seconds, worst = [], [], {}
    output = lambda layers: float(jnp.linalg.norm(inputs(layers, X)[-1] - floats[-1]) / jnp.linalg.norm(floats[-1]))
    for name, group in [(k, g) for k in ("GPTQ", "QEP") for g in (None, args.width // 2)]:
        method, mismatch = OURS[name][""], name == "QEP"
        made = {}
        theirs = lambda name=name, group=group, made=made: made.setdefault(
            "it", by_qwix(Ws, X, name, group, args.batches)
        )
        first = clock(theirs, 0)
        layers = made.pop("it")
        ours = lambda layers=layers, method=method, mismatch=mismatch: layer_by_layer(Ws, X, layers, method, mismatch)
        cold = clock(ours, 0)
        warm = [(clock(theirs, 0), clock(ours), made.pop("it"))[:2] for _ in range(args.rounds)]
        quantized = [X, *inputs([done.q for done in layers], X)[1:]] if mismatch else floats
        found = compare(Ws, floats, quantized, layers, jpfq.Integer(4), method)
        worst[name] = max(worst.get(name, 0), found.worst)
        ends = (f"{output([done.q for done in layers]):.4f}", f"{output(ours()):.4f}")
        label = f"groups of {group}" if group else "per neuron"
        lines.append((name, label, *found.row(), *ends))
        spent, mine = np.median(np.array(warm), axis=0)
        seconds.append((name, label, *(f"{x:.2f}" for x in (first, spent, cold)), f"{mine:.4f}", f"{spent / mine:.0f}"))
    says = [verdict(r <= CLOSE, f"{k}: error at most {CLOSE} of qwix's: {r:.4f} at worst") for k, r in worst.items()]
    head = ("method", "steps", *ERRORS, "their output error", "ours")
    clocks = ("method", "steps", "their first s", "their later s", "our first s", "our later s", "ratio")
    return f"{table(head, lines)}\n\n{table(clocks, seconds)}", says


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--width", type=int, default=256, help="inputs and neurons of the layers whose errors are compared"
    )
    parser.add_argument("--depth", type=int, default=3, help="how many layers")
    parser.add_argument("--rows", type=int, default=2048, help="calibration rows of the errors")
    parser.add_argument("--batches", type=int, default=4, help="batches the peers are given the rows in")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--layer", type=int, default=1024, help="inputs and neurons of the layer that is timed")
    parser.add_argument("--samples", type=int, default=4096, help="its calibration rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--parts", nargs="+", choices=["brevitas", "qwix", "times"], default=["brevitas", "qwix", "times"]
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as jax takes
    torch.set_grad_enabled(False)

    size = f"{args.depth} layers {args.width} x {args.width}, {args.rows} rows in {args.batches} batches"
    blas = os.environ.get("OPENBLAS_NUM_THREADS", "unset")  # of the Cholesky factors jax takes on a CPU
    threads = f"{torch.get_num_threads()} threads, OPENBLAS_NUM_THREADS {blas}"
    layer = f"one layer {args.layer} x {args.layer}, {args.samples} rows, {threads}"
    parts = {
        "brevitas": (brevitas_errors, f"Brevitas: {size}; steps max |w| / (2^(b-1) - 1) per neuron, frozen"),
        "qwix": (qwix_errors, f"qwix: int4, {size}; GPTQ sees the float network only, QEP both"),
        "times": (times, f"Seconds: {layer}; medians of {args.rounds} rounds"),
    }
    texts, verdicts = [], []
    for part in args.parts:
        make, title = parts[part]
        text, says = make(args)
        texts.append(f"{title}\n\n{text}")
        verdicts += says
    report("peers", parser, args, *texts, "\n".join(verdicts))


if __name__ == "__main__":
    main()
