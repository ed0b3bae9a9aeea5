"""Weight-only methods: RTN, GPTQ, AWQ, TEQ, AutoRound, HQQ."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from inc_graph.errors import ConfigError
from inc_graph.qtypes import get_qtype
from inc_graph.quantization.base_config import BaseConfig, register_config
from inc_graph.quantization.fields import (
    Field,
    a_bool,
    a_choice,
    a_dict,
    a_list,
    a_number,
    a_string,
    an_int,
    anything,
    either,
)
from inc_graph.recipe import OpQuant, Recipe
from inc_graph.spec import PerGroup, QSpec

__all__ = ["LM_HEAD_NAMES", "AWQConfig", "AutoRoundConfig", "GPTQConfig", "HQQConfig", "RTNConfig", "TEQConfig"]

LM_HEAD_NAMES = [".*lm_head", ".*output_layer", ".*embed_out"]
"""Names of the output layer of language models; weight-only methods leave it float unless `quant_lm_head` is set."""

WEIGHT_TYPES = (
    "int", "int2", "int3", "int4", "int8", "nf4", "fp4", "fp4_e2m1_bnb", "fp4_e2m1", "fp8_e5m2", "fp8_e5m2fnuz",
    "fp8_e4m3", "fp8_e4m3fn", "fp8_e4m3fnuz", "fp32",
)  # fmt: skip
_BITS = an_int(1, 8)
_GROUP = an_int(1, also=(-1,))
_OPTIONAL_BOOL = a_choice(None, False, True)
_OPTIONAL_TEXT = either(a_choice(None), a_string)


def _bool(default: bool, doc: str, **more: Any) -> Field:
    return Field(default, a_bool, doc, **more)


_FORMAT = {
    "dtype": Field(
        "int",
        a_choice(*WEIGHT_TYPES),
        'Weight format: "int" with `bits`, or a format, whose own width counts then; "fp32" leaves float.',
    ),
    "bits": Field(4, _BITS, "Bits of an integer weight, from 2."),
    "use_sym": _bool(True, "Symmetric around zero: no zero point."),
    "group_size": Field(32, _GROUP, "Weights that share a scale, along the input; -1: all of an output channel."),
}
_GROUP_DIM = {"group_dim": Field(1, a_choice(0, 1), "Dimension that groups lie along: 1 input, 0 output channels.")}
_SEARCH = {"use_mse_search": _bool(False, "Search the range with the least squared error.")}
_FULL = {"use_full_range": _bool(False, "Use the code -2**(bits-1) as well.")}
_ONE, _ALWAYS = "A model without values (`load_empty_model`) has one", "whatever this says"
_LAYER_WISE = {
    "use_layer_wise": _bool(False, f"{_ONE} layer at a time in memory, {_ALWAYS}; a block where data runs through it."),
    "model_path": Field("", a_string, "Checkpoint folder that layers of a model without values are read from."),
}
_HEAD = {"quant_lm_head": _bool(False, "Quantize the output layer of a language model too.")}


def _double(sym: bool) -> dict[str, Field]:
    return {
        "use_double_quant": _bool(False, "Quantize the scales too."),
        "double_quant_dtype": Field("int", a_choice(*WEIGHT_TYPES[:-1]), "Format of the scales."),
        "double_quant_bits": Field(8, _BITS, "Bits of the scales, from 2."),
        "double_quant_use_sym": _bool(sym, "Scales symmetric around zero."),
        "double_quant_group_size": Field(256, _GROUP, "Scales that share a scale: 2 or more, or -1 for all."),
    }


_FORMATS = {
    "fp4": "fp4_bnb", "fp4_e2m1_bnb": "fp4_bnb", "fp4_e2m1": "fp4", "nf4": "nf4",
    "fp8_e4m3": "fp8_e4m3", "fp8_e4m3fn": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2",
    "fp8_e4m3fnuz": "fp8_e4m3fnuz", "fp8_e5m2fnuz": "fp8_e5m2fnuz",
}  # fmt: skip
"""Weight types that are no integers -> qtypes."""


def weight_format(config: Any) -> QSpec:
    """The number format that `dtype`, `bits`, `use_sym`, `group_size` and `group_dim` stand for."""
    groups = PerGroup(config.group_size, 0 if getattr(config, "group_dim", config.default_group_dim) == 0 else -1)
    if (qtype := _FORMATS.get(config.dtype)) is not None:
        return QSpec(qtype, "symmetric", groups)
    return QSpec(
        *integer_format(type(config).__name__, config.dtype, config.bits, getattr(config, "use_sym", False)), groups
    )


def integer_format(owner: str, dtype: str, bits: int, symmetric: bool) -> tuple[str, str]:
    """(qtype, scheme) of an integer of so many bits; `dtype` may have its own width ("int4")."""
    bits = int(dtype.removeprefix("int") or bits)
    if not 2 <= bits <= 8:
        raise ConfigError(f"{owner}: integers of {bits} bits cannot be had", hint="bits from 2 to 8, or dtype='nf4'")
    return (f"int{bits}", "symmetric") if symmetric else (f"uint{bits}", "asymmetric")


def check_scale_group(owner: str, field: str, size: int) -> None:
    """ConfigError for scales of which each would have a scale of its own."""
    if size == 1:
        raise ConfigError(
            f"{owner}.{field}=1 would keep a scale for each scale", hint="a number from 2, or -1 for one scale for all"
        )


def scale_options(config: Any) -> dict[str, Any]:
    """What `use_double_quant` and its fields are as options of the algorithm."""
    if not config.use_double_quant:
        return {}
    owner = type(config).__name__
    if getattr(config, "fp8_aware", False):
        raise ConfigError(
            f"{owner}: fp8_aware and use_double_quant exclude each other",
            hint="set one of them to False: powers of two are not quantized again",
        )
    check_scale_group(owner, "double_quant_group_size", config.double_quant_group_size)
    dtype, scheme = config.double_quant_dtype, "symmetric" if config.double_quant_use_sym else "asymmetric"
    if dtype not in ("int", "int2", "int3", "int4", "int8"):
        raise ConfigError(
            f"{owner}.double_quant_dtype {dtype!r} cannot be had for scales",
            hint="'int' with double_quant_bits",
        )
    qtype, _ = integer_format(owner, dtype, config.double_quant_bits, config.double_quant_use_sym)
    return {"scale_type": qtype, "scale_scheme": scheme, "scale_group": config.double_quant_group_size}


def scales_without_effect(config: Any) -> list[str]:
    """Fields of quantized scales that were set and change nothing, as `without_effect` gives them."""
    fields = config.fields
    set_ = [n for n in fields if n.startswith("double_quant_") and getattr(config, n) != fields[n].default]
    if not getattr(config, "use_double_quant", True):
        return [f"{n}={getattr(config, n)!r}: use_double_quant=False" for n in set_]
    if "double_quant_bits" in set_ and (own := str(config.double_quant_dtype).removeprefix("int")).isdigit():
        if isinstance(config.double_quant_bits, int) and config.double_quant_bits != int(own):
            return [f"double_quant_bits={config.double_quant_bits}: double_quant_dtype 'int{own}' has {own}"]
    return []


def written(name: str, **options: Any) -> str:
    """An algorithm as text, with the options that are not False."""
    said = ",".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items() if v is not False)
    return f"{name}{{{said}}}" if said else name


class WeightOnlyConfig(BaseConfig):
    """Base of the weight-only configs: linear layers, without the output layer of a language model by default."""

    operators: ClassVar[tuple[Any, ...]] = (torch.nn.Linear, "Conv1D")
    scope: ClassVar[str] = "linear,Conv1D"
    default_group_dim: ClassVar[int] = 1  # of configs without the field

    def leaves_float(self) -> bool:
        return getattr(self, "dtype", None) == "fp32"

    def without_effect(self) -> list[str]:
        if self.leaves_float() or not isinstance(getattr(self, "dtype", None), str):
            return []
        found, named = [], self.dtype in _FORMATS
        width = get_qtype(_FORMATS[self.dtype]).bits if named else int(self.dtype.removeprefix("int") or self.bits)
        if self.bits not in (width, self.fields["bits"].default):
            found.append(f"bits={self.bits}: dtype {self.dtype!r} has {width}")
        if named and getattr(self, "use_sym", True) is False:
            found.append(f"use_sym=False: dtype {self.dtype!r} has no zero point")
        if getattr(self, "use_full_range", False) and (named or not self.use_sym):
            of = f"dtype {self.dtype!r}" if named else "use_sym=False"
            found.append(f"use_full_range=True: with {of} all codes are in use")
        return found + scales_without_effect(self)

    def algorithm(self) -> str | None:
        """The weight algorithm with its options, as recipes name it; None if this version does not have it."""
        return None

    def op_quant(self) -> OpQuant | None:
        if self.leaves_float():
            return None
        if (algorithm := self.algorithm()) is None:
            return super().op_quant()
        return OpQuant(None, weight_format(self), weight_algorithm=algorithm)

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        if not self.leaves_float() and self.algorithm() is None:
            raise self._missing()
        return Recipe(
            self.name,
            self.rules(),
            prepare="fold-constants,canonicalize,fold-conv-bn,annotate,insert-observers",
            convert="correct-bias,convert-qdq",
            backend=backend,
        )

    def implied(self) -> tuple[tuple[str, BaseConfig], ...]:
        if getattr(self, "quant_lm_head", True):
            return ()
        return tuple((name, type(self)(dtype="fp32")) for name in LM_HEAD_NAMES)


@register_config(algo_name="rtn", priority=80)
class RTNConfig(WeightOnlyConfig):
    """Round to nearest: no data needed."""

    fields: ClassVar[dict[str, Field]] = {
        **_FORMAT, **_GROUP_DIM, **_FULL, **_SEARCH,
        "use_layer_wise": _bool(True, f"{_ONE} layer at a time in memory, {_ALWAYS}."),
        "model_path": _LAYER_WISE["model_path"],
        **_double(False), **_HEAD,
    }  # fmt: skip
    needs_calibration = False
    on_client: ClassVar[dict[str, Any]] = {"use_layer_wise": True}
    tuning: ClassVar[dict[str, list[Any]]] = {
        "dtype": ["int4", "nf4"], "use_sym": [True, False], "group_size": [32, 128], "use_mse_search": [False, True],
    }  # fmt: skip

    def algorithm(self) -> str:
        search = {"full_range": self.use_full_range, "search": self.use_mse_search}
        return written("rtn", **search, **scale_options(self))


@register_config(algo_name="gptq", priority=90)
class GPTQConfig(WeightOnlyConfig):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding errors are made up for by the weights not yet rounded."""

    fields: ClassVar[dict[str, Field]] = {
        **_FORMAT, **_SEARCH,
        "use_layer_wise": _LAYER_WISE["use_layer_wise"],
        "use_block_wise": _bool(False, f"{_ONE} block of layers at a time in memory, {_ALWAYS}."),
        "model_path": _LAYER_WISE["model_path"],
        **_double(False), **_HEAD,
        "act_order": _bool(False, "Round columns in the order of falling activation energy."),
        "hybrid_order": _bool(False, "As act_order, but whole groups, and columns within them."),
        "fp8_aware": _bool(False, "Scales for an FP8 product."),
        "percdamp": Field(0.01, a_number(0, 1), "Damping: this part of the mean of the Hessian's diagonal."),
        "block_size": Field(2048, an_int(1), "Columns that are rounded before the rest is updated."),
        "static_groups": _bool(False, "Find the scales of all groups before rounding."),
        "true_sequential": _bool(False, "Quantize the layers of a block one after the other."),
    }  # fmt: skip
    on_client: ClassVar[dict[str, Any]] = {"use_layer_wise": True}
    tuning: ClassVar[dict[str, list[Any]]] = {"use_sym": [False, True], "act_order": [True, False]}

    def algorithm(self) -> str:
        owner = type(self).__name__
        if self.act_order and self.hybrid_order:
            raise ConfigError(
                f"{owner}: act_order and hybrid_order exclude each other", hint="set one of them to False"
            )
        qtype = get_qtype(weight_format(self).qtype)
        if self.fp8_aware and not (qtype.is_int and qtype.bits <= 4):
            text = f"{owner}.fp8_aware needs integers of at most 4 bits, not {qtype.name}"
            raise ConfigError(text, hint="bits=4, or fp8_aware=False")
        names = ("act_order", "hybrid_order", "static_groups", "true_sequential", "fp8_aware", "percdamp", "block_size")
        options = {name: getattr(self, name) for name in names}
        return written("gptq", search=self.use_mse_search, **options, **scale_options(self))


