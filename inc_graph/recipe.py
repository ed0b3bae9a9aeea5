"""WHERE -> WHAT + HOW: the ordered list of rules that a user's config compiles to.

`prepare` and `convert` know recipes and pipelines only. A recipe is JSON-able and rides in `gm.meta["inc"]["recipe"]`,
so that convert, saving and inspection see the decisions that prepare was given.

A name is the path of a module, as a regular expression that is matched at its start. An operator that is a function
call has no module of its own (`torch.matmul` in somebody's forward): it can be named by its name in the graph, in full.

Which rule wins is said in `decide` and nowhere else: recipes and `to_config_mapping` both ask it. The rules of each
config begin with the one of kind "all"; in a composition a rule whose origin is `PRIORITY` stands before the configs
of a higher priority.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx

from inc_graph.errors import ConfigError
from inc_graph.oppattern import Named, OpPattern, named, names_of_type, operator_name
from inc_graph.registry import PATTERNS
from inc_graph.spec import QSpec

__all__ = [
    "HALF_DTYPES",
    "KINDS",
    "ONE_LAYER",
    "Claim",
    "OpQuant",
    "Recipe",
    "Where",
    "WhereRule",
    "claims",
    "decide",
    "get_recipe",
    "in_vain",
    "names_of_type",
    "operator_name",
    "set_recipe",
    "smoothing_of",
]  # fmt: skip

KINDS = ("all", "type", "implied", "predicate", "name")  # from the least to the most specific
FITS = (*KINDS, "path")  # a name may be the whole path, as it stands
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WHITE_LIST, ENTRY, PRIORITY = "white_list", "white_list entry ", "higher priority"  # origins that mean something


ONE_LAYER = "inc_one_layer"
"""Key of the `meta` of a graph that is one layer of a model: what rules give to the others is not seen there."""


@dataclass(frozen=True)
class Where:
    """Which operators a rule speaks of.

    Attributes:
        kind: "all", "type" (operator type, module class), "name" (see the head of this file), "implied" (a name too,
            that a config implies and the user has not said), "predicate".
        value: The type's name, the regex, or what messages call the predicate; for "all" '' or, with commas, the types
            of operators that a method is for, if nothing more specific is said.
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

    def fit(self, op: Named) -> str | None:
        """One of `FITS`: how this speaks of an operator; None if it does not."""
        if self.kind == "all":
            return "all" if not self.value or not op.types.isdisjoint(self.value.split(",")) else None
        if self.kind == "type":
            return "type" if self.value in op.types else None
        if self.kind == "predicate":
            members = self.members or ()
            return "predicate" if op.name in members or (op.weighted and op.path in members) else None
        if self.kind == "name" and self.value and self.value in (op.path, op.name):
            return "path"
        if re.match(self.value, op.path) is not None:
            return self.kind
        # neural_compressor takes the name of a class for the class
        return "type" if self.value[:1].isupper() and self.value in op.types else None

    def matches(self, node: fx.Node, pattern: OpPattern) -> bool:
        """Whether this operator of a graph is meant."""
        return self.fit(named(node, pattern)) is not None

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
        return f"{self.kind} {self.value!r}" if self.value or self.kind != "all" else "all"


@dataclass(frozen=True)
class OpQuant:
    """WHAT and HOW for one operator.

    Attributes:
        activation: Format of its quantizable inputs; None leaves them float (weight only).
        weight: Format of its weight; the granularity's axis is replaced by the operator's own channel axis.
        act_algorithm: Range estimator of the activations, `name` or `name{option=value}`.
        weight_algorithm: Range estimator of the weight.
        bias_correction: Correct the bias for the mean error of the quantized weight.
        smooth: How the input is smoothed, `smooth{alpha=0.5}`; None: not. Another config of a composition may quantize
            the operator: it is smoothed all the same.
        half: One of `HALF_DTYPES`: nothing is quantized, and it computes in that.
    """

    activation: QSpec | None = None
    weight: QSpec | None = None
    act_algorithm: str = "minmax"
    weight_algorithm: str = "minmax"
    bias_correction: bool = False
    smooth: str | None = None
    half: str | None = None

    def to_json(self) -> dict[str, Any]:
        found = {
            **({} if self.half is None else {"half": self.half}),
            "activation": self.activation and self.activation.to_json(),
            "weight": self.weight and self.weight.to_json(),
            "act_algorithm": self.act_algorithm,
            "weight_algorithm": self.weight_algorithm,
            "bias_correction": self.bias_correction,
        }
        return found if self.smooth is None else {**found, "smooth": self.smooth}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OpQuant:
        if isinstance(data, Mapping):
            data = {"smooth": None, "half": None, **data}  # rules had neither at first
        _same_keys(data, cls)
        _need(data["smooth"] is None or isinstance(data["smooth"], str), cls, "smooth", data["smooth"])
        _need(data["half"] in (None, *HALF_DTYPES), cls, "half", data["half"])
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

    @property
    def floats(self) -> bool:
        """Whether it leaves operators float."""
        return self.what is None

    @property
    def half(self) -> torch.dtype | None:
        """The half precision that it gives operators."""
        return None if self.what is None or self.what.half is None else HALF_DTYPES[self.what.half]

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
        if what.half is not None:
            return f"{self.where} -> {what.half}"
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
        found = decide(self.rules, named(node, pattern))
        return None if found is None else (found, self.rules[found])

    def why_float(self, index: int | None) -> str | None:
        """Why the rule at `index` (None: no rule) leaves an operator float; None if it does not."""
        if index is not None:
            rule = self.rules[index]
            return f"kept float by {rule.origin or rule.where}" if rule.what is None else None
        meant = {kind for r in self.rules if r.where.kind == "all" for kind in r.where.value.split(",") if kind}
        if not meant:
            return "no rule of the recipe speaks of it"
        kinds = " and ".join(sorted(meant & set(PATTERNS.names())))
        return f"{self.method} is for {kinds}, unless set_local names others"

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


