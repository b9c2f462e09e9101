"""Every public name is documented: with an example that runs, and with all of its arguments. So is the theory.

The examples take for granted the names that the docstring of `jpfq` makes; each starts from those, in a folder of its own.
"""

import dataclasses
import doctest
import importlib.util
import inspect
import re
import types
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
import jpfq.matrix
from tests.helpers import assert_close, problem

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SLOTS = ("scale", "order", "prepare", "rounding", "finish", "damping")  # of a rule, and the namespaces of their choices
SPACES = (*SLOTS, "formats", "paper", "ranges", "patches", "embed", "hub", "plot")  # what `jpfq` offers one level down
SHOWN = (  # classes whose methods are examples of their own
    jpfq.Gram,
    jpfq.QTensor,
    jpfq.Packed,
    jpfq.Quantized,
    jpfq.Space,
    jpfq.Sweep,
    jpfq.RandomFourierFeatures,
    jpfq.BinaryEmbedding,
    jpfq.embed.Embedding,
    jpfq.embed.SparseGaussian,
    jpfq.embed.FJLT,
    jpfq.embed.SigmaDelta,
    jpfq.hub.Checkpoint,
)
INNER = {  # public to the rest of the package, or an override of what is documented elsewhere
    *("Gram.permute", "Gram.split", "Gram.excess", "QTensor.turned", "QTensor.at"),
    *("RandomFourierFeatures.measure", "BinaryEmbedding.measure", "Embedding.measure"),
    *("SigmaDelta.filter", "SigmaDelta.run"),
}
HELP = {"plot.given_or_new", "plot.Swept"}  # what jpfq.plot needs itself
SLOW = {
    "budget",
    "certify",
    "fake_quant",
    "learn",
    "Learned",
    "plot.accumulators",
    "Certificate",
    "prepare.MalySaab",
    "verify",
    "Verified",
    "Bounding",
    "predicts_alike",
}  # programs of their own, which the README or other tests run as well
NEEDS = {
    "Sweep.frame": "pandas",
    "Sweep.picture": "matplotlib",
    "Quantized.report": "matplotlib",
    "Quantized.to_qwix": "qwix",
}


def names_of(space):
    """The public names of `jpfq` or one of the modules it offers."""
    if space in (jpfq, jpfq.embed, jpfq.hub, *(getattr(jpfq, slot) for slot in SLOTS)):  # which list them
        return [name for name, x in vars(space).items() if name[0] != "_" and not isinstance(x, types.ModuleType)]
    home = "jpfq.report.result_plots" if space is jpfq.plot else space.__name__
    return [name for name, x in vars(space).items() if name[0] != "_" and getattr(x, "__module__", "") == home]


def methods_of(cls):
    """Methods that a class writes itself and does not mean for the rest of the package alone."""
    for name, x in vars(cls).items():
        x = x.__func__ if isinstance(x, classmethod) else x
        if name[0] != "_" and isinstance(x, types.FunctionType) and f"{cls.__name__}.{name}" not in INNER:
            yield f"{cls.__name__}.{name}", x


def public():
    """Everything public by its name."""
    found = {name: getattr(jpfq, name) for name in names_of(jpfq)}
    for space in SPACES:
        module = getattr(jpfq, space)
        found |= {
            f"{space}.{name}": getattr(module, name) for name in names_of(module) if f"{space}.{name}" not in HELP
        }
    for cls in SHOWN:
        found |= dict(methods_of(cls))
    return found


PUBLIC = public()
CALLED = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x) or hasattr(x, "__wrapped__")}
CLASSES = {name: x for name, x in PUBLIC.items() if inspect.isclass(x)}


def listed(doc):
    """The names that the section Args explains, alone or together."""
    section = re.search(r"^Args:\n((?: +.*\n?|\n)+)", doc, re.MULTILINE)
    lines = section[1].splitlines() if section else []
    heads = (re.match(r" {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", line) for line in lines)
    return {name.strip("* ") for head in heads if head for name in head[1].split(",")}


