"""`docs/fields/`: a page a config class, with what each field may be. Written from the field tables themselves."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields as dataclass_fields
from typing import Any

from inc_graph.quantization import TuningConfig
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.config import ComposableConfig, get_all_registered_configs
from inc_graph.quantization.fields import DEFAULT_WHITE_LIST, Field, a_choice, a_list, either

UPSTREAM = {
    "AWQConfig.use_double_quant": "its guide says that only RTN and GPTQ have it; its class takes it too",
    "AutoRoundConfig.low_gpu_mem_usage": "its guide says True",
    "AutoRoundConfig.nblocks": "its guide calls it `n_blocks`",
    "AutoRoundConfig.nsamples": "its guide calls it `n_samples`, and says 512",
    "FP8Config.fake_quant": "a Boolean is turned into text there too",
    "FP8Config.use_qdq": "a Boolean is turned into text there too",
    "GPTQConfig.block_size": "its guide says 128",
    "GPTQConfig.hybrid_order": "its guide calls it `hybrid_act_order`",
    "MXQuantConfig.w_dtype": "its guide describes `AutoRoundConfig(scheme=...)` in the place of this class",
    "RTNConfig.use_layer_wise": "its guide says False",
    "SmoothQuantConfig.alpha": "its guide has `auto`, and its `neural_compressor.torch` refuses it",
    "TEQConfig.folding": "its guide says False",
    "TEQConfig.use_double_quant": "its guide says that only RTN and GPTQ have it; its class takes it too",
}
"""Class.field -> where the documentation of neural_compressor 3.10 and its code differ; the default is the code's."""

_WHITE_LIST = Field(
    DEFAULT_WHITE_LIST,
    either(a_choice(DEFAULT_WHITE_LIST), a_list(words="names, classes, functions and predicates")),
    doc='Operators that the config is for: "*" for all, or a list of names (regular expressions), classes, functions '
    "and predicates, as `set_local` takes them. What is not listed stays float.",
)
_PROBES: tuple[Any, ...] = (None, True, False, 0, 1, 4, 0.5, "x", "32", [], ["x"], [["x"]], {}, {"x": 1})
_NOTHING = type("nothing", (), {})()


def classes() -> dict[str, type[BaseConfig]]:
    """Class name -> config class, in the order of the registry; none of extensions."""
    every = get_all_registered_configs().values()
    return {kind.__name__: kind for kind in every if kind.__module__.startswith("inc_graph.")}


def built(kind: type[BaseConfig]) -> bool:
    """Whether this version has the algorithm."""
    try:
        kind().recipe("eager", None)
    except NotImplementedError:
        return False
    return True


def type_of(field: Field) -> str:
    """The types of what the field's check lets through, found by asking it."""
    values = [*_PROBES, field.default, *field.choices]
    names = dict.fromkeys(type(v).__name__ for v in values if field.check(v) is None)
    if len(names) >= 7:  # every kind of probe
        return "anything"
    if "float" in names:
        names.pop("int", None)
    last = ["None"] if names.pop("NoneType", ...) is None else []
    return " or ".join(f"`{n}`" for n in [*sorted(names), *last])


def allowed(field: Field) -> str:
    """The legal values in words, as the error message has them."""
    return (field.check(_NOTHING) or "anything").split(";")[0]  # behind it: what is wrong with this very value