# --------------------------------------------------------------------------------------------------------- precedence
class _Rule(Protocol):
    @property
    def where(self) -> Where: ...
    @property
    def origin(self) -> str: ...
    @property
    def floats(self) -> bool: ...
    @property
    def half(self) -> torch.dtype | None: ...


class Claim(NamedTuple):
    """What one config says of an operator: the index of its rule, and how that fits. Larger is stronger.

    `gives`: 2 codes, 1 half precision, 0 neither.
    """

    gives: int
    priority: int
    fit: int
    rule: int


def claims(rules: Sequence[_Rule], op: Named) -> list[Claim]:
    """The claim of each config that speaks of an operator.

    Inside of a config a local setting is above the white list; then the better fit counts, then the later rule. What a
    config implies gives way where it names the operator, or a predicate of it takes that.
    """
    found: list[Claim] = []
    priority = 0
    for start, end in _configs(rules):
        priority += rules[start].origin == PRIORITY
        fits = {i: fit for i in range(start, end) if (fit := rules[i].where.fit(op)) is not None}
        if rules[start].floats and rules[start].origin in (WHITE_LIST, PRIORITY):
            fits.pop(start)
        if any(fit in ("predicate", "name", "path") for fit in fits.values()):
            fits = {i: fit for i, fit in fits.items() if fit != "implied"}
        local = {i: fit for i, fit in fits.items() if fit != "all" and not rules[i].origin.startswith(ENTRY)}
        if fits:
            best, i = max((FITS.index(fit), i) for i, fit in (local or fits).items())
            found.append(Claim(0 if rules[i].floats else 2 - (rules[i].half is not None), priority, best, i))
    return found


def _configs(rules: Sequence[_Rule]) -> list[tuple[int, int]]:
    """Where the rules of each config begin and end."""
    starts = sorted({0, *(i for i, rule in enumerate(rules) if rule.where.kind == "all")})
    return list(zip(starts, [*starts[1:], len(rules)], strict=True)) if rules else []


def decide(rules: Sequence[_Rule], op: Named) -> int | None:
    """Index of the rule that an operator goes by: of the claims of the configs one that quantizes is above one of
    half precision, and that above one that leaves float; then the priority of the config counts, then the better fit,
    then the later config.

    Where white lists leave it out and nothing else speaks of it, that is the last white list; None without one.
    """
    if found := claims(rules, op):
        return max(found).rule
    lists = [i for i, rule in enumerate(rules) if rule.where.kind == "all" and rule.origin == WHITE_LIST]
    return lists[-1] if lists else None


def smoothing_of(recipe: Recipe, op: Named) -> str | None:
    """How an operator is smoothed, whoever quantizes it; None: not. A config that leaves it float smooths nothing."""
    found = [c for c in claims(recipe.rules, op) if (what := recipe.rules[c.rule].what) and what.smooth]
    what = recipe.rules[max(found).rule].what if found else None
    return None if what is None else what.smooth


def in_vain(rules: Sequence[WhereRule], operators: Sequence[Named]) -> tuple[list[str], list[str]]:
    """Messages for a user: (local settings that another one of the same config always beats, operators that two configs
    claim). Rules that lose to what says the same are not meant, nor what one config leaves to another's "everything".
    """
    parts = [(start, end) for start, end in _configs(rules) if rules[start].origin != PRIORITY]
    config = {i: number for number, (start, end) in enumerate(parts, 1) for i in range(start, end)}
    won: set[int] = set()
    beaten: dict[int, int] = {}
    twice: dict[tuple[int, int], dict[str, None]] = {}
    for op in operators:
        found = claims(rules, op)
        won.update(claim.rule for claim in found)
        for i, rule in enumerate(rules):
            local = rule.where.kind not in ("all", "implied") and not rule.origin.startswith(ENTRY)
            mine = next((c.rule for c in found if config[c.rule] == config.get(i)), i)
            if local and rule.where.fit(op) is not None and rules[mine].what != rule.what:
                beaten.setdefault(i, mine)
        for lost in found:
            first = max(found)
            if rules[lost.rule].half is not None and FITS[lost.fit] == "all" and first.gives == 2:
                continue  # half precision is for the rest
            said = FITS[lost.fit] not in ("all", "implied") or (lost.fit == first.fit and FITS[lost.fit] == "all")
            if said and lost is not first and not _agree(rules[lost.rule].what, rules[first.rule].what):
                twice.setdefault((lost.rule, first.rule), {})[op.name] = None
    dead = [f"{_said(rules[i])} never counts: {_said(rules[j])} beats it" for i, j in beaten.items() if i not in won]
    both = []
    for pair, ops in twice.items():
        shown = ", ".join(list(ops)[:5]) + (", ..." if len(ops) > 5 else "")
        a, b = (f"{_said(rules[i])} of config {config[i]}" for i in pair)
        both.append(f"two configs claim {shown}: {b} wins over {a}")
    return dead, both


def _agree(lost: OpQuant | None, won: OpQuant | None) -> bool:
    """Whether nobody loses anything: both say the same, or the one that loses smooths what the other quantizes."""
    return lost == won or (lost is not None and lost.smooth is not None)


def _said(rule: WhereRule) -> str:
    return rule.origin or ("everything" if rule.where.kind == "all" else str(rule.where))


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