@pytest.fixture(scope="module")
def names():
    """What examples take for granted, made by the docstring that says so."""
    made: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_runs("jpfq", jpfq.__doc__, made)
    return made


def assert_runs(name, doc, names):
    """Runs the examples of a docstring and compares what they print; leaves in `names` what they define."""
    test = doctest.DocTestParser().get_doctest(doc, names, name, name, 0)
    found: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=found.append, clear_globs=False)
    names |= test.globs
    assert test.examples, f"{name} has no example"
    assert not found, "".join(found)


@pytest.mark.filterwarnings("ignore:'VariableState' was removed")  # which qwix still asks for
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PUBLIC])
def test_its_example_runs(name, names, tmp_path, monkeypatch, request):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    monkeypatch.chdir(tmp_path)
    if name == "cache_compilations":
        request.getfixturevalue("cache_settings")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_runs(name, own_doc(PUBLIC[name]), dict(names))


def test_the_page_of_theory_runs(names):
    """Its loop in a few lines makes the codes that `solve` makes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_runs("jpfq.matrix", jpfq.matrix.__doc__, dict(names))


@pytest.mark.parametrize(
    ("method", "A", "L"),
    [
        (jpfq.MSQ(), "W", "0"),
        (jpfq.GPFQ(), "D^-1 tril(G) W", "D^-1 stril(H)"),
        (jpfq.UNI(2.0), "W + (c D)^-1 stril(G) W", "(c D)^-1 stril(H)"),
        (jpfq.OPTQ(), "T W", "T - I"),
        (jpfq.QEP(0.5), "T (W + alpha (H + lam I)^-1 C W)", "T - I"),
        (jpfq.Qronos(), "W* = (H + lam I)^-1 (G + lam I) W", "T - I"),
        (jpfq.Qronos(exact=True), "w_1 + C_1 W / H_11", "T - I"),
        (jpfq.GPTAQ(0.5), "M^-T W", "-(N M^-1)^T"),
    ],
    ids=lambda x: x if isinstance(x, str) else str(type(x).__name__),
)
def test_the_table_of_methods_is_what_they_compute(method, A, L, x64):
    """In NumPy, straight from the formulas of the page."""
    doc = jpfq.matrix.__doc__ or ""
    assert f"`{A}`" in doc
    assert f"`{L}`" in doc
    X, Xq, W = problem(m=100, n=12, out=3, drift=0.3)
    H, C, stril, triu, inv = (
        Xq.T @ Xq,
        Xq.T @ (X - Xq),
        lambda M: np.tril(M, -1),
        lambda M: np.triu(M, 1),
        np.linalg.inv,
    )
    G, D, I, c, alpha = H + C, np.diag(np.diag(H)), np.eye(12), 2.0, 0.5
    lam = 0.01 * np.diag(H).mean()
    V = np.linalg.cholesky((H + lam * I)[::-1, ::-1])[::-1, ::-1]
    T, U, best = (V @ inv(np.diag(np.diag(V)))).T, inv(V), inv(H + lam * I) @ (G + lam * I) @ W
    N = triu(inv(np.diag(np.diag(U))) @ U)
    M = I + N - triu(alpha * triu(C.T @ U.T) @ U)
    formulas = {
        "W": lambda: W,
        "0": lambda: 0 * H,
        "D^-1 tril(G) W": lambda: inv(D) @ np.tril(G) @ W,
        "D^-1 stril(H)": lambda: inv(D) @ stril(H),
        "W + (c D)^-1 stril(G) W": lambda: W + inv(c * D) @ stril(G) @ W,
        "(c D)^-1 stril(H)": lambda: inv(c * D) @ stril(H),
        "T W": lambda: T @ W,
        "T - I": lambda: T - I,
        "T (W + alpha (H + lam I)^-1 C W)": lambda: T @ (W + alpha * inv(H + lam * I) @ C @ W),
        "W* = (H + lam I)^-1 (G + lam I) W": lambda: T @ best,
        "w_1 + C_1 W / H_11": lambda: np.vstack([W[0] + C[0] @ W / H[0, 0], (T @ best)[1:]]),
        "M^-T W": lambda: inv(M).T @ W,
        "-(N M^-1)^T": lambda: -(N @ inv(M)).T,
    }
    system = method(jnp.asarray(W), jpfq.Gram.from_data(jnp.asarray(X), jnp.asarray(Xq)))
    assert_close(system.A, formulas[A]())
    assert_close(jnp.zeros((12, 12)) if system.L is None else system.L, formulas[L]())


@pytest.mark.parametrize("name", CALLED)
def test_all_arguments_are_explained(name):
    taken = [p for p in inspect.signature(CALLED[name]).parameters if p not in ("self", "cls")]
    assert [p for p in taken if p not in listed(own_doc(CALLED[name]))] == []


@pytest.mark.parametrize("name", CLASSES)
def test_all_fields_are_named(name):
    """In the docstring, or in a comment beside the field."""
    cls = CLASSES[name]
    source = inspect.getsource(cls)
    taken = (
        [f.name for f in dataclasses.fields(cls) if f.init and f.name[0] != "_"]
        if dataclasses.is_dataclass(cls)
        else []
    )
    named = lambda f: re.search(rf"\b{f}\b", own_doc(cls)) or re.search(rf"^    {f}:.*#", source, re.MULTILINE)
    assert [f for f in taken if not named(f)] == []


def own_doc(x):
    """The docstring that is written there: none that a class inherits, or that `dataclass` makes of its fields."""
    doc = inspect.cleandoc(vars(x).get("__doc__") or "") if inspect.isclass(x) else inspect.getdoc(x)
    assert doc, "it has no docstring"
    assert not (inspect.isclass(x) and doc.startswith(f"{x.__name__}(")), "its docstring is its signature"
    return doc


@pytest.mark.parametrize("cls", SHOWN, ids=lambda cls: cls.__name__)
def test_properties_say_what_they_are(cls):
    properties = {n: x for n, x in vars(cls).items() if n[0] != "_" and isinstance(x, property | cached_property)}
    assert [n for n in properties if not inspect.getdoc(getattr(cls, n))] == []


def test_what_is_meant_for_others_exists():
    """A name in INNER, SLOW or NEEDS that nobody has any more would hide nothing."""
    methods = {f"{cls.__name__}.{name}" for cls in SHOWN for name in vars(cls)}
    assert set(INNER) <= methods
    assert all(hasattr(jpfq.plot, name.removeprefix("plot.")) for name in HELP)
    assert set(NEEDS) | SLOW <= set(PUBLIC)
    assert {"quantize", "GPFQ", "paper.rtn", "ranges.Max", "patches.All", "embed.pack", "Gram.update"} <= set(PUBLIC)
    assert not {"Any", "paper.AbsMax", "ranges.Grid", "matrix"} & set(PUBLIC)


@pytest.mark.parametrize(
    ("doc", "complaint"),
    [
        ("Says nothing.", "has no example"),
        (">>> 1 + 1\n3", "Expected"),
        (">>> 1 + 1", "Expected nothing"),
        (">>> undefined", "NameError"),
    ],
)
def test_the_check_itself_sees(doc, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert_runs("x", doc, {})


def test_the_list_of_arguments_is_read():
    doc = "It.\n\nArgs:\n    a, b: two.\n        c: no argument.\n    **more: others.\n\nReturns:\n    d: none."
    assert listed(doc) == {"a", "b", "more"}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("AbsMax", "scale.AbsMax"),
        ("PerGroup", "scale.PerGroup"),
        ("Descend", "finish.Descend"),
        ("GPTQ", "OPTQ"),
        ("RTN", "MSQ"),
    ],
)
def test_a_name_from_elsewhere_leads_here(name, place):
    with pytest.raises(AttributeError, match=rf"jpfq has no {name}: take jpfq\.{place}\."):
        getattr(jpfq, name)


def test_a_name_that_is_nowhere_is_missing():
    assert not hasattr(jpfq, "_nothing")
    with pytest.raises(AttributeError, match=r"jpfq has no nothing\.$"):
        _ = jpfq.nothing
