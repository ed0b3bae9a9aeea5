"""Every example runs as a user would run it, and shows what it is there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"

QUICK = {
    "keep_a_layer_float": [
        r"everything:\n +int8 : stem\.0, body\.0, body\.2, head\n",
        r"not the stem .*:\n +int8 : body\.0, body\.2, head\n +float: stem\.0: kept float by set_local\('stem'\)",
        r"a name beats a class\):\n +int8 : body\.2, head\n",
    ],
    "inspect_the_graph": [
        r"graph float\n",
        r"^\+  %quantize_1 = inc\.quantize\(%input",
        r"legal 'qdq' graph",
        r"kernels agree with the graph's own meaning to \d\.\de-\d",
    ],
    "quantize_without_export": [
        r"warning: the whole model cannot be exported",
        r"stay float: rare",
        r"still a Settler, whose settle\(\) takes \d+ steps",
        r"SQNR [34]\d\.\d dB",
    ],
    "save_and_load": [
        r"float weights +0\.2\d\d MB\nsaved graph +0\.0\d\d MB",
        r"in this process: +class (\d)\nin another process: QuantizedModel, class \1\n",
        r"still a Classifier; equal: True",
        r"damaged: inc_graph.json: field 'format' is not 'inc_graph'",
    ],
    "quantize_without_data": [
        r"defaults: SQNR 1\d\.\d dB",
        r"'act_granularity': 'per_token'}: SQNR 2[4-8]\.\d dB",
        r"linear +│ +5 │ int8 linear, dynamic uint8, per token",
    ],
    "half_precision": [
        r"everything: error 0\.00\d\d, 0\.5\d x the bytes\n  layer_norm is float32: its mean and variance",
        r"but the head: error 0\.00\d\d, 0\.6\d x the bytes\n.*\n  linear is float32: kept float by set_local\('3'\)",
    ],
    "train_with_quantization": [
        r"float +9\d\.\d %",
        r"MXFP4, as it is +[89]\d\.\d %\nMXFP4, trained with it +9\d\.\d %\n",
        r"INT4, as it is +\d\d\.\d %\nINT4, trained with it +9\d\.\d %\n",
        r"converted and trained differ by \d\.\de[-+]0[05-9]",
    ],
    "run_on_ipex": [
        r"conv2d +│ +2 │ int8",
        r"batch  1: \w+ differs from the reference by \d\.\de-0[3-9]",
        r"batch 32: \w+ differs from the reference by \d\.\de-0[3-9]",
    ],
    "add_your_own_backend": [
        r"linear +│ +1 │ integer linear",
        r"conv1d +│ +1 │ float: backend 'plain_integers' has no quantized kernel for conv1d",
        r"differs from the reference by \d\.\de-0[5-9]",
    ],
}
SLOW = {
    "smooth_a_language_model": [
        r"static +relative error 0\.[1-9]",
        r"alpha 0\.5 +relative error 0\.0[0-4]",
        r"auto +relative error 0\.0[0-4]",
        r"absorbed",
    ],
    "compile_the_result": [
        r"int8, called directly +\d",
        r"int8, compiled .*freezing=False, differs by \d\.\de[-+]0[05-9]",
        r"int8, compiled .*freezing=True, differs by \d\.\de[-+]0[05-9]",
    ],
}
REAL = {
    "quantize_two_models": [
        r"top-1 17/20 -> (1[6-9]|20)/20",
        r"Spearman 0\.504\d -> 0\.(49[5-9]|5)",
        r"59: 49 conv2d, 9 add, 1 linear",
        r"36 linear",
        r"50 calls counted",
        r"36 calls counted",
        r"stayed float, and why",
        r"avg_pool: ",
        r"sdpa: ",
    ],
    "autotune_with_sensitivity": [
        r"plain static INT8: 0\.00\d+, tolerance 0\.001",
        r"strategy='sensitivity' meets it with \d{1,2} of 59 layers float: 0\.000\d+",
        r"evaluations: [12]\d; one per layer would be 59",
    ],
    "quantize_a_language_model": [
        r"float32 +│ +(\d\d\.\d\d) │ +424\.7 │",
        r"4-bit RTN +│ +[34]\d\.\d\d │ +59\.7 │",
        r"4-bit GPTQ +│ +[23]\d\.\d\d │ +59\.7 │",
        r"4-bit GPTQ: The three primary colors are.",
        r"still a LlamaForCausalLM",
    ],
    "choose_bits_by_layer": [
        r"│ 8 +│ +10\.66 │ +[23]\d\.\d │",
        r"│ 4 +│ +5\.97 │ +1\d\.\d │",
        r"│ 8, chosen kinds 4 +│ +[789]\.\d\d │ +1\d\.\d │",
        r"chosen for 4 bits: \w",
        r"correlation with people: 0\.50\d in float, 0\.(49|5\d)",
    ],
    "quantize_a_cnns_weights": [
        r"float32 +│ 17/20 │ +│ +18\.78 │",
        r"8-bit +│ (1[789]|20)/20 │ +20\.\d │ +[45]\.\d\d │",
        r"few are read │ (1[4-9]|20)/20 │ +[4-9]\.\d │ +[234]\.\d\d │",
    ],
    "choose_range_estimation": [r"minmax \(the defaults\) +│ +2\d\.\d │", r"chosen: histogram MSE"],
}


def run(name: str) -> str:
    """Output of the example; AssertionError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(name: str, lines: list[str]) -> None:
    text = run(name)
    for line in lines:
        assert re.search(line, text, re.MULTILINE), f"{name}: no {line!r} in\n{text}"


@pytest.mark.parametrize("name", QUICK)
def test_quick(name: str) -> None:
    check(name, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow(name: str) -> None:
    check(name, SLOW[name])


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str) -> None:
    check(name, REAL[name])


def test_every_example_is_run() -> None:
    assert {f.stem for f in FOLDER.glob("*.py")} == {*QUICK, *SLOW, *REAL}


def test_every_example_says_how_to_run_it() -> None:
    for file in FOLDER.glob("*.py"):
        assert f"python -m examples.{file.stem}" in file.read_text(encoding="utf-8").split('"""')[1], file.name
