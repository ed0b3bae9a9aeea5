"""Passes and pipelines of them.

A pass is a frozen dataclass: its class carries a name and the levels it needs and leaves behind, its fields are its
options. So a pipeline is text, and text is a pipeline: `fold-conv-bn,smooth-quant{alpha=0.5}`.

Environment: `INC_FUEL=n` stops after n optional rewrites (bisect a miscompile), `INC_VERIFY=1` verifies the graph after
each pass, `INC_DUMP=dir` writes the graph and its diff after each pass.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from inc_graph.errors import CalibrationError, ConfigError, IncError, PassError, TrainingError
from inc_graph.graph import Fuel, code_later, current_fuel, editing, get_level
from inc_graph.plain import plain
from inc_graph.registry import PASSES
from inc_graph.text import diff, to_text
from inc_graph.verify import verify


@dataclass
class PassReport:
    """What a pass matched, what it did not and why. `missed` holds (node name, reason)."""

    matched: list[str] = field(default_factory=list)
    missed: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    name: str = ""

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.matched)} matched, {len(self.missed)} missed"]
        lines += [f"  missed {node}: {reason}" for node, reason in self.missed]
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])


@dataclass
class PassResult:
    """The graph after a pass, whether it changed, and the report."""

    graph: fx.GraphModule
    modified: bool
    report: PassReport = field(default_factory=PassReport)


@dataclass(frozen=True)
class Pass:
    """Base of all passes. A subclass is a frozen dataclass whose fields are its options.

    `requires`: level or levels the graph must have (None: any). `ensures`: level it has afterwards (None: unchanged).
    Both are checked by the pipeline.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[str | tuple[str, ...] | None] = None
    ensures: ClassVar[str | None] = None

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Transform `gm`, in place or into a new graph module, and say what was done."""
        raise NotImplementedError(f"{type(self).__name__}.run")

    def __str__(self) -> str:
        options = [f"{f.name}={_show(v)}" for f in dataclasses.fields(self) if (v := _changed(self, f)) is not _SAME]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


@dataclass
class PipelineResult:
    """The graph after the last pass; a report and a time (seconds) for each pass, in order."""

    graph: fx.GraphModule
    reports: list[PassReport]
    timings: list[tuple[str, float]]

    def __str__(self) -> str:
        return "\n".join(f"{s * 1e3:9.1f} ms  {r}" for (_, s), r in zip(self.timings, self.reports, strict=True))


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes. `str(p)` and `Pipeline.parse` are inverses."""

    passes: tuple[Pass, ...]

    def __init__(self, passes: typing.Iterable[Pass] = ()) -> None:
        object.__setattr__(self, "passes", tuple(passes))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """From `name{option=value,...},name,...`. PassError on bad text, UnknownNameError on an unknown pass."""
        return cls(_Parser(text).passes())

    @classmethod
    def merged(cls, pipelines: typing.Sequence[Pipeline]) -> Pipeline:
        """One pipeline with the passes of all, each once, in an order that is right for every one of them.

        Where that leaves a choice, the passes of the earlier pipeline come first.

        Raises:
            PassError: two of them want a pass with different options, or two passes in opposite orders.
        """
        known: dict[str, Pass] = {}
        before: dict[str, set[str]] = {}
        for pipeline in pipelines:
            for i, p in enumerate(pipeline.passes):
                if known.setdefault(p.name, p) != p:
                    raise PassError(f"one pipeline asks for {known[p.name]}, another for {p}")
                before.setdefault(p.name, set()).update({q.name for q in pipeline.passes[:i]} - {p.name})
        found: list[Pass] = []
        while before:
            free = next((name for name, names in before.items() if names.isdisjoint(before)), None)
            if free is None:
                raise PassError(f"pipelines want these passes in opposite orders: {', '.join(before)}")
            del before[free]
            found.append(known[free])
        return cls(found)

    def run(
        self,
        gm: fx.GraphModule,
        *,
        verify_each: bool | None = None,
        on_pass: Callable[[str], None] = lambda name: None,
        recompile: bool = True,
    ) -> PipelineResult:
        """Run the passes in order. PassError names the pass that failed and the ones before it.

        `verify_each` (default: `INC_VERIFY=1`) checks the graph, and that a pass which reports no change made none.
        `on_pass` is told the name of each pass before it runs. Code is generated once, after the last pass, and not at
        all without `recompile`: the graph that comes back is to be recompiled before it is run.
        """
        checking = os.environ.get("INC_VERIFY") == "1" if verify_each is None else verify_each
        dump = _Dump(os.environ.get("INC_DUMP"), gm)
        fuel = current_fuel() or _fuel_from_environment()
        reports: list[PassReport] = []
        timings: list[tuple[str, float]] = []
        for p in self.passes:
            on_pass(p.name)
            before = to_text(gm) if checking else ""
            start = time.perf_counter()
            try:
                _check_requires(p, gm)
                with plain(), editing(p.name, fuel), code_later():
                    result = p.run(gm)
                seconds = time.perf_counter() - start
                _check_result(p, gm, result)
                if checking:
                    verify(result.graph)
                    if not result.modified and to_text(result.graph) != before:
                        raise PassError(f"pass {p.name!r} reports no change but changed the graph")
            except (CalibrationError, ConfigError, TrainingError):
                raise  # what the user has to mend is no failure of a pass
            except Exception as e:
                done = ", ".join(n for n, _ in timings)
                raise PassError(
                    f"pass {p.name!r} failed after [{done}]: {e.message if isinstance(e, IncError) else _short(e)}",
                    **{k: getattr(e, k, None) for k in ("node", "module", "hint")},
                ) from e
            result.report.name = p.name
            gm = result.graph
            reports.append(result.report)
            timings.append((p.name, seconds))
            dump.write(p.name, gm)
        if recompile:
            gm.recompile()
        return PipelineResult(gm, reports, timings)


