"""`learn`: codes, steps, biases and norms of a quantized network, trained towards the float network's outputs.

All layers are trained at once, as in quantization-aware training by distillation (Hinton et al., arXiv 1503.02531), but
each code may change by few levels only, as in AdaRound (Nagel et al., arXiv 2004.10568): the start is a result of path
following. Levels are soft at first and hard in the end (moves.py); the loss on held-out batches is that of the hard network.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..calibrate.output_error import Comparison, OutputError
from ..matrix import Info, QTensor
from ..matrix.explicit_mesh import automatic, context
from ..model.adapters import adapt
from ..model.compat import bind
from ..model.functional import Functional, check_values
from ..model.mesh import like, on_auto_axes, on_mesh_of
from ..model.program import evaluate, trace
from ..model.sites import find_sites
from ..scalar import register_dataclass
from ..scalar.checks import check_choice
from ..scalar.grid import Number
from ..scalar.predicates import is_count, may_be
from .apply import run
from .distance import distance_of, floating
from .learned import Learned
from .moves import Moves, bounds_of, info_of
from .quantize import placed_like
from .quantized import Quantized
from .targets import Outputs, split

LOG = logging.getLogger("jpfq")
SOFT, HARD = 4.0, 100.0  # the sharpness of levels at the first step and at the last
PARTS = ("codes", "steps", "zeros", "vectors", "others")
_static: Any = {"metadata": {"static": True}}


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Learning:
    """The settings of `jpfq.learn`.

    Args:
        steps: updates, each on one batch.
        rate: the learning rate of Adam at the start; it falls to 0 as a cosine. An update of x changes a code's position by
            16 x levels, a step by a factor exp(x), and a bias by x.
        optimizer: any `optax.GradientTransformation` in place of Adam; `rate` is then not used.
        loss: "outputs", the square error relative to the float outputs; "logits", the divergence KL(float, quantized) of the
            softmax over the last axis, for classifiers and language models; or a function (float outputs, quantized
            outputs) -> number.
        parts: what is trained. "codes"; "steps", unless their type has few digits (E8M0, E4M3); "zeros", the zero points
            that a grid fits to the weights; "vectors", parameters of one axis, such as biases and the scales of norms;
            "others", all further parameters that are not quantized, such as embeddings.
        reach: levels by which a code may differ from its start, at most.
        keep_zeros: whether weights that are quantized to 0 stay 0, for sparse kernels.
        held_out: the share of the batches that is held out, at least one batch; or other batches, in a list.
        checks: times that the loss on held-out batches is computed, evenly over the steps. The best result is returned.
        seed: of the order of the batches, and of the choice of those held out.

    Examples:
        >>> jpfq.Learning(steps=1_000, loss="logits", reach=1).steps
        1000
    """

    steps: int = dataclasses.field(default=400, kw_only=True, **_static)
    rate: Number = dataclasses.field(default=1e-3, kw_only=True)
    optimizer: Any = dataclasses.field(default=None, kw_only=True, **_static)
    loss: Literal["outputs", "logits"] | Callable = dataclasses.field(default="outputs", kw_only=True, **_static)
    parts: tuple[str, ...] = dataclasses.field(default=("codes", "steps", "vectors"), kw_only=True, **_static)
    reach: int = dataclasses.field(default=2, kw_only=True, **_static)
    keep_zeros: bool = dataclasses.field(default=False, kw_only=True, **_static)
    held_out: Any = dataclasses.field(default=0.125, kw_only=True)
    checks: int = dataclasses.field(default=10, kw_only=True, **_static)
    seed: int = dataclasses.field(default=0, kw_only=True, **_static)

    def __post_init__(self):
        for name, least in (("steps", 0), ("reach", 1), ("checks", 1), ("seed", 0)):
            if not is_count(value := getattr(self, name), least):
                raise ValueError(f"Learning: {name} is an integer of at least {least}; got {value!r}.")
        if not may_be(self.rate, lambda x: x > 0):
            raise ValueError(f"Learning: rate is a positive number, such as 1e-3; got {self.rate!r}.")
        if not callable(self.loss):
            check_choice("Learning: loss", self.loss, ("outputs", "logits", "a function"))
        if self.optimizer is not None and not isinstance(self.optimizer, optax.GradientTransformation):
            raise ValueError(f"Learning: optimizer is one of optax, such as optax.sgd(1e-2); got {self.optimizer!r}.")
        if isinstance(self.parts, str) or not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"Learning: parts are some of {', '.join(PARTS)}, in a tuple; got {self.parts!r}.")
        if self.keep_zeros and "zeros" in self.parts:
            raise ValueError("Learning: with keep_zeros zero points cannot be trained: leave 'zeros' out of parts.")
        if isinstance(self.held_out, (int, float)) and not 0 < self.held_out < 1:
            raise ValueError(
                f"Learning: held_out is a share between 0 and 1, such as 0.125, or a list of batches; got {self.held_out}."
            )


class _State(NamedTuple):
    """The trained numbers of kernels, and other parameters, by path."""

    kernels: Any
    others: dict


def learn(
    quantized: Quantized,
    model: Any,
    batches: Iterable,
    learning: Learning | None = None,
    *,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Trains a quantized network towards the outputs of the float network. No labels are used.

    Codes, steps, biases and norms change, within the settings; grids, types of steps and quantizers of inputs do not, and
    inputs are rounded while it trains. Where sums are bounded by an accumulator, they stay so: `jpfq.certify` holds. The
    result is the best of all checks on the batches that are held out, the start included, so that it is never worse than
    the start on these. Each step takes one batch: small ones, of 8 to 32 samples, serve best.

    Args:
        quantized: the start, from `jpfq.quantize` or `jpfq.load`.
        model, variables, params, kwargs: the float network, the same as for `jpfq.quantize`.
        batches: calibration data as for `jpfq.quantize`, two batches at least. Those that were calibrated on will do; more
            data help more here than there.
        learning: the settings; None for `Learning()`.
        progress: True prints a line at each check to standard error, None logs it (logger "jpfq", level INFO), and False
            neither.

    Returns:
        A new `Quantized`. `learned` has the losses. Of `info`, errors on calibration data are unknown, nan.

    Raises:
        ValueError: the result belongs to another network, there are too few batches, outputs do not fit the loss, or the
            loss is not finite at the start.

    Examples:
        >>> learning = jpfq.Learning(steps=20, checks=2)
        >>> better = jpfq.learn(quantized, model, batches, learning, variables=variables)
        >>> better.learned.after <= better.learned.before
        True
    """
    learning = Learning() if learning is None else learning
    if not isinstance(learning, Learning):
        raise ValueError(f"learning takes settings, such as jpfq.Learning(steps=400); got {learning!r}.")
    given = adapt(model, variables, params, kwargs)
    _check_start(quantized, given)
    float_network = on_auto_axes(given)
    with context(float_network.leaves):
        check_values(zip(float_network.paths, float_network.leaves, strict=True), "Learning")
        start = quantized.on_auto_axes
        sets = split(batches, learning.held_out, float_network, learning.seed, isinstance(learning.loss, str))
        learner = _Learner(learning, float_network, start, *sets)
        tensors, leaves, learned = learner.best(progress)
        info = learner.info(tensors) if learned.kept else start.info
        return _assembled(start, given, (tensors, leaves, info), learner.error(leaves), learned)


