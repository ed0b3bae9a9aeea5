"""What `autotune` has tried and measured so far, in a file: after an interruption it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import fx, nn

from inc_graph.errors import ConfigError, IncWarning
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.composable import ComposableConfig
from inc_graph.quantization.sensitivity import Damage, Measured
from inc_graph.quantization.tuning_config import Evaluator

__all__ = ["TRIAL", "Journal", "fingerprint", "journal_in", "search_of"]

FORMAT = 2
NUMBER = (int, float)
TRIAL: dict[str, tuple[type, ...]] = {  # of a trial
    "score": NUMBER, "bytes": (int,), "milliseconds": (*NUMBER, NoneType), "seconds": NUMBER,
}  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's modules and operators, and of its tensors: names, shapes, dtypes and some of the values."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}\n".encode())
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        target = getattr(node.target, "__name__", node.target)  # a function as text has an address in it
        digest.update(f"{node.name} {target}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            few = tensor.detach().reshape(-1)[:256]
            if few.device.type != "meta":
                digest.update(json.dumps(few.to("cpu", torch.float64).tolist()).encode())
    return digest.hexdigest()


def search_of(model: nn.Module, scope: str, evaluator: Evaluator) -> dict[str, Any]:
    """What scores depend on, as far as it can be written down: data and what functions do cannot.

    Args:
        model: The float model.
        scope: "graph" or "modules": what is quantized.
        evaluator: Its direction, and the names and weights of its metrics.
    """
    metrics = [[m.name, m.weight] for m in evaluator.metrics]
    better = evaluator.higher_is_better
    return {"model": fingerprint(model), "scope": scope, "higher_is_better": better, "metrics": metrics}


class Journal:
    """A file with a line for the search, and one for each measurement and trial, each written at once, as JSON.

    Args:
        path: The file. If it is there, the search goes on; what it holds is in `baseline` and `known`.
        search: From `search_of`: a journal of another one is refused.

    Attributes:
        baseline: Score of the float model, None in a new journal.

    Raises:
        ConfigError: the file is no journal, one of another search, or cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], search: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.baseline: float | None = None
        self._search = dict(search)
        self._trials: dict[str, dict[str, Any]] = {}
        self._measured: dict[str, Measured] = {}
        if self.path.is_dir():
            hint = f"name a file in it: {self.path / 'autotune.jsonl'}"
            raise ConfigError(f"the journal {self.path} is a folder", hint=hint)
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            text = self.path.read_bytes()
        except OSError as e:
            raise ConfigError(f"the journal {self.path} cannot be read: {e}", hint="name another file") from e
        whole = text.rpartition(b"\n")[0] + b"\n" if b"\n" in text else b""  # the last line may have been cut off
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as e:
                raise ConfigError(f"{self.path}, line {number} is not JSON", hint="name another journal") from e
        if not lines:
            if text and not text.startswith(b'{"format"'):
                raise ConfigError(f"{self.path} is not a journal of autotune", hint="name another file")
            self.path.unlink()
            return
        self._compare(lines[0])
        number = 1
        try:
            self.baseline = float(lines[0]["baseline"])
            for line in lines[1:]:
                number += 1
                if "measured" in line:
                    self._measured[line["measured"]] = _measured(line)
                else:
                    self._trials[line["config"]] = {key: _value(line[key], key, kinds) for key, kinds in TRIAL.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            hint = "delete that line, or name another journal"
            raise ConfigError(f"{self.path}, line {number} is damaged: {type(e).__name__}: {e}", hint=hint) from e
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _compare(self, head: Any) -> None:
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ConfigError(f"{self.path} is not a journal of autotune in format {FORMAT}", hint="name another file")
        hint = "name another journal, or delete this one"
        if head.get("model") != self._search["model"]:
            raise ConfigError(f"{self.path} is the journal of another model", hint=hint)
        other = [f"{k} was {head.get(k)!r}, and is {v!r}" for k, v in self._search.items() if head.get(k) != v]
        if other:
            raise ConfigError(f"{self.path} is the journal of another search: {'; '.join(other)}", hint=hint)

    def begin(self, baseline: float) -> None:
        """Note the score of the float model, which a new journal starts with."""
        if self.baseline is None:
            self.baseline = baseline
            self._write({"format": FORMAT, **self._search, "baseline": baseline})

    def known(self, config: BaseConfig) -> dict[str, Any] | None:
        """What an earlier run noted of a config."""
        key = _key(config)
        return None if key is None else self._trials.get(key)

    def note(self, config: BaseConfig, facts: dict[str, Any]) -> None:
        """Add a trial. One whose config cannot be written down (with a lambda in it) is tried again next time."""
        key = _key(config)
        if key is not None:
            self._write({"config": key, **facts})

    def measured(self, config: BaseConfig, calls: int) -> Measured | None:
        """The damage of each layer that an earlier run measured, for this config, on so many calls."""
        key = _key(config, calls)
        return None if key is None else self._measured.get(key)

    def note_measured(self, config: BaseConfig, calls: int, found: Measured) -> None:
        """Add a measurement; if its config cannot be written down it is measured again next time."""
        key = _key(config, calls)
        if key is not None:
            layers = [[d.name, d.op, d.db, d.general] for d in found.layers]
            self._write({"measured": key, "layers": layers, "unmeasured": found.unmeasured})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise ConfigError(f"the journal {self.path} cannot be written: {e}", hint="name another file") from e


def journal_in(folder: str, search: Mapping[str, Any], resume: bool) -> Journal:
    """The journal of a search in a folder for all of them: a new one, or with `resume` the last one of this search."""
    name = hashlib.sha256(json.dumps(dict(search), sort_keys=True).encode()).hexdigest()[:12]

    def path(number: int) -> Path:
        return Path(folder) / (f"autotune-{name}.jsonl" if number == 1 else f"autotune-{name}-{number}.jsonl")

    number = 1
    while path(number).exists():
        number += 1
    if resume and number > 1:
        number -= 1
    elif resume and Path(folder).exists():
        text = f"{folder!r} holds no journal of this search (of this model, with these metrics), so nothing is resumed"
        warnings.warn(f"set_resume_from: {text}", IncWarning, stacklevel=4)
    return Journal(path(number), search)


def _measured(line: Mapping[str, Any]) -> Measured:
    layers = []
    for name, op, db, general in line["layers"]:
        _value(name, "name", (str,)), _value(op, "op", (str,)), _value(db, "db", NUMBER)
        layers.append(Damage(name, op, db, bool(general)))
    return Measured(layers, {str(k): str(v) for k, v in line["unmeasured"].items()})


def _value(value: Any, name: str, kinds: tuple[type, ...]) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} is {value!r}")
    return value


def _key(config: BaseConfig, *more: Any) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncWarning)  # of what a dictionary leaves out: it is not left out here
            return json.dumps([_facts(config), *more], sort_keys=True)
    except (ConfigError, TypeError, ValueError):
        return None


def _facts(config: BaseConfig) -> Any:
    """All that a config says: its dictionary, and beside it what that leaves out."""
    if isinstance(config, ComposableConfig):
        return [_facts(c) for c in config.config_list]
    fields = config.fields.items()
    out = {k: v for k, f in fields if not f.stored and (v := getattr(config, k)) is not f.default}
    return [config.name, config.to_dict(), out, [_facts(c) for c in config.local_config.values()]]
