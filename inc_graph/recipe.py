"""WHERE -> WHAT + HOW: the ordered list of rules that a user's config compiles to.

`prepare` and `convert` know recipes and pipelines only. A recipe is JSON-able and rides in `gm.meta["inc"]["recipe"]`,
so that convert, saving and inspection see the decisions that prepare was given. The most specific rule wins; among
equals, the one said last.

A name is the path of a module, as a regular expression that is matched at its start. An operator that is a function
call has no module of its own (`torch.matmul` in somebody's forward): it can be named by its name in the graph, in full.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import fx

from inc_graph.errors import ConfigError
from inc_graph.graph import module_path, module_type, peek_meta
from inc_graph.oppattern import OpPattern
from inc_graph.registry import PATTERNS
from inc_graph.spec import QSpec

__all__ = ["KINDS", "OpQuant", "Recipe", "Where", "WhereRule", "get_recipe", "operator_name", "set_recipe"]

KINDS = ("all", "type", "implied", "predicate", "name")  # from the least to the most specific


@dataclass(frozen=True)
class Where:
    """Which operators a rule speaks of.

    Attributes:
        kind: "all", "type" (operator type, module class), "name" (see the head of this file), "implied" (a name too,
            that a config implies and the user has not said), "predicate".
        value: The type's name, the regex, or what messages call the predicate; '' for "all".
        members: What a predicate took: module paths, and names of function calls. `None` until it was asked.
    """

    kind: str = "all"
    value: str = ""
    members: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Where.kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.kind in ("name", "implied"):
            try:
                re.compile(self.value)
            except re.error as e:
                raise ConfigError(f"{self.value!r} is not a regular expression: {e}") from e

    def rank(self, node: fx.Node, pattern: OpPattern) -> float | None:
        """How specific this is for an operator, None if it is not meant."""
        base = float(KINDS.index(self.kind))
        if self.kind == "all":
            return base
        if self.kind == "type":
            return base if self.value in type_names(node, pattern) else None
        path = module_path(node)
        own_name = operator_name(node, pattern)
        if self.kind == "predicate":
            return base if own_name in (self.members or ()) else None
        if re.fullmatch(self.value, path) is not None or self.value == own_name:
            return base + 0.5
        if re.match(self.value, path) is not None:
            return base
        # neural_compressor takes the name of a class for the class
        return 1.0 if self.value[:1].isupper() and self.value in type_names(node, pattern) else None

    def matches(self, node: fx.Node, pattern: OpPattern) -> bool:
        """Whether this operator is meant."""
        return self.rank(node, pattern) is not None

    def to_json(self) -> dict[str, Any]:
        members = None if self.members is None else list(self.members)
        return {"kind": self.kind, "value": self.value, "members": members}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Where:
        _same_keys(data, cls)
        _need(isinstance(data["value"], str), cls, "value", data["value"])
        members = data["members"]
        good = members is None or (isinstance(members, list) and all(isinstance(m, str) for m in members))
        _need(good, cls, "members", members)
        return cls(data["kind"], data["value"], None if members is None else tuple(members))

    def __str__(self) -> str:
        return self.kind if self.kind == "all" else f"{self.kind} {self.value!r}"


@dataclass(frozen=True)
class OpQuant:
    """WHAT and HOW for one operator.

    Attributes:
        activation: Format of its quantizable inputs; None leaves them float (weight only).
        weight: Format of its weight; the granularity's axis is replaced by the operator's own channel axis.
        act_algorithm: Range estimator of the activations, `name` or `name{option=value}`.
        weight_algorithm: Range estimator of the weight.
        bias_correction: Correct the bias for the mean error of the quantized weight.
    """

    activation: QSpec | None = None
    weight: QSpec | None = None
    act_algorithm: str = "minmax"
    weight_algorithm: str = "minmax"
    bias_correction: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "activation": self.activation and self.activation.to_json(),
            "weight": self.weight and self.weight.to_json(),
            "act_algorithm": self.act_algorithm,
            "weight_algorithm": self.weight_algorithm,
            "bias_correction": self.bias_correction,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OpQuant:
        _same_keys(data, cls)
        for key in ("act_algorithm", "weight_algorithm"):
            _need(isinstance(data[key], str), cls, key, data[key])
        _need(isinstance(data["bias_correction"], bool), cls, "bias_correction", data["bias_correction"])
        specs = {k: None if data[k] is None else QSpec.from_json(data[k]) for k in ("activation", "weight")}
        return cls(**{**data, **specs})


@dataclass(frozen=True)
class WhereRule:
    """One line of a recipe. `what` None leaves the operator float. `origin` is the user's wording, for messages."""

    where: Where = field(default_factory=Where)
    what: OpQuant | None = None
    origin: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"where": self.where.to_json(), "what": self.what and self.what.to_json(), "origin": self.origin}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WhereRule:
        _same_keys(data, cls)
        _need(isinstance(data["origin"], str), cls, "origin", data["origin"])
        what = None if data["what"] is None else OpQuant.from_json(data["what"])
        return cls(Where.from_json(data["where"]), what, data["origin"])

    def __str__(self) -> str:
        what = self.what
        if what is None:
            return f"{self.where} -> float"
        parts = [
            f"activation {what.activation}" if what.activation else "",
            f"weight {what.weight}" if what.weight else "",
        ]
        return f"{self.where} -> {', '.join(p for p in parts if p)}"


