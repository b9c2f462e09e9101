"""Random numbers in a model: a check that their keys come from the batch, so that both networks see the same noise.

That is so in a VAE or a diffusion model. A key that is a constant or part of the model's state means that dropout, or
another kind of training noise, was left on. The check follows every key through the program.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from .compat import PRODUCTS, inner_jaxprs, is_literal, opened, scan_arity

DRAWS = {  # primitives, and the operands that make up the key
    "random_bits": slice(1),
    "random_gamma": slice(1),
    "rng_bit_generator": slice(1),
    "threefry2x32": slice(None),
    "rng_uniform": slice(0),  # has a hidden state
}
BATCH, LAYER = "batch", "layer"  # a variable may depend on these, and on paths of the model's state
Sources = frozenset


def check_random_keys(equations: Iterable, keys: dict[Any, str], inputs: Iterable) -> None:
    """Raises if random numbers are drawn with a key that does not come from the batch.

    Args:
        keys: by variable, the paths of the model's leaves that may be random keys.
        inputs: variables of the batch.
    """
    sources = {v: Sources({BATCH}) for v in inputs} | {v: Sources({("state", path)}) for v, path in keys.items()}
    _follow(equations, sources)


def _follow(equations, sources: dict):
    """Adds the sources of every variable that the equations define."""
    for eqn in equations:
        operands = [Sources() if is_literal(v) else sources.get(v, Sources()) for v in eqn.invars]
        if eqn.primitive.name in DRAWS:
            _check(eqn.primitive.name, Sources().union(*operands[DRAWS[eqn.primitive.name]]))
        sources.update(zip(eqn.outvars, _through(eqn, operands), strict=True))


def _through(eqn, given: list) -> list:
    """The sources that the outputs of an equation depend on."""
    bodies, name = inner_jaxprs(eqn), eqn.primitive.name
    every = Sources().union(*given)
    if name == "scan":
        first, carries = scan_arity(eqn)
        run = lambda state: _run(bodies[0], [*given[:first], *state, *given[first + carries :]])
        return _loop(run, given[first : first + carries])
    if name == "while":
        cond, body = (eqn.params[name] for name in ("cond_jaxpr", "body_jaxpr"))
        carries = len(eqn.outvars)
        of_cond, of_body = (len(opened(x)[0].invars) - carries for x in (cond, body))
        _run(cond, [*given[:of_cond], *given[of_cond + of_body :]])
        run = lambda state: _run(body, [*given[of_cond : of_cond + of_body], *state])
        return _loop(run, given[of_cond + of_body :])
    if name == "cond":
        branches = zip(*(_run(body, given[1:]) for body in bodies), strict=True)
        return [given[0].union(*found) for found in branches]
    for body in bodies:
        jaxpr = opened(body)[0]
        if len(bodies) == 1 and (len(jaxpr.invars), len(jaxpr.outvars)) == (len(given), len(eqn.outvars)):
            return _run(body, given)
        _run(body, [every] * len(jaxpr.invars))
    made = every | {LAYER} if bodies or name in PRODUCTS else every
    return [made] * len(eqn.outvars)


def _run(body, given: Sequence) -> list:
    """The sources that the outputs of a jaxpr depend on."""
    jaxpr = opened(body)[0]
    sources = dict(zip(jaxpr.invars, given, strict=True))
    _follow(jaxpr.eqns, sources)
    return [Sources() if is_literal(v) else sources.get(v, Sources()) for v in jaxpr.outvars]


def _loop(run, state: list) -> list:
    """The sources of the outputs of a loop whose body takes and returns its state first."""
    while True:
        out = run(state)
        grown = [a | b for a, b in zip(state, out, strict=False)]
        if grown == state:
            return [*state, *out[len(state) :]]
        state = grown


def _check(name, sources):
    paths = sorted(source[1] for source in sources if isinstance(source, tuple))
    if LAYER in sources:
        raise ValueError(
            f"The model draws random numbers ({name}) with a key that depends on the output of a layer, so the float and "
            "the quantized network would see different noise. Take it from the batch: model(x, key), with batches (x, key)."
        )
    if paths or BATCH not in sources:
        origin = f" from '{paths[0]}'" if paths else ""
        raise ValueError(
            f"The model draws random numbers{origin} ({name}), as dropout does in training. Switch it off: pass "
            "deterministic=True or train=False (Linen), call model.eval() (NNX), or remove the noise from the function. If "
            "the noise is part of the model, take its key from the batch: model(x, key), with batches (x, key)."
        )