def _flat(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _section(kind: type[BaseConfig], name: str, field: Field) -> str:
    lines = [f"\n## {name}\n\n{field.doc}\n"]
    lines.append(f"* Type: {type_of(field)}. Default: `{field.default!r}`.")
    if field.check.__name__ not in ("a_bool", "a_string", "anything", "<lambda>"):
        lines.append(f"* Must be {_flat(allowed(field))}.")
    if name in kind.on_client:
        lines.append(f"* On a client processor: `{kind.on_client[name]!r}`.")
    if name in kind.tuning:
        lines.append(f"* `get_config_set_for_tuning` tries `{kind.tuning[name]!r}`.")
    if not field.tunable:
        lines.append("* A list is one value here, not a list of candidates.")
    if not field.stored:
        lines.append("* An object of Python: not in `to_dict` and files.")
    if field.ours:
        lines.append("* Not in neural_compressor; written to files only where it differs from its default.")
    if note := UPSTREAM.get(f"{kind.__name__}.{name}"):
        lines.append(f"* neural_compressor: {note}.")
    return "\n".join(lines) + "\n"


def _operators(kind: type[BaseConfig]) -> str:
    return ", ".join(f"`{o if isinstance(o, str) else o.__name__}`" for o in kind.operators)


def fields_of(kind: type[BaseConfig]) -> dict[str, Field]:
    """Every argument of a config, in order."""
    return {n: _WHITE_LIST if n == "white_list" else f for n, f in kind._arguments().items()}


def _page(name: str, kind: type[BaseConfig]) -> str:
    doc = inspect.cleandoc(kind.__doc__ or "").split("\n\nFields:")[0]
    status = "" if built(kind) else (
        "\n!!! note\n    The algorithm is not in this version yet: the config can be made, read and written, and "
        "`prepare` refuses it\n    by name.\n"
    )  # fmt: skip
    data = "needs calibration data" if kind.needs_calibration else "needs no calibration data"
    facts = [f"* Algorithm `{kind.name}`, which {data}."]
    if kind.operators:
        facts.append(f"* For {_operators(kind)}.")
    facts.append(f"* In a composition, priority {kind.priority}: where two claim one operator, the higher one gets it.")
    if kind.tuning:
        facts.append(
            f"* `get_config_set_for_tuning()` stands for {len(kind.get_config_set_for_tuning().expand())} configs."
        )
    body = "".join(_section(kind, n, f) for n, f in fields_of(kind).items())
    return f"# {name}\n\n{doc}\n{status}\n" + "\n".join(facts) + "\n" + body


def tuning_fields() -> dict[str, str]:
    """Field of `TuningConfig` -> what its docstring says of it."""
    part = inspect.cleandoc(TuningConfig.__doc__ or "").split("Attributes:\n")[1].split("\n\n")[0]
    return {m[1]: " ".join(m[2].split()) for m in re.finditer(r"^    (\w+): (.*?)(?=^    \w|\Z)", part, re.M | re.S)}


def _tuning_page() -> str:
    text = [
        f"# TuningConfig\n\n{(TuningConfig.__doc__ or '').splitlines()[0]} [Autotune](../autotune.md) has examples.\n"
    ]
    docs = tuning_fields()
    for field in dataclass_fields(TuningConfig):
        default = getattr(field.default, "__name__", repr(field.default))
        kind = re.sub(r"\| None$", "or `None`", f"`{field.type}`".replace(" | None`", "` | None"))
        text.append(f"\n## {field.name}\n\n{docs.get(field.name, '')}\n\n* Type: {kind}. Default: `{default}`.\n")
    return "".join(text)


def _index() -> str:
    rows = "".join(
        f"| [`{n}`]({n}.md) | `{k.name}` | {'yes' if built(k) else 'not yet'} | {len(k._arguments())} |\n"
        for n, k in classes().items()
    )
    return (
        "# Every field of every config\n\n"
        "One page a config class, written by `python docs/generate` from the tables that check the values; the tests\n"
        "compare them. How configs are combined, stored and kept to some operators is on [Configs](../configs.md).\n"
        "\n| class | algorithm | in this version | fields |\n|---|---|---|---:|\n" + rows + "\n"
        "[`TuningConfig`](TuningConfig.md) says what `autotune` tries.\n\n"
        "`StaticQuantConfig(...)` makes an [`INT8StaticQuantConfig`](INT8StaticQuantConfig.md), or with `fp8_config=`\n"
        "an [`FP8Config`](FP8Config.md). "
        f"`a + b` makes a `{ComposableConfig.__name__}`, which has no fields of its own.\n\n"
        "A list of legal values, where the field does not take a list itself, is a set of candidates for\n"
        "[`autotune`](../autotune.md).\n"
    )  # fmt: skip


def pages() -> dict[str, str]:
    """File in docs/ -> its text."""
    return {"fields/index.md": _index(), "fields/TuningConfig.md": _tuning_page()} | {
        f"fields/{n}.md": _page(n, k) for n, k in classes().items()
    }