def _short(e: Exception, limit: int = 400) -> str:
    """torch puts whole graphs into its messages; the cause is chained, so its head is enough here."""
    text = repr(e)
    return text if len(text) <= limit else text[:limit] + " ..."


def _check_requires(p: Pass, gm: fx.GraphModule) -> None:
    levels = (p.requires,) if isinstance(p.requires, str) else p.requires
    if levels and get_level(gm) not in levels:
        raise PassError(f"needs a graph of level {' or '.join(levels)}, this one is {get_level(gm)!r}")


def _check_result(p: Pass, gm: fx.GraphModule, result: Any) -> None:
    if not isinstance(result, PassResult):
        raise PassError(f"run() must give a PassResult, not {type(result).__name__}")
    if p.ensures is not None and get_level(result.graph) != p.ensures:
        raise PassError(f"declares level {p.ensures!r} but left {get_level(result.graph)!r}")


def _fuel_from_environment() -> Fuel | None:
    text = os.environ.get("INC_FUEL", "")
    if not text:
        return None
    if not text.isdigit():
        raise PassError(f"INC_FUEL must be a number of rewrites, not {text!r}")
    return Fuel(int(text))


class _Dump:
    """Writes `NN-pass.txt` and `NN-pass.diff` into a folder; does nothing without one."""

    def __init__(self, folder: str | None, gm: fx.GraphModule) -> None:
        self.folder = Path(folder) if folder else None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count = len(list(self.folder.glob("*.txt")))  # several pipelines may share the folder
        self.last = to_text(gm)
        self._put("input", "txt", self.last)

    def _put(self, name: str, ext: str, text: str) -> None:
        assert self.folder is not None
        (self.folder / f"{self.count:02d}-{name}.{ext}").write_text(text)

    def write(self, name: str, gm: fx.GraphModule) -> None:
        if self.folder is None:
            return
        self.count += 1
        text = to_text(gm)
        self._put(name, "txt", text)
        self._put(name, "diff", diff(self.last, text))
        self.last = text


# ------------------------------------------------------------------------------------------------- text of options
_SAME = object()
_BARE = re.compile(r"[A-Za-z_./+*?^$|\\-][\w./+*?^$|\\:-]*")
_WORDS = {"true": True, "false": False, "none": None}


def _changed(p: Pass, f: dataclasses.Field) -> Any:
    """The option's value, or `_SAME` if it is the default."""
    value = getattr(p, f.name)
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    return _SAME if type(value) is type(default) and value == default else value


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _show(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, str) and _BARE.fullmatch(value) and _bare_value(value) == value:
        return value
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    except TypeError as e:
        hint = "give its class to_json() and from_json()"
        raise PassError(f"option value {value!r} has no text form", hint=hint) from e


def _bare_value(word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, what: str) -> typing.NoReturn:
        raise PassError(f"pipeline text, position {self.at}: {what}: {self.text[: self.at]}>>>{self.text[self.at :]}")

    def take(self, pattern: str, what: str) -> str:
        found = re.compile(r"\s*(" + pattern + r")\s*").match(self.text, self.at)
        if found is None:
            self.fail(f"expected {what}")
        self.at = found.end()
        return found.group(1)

    def peek(self) -> str:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def passes(self) -> list[Pass]:
        found: list[Pass] = []
        while self.text[self.at :].strip():
            if found:
                self.take(",", "','")
            name = self.take(r"[A-Za-z_][\w.-]*", "a pass name")
            cls = PASSES.get(name)
            found.append(self.make(cls, self.options() if self.peek() == "{" else {}))
        return found

    def options(self) -> dict[str, Any]:
        self.take(r"\{", "'{'")
        found: dict[str, Any] = {}
        while self.peek() != "}":
            if found:
                self.take(",", "',' or '}'")
            name = self.take(r"[A-Za-z_]\w*", "an option name")
            if name in found:
                self.fail(f"option {name!r} given twice")
            self.take("=", "'='")
            found[name] = self.value()
        self.take(r"\}", "'}'")
        return found

    def value(self) -> Any:
        if self.peek() and self.peek() in '[{"':
            try:
                value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as e:
                self.fail(f"bad value ({e.msg})")
            return value
        return _bare_value(self.take(r"[^,{}\[\]\"=\s]+", "a value"))

    def make(self, cls: type[Pass], options: dict[str, Any]) -> Pass:
        hints = typing.get_type_hints(cls) if options else {}
        known = [f.name for f in dataclasses.fields(cls)]
        for name, value in options.items():
            if name not in known:
                self.fail(f"pass {cls.name!r} has no option {name!r} (it has: {', '.join(known) or 'none'})")
            options[name] = _typed(value, hints.get(name))
        return cls(**options)


def _typed(value: Any, hint: Any) -> Any:
    """JSON gives lists and dictionaries; the field may want a tuple, a float or a class with from_json()."""
    kinds = [hint, *typing.get_args(hint)] if typing.get_origin(hint) is not tuple else [hint]
    for kind in kinds:
        if isinstance(value, list) and (kind is tuple or typing.get_origin(kind) is tuple):
            inner = (typing.get_args(kind) or (None,))[0]
            return tuple(_typed(v, inner) for v in value)
        if hasattr(kind, "from_json") and value is not None:
            return kind.from_json(value)
    if float in kinds and int not in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
