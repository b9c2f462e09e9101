"""What is said of servers: the facts that were read, alike of a plan and its result, and no promise that export breaks."""

import dataclasses
import re
from importlib.util import find_spec

import flax.linen as nn
import jax
import pytest

import jpfq
from jpfq.export.awq import awq
from jpfq.network.servers import FACTS, Exported, form_of, loads_file, verdict

DYNAMIC_INT8 = jpfq.Activations(jpfq.Integer(8), per="row")
DYNAMIC_FP8 = jpfq.Activations(jpfq.E4M3(), per="row")
STATIC = jpfq.Activations(jpfq.Integer(8))
TPU, GPU = "vLLM on TPU", "vLLM on GPU"


def form(rules, activations=None, inputs=256, neurons=64, **rest):
    (rule,) = rules
    recipe = rule.recipe()
    group = getattr(recipe.scale.per, "size", None)
    return form_of(recipe.grid, recipe.step_dtype, group, (inputs, neurons), activations, **rest)


f = jpfq.formats


@pytest.mark.parametrize(
    ("server", "rules", "activations", "loads"),
    [  # the table of design, row by row
        (TPU, f.int4(), None, "no: int4 takes inputs in fp8 by token, and these are floats: dynamic_inputs='fp8'"),
        (TPU, f.int4(), DYNAMIC_FP8, "FP8 products"),
        (TPU, f.int4(group=32), DYNAMIC_FP8, "FP8 products"),
        ("llama.cpp", f.q8_0(), DYNAMIC_INT8, "no: int8 takes inputs in floats, and these are int8 by token"),
        (TPU, f.int4(), DYNAMIC_INT8, "no: int4 takes inputs in fp8 by token, and these are int8 by token"),
        (TPU, f.nvfp4(), None, "regrouped"),
        (TPU, f.nvfp4(), DYNAMIC_FP8, "regrouped"),
        (TPU, f.fp8(), DYNAMIC_FP8, "FP8 products"),
        (TPU, f.fp8(), None, "no: fp8 takes inputs in fp8 by one step or fp8 by token, and these are floats"),
        (TPU, f.int8(), DYNAMIC_INT8, "int8 products"),
        (TPU, f.int8(), STATIC, "no: int8 takes inputs in int8 by token, and these are int8 by one step"),
        (TPU, f.awq(), None, r'export\("awq"\): bfloat16 products'),
        (TPU, f.mxfp8(), None, "no: it has no mxfp8"),
        (GPU, f.int4(), None, r'export\("compressed-tensors"\): 16-bit products'),
        (GPU, f.int4(group=16), None, "no: int4 takes groups of all inputs or 32 or 64 or 128, and these are of 16"),
        (GPU, f.int4(group=128), DYNAMIC_FP8, "FP8 products"),
        (GPU, f.int4(group=32), DYNAMIC_FP8, "no: "),
        (GPU, f.int8(), STATIC, "int8 products"),
        (GPU, f.awq(), None, "16-bit products"),
        (GPU, f.mxfp4(), None, "16-bit products"),
        (GPU, f.mxfp6(), None, "no: it has no mxfp6"),
        ("sglang-jax", f.int8(), None, "not tried"),
        ("sglang-jax", f.int4(), None, "no: it has no int4"),
        ("sglang-jax", f.fp8(group=128), None, "no: fp8 takes groups of all inputs, and these are of 128"),
        ("llama.cpp", f.q4_0(), None, r'export\("gguf"\)'),
        ("llama.cpp", f.q8_0(), None, r'export\("gguf"\)'),
        ("llama.cpp", f.q4_k(), None, r'export\("gguf"\)'),
        ("llama.cpp", f.q4_1(), None, r'export\("gguf"\)'),
        ("llama.cpp", f.q6_k(), None, r'export\("gguf"\)'),
        ("llama.cpp", f.q4_1(step_dtype="bfloat16"), None, r"no: it has no Offset\(4\) in groups of 32"),
        (GPU, f.q4_k(), None, "no: it has no Q4_K"),
        ("qwix", f.q6_k(), None, "to_qwix"),
        ("llama.cpp", f.int4(group=32), None, "no: its steps are not of float16"),
        ("llama.cpp", f.int4(group=16, step_dtype="float16"), None, "no: GGUF takes groups of multiples of 32 inputs"),
        ("llama.cpp", f.int4(step_dtype="float16"), None, r'export\("gguf"\)'),
        ("qwix", f.int8(group=32), STATIC, "int8 products"),
        ("qwix", f.int8(group=32), DYNAMIC_INT8, "no: int8 takes groups of all inputs"),
        ("llama.cpp", f.nvfp4(), None, "no: it has no nvfp4"),
        ("qwix", f.mxfp8(), None, "to_qwix"),
        ("qwix", f.nf4(), None, "to_qwix"),
        ("qwix", f.mxfp6(), None, "to_qwix"),  # as integers
        ("qwix", f.mxfp6(jpfq.E3M2()), None, r"no: it has no E3M2\(\)"),
        (GPU, f.fp8(32), DYNAMIC_FP8, "no: fp8 takes groups of all inputs, and these are of 32"),
    ],
)
def test_facts(server, rules, activations, loads):
    found, text = verdict(server, form(rules, activations))
    assert found != loads.startswith("no: ")
    assert re.search(loads.removeprefix("no: ") if not found else loads, text), text


