"""The two files of a folder that neural_compressor saved: settings and tensors. What else may be there is named.

The tensors are read by `torch.load(weights_only=True)`, which makes tensors and containers of them and nothing else.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inc_graph.errors import SavedModelError
from inc_graph.saving.folder import is_saved_model

__all__ = ["CONFIG", "read_config", "read_state", "take_layers"]

CONFIG, WEIGHTS = "qconfig.json", "quantized_weight.pt"
_OF_A_LAYER = ("qweight", "scales", "qzeros", "bias", "g_idx", "scale_bf16_to_fp8")
_AGAIN = "quantize the float model again, with inc_graph.quantization"
_ELSEWHERE = {  # what tells of another layout -> what it is
    "model_bin_index.json": "it was saved block by block (model_bin_index.json)",
    "quantized_hpu_weight.pt": "it was saved in the layout of Gaudi",
    "quantized_hpu_weight.safetensors": "it was saved in the layout of Gaudi",
    "hpu_model.safetensors": "it was saved in the layout of Gaudi",
    "quantize_config.json": "it was saved with format='huggingface'",
    "quantization_config.json": "it was saved with format='huggingface'",
}


def read_config(folder: Path) -> dict[str, dict[str, Any]]:
    """Layer -> {algorithm: settings}."""
    if not folder.is_dir():
        raise SavedModelError(f"there is no folder {folder}")
    if is_saved_model(folder):
        raise SavedModelError(f"{folder} is a saved model of inc_graph already", hint="load it")
    file = folder / CONFIG
    if not file.is_file() or not (folder / WEIGHTS).is_file():
        for other, what in _ELSEWHERE.items():
            if (folder / other).exists():
                raise SavedModelError(f"{folder} cannot be imported: {what}", hint=_AGAIN)
        hint = f"give a folder with {CONFIG} and {WEIGHTS}"
        raise SavedModelError(f"{folder} was not saved by neural_compressor", hint=hint)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise SavedModelError(f"{file} cannot be read: {str(e)[:120]}") from e
    if not isinstance(data, dict):
        raise SavedModelError(f"{file} is not a table")
    found = {}
    for key, entry in data.items():
        found_name = re.match(r"\(\s*(['\"])(.*?)\1\s*,", key)
        if found_name is not None:
            name = found_name[2]
            if not isinstance(entry, dict) or not entry or not all(isinstance(v, dict) for v in entry.values()):
                raise SavedModelError(f"{file}: the entry of {name!r} is not {{algorithm: settings}}")
            found[name] = entry
    return found


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors. Nothing but tensors and containers is made of the file."""
    file = folder / WEIGHTS
    names: list[str] = []
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    if any(re.search(r"(^|/)(models/[^/]+\.json|serialized_exported_program\.json)$", n) for n in names):
        raise _other_kind(folder, "an exported program (static or dynamic INT8 by PT2E)", "StaticQuantConfig")
    if any(n.endswith("/constants.pkl") for n in names):
        raise _other_kind(folder, "a TorchScript program (static INT8 or SmoothQuant by IPEX)", "SmoothQuantConfig")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=bool(names))
    except pickle.UnpicklingError as e:
        hint = "nothing in it was executed; a file that neural_compressor saved for weights holds tensors only"
        raise SavedModelError(f"{file} holds more than tensors: {str(e).splitlines()[0][:160]}", hint=hint) from e
    except Exception as e:  # zip, end of file, whatever torch says of damaged ones
        raise SavedModelError(f"{file} is damaged: {type(e).__name__}: {str(e)[:160]}") from e
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise SavedModelError(f"{file} is not a state_dict: it must hold names and tensors")
    return dict(state)


def _other_kind(folder: Path, what: str, config: str) -> SavedModelError:
    hint = f"{_AGAIN} and {config}: its calibration takes the same data"
    return SavedModelError(f"{folder / WEIGHTS} is {what}, and cannot be imported", hint=hint)


def take_layers(folder: Path, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> its tensors, which are taken out of the state."""
    found = {}
    for key in [k for k in state if k == "qweight" or k.endswith(".qweight")]:
        inner = key.removesuffix("qweight")
        tensors = {n: state.pop(inner + n) for n in _OF_A_LAYER if inner + n in state}
        outer = inner.removesuffix("linear.")
        if outer != inner and f"{outer}input_scale" in state:
            tensors["input_scale"] = state.pop(f"{outer}input_scale")
            inner = outer
        found[inner.removesuffix(".")] = tensors
    if not found:
        what = "layers of HQQ" if any(k.endswith((".val", "val")) for k in state) else "no quantized layers"
        raise SavedModelError(f"{folder / WEIGHTS} holds {what}, which cannot be imported", hint=_AGAIN)
    _unwrap_float_layers(state)
    return found


def _unwrap_float_layers(state: dict[str, Tensor]) -> None:
    """A float layer whose input TEQ scales is one whose weight is scaled."""
    for key in [k for k in state if k.endswith("input_scale")]:
        outer = key.removesuffix("input_scale")
        if f"{outer}linear.weight" in state:
            state[f"{outer}weight"] = state.pop(f"{outer}linear.weight") * state.pop(key)
            if f"{outer}linear.bias" in state:
                state[f"{outer}bias"] = state.pop(f"{outer}linear.bias")