@register_config(algo_name="awq", priority=70)
class AWQConfig(WeightOnlyConfig):
    """AWQ (Lin et al. 2023, arXiv:2306.00978): channels are scaled by what their activations matter."""

    fields: ClassVar[dict[str, Field]] = {
        **_FORMAT, **_GROUP_DIM, **_FULL, **_SEARCH, **_LAYER_WISE, **_double(True), **_HEAD,
        "use_auto_scale": _bool(True, "Search the scale of each channel."),
        "use_auto_clip": _bool(True, "Search the clipping of each group."),
        "folding": _bool(False, "Only scale where a producer can absorb it; False: insert a multiplication elsewhere."),
        "white_list": Field("*"),
        "absorb_layer_dict": Field({}, a_dict(), "Producer -> layers whose scale it absorbs; empty: searched."),
    }  # fmt: skip
    tuning: ClassVar[dict[str, list[Any]]] = {"bits": [4, 6]}


@register_config(algo_name="teq", priority=60)
class TEQConfig(WeightOnlyConfig):
    """TEQ (Cheng et al. 2023, arXiv:2310.10944): the scales of channels are trained."""

    fields: ClassVar[dict[str, Field]] = {
        **_FORMAT, **_GROUP_DIM, **_FULL, **_SEARCH, "use_layer_wise": _LAYER_WISE["use_layer_wise"], **_double(True),
        **_HEAD,
        "absorb_to_layer": Field({}, a_dict(), "Producer -> layers whose scale it absorbs; empty: found in the graph."),
        "folding": _bool(True, "Only scale where a producer can absorb it; False: insert a multiplication elsewhere."),
    }  # fmt: skip
    tuning: ClassVar[dict[str, list[Any]]] = {"bits": [4, 6]}