def _assembled(start, given, found, outputs, learned):
    """The result with other tensors, parameters and figures, where the arrays of the float network lie."""
    home, (tensors, leaves, info) = dict(zip(given.paths, given.leaves, strict=True)), found
    new = tuple(like(x, old) for x, old in zip(leaves, given.leaves, strict=True))
    rebuilt = given.rebuild(new)
    return dataclasses.replace(
        start,
        params=rebuilt["params"],
        tensors={path: placed_like(tensors[path], home[path]) for path in start.tensors},  # programs sort them by name
        info={path: on_mesh_of(home[path], info[path]) for path in start.tensors},
        output_error=outputs.error_or_nan,
        outputs=outputs,
        held_out=None if learned.kept else start.held_out,
        learned=learned,
        _functional=dataclasses.replace(given, leaves=tuple(map(automatic, new))),
        _model=rebuilt.get("model"),
        _variables=rebuilt.get("variables"),
    )


class _Learner:
    """One run of `learn`. Compiles a step, a loss and the networks once for each shape of batch."""

    def __init__(self, learning: Learning, exact: Functional, start: Quantized, training, held):
        self.learning, self.exact, self.start = learning, exact, start
        self.training, self.held = training, held
        self.float_outputs = Outputs(exact, [*training, *held])
        self.distance = distance_of(learning.loss, self.float_outputs.shapes)
        bounds = {}
        if any(info.reach is not None for info in start.info.values()):
            bounds = bounds_of(trace(exact.fn, exact.paths, exact.leaves, training[0].data), start.info)
        self.moves = Moves(learning.parts, learning.reach, learning.keep_zeros, bounds)
        self.index = {path: i for i, path in enumerate(exact.paths) if exact.trainable[i]}
        rate = optax.cosine_decay_schedule(learning.rate, max(learning.steps, 1))
        self.optimizer = optax.adam(rate) if learning.optimizer is None else learning.optimizer
        self.step, self.run, self.deployed = jax.jit(self._step), jax.jit(self._run), jax.jit(self._deployed)
        self.loss = jax.jit(self.distance)

    def best(self, progress: bool | None) -> tuple[dict[str, QTensor], Sequence, Learned]:
        """Trains; the tensors and the parameters of the best network, and what is to be said of it."""
        start, steps = self.start, self.learning.steps
        leaves, state = start._functional.leaves, self._initial()
        before = best = self._held_out(leaves)
        if not np.isfinite(before):
            raise ValueError(self._not_finite(before))
        tensors, found, kept = start.tensors, leaves, 0
        memory = self.optimizer.init(state)
        every = -(-steps // self.learning.checks)
        draw = np.random.default_rng(self.learning.seed)
        queue: list[int] = []
        for taken in range(1, steps + 1):
            queue = queue or draw.permutation(len(self.training)).tolist()
            batch = self.training[queue.pop()]
            sharpness = jnp.asarray(SOFT * (HARD / SOFT) ** (taken / steps))
            data = batch.data, self.float_outputs(batch), batch.weights
            state, memory = self.step(state, memory, sharpness, start.tensors, leaves, start.inputs, *data)
            if taken % every == 0 or taken == steps:
                made = self.deployed(state, start.tensors, leaves)
                loss = self._held_out(made[1])
                _say(f"step {taken} of {steps}: held-out loss {loss:.4g}, {before:.4g} at the start", progress)
                if loss < best:
                    (tensors, found), best, kept = made, loss, taken
        changed = sum(int(jnp.sum(tensors[path].codes != old.codes)) for path, old in start.tensors.items())
        share = changed / max(1, sum(tensor.codes.size for tensor in tensors.values()))
        name = self.learning.loss if isinstance(self.learning.loss, str) else "function"
        return tensors, found, Learned(name, before, best, steps, kept, share)

    def info(self, tensors: dict[str, QTensor]) -> dict[str, Info]:
        """The figures of kernels that have changed."""
        of = lambda path, info, tensor: info_of(info, tensor, self.moves.bounds.get(path, ()))
        return jax.jit(lambda info, new: {path: of(path, info[path], new[path]) for path in new})(
            self.start.info, tensors
        )

    def error(self, leaves: Sequence) -> OutputError:
        """The error of the outputs on all batches."""
        comparisons = []
        for batch in [*self.training, *self.held]:
            exact, found = self.float_outputs(batch), self.run(leaves, self.start.inputs, batch.data)
            comparisons.append(Comparison.of(floating(exact), floating(found), weights=batch.weights))
        return functools.reduce(lambda a, b: a + b, comparisons).error.overall

    def _initial(self):
        """The state before the first step. Parameters are trained in float32: small updates of a bfloat16 are lost."""
        wanted = lambda x: ("vectors" if jnp.ndim(x) <= 1 else "others") in self.learning.parts
        leaves, tensors = self.start._functional.leaves, self.start.tensors
        others = {path: leaves[i] for path, i in self.index.items() if path not in tensors and floating(leaves[i])}
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        others = {path: wide(jnp.asarray(x)) for path, x in others.items() if wanted(x)}
        kernels = {path: self.exact.leaves[self.index[path]] for path in tensors}
        return _State(jax.jit(self.moves.start)(tensors, kernels), others)

    def _parameters(self, kernels, others, leaves):
        """All parameters, with these kernels and others."""
        new = list(leaves)
        for path, x in (kernels | others).items():
            new[self.index[path]] = x.astype(jnp.result_type(leaves[self.index[path]]))
        return tuple(new)

    def _run(self, leaves, inputs, data):
        return run(self.exact, leaves, inputs, data) if inputs else self.exact.fn(leaves, data)

    def _step(self, state, memory, sharpness, tensors, leaves, inputs, data, exact, weights):
        def loss(state):
            soft = self._parameters(self.moves(state.kernels, tensors, sharpness), state.others, leaves)
            return self.distance(exact, self._run(soft, inputs, data), weights)

        slope = jax.grad(loss)(state)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which optax relies on
            change, memory = self.optimizer.update(slope, memory, state)
            new: Any = optax.apply_updates(state, change)
        return new._replace(kernels=self.moves.within(new.kernels, tensors)), memory

    def _deployed(self, state, tensors, leaves):
        """Tensors and parameters of the network that is deployed, from its codes."""
        made = self.moves.deployed(state.kernels, tensors)
        return made, self._parameters({path: x.dequantize() for path, x in made.items()}, state.others, leaves)

    def _held_out(self, leaves) -> float:
        found = lambda batch: self.run(leaves, self.start.inputs, batch.data)
        losses = [self.loss(self.float_outputs(batch), found(batch), batch.weights) for batch in self.held]
        return float(np.mean(jax.device_get(losses), dtype=np.float64))

    def _not_finite(self, loss):
        """The message for a loss that is not finite, with the first layer where that shows."""
        for name, leaves in (("float", self.exact.leaves), ("quantized", self.start._functional.leaves)):
            for batch in self.held:
                if path := _first_not_finite(self.exact, leaves, batch.data):
                    return (
                        f"The loss is {loss} before the first step: the output of {path} is infinite or NaN in the {name} "
                        "network on a held-out batch. Replace such values in the data, or scale the model's inputs down."
                    )
        return (
            f"The loss is {loss} before the first step, although the outputs of all layers are finite: outputs of the "
            "network are infinite or NaN in one of the two networks. Compare others, by a function as loss."
        )


def _check_start(quantized, given: Functional):
    """Raises for a result that is not of this network, or whose codes are not on their grids."""
    if not isinstance(quantized, Quantized):
        raise ValueError(f"learn starts from the result of jpfq.quantize; got {type(quantized).__name__}.")
    own, shapes = quantized._functional, lambda network: list(map(jnp.shape, network.leaves))
    if own.paths != given.paths or shapes(own) != shapes(given):
        wrong = sorted(set(own.paths) ^ set(given.paths)) or [
            path for path, a, b in zip(own.paths, shapes(own), shapes(given), strict=True) if a != b
        ]
        raise ValueError(
            f"The float network is not the one that was quantized: they differ in {', '.join(wrong[:5]) or 'the order'}. "
            "Give the model and the variables or params that jpfq.quantize was given."
        )
    for path, tensor in quantized.tensors.items():
        lo, hi, *_ = tensor.grid.alphabet()
        if tensor.codes.size and not (lo <= int(tensor.codes.min()) and int(tensor.codes.max()) <= hi):
            raise ValueError(
                f"The codes of {path} run from {tensor.codes.min()} to {tensor.codes.max()}, beyond those of {tensor.grid}, "
                f"{lo} to {hi}: learn from a result as jpfq.quantize or jpfq.load returns it."
            )


def _first_not_finite(network: Functional, leaves, data) -> str | None:
    """The path of the first kernel whose product with data is not finite."""
    program = trace(network.fn, network.paths, leaves, data)
    paths = {site.index: site.path for site in find_sites(program)[0]}

    @jax.jit
    def flags(leaves, inputs):
        found = {}

        def visit(index, eqn, values):
            out = bind(eqn, values)
            if index in paths:
                found[index] = jnp.isfinite(out[0]).all()
            return out

        evaluate(program, leaves, inputs, visit)
        return found

    found = flags(list(leaves), jax.tree.leaves(data))
    return next((paths[index] for index in sorted(found) if not found[index]), None)


def _say(line: str, progress: bool | None):
    if progress is None:
        LOG.info(line)
    elif progress:
        print(line, file=sys.stderr, flush=True)
