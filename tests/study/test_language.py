"""`jpfq quantize` of a language model from its own files, with windows of a text: without a line of Python."""

import json

import numpy as np
import pytest
from safetensors import safe_open

import jpfq
from jpfq import hub
from jpfq.study.cli import main
from tests.hub import tiny

tokenizers = pytest.importorskip(
    "tokenizers", reason="the package tokenizers is not installed: pip install 'jpfq[hub]'"
)
SETTINGS = ["--windows", "8", "--length", "16", "--score-windows", "5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, its tokenizer, and texts of words."""
    folder = tmp_path_factory.mktemp("language")
    hub.save(tiny.decoder(tiny.QWEN3), folder / "tiny")
    words = [f"w{i}" for i in range(tiny.SIZES["vocab_size"])]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tiny" / "tokenizer.json"))
    write = lambda name, count, seed: (folder / name).write_text(
        " ".join(words[i] for i in tiny.tokens(count, seed=seed))
    )
    write("text.txt", 16 * 20, 1)
    write("other.txt", 16 * 5, 2)
    write("short.txt", 16 * 8, 3)
    (folder / "broken.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "module.gguf").write_bytes(b"nothing")
    return folder


@pytest.fixture
def own(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.mark.slow
def test_a_folder_is_quantized_scored_and_saved(own, capsys):
    arguments = ["quantize", "tiny", "--bits", "4", "--calibrate", "text.txt", "--save", "w4", *SETTINGS]
    assert main([*arguments, "--export", "served"]) == 0
    out = capsys.readouterr().out
    servers = [line for line in out.splitlines() if line.startswith("  ") and " load" in line]
    assert "  vLLM on GPU loads it: 16-bit products of dequantized weights" in servers
    assert any(
        line.startswith("  vLLM on TPU will not load it: ") and "takes inputs in fp8" in line for line in servers
    )
    lines = [line.split(": ") for line in out.splitlines() if line.startswith("  ") and line not in servers]
    shown = {name.strip(): float(value) for name, value in lines}
    assert list(shown) == ["float", "Integer(4) best"]
    model = hub.load("tiny").model
    tokens = tiny.tokens(16 * 20, seed=1)
    scored = hub.windows(tokens[8 * 16 :], 16, 5)
    saved = jpfq.load("w4", model)
    assert shown["float"] == pytest.approx(hub.perplexity(model, scored), abs=0.01)
    assert shown["Integer(4) best"] == pytest.approx(hub.perplexity(saved.model, scored), abs=0.01)
    same = jpfq.quantize(model, hub.windows(tokens, 16, 8), 4, progress=False)
    for path, tensor in same.tensors.items():
        np.testing.assert_array_equal(tensor.codes, saved.tensors[path].codes)
    written = json.loads((own / "served" / "config.json").read_text())
    floats = json.loads((own / "tiny" / "config.json").read_text())
    assert floats.items() <= written.items()
    assert (own / "served" / "tokenizer.json").read_bytes() == (own / "tiny" / "tokenizer.json").read_bytes()
    with safe_open(own / "served" / "model.safetensors", "np") as file:
        packed = {name.removesuffix(".weight_packed") for name in file.keys() if name.endswith(".weight_packed")}  # noqa: SIM118
    assert packed == {
        jpfq.hub.decoder.name_of(tuple(path.split("/"))).removesuffix(".weight") for path in saved.tensors
    }
    assert f"Exported: {own / 'served'} (compressed-tensors)" in out
    assert "Perplexity on 5 windows of 16 tokens" in out
    assert "jpfq.load('w4', jpfq.hub.load('tiny').model)" in out


@pytest.mark.slow
def test_methods_side_by_side_and_another_text_to_score_on(own, capsys):
    arguments = ["quantize", "tiny", "--bits", "3", "--method", "MSQ", "GPFQ", "--calibrate", "text.txt"]
    assert main([*arguments, "--score", "other.txt", *SETTINGS, "--skip", "lm_head/.*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scored = hub.windows(tiny.tokens(16 * 5, seed=2), 16)
    assert found["perplexity"]["float"] == pytest.approx(hub.perplexity(hub.load("tiny").model, scored), rel=1e-4)
    assert list(found["perplexity"]) == ["float", "Integer(3) MSQ", "Integer(3) GPFQ"]
    assert np.log(found["perplexity"]["Integer(3) MSQ"]) == pytest.approx(-found["trials"][0]["score"])
    assert all("lm_head/kernel" in trial["skipped"] for trial in found["trials"])


def test_perplexity_says_that_it_does_not_see_activations(own, capsys):
    arguments = [
        "quantize",
        "tiny",
        "--bits",
        "8",
        "--method",
        "MSQ",
        "--activation-bits",
        "8",
        "--calibrate",
        "text.txt",
    ]
    assert main([*arguments, *SETTINGS]) == 0
    assert "does not see activations rounded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tiny", "needs a text to calibrate on: --calibrate FILE"),
        ("tiny --calibrate nothing.txt", "there is no file nothing.txt"),
        ("tiny --calibrate text.txt --score nothing.txt", "--score names a text"),
        ("absent.gguf --calibrate text.txt", "There is no file absent.gguf"),
        ("module.gguf --calibrate text.txt", "is no GGUF file"),
        ("absent --calibrate text.txt", "there is no file or folder absent"),
        ("own:scored --windows 3", "--windows is for a language model"),
        ("tiny --calibrate text.txt --windows 0", "--windows takes a positive number; got 0"),
        ("tiny --calibrate text.txt --length 16", "32 windows of 16 tokens are asked for, and there are 320 tokens"),
        ("tiny --calibrate short.txt --length 16 --windows 8", "has 0 tokens to score on"),
        ("tiny --calibrate broken.txt", "no text in UTF-8"),
        ("tiny --calibrate text.txt --bits 3 4 --save x", "--save takes one result, but there are 2"),
    ],
)
def test_errors_say_what_to_do(own, capsys, arguments, message):
    assert main(["quantize", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