@register_config(algo_name="hqq", priority=75)
class HQQConfig(WeightOnlyConfig):
    """HQQ (Badri and Shaji 2023): half-quadratic search of zero points, without data.

    Groups lie along the output channels, as in neural_compressor: there the search gains much more.
    """

    default_group_dim: ClassVar[int] = 0

    fields: ClassVar[dict[str, Field]] = {
        "dtype": _FORMAT["dtype"],
        "bits": _FORMAT["bits"],
        "group_size": Field(64, _GROUP, "Weights that share a scale, along the output channels; -1: all of an input."),
        "quant_zero": _bool(True, "Quantize the zero points to 8 bits."),
        "quant_scale": _bool(False, "Quantize the scales to 8 bits."),
        "scale_quant_group_size": Field(
            128, _GROUP, "Scales (zero points) that share a scale: 2 or more, or -1 for all."
        ),
        **_HEAD,
    }
    needs_calibration = False
    tuning: ClassVar[dict[str, list[Any]]] = {"bits": [4, 8]}

    def without_effect(self) -> list[str]:
        found = super().without_effect()
        size = self.scale_quant_group_size
        if not (self.quant_zero or self.quant_scale) and size != self.fields["scale_quant_group_size"].default:
            found.append(f"scale_quant_group_size={size}: neither quant_zero nor quant_scale")
        return found

    def algorithm(self) -> str:
        if self.dtype in _FORMATS:
            text = f"{type(self).__name__}.dtype {self.dtype!r} has no zero points, which HQQ searches"
            raise ConfigError(text, hint="dtype='int' with bits, or RTNConfig for this format")
        if self.quant_zero or self.quant_scale:
            check_scale_group(type(self).__name__, "scale_quant_group_size", self.scale_quant_group_size)
        options = {"quant_zero": str(self.quant_zero).lower(), "quant_scale": self.quant_scale}
        return written(
            "hqq", **options, meta_group=-1 if self.scale_quant_group_size == 1 else self.scale_quant_group_size
        )