def test_each_way_to_write_it_has_its_reason():
    """4-bit integers with bfloat16 steps are not for vLLM on TPU: inputs in FP8, or steps for AWQ, would make them so."""
    _, text = verdict(TPU, form(f.int4()))
    assert text == (
        "export(\"compressed-tensors\"): int4 takes inputs in fp8 by token, and these are floats: dynamic_inputs='fp8'; "
        "export(\"awq\"): its steps are not of float16: step_dtype='float16'"
    )


def test_what_concerns_the_layer():
    for server in (TPU, GPU):
        assert not verdict(server, form(f.int8(), DYNAMIC_INT8, conv=True)).loads
    assert verdict("qwix", form(f.int8(), STATIC, conv=True)).loads
    assert verdict("qwix", form(f.int8(), conv=True)) == (
        False,
        "it is a convolution, which qwix takes with inputs of 8 bits",
    )
    odd = verdict(TPU, form(f.awq(), neurons=60))
    assert odd == (False, "AWQ takes multiples of 8 neurons, in groups of multiples of 32 inputs")
    assert verdict(TPU, form(f.awq(group=None), inputs=72)) == odd
    assert verdict(TPU, form(f.awq(group=None), inputs=96)).loads
    assert verdict(TPU, form(f.awq(), refused="its inputs are rotated")) == (False, "its inputs are rotated")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="up")(x)


RULES = {
    "int4, 32": f.int4(group=32),
    "int8, inputs by token": f.int8(activations=DYNAMIC_INT8),
    "awq": f.awq(group=32),
    "mxfp6": f.mxfp6(),
}
MORE = {
    "int4": f.int4(),
    "int8, static": f.int8(activation_bits=8),
    "fp8": f.fp8(),
    "fp8, inputs": f.fp8(activations=DYNAMIC_FP8),
    "mxfp4": f.mxfp4(),
    "nvfp4": f.nvfp4(),
    "nf4": f.nf4(),
    "q4_0": f.q4_0(),
    "12 bits": [jpfq.Rule(".*", bits=12)],
    "levels": [jpfq.Rule(".*", grid=jpfq.Levels([-4, -1, 0, 1, 4]))],
    "E5M2": [jpfq.Rule(".*", grid=jpfq.E5M2())],
}


@pytest.mark.parametrize("name", [*RULES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_plan_says_what_its_result_says_and_export_keeps_it(name, tmp_path):
    base = lambda scale: scale.base if isinstance(scale, jpfq.scale.MinError) else scale
    rules = [dataclasses.replace(r, plain=True, method=jpfq.MSQ(), scale=base(r.scale)) for r in (RULES | MORE)[name]]
    x = jax.random.normal(jax.random.key(0), (64, 64))
    variables = Net().init(jax.random.key(1), x)
    quantized = jpfq.quantize(Net(), [x], rules, variables=variables)
    found = quantized.servers()
    assert found == jpfq.plan(Net(), x, rules, variables=variables).servers()
    assert list(found.layers) == ["up/kernel"]
    assert all(name in str(found) for name in found.layers["up/kernel"])
    said = {v.text.split(":")[0] for v in found.layers["up/kernel"].values() if v.loads}
    assert said <= {fact.call for fact in FACTS}
    for call, write in (
        ('export("compressed-tensors")', lambda: quantized.export("compressed-tensors", tmp_path / "c")),
        ('export("awq")', lambda: awq(quantized, tmp_path / "a")),
    ):
        if call in said:
            assert write() == {}
    if 'export("compressed-tensors")' in said:
        of_file = quantized.export("compressed-tensors", tmp_path / "c", overwrite=True).servers
        assert set(of_file) == {TPU, GPU, "sglang-jax"}
        for server, (loads, text) in of_file.items():
            layer = found.layers["up/kernel"][server]
            assert loads == (layer.loads and layer.text.startswith('export("compressed-tensors")'))
            assert not loads or text in layer.text
    if find_spec("qwix") and not quantized.inputs:
        if "to_qwix" in said:
            quantized.to_qwix(x, Net())
        else:
            with pytest.raises(ValueError, match="cannot hold these kernels"):
                quantized.to_qwix(x, Net())


def test_a_file_is_loaded_if_all_its_layers_are():
    """Those that the format left in floats are, and other formats that a server has do not count."""
    forms = {"a": form(f.int4()), "b": form(f.nvfp4()), "c": form([jpfq.Rule(".*", bits=12)])}
    left = {"c": "12 bits"}
    said = loads_file("compressed-tensors", forms, left)
    assert said[GPU] == (True, "16-bit products of dequantized weights")
    assert not said[TPU].loads
    assert said[TPU].text.startswith("a: int4 takes inputs in fp8 by token, and these are floats: dynamic_inputs='fp8'")
    assert loads_file("compressed-tensors", forms, left, "fp8")[TPU] == (
        True,
        "FP8 products; products of regrouped weights",
    )
    assert said["sglang-jax"] == (False, "a: it has no int4 (and 1 more)")
    assert loads_file("compressed-tensors", forms, {})[GPU].text.startswith("c: it has no Integer(12")
    assert loads_file("gguf", forms, dict.fromkeys(forms, "")) == {"llama.cpp": (True, "all in floats")}
    assert loads_file("npz", forms, left) == {}
    shown = str(Exported(left, said))
    assert "vLLM on TPU" in shown
    assert "12 bits" in shown
    assert Exported({}, said) == {}
