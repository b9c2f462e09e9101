"""The report: a page that is whole, asks nothing of any network, escapes what it shows, and shows what the result says."""

import base64
import dataclasses
import hashlib
import html.parser
import importlib.util
import os
import re
import sys
import types

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

import jpfq
from jpfq.calibrate.activation import ActivationQuantizer
from jpfq.matrix.layout import DotLayout
from jpfq.report import report as report_module
from jpfq.scalar import ScaledGrid
from jpfq.study.compare import Trial
from tests.network.saved import reached, result, tensor

NASTY = "a/<script>alert('1')</script>&amp;\"'"
VOID = {"meta", "link", "br", "wbr"}


def linear(params, x):
    return sum(x @ w for w in params.values())


def layout(n, out):
    return DotLayout((n, out), (0,), (), (1,), (), False)


def example():
    """Kernels of many kinds; figures by hand."""
    tensors = {
        "first": tensor((12, 4), (3, 4), jpfq.Asymmetric(4), seed=1),
        "wide": tensor((12, 6), (1, 6), jpfq.Integer(12), seed=2),
        NASTY: tensor((12, 4), (1, 4), jpfq.Integer(4), jnp.bfloat16, seed=3),
        "turned": tensor((16, 5), (1, 1), jpfq.Ternary(), seed=4, rotated=(jpfq.Hadamard(3), layout(16, 5))),
        "signs": tensor((3, 8, 4), (3, 1, 4), jpfq.Binary(), seed=5),
        "free": tensor((8, 4), (1, 4), jpfq.Infinite(), seed=6),
    }
    bias = {"bias": jnp.ones(100)}
    quantized = result(linear, tensors, params=bias | {name: jnp.ones(t.shape, t.dtype) for name, t in tensors.items()})
    reach = reached(15, 4, (1, 3, 4))
    levels = ScaledGrid(*(jnp.asarray(x, jnp.float32) for x in ([0.5], [2.0], 0, 255)))
    inputs = [
        ActivationQuantizer(jpfq.Activations(), layout(12, 4), levels),
        ActivationQuantizer(jpfq.Activations(jpfq.Integer(8), per="row"), layout(12, 4), None),
    ]
    return dataclasses.replace(
        quantized,
        info=quantized.info | {NASTY: dataclasses.replace(quantized.info[NASTY], reach=reach)},
        skipped={"b/<i>norm": "a reason with <b> & 'quotes'"},
        inputs={"first": inputs},
        biases=("<u>bias",),
    )


RECORDS = [
    {"bits": b, "what": "<em>", "loss": loss, "output_error": 0.1, "bits_per_weight": b + 0.25, "nbytes": 10}
    for b, loss in ((2, 0.5), (3, 0.75), (4, 0.125))
]
SWEPT = types.SimpleNamespace(records=RECORDS, front=[0, 2])  # what a page takes of a sweep