@dataclass(frozen=True)
class Recipe:
    """Rules plus the pipelines that carry them out.

    Attributes:
        method: Name of the method ("static_quant"), for reports.
        rules: In the order they were said.
        prepare: Pipeline text that prepare runs on the float graph.
        convert: Pipeline text that convert runs on the observed graph.
        supported: Operator types that the target backend has quantized kernels for; others stay float unless a rule of
            kind "type" or "name" asks for them. None: every known operator.
        backend: The backend that `supported` was read from.
    """

    method: str
    rules: tuple[WhereRule, ...]
    prepare: str
    convert: str
    supported: tuple[str, ...] | None = None
    backend: str = "eager"

    def resolve(self, node: fx.Node, pattern: OpPattern) -> tuple[int, WhereRule] | None:
        """The rule for `node` and its index, or None if no rule speaks of it."""
        best: tuple[float, int] | None = None
        for i, rule in enumerate(self.rules):
            if (rank := rule.where.rank(node, pattern)) is not None and (best is None or (rank, i) > best):
                best = (rank, i)
        return None if best is None else (best[1], self.rules[best[1]])

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "rules": [r.to_json() for r in self.rules],
            "prepare": self.prepare,
            "convert": self.convert,
            "supported": None if self.supported is None else list(self.supported),
            "backend": self.backend,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_json`. ConfigError or SpecError that names the field if the data is not of that form."""
        _same_keys(data, cls)
        for key in ("method", "prepare", "convert", "backend"):
            _need(isinstance(data[key], str), cls, key, data[key])
        _need(isinstance(data["rules"], list), cls, "rules", data["rules"])
        supported = data["supported"]
        _need(supported is None or isinstance(supported, list), cls, "supported", supported)
        rules = tuple(WhereRule.from_json(r) for r in data["rules"])
        return cls(**{**data, "rules": rules, "supported": None if supported is None else tuple(map(str, supported))})

    def for_backend(self, name: str, supported: tuple[str, ...] | None) -> Recipe:
        """The same rules aimed at another backend."""
        return replace(self, backend=name, supported=supported)

    def __str__(self) -> str:
        return "\n".join([f"{self.method} for {self.backend}:", *(f"  {i}. {r}" for i, r in enumerate(self.rules))])


def operator_name(node: fx.Node, pattern: OpPattern) -> str:
    """The path of the module that is this operator; of a function call, its name in the graph."""
    own = module_type(node) in _type_names(pattern, node.target, None, None)
    return module_path(node) if own else node.name


def type_names(node: fx.Node, pattern: OpPattern) -> frozenset[str]:
    """Every name a user may call the operator's type by: pattern, aten name, functions, classes, innermost module.

    Where a pass has spelled an operator in another way, also the names of the type it was (`was` in its annotations).
    """
    return _type_names(pattern, node.target, module_type(node), peek_meta(node).get("was"))


@functools.lru_cache(maxsize=4096)
def _type_names(pattern: OpPattern, target: Any, inner: str | None, was: str | None) -> frozenset[str]:
    names = {pattern.name, str(target)}
    if (schema := getattr(target, "_schema", None)) is not None:
        names.add(schema.name)
    for module in pattern.modules:
        names |= set(names_of_type(module))
    if inner is not None:
        names |= {inner, inner.rpartition(".")[2]}
    if was is not None and was in PATTERNS:
        names |= {was, *(n for module in PATTERNS.get(was).modules for n in names_of_type(module))}
    return frozenset(names)


def names_of_type(kind: Any) -> tuple[str, str]:
    """(short, qualified) name of a module class or function."""
    short = getattr(kind, "__name__", str(kind))
    name = getattr(kind, "__qualname__", short)
    if "<locals>" in name:  # torch makes its pooling functions in a function that gives them all one name
        name = short
    return short, f"{getattr(kind, '__module__', None) or 'torch'}.{name}"


def _same_keys(data: Any, cls: type) -> None:
    names = {f.name for f in fields(cls)}
    if not isinstance(data, Mapping) or set(data) != names:
        found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise ConfigError(f"{cls.__name__} has the fields {sorted(names)}, found {found}")


def _need(good: bool, cls: type, field_name: str, value: Any) -> None:
    if not good:
        raise ConfigError(f"{cls.__name__}.{field_name} cannot be {value!r}")


def set_recipe(gm: fx.GraphModule, recipe: Recipe) -> None:
    """Store the recipe with the graph."""
    gm.meta.setdefault("inc", {})["recipe"] = recipe.to_json()


def get_recipe(gm: fx.GraphModule) -> Recipe:
    """The recipe stored with the graph. ConfigError if there is none."""
    data = gm.meta.get("inc", {}).get("recipe")
    if data is None:
        raise ConfigError("this graph carries no recipe", hint="run inc_graph.quantization.prepare on it")
    return Recipe.from_json(data)