_OPTIONAL_BITS = an_int(1, 32, also=(None,))
_OPTIONAL_GROUP = an_int(1, also=(-1, 0, None))
_RATE = a_number(0, also=(None,))
_COUNT = an_int(1)


@register_config(algo_name="autoround", priority=50)
class AutoRoundConfig(WeightOnlyConfig):
    """AutoRound (Cheng et al. 2023, arXiv:2309.05516): rounding and clipping are trained by signed gradient descent.

    What is None comes from `scheme`.
    """

    fields: ClassVar[dict[str, Field]] = {
        "bits": Field(None, _OPTIONAL_BITS, "Bits of the weights."),
        "group_size": Field(None, _OPTIONAL_GROUP, _FORMAT["group_size"].doc),
        "use_sym": Field(None, _OPTIONAL_BOOL, _FORMAT["use_sym"].doc),
        "dtype": Field(None, _OPTIONAL_TEXT, "Weight format."),
        "act_bits": Field(None, _OPTIONAL_BITS, "Bits of the activations; 16 and more: float."),
        "act_group_size": Field(None, _OPTIONAL_GROUP, "Activations that share a scale."),
        "act_sym": Field(None, _OPTIONAL_BOOL, "Activations symmetric around zero."),
        "act_dtype": Field(None, _OPTIONAL_TEXT, "Activation format."),
        "act_dynamic": Field(None, _OPTIONAL_BOOL, "Activation scales found at run time."),
        "super_bits": Field(None, _OPTIONAL_BITS, "Bits of quantized scales (GGUF)."),
        "super_group_size": Field(None, _OPTIONAL_GROUP, "Scales that share a scale (GGUF)."),
        "enable_full_range": _bool(False, _FULL["use_full_range"].doc),
        "batch_size": Field(8, _COUNT, "Samples a step."),
        "amp": _bool(True, "Train in half precision."),
        "lr_scheduler": Field(None, anything, "Schedule of the learning rate; None: linear."),
        "enable_quanted_input": _bool(True, "Train each block on the inputs that the quantized blocks before it give."),
        "enable_minmax_tuning": _bool(True, "Train the clipping too."),
        "lr": Field(None, _RATE, "Learning rate; None: 1 / iters."),
        "minmax_lr": Field(None, _RATE, "Learning rate of the clipping; None: lr."),
        "low_gpu_mem_usage": _bool(False, "Keep samples off the accelerator."),
        "iters": Field(200, an_int(0), "Steps a block; 0: round to nearest."),
        "seqlen": Field(2048, _COUNT, "Tokens a sample."),
        "nsamples": Field(128, _COUNT, "Calibration samples."),
        "sampler": Field("rand", a_choice("rand", "sequential"), "How samples are drawn."),
        "seed": Field(42, an_int(), "Seed of the samples."),
        "nblocks": Field(1, _COUNT, "Blocks that are trained together."),
        "gradient_accumulate_steps": Field(1, _COUNT, "Batches a step."),
        "not_use_best_mse": _bool(False, "Keep the last rounding, not the best."),
        "dynamic_max_gap": Field(-1, an_int(-1), "Stop after so many steps without a gain; -1: never."),
        "scale_dtype": Field("fp16", a_choice("fp16", "bf16", "fp32"), "Format of the scales."),
        "use_layer_wise": _bool(True, _LAYER_WISE["use_layer_wise"].doc),
        "to_quant_block_names": Field(None, either(a_choice(None), a_string, a_list(words="block names")),
                                      "Blocks to quantize; None: all.", tunable=True),
        "export_format": Field("auto_round", a_string, "Format of the folder that `output_dir` gets."),
        "enable_norm_bias_tuning": _bool(False, "Train norms and biases too."),
        "enable_torch_compile": Field(False, _OPTIONAL_BOOL, "Compile the blocks."),
        "scheme": Field("W4A16", either(a_string, a_dict()), "Named set of formats: W4A16, W2A16, MXFP4, NVFP4, ..."),
        "device_map": Field(0, anything, "Where blocks are trained."),
        "quant_nontext_module": _bool(False, "Quantize the vision part too."),
        "extra_data_dir": Field(None, _OPTIONAL_TEXT, "Folder of pictures or sounds."),
        "processor": Field(None, anything, "Processor of a multimodal model.", stored=False),
        "image_processor": Field(None, anything, "Image processor of a multimodal model.", stored=False),
        "template": Field(None, anything, "Prompt template of a multimodal model.", stored=False),
        "truncation": _bool(False, "Cut samples to `seqlen`."),
        **_HEAD,
        "enable_adam": _bool(False, "Train with Adam, not with the sign of the gradient."),
        "target_bits": Field(None, a_number(1, 32, also=(None,)), "Mean bits of a weight, by a choice of `options`."),
        "options": Field(("MXFP4", "MXFP8"), either(a_string, a_list(words="schemes")), "Schemes to choose from.",
                         tunable=False),
        "shared_layers": Field(None, either(a_choice(None), a_list(words="lists of layers")),
                               "Layers that get the same scheme.", tunable=False),
        "ignore_scale_zp_bits": _bool(False, "Count bits of codes only."),
        "auto_scheme_method": Field("default", a_string, "How schemes are chosen."),
        "auto_scheme_device_map": Field(None, anything, "Where schemes are tried."),
        "auto_scheme_batch_size": Field(None, an_int(1, also=(None,)), "Samples a trial of a scheme."),
        "output_dir": Field("./tmp_auto_round", a_string, "Folder that the exported model goes to."),
    }  # fmt: skip
    on_client: ClassVar[dict[str, Any]] = {"use_layer_wise": True}
    tuning: ClassVar[dict[str, list[Any]]] = {"bits": [4, 6]}