class Page(html.parser.HTMLParser):
    """A page's elements, texts and table rows; raises where an element is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.texts, self.scripts, self.styles = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["script"], ["style"]):
            (self.scripts if self.open[-1] == "script" else self.styles).append(data)
        else:
            self.texts.append(data)
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data

    @property
    def text(self):
        return "".join(self.texts)

    def of(self, name):
        return [attributes for tag, attributes, _ in self.elements if tag == name]


@pytest.fixture(scope="module")
def quantized():
    return example()


@pytest.fixture(scope="module")
def written(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "r.html"
    assert quantized.report(path, params=quantized.params, sweep=SWEPT, title="A <title>") == path
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_asks_for_nothing(written):
    page = Page(written)
    assert written.startswith("<!doctype html>")
    assert "http:" not in written
    assert "https:" not in written
    assert "@import" not in written
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    referred = set(re.findall(r"url\(([^)]*)\)", written))
    for _, attributes, _ in page.elements:
        assert not attributes.keys() & {"src", "xlink:href", "srcset", "action", "data", "poster", "background"}
        assert not [name for name in attributes if name.startswith("on")]
        referred |= {attributes["href"]} if "href" in attributes else set()
    assert referred - {"data:,"} == {"#" + name for name in ids}


def test_names_are_never_markup(written):
    page = Page(written)
    assert len(page.of("script")) == len(page.of("style")) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = next(m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy  # that script runs and no other, whatever is on the page
    assert "default-src 'none'" in policy
    assert not page.of("em") + page.of("i") + page.of("u")
    assert "A <title>" in page.text
    assert NASTY in page.text
    label = [svg["aria-label"] for svg in page.of("svg") if NASTY in svg["aria-label"]]
    assert label == [f"Codes of {NASTY} over its levels"]


def test_everything_is_on_the_page(quantized, written):
    page = Page(written)
    for path in quantized.tensors:
        assert page.text.count(path) >= 2  # in the table and beside its histogram
    for path, reason in quantized.skipped.items():
        assert [path, reason] in page.rows
    assert "<u>bias" in page.text
    assert len(page.of("svg")) == 4 + len(quantized.tensors) + 1 + 1  # the depth, histograms, accumulators, the sweep
    for name in ("jpfq", "jax", "flax", "matplotlib"):
        assert f"{name} {importlib.metadata.version(name)}" in page.text


def test_figures_are_those_of_the_result(quantized, written):
    page = Page(written)
    head = next(row for row in page.rows if row[:2] == ["#", "kernel"])
    table = {row[1]: dict(zip(head, row)) for row in page.rows if len(row) == len(head) and row != head}
    assert list(table) == list(quantized.tensors)
    for number, (path, info) in enumerate(quantized.info.items(), 1):
        row, own = table[path], quantized.tensors[path]
        assert (row["#"], row["grid"], row["shape"]) == (str(number), str(own.grid), "x".join(map(str, own.shape)))
        figures = {
            "bits": own.bits_per_weight,
            "entropy": info.entropy,
            "error, %": 100 * info.relative_error,
            "floor, %": 100 * info.relative_floor,
            "saturated, %": 100 * info.saturation,
            "zeros, %": 100 * info.sparsity,
        }
        for name, value in figures.items():
            assert abs(float(row[name]) - float(value)) <= 0.005 + 1e-6, name
        assert (row["dead inputs"], row["bytes"]) == ("3", f"{own.nbytes:,}")
    reach = quantized.info[NASTY].reach
    sums = next(row for row in page.rows if row[1] == NASTY and len(row) == 8)
    most = reach.types_bits(jpfq.Integer(4), 12)
    figures = map(str, (15, 4, reach.bits, most, reach.outer_bits))
    assert sums == ["3", NASTY, *figures, f"{int(reach.ends.max()):,}"]
    assert table[NASTY]["bits of sums"] == f"{reach.bits} of 15"
    assert ["1", "first, use 1", "Asymmetric(8)", "tensor", "0.5", "-1", "126.5"] in page.rows
    assert ["1", "first, use 2", "Integer(8)", "row", "taken from the row", "", ""] in page.rows
    assert ["*", "2", "<em>", "0.5", "0.1", "2.25", "10"] in page.rows
    assert ["", "3", "<em>", "0.75", "0.1", "3.25", "10"] in page.rows
    before = sum(t.codes.size * t.dtype.itemsize for t in quantized.tensors.values())
    part, whole = quantized.nbytes / before, (quantized.nbytes + 400) / (before + 400)  # with the bias
    sizes = {path: t.codes.size for path, t in quantized.tensors.items()}
    mean = sum(float(quantized.info[path].entropy) * n for path, n in sizes.items()) / sum(sizes.values())
    cards = {
        "Kernels quantized": ["6", "1 left as they are"],
        "Bits per weight": [f"{quantized.bits_per_weight:.2f}", f"steps included; entropy {mean:.2f}"],
        "Size of the kernels": [
            f"{quantized.nbytes} bytes",
            f"{part:.3f} of the {before / 1e3:.3g} kB before; "
            f"the whole network {whole:.3f} of {(before + 400) / 1e3:.3g} kB",
        ],
        "Error of the outputs": ["12.50 %", "on the calibration data"],
    }
    for title, shown in cards.items():
        at = page.texts.index(title)
        assert page.texts[at + 1 : at + 3] == shown


def test_pictures_take_their_colours_from_the_page(written):
    svgs = re.findall(r"<svg.*?</svg>", written)
    assert all("var(--" in svg for svg in svgs)
    assert not re.search("#[0-9a-f]{3,8}\\b|rgb", "".join(svgs).replace('href="#', ""))
    names = set(re.findall(r"var\((--[a-z]+)\)", written))
    by_day, by_night = re.findall(r":root \{([^}]*)\}", written)
    defined = [set(re.findall("(--[a-z]+):", part)) for part in (by_day, by_night)]
    assert names - {"--share"} <= defined[0]
    assert defined[0] == defined[1]


@pytest.mark.slow
def test_the_readers_own_style_changes_nothing(quantized, written, tmp_path):
    """And the same result makes the same page, to the byte."""
    with plt.style.context("dark_background"), matplotlib.rc_context({"font.size": 30, "xtick.direction": "in"}):
        quantized.report(tmp_path / "r.html", params=quantized.params, sweep=SWEPT, title="A <title>")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == written


@pytest.mark.slow
def test_a_loaded_result_makes_the_same_page_and_one_without_kernels_a_page(quantized, written, tmp_path):
    quantized.save(tmp_path / "saved")
    loaded = jpfq.load(tmp_path / "saved")
    path = loaded.report(tmp_path / "l.html", params=quantized.params, sweep=SWEPT, title="A <title>")
    assert path.read_text(encoding="utf-8") == written
    assert "Accumulators" in Page(written).text
    page = Page(loaded.report(tmp_path / "p.html").read_text(encoding="utf-8"))
    assert "With params=" in page.text
    empty = dataclasses.replace(quantized, tensors={}, info={}, inputs={}, biases=())
    page = Page(empty.report(tmp_path / "e.html").read_text(encoding="utf-8"))
    assert not page.of("svg")
    assert list(quantized.skipped) == [row[0] for row in page.rows[1:]]


def test_after_training_the_error_is_unknown(quantized, tmp_path):
    tuned = dataclasses.replace(quantized, output_error=float("nan"))
    page = Page(tuned.report(tmp_path / "t.html").read_text(encoding="utf-8"))
    assert "trained afterwards" in page.text
    assert "unknown" in page.text
    assert "nan" not in page.text


@pytest.mark.slow
def test_hundreds_of_kernels(quantized, tmp_path, monkeypatch):
    """The worst are seen at once, some are folded, and the page stays small."""
    monkeypatch.setattr(report_module, "DRAWN", 20)
    kinds = list(quantized.tensors)
    names = {f"layers_{i}/kernel": kinds[i % len(kinds)] for i in range(300)}
    many = dataclasses.replace(
        quantized,
        tensors={name: quantized.tensors[kind] for name, kind in names.items()},
        info={
            name: dataclasses.replace(quantized.info[kind], square_error=jnp.asarray(float(i)), energy=jnp.asarray(1.0))
            for i, (name, kind) in enumerate(names.items())
        },
        inputs={},
        biases=(),
    )
    text = many.report(tmp_path / "m.html").read_text(encoding="utf-8")
    page = Page(text)
    shown = [
        inside
        for tag, attributes, inside in page.elements
        if tag == "svg" and "over its levels" in attributes["aria-label"]
    ]
    assert ["details" in inside for inside in shown] == [False] * 12 + [True] * 8
    labels = [svg["aria-label"] for svg in page.of("svg") if "over its levels" in svg["aria-label"]]
    assert labels == [f"Codes of layers_{i}/kernel over its levels" for i in range(299, 279, -1)]
    assert "The next 8 kernels of 288" in page.text
    histograms = re.findall(r'<svg[^>]*over its levels".*?</svg>', text)
    assert len(text) - sum(map(len, histograms)) + 200 * max(map(len, histograms)) < 3_000_000  # drawn as many as ever


def test_a_report_appears_whole_or_not_at_all(quantized, tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    empty = dataclasses.replace(quantized, tensors={}, info={}, inputs={})
    empty.report(path)
    old = path.read_bytes()

    def full(handle):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            empty.report(path, title="new", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert path.read_bytes() == old
    with open(path, "rb") as held:  # by whoever looks at the old one meanwhile
        empty.report(path, title="new", overwrite=True)
        assert held.read() == old
    assert b"<title>new</title>" in path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_bad_input_is_refused_before_any_work(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "html", None)  # the work
    (tmp_path / "there.html").write_text("kept")
    (tmp_path / "folder.html").mkdir()
    params = dict(quantized.params)
    wrong = [
        ({"path": tmp_path}, "is a folder: name a file"),
        ({"path": tmp_path / "folder.html"}, "is a folder"),
        ({"path": tmp_path / "r.pdf"}, "an .html file; got 'r.pdf'"),
        ({"path": tmp_path / "absent" / "r.html"}, "no folder .*absent"),
        ({"path": tmp_path / "there.html"}, "overwrite=True"),
        ({"title": 3}, "title is a string; got 3"),
        ({"sweep": [1]}, "sweep is the result of jpfq.sweep"),
        ({"params": {"params": params}}, r"no leaf 'first'.*got params/"),
        ({"params": params | {"wide": jnp.ones(3)}}, r"wide must have shape \(12, 6\); got \(3,\)"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            quantized.report(**{"path": tmp_path / "r.html"} | given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jpfq\[demo\]'"):
        quantized.report(tmp_path / "r.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html", "there.html"]
    assert (tmp_path / "there.html").read_text() == "kept"


def axes():
    return Figure().subplots()


def heights(patch):
    """Of bars that are one shape."""
    values, edges, _ = patch.get_data()
    assert not values[1::2].any()
    return values[::2], (edges[::2] + edges[1::2]) / 2


def test_pictures_along_the_depth_hold_the_figures(quantized):
    numbers = np.arange(1, 7)
    infos, tensors = list(quantized.info.values()), list(quantized.tensors.values())
    ax = axes()
    assert jpfq.plot.errors(quantized, ax) is ax
    for line, name in zip(ax.lines, ("relative_error", "relative_floor"), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), numbers)
        np.testing.assert_allclose(line.get_ydata(), [100 * float(getattr(info, name)) for info in infos])
    ax = jpfq.plot.bits(quantized, axes())
    for found, expected in zip(heights(ax.patches[0]), ([t.bits_per_weight for t in tensors], numbers), strict=True):
        np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [float(info.entropy) for info in infos])
    ax = jpfq.plot.sizes(quantized, axes())
    assert ax.get_ylabel() == "kB"
    np.testing.assert_allclose(heights(ax.patches[0])[0], [t.codes.size * t.dtype.itemsize / 1e3 for t in tensors])
    np.testing.assert_allclose(heights(ax.patches[1])[0], [t.nbytes / 1e3 for t in tensors])
    ax = jpfq.plot.saturation(quantized, axes())
    np.testing.assert_allclose(heights(ax.patches[0])[0], [100 * float(info.saturation) for info in infos])
    ax, reach = jpfq.plot.accumulators(quantized, axes()), infos[2].reach
    shown = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    any_codes = jpfq.datatype_bits(4, jpfq.Integer(4), (0, 255))
    assert shown == {"of any codes": ([3], [any_codes]), "asked for": ([3], [15]), "needed": ([3], [reach.bits])}


@pytest.mark.parametrize("path", ["first", NASTY, "signs", "wide", "free"])
def test_a_histogram_counts_codes_and_float_weights(quantized, path):
    own = quantized.tensors[path]
    codes = np.asarray(own.codes)
    repeats = [a // b for a, b in zip(own.shape, own.step.shape, strict=True)]
    step, zero = (np.kron(np.asarray(x), np.ones(repeats)) for x in (own.step, own.zero))
    weights = np.asarray(np.random.default_rng(1).normal(0, 3, own.shape) * step, np.float32)
    ax = jpfq.plot.histogram(own, jnp.asarray(weights).astype(own.dtype), axes())
    bars, line = ax.patches
    lo, hi, *_ = own.grid.alphabet()
    if path in ("wide", "free"):  # of many levels several share a bar, from the least code to the largest
        values, edges, _ = bars.get_data()
        values, lower, upper = values[::2], edges[::2], edges[1::2]
        assert len(values) <= 64
        np.testing.assert_allclose(lower[1:], upper[:-1])
        assert lower[0] == codes.min() - 0.5
        shares = [100 * np.mean((a < codes) & (codes < b)) for a, b in zip(lower, upper)]
        np.testing.assert_allclose(values * (upper - lower), shares)
    else:
        levels = np.arange(lo, hi + 1)
        np.testing.assert_allclose(heights(bars)[0], [100 * (codes == k).mean() for k in levels])
        np.testing.assert_allclose(heights(bars)[1], levels)
    values, edges, _ = line.get_data()
    given = np.asarray(jnp.asarray(weights).astype(own.dtype), np.float64)
    expected, _ = np.histogram(np.clip(given / step + zero, edges[0], edges[-1]), edges)
    share = np.diff(edges)[0]
    if path in ("wide", "free"):
        lo, hi = codes.min(), codes.max()
    margin = max(1, (hi - lo + 1) // 4)  # what is shown beyond the grid, where there are weights
    ends = np.clip([(given / step + zero).min(), (given / step + zero).max()], lo - 0.5 - margin, hi + 0.5 + margin)
    np.testing.assert_allclose(edges[[0, -1]], [min(ends[0], lo - 0.5), max(ends[1], hi + 0.5)], rtol=1e-5)
    near = np.abs(np.cumsum(values * share) / 100 - np.cumsum(expected) / given.size)
    assert near.max() <= 1.01 / given.size  # one may lie at an edge
    np.testing.assert_allclose((values * share).sum(), 100)


def test_a_histogram_of_a_rotated_kernel_turns_the_weights(quantized):
    """Dequantized, they lie on the levels: each bin holds one level or none."""
    own = quantized.tensors["turned"]
    ax = jpfq.plot.histogram(own, own.dequantize(), axes())
    bars, line = ax.patches
    values, edges, _ = line.get_data()
    held = [100 * (np.asarray(own.codes) == k).mean() for k in (-1, 0, 1)]
    np.testing.assert_allclose(heights(bars)[0], held)
    found = [values[(k - 0.25 < edges[:-1]) & (edges[1:] < k + 0.25)].sum() * np.diff(edges)[0] for k in (-1, 0, 1)]
    np.testing.assert_allclose(found, held)


def test_a_histogram_of_a_table_puts_weights_at_their_codes():
    """Levels are at distances of their own, and codes are not: weights that lie on levels lie under the bars."""
    own = tensor((16, 5), (1, 5), jpfq.E2M1(), seed=9)
    ax = jpfq.plot.histogram(own, own.dequantize(), axes())
    bars, line = ax.patches
    values, edges, _ = line.get_data()
    held = [100 * (np.asarray(own.codes) == k).mean() for k in range(15)]
    np.testing.assert_allclose(heights(bars)[0], held)
    found = [values[(k - 0.25 < edges[:-1]) & (edges[1:] < k + 0.25)].sum() * np.diff(edges)[0] for k in range(15)]
    np.testing.assert_allclose(found, held)


def test_the_front_and_scores():
    ax = jpfq.plot.front(SWEPT, axes())
    points = [(r["bits_per_weight"], r["loss"]) for r in RECORDS]
    assert [tuple(p) for p in ax.lines[0].get_xydata()] == points
    assert [tuple(p) for p in ax.lines[1].get_xydata()] == [points[0], points[2]]
    trials = [
        Trial("m", jpfq.Integer(b), method, score, b, 1, 1, 0.1, 1.0, [], {}, "")
        for b, method, score in ((4, "GPFQ", 90.0), (2, "GPFQ", 70.0), (2, "MSQ", 50.0), (3, "MSQ", None))
    ]
    ax = jpfq.plot.scores(trials, 91.5, axes())
    shown = {line.get_label(): [tuple(p) for p in line.get_xydata()] for line in ax.lines[:2]}
    assert shown == {"GPFQ": [(2, 70), (4, 90)], "MSQ": [(2, 50)]}
    assert set(ax.lines[2].get_ydata()) == {91.5}


def test_axes_are_made_where_none_are_given(quantized, monkeypatch):
    assert jpfq.plot.errors(quantized).figure in map(plt.figure, plt.get_fignums())
    with pytest.raises(ValueError, match=r"ax must be matplotlib axes.*got 'no'"):
        jpfq.plot.bits(quantized, "no")
    own = quantized.tensors["first"]
    with pytest.raises(ValueError, match=r"shape \(12, 4\); got \(3,\)"):
        jpfq.plot.histogram(own, jnp.ones(3), axes())
    with pytest.raises(ValueError, match="NaN"):
        jpfq.plot.histogram(own, jnp.full((12, 4), jnp.nan), axes())
    bare = dataclasses.replace(quantized, tensors={"first": own})
    with pytest.raises(ValueError, match=r"accumulator=.*jpfq\.certify"):
        jpfq.plot.accumulators(bare, axes())
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ValueError, match=r"pip install 'jpfq\[demo\]'"):
        jpfq.plot.errors(quantized)
