"""Methods with float formats: FP8, hybrid GPTQ, microscaling."""

from __future__ import annotations

import os
import tempfile
from typing import Any, ClassVar

import torch

from inc_graph.quantization.base_config import BaseConfig, register_config
from inc_graph.quantization.configs.activations import StaticQuantConfig
from inc_graph.quantization.fields import Field, a_bool, a_choice, a_dict, a_string, an_int, either

__all__ = ["FP8Config", "HybridGPTQConfig", "MXQuantConfig"]

_LISTS = a_dict("names", "types")
_FLAG = either(a_bool, a_choice("True", "False"))  # text once it is kept, as in neural_compressor


@register_config(algo_name="fp8_quant")
class FP8Config(StaticQuantConfig):
    """FP8: weights and activations in 8-bit float formats, scaled per tensor or channel."""

    fields: ClassVar[dict[str, Field]] = {
        "dump_stats_path": Field("./hqt_output/measure", a_string, "Folder and prefix of measurements."),
        "fp8_config": Field("E4M3", a_choice("E4M3", "E5M2"), "Format."),
        "hp_dtype": Field("bf16", a_choice("bf16", "fp16", "fp32"), "Format of the rest of the model."),
        "blocklist": Field({"names": [], "types": ()}, _LISTS, "Names (parts of paths) and types that stay."),
        "allowlist": Field({"names": [], "types": ["Linear", "Conv2d", "EmbeddingBag"]}, _LISTS,
                           "Names and types that are quantized."),
        "mode": Field("AUTO", a_choice("AUTO", "MEASURE", "QUANTIZE", "LOAD"), "Measure, quantize, or both."),
        "scale_method": Field("maxabs_hw", either(a_string, a_dict()), "How scales are found."),
        "scale_params": Field({}, a_dict(), "Options of the scale method."),
        "observer": Field("maxabs", a_choice("maxabs", "maxabs_per_channel", "shape", "save"), "What is measured."),
        "mod_dict": Field({}, a_dict(), "Class name -> kind of operator, for modules of one's own."),
        "measure_exclude": Field("OUTPUT", a_choice("OUTPUT", "INPUT", "NONE", "ALL"), "What is not measured."),
        "fake_quant": Field("False", _FLAG, "Round to FP8 and go on in high precision.", convert=str),
        "use_qdq": Field("False", _FLAG, "Quantize and dequantize, and compute in high precision.", convert=str),
        "scale_format": Field("scalar", a_choice("scalar", "const"), "Scales as numbers or as tensors."),
        "measure_on_hpu": Field(True, a_bool, "Measure on the accelerator."),
    }  # fmt: skip
    operators: ClassVar[tuple[Any, ...]] = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.EmbeddingBag)
    tuning: ClassVar[dict[str, list[Any]]] = {}
    _mark: ClassVar[dict[str, Any]] = {"_json_file": None}

    @classmethod
    def _arguments(cls) -> dict[str, Field]:
        return dict(cls.fields)

    @property
    def measure(self) -> bool:
        """Whether the mode is to measure only."""
        return self.mode == "MEASURE"

    @property
    def quantize(self) -> bool:
        """Whether the mode is to quantize with measurements of before."""
        return self.mode == "QUANTIZE"

    @property
    def json_file(self) -> str | None:
        """The file this config was read from, or last written to by `save_temp_json_file`."""
        return getattr(self, "_json_file", None)

    @json_file.setter
    def json_file(self, value: str | None) -> None:
        self._json_file = value

    @classmethod
    def from_json_file(cls, filename: str | os.PathLike[str]) -> FP8Config:
        config = super().from_json_file(filename)
        config.json_file = str(filename)
        return config

    def save_temp_json_file(self) -> None:
        """Write the config to a temporary file; `json_file` names it."""
        handle, name = tempfile.mkstemp(suffix=".json")
        os.close(handle)
        self.to_json_file(name)
        self.json_file = name


@register_config(algo_name="hybrid_gptq")
class HybridGPTQConfig(FP8Config):
    """GPTQ weights of 4 bits with FP8 activations (W4A8)."""

    def convert_from_fp8(self, fp8_config: FP8Config) -> HybridGPTQConfig:
        """Take over the fields of an FP8 config; returns self."""
        for key, value in fp8_config.get_params_dict().items():
            setattr(self, key, value)
        return self


_MX = ("int8", "int4", "int2", "fp8_e5m2", "fp8_e4m3", "fp6_e3m2", "fp6_e2m3", "fp4", "float16", "bfloat16", "float32")


@register_config(algo_name="mx_quant")
class MXQuantConfig(BaseConfig):
    """Microscaling (OCP MX 1.0): blocks of elements share a power-of-two scale."""

    fields: ClassVar[dict[str, Field]] = {
        "w_dtype": Field("int8", a_choice(*_MX), "Element format of weights."),
        "act_dtype": Field("int8", a_choice(*_MX), "Element format of activations."),
        "out_dtype": Field("bfloat16", a_choice("bfloat16", "float16", "float32"), "Format of results."),
        "blocksize": Field(32, an_int(1), "Elements that share a scale."),
        "round_method": Field("nearest", a_choice("nearest", "dither", "floor", "even"), "Rounding of elements."),
        "weight_only": Field(False, a_bool, "Leave activations float."),
    }
    operators: ClassVar[tuple[Any, ...]] = (torch.nn.Linear, torch.nn.functional.linear)
    needs_calibration = False
    tuning: ClassVar[dict[str, list[Any]]] = {"weight_only": [False, True]}
