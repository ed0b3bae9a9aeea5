"""What `autotune` has tried and measured so far, in a file: after an interruption it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inc_graph.errors import ConfigError
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.sensitivity import Damage, Measured

__all__ = ["TRIAL", "Journal", "fingerprint"]

FORMAT = 1
TRIAL = ("score", "bytes", "milliseconds", "seconds")  # of a trial


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and some values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            few = tensor.detach().reshape(-1)[:256]
            if few.device.type != "meta":
                digest.update(json.dumps(few.to("cpu", torch.float64).tolist()).encode())
    return digest.hexdigest()


class Journal:
    """A file with a line for the search, and one for each measurement and trial, each written at once, as JSON.

    Args:
        path: The file. If it is there, the search goes on; what it holds is in `baseline` and `known`.
        model: The float model: a journal of another one is refused.

    Attributes:
        baseline: Score of the float model, None in a new journal.

    Raises:
        ConfigError: the file is no journal, or one of another model.
    """

    def __init__(self, path: str | os.PathLike[str], model: nn.Module) -> None:
        self.path = Path(path)
        self.baseline: float | None = None
        self._model = fingerprint(model)
        self._trials: dict[str, dict[str, Any]] = {}
        self._measured: dict[str, Measured] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text.rpartition(b"\n")[0] + b"\n" if b"\n" in text else b""  # the last line may have been cut off
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError as e:
                raise ConfigError(f"{self.path}, line {number} is not JSON", hint="name another journal") from e
        if not lines:
            if text and not text.startswith(b'{"format"'):
                raise ConfigError(f"{self.path} is not a journal of autotune", hint="name another file")
            self.path.unlink()
            return
        head = lines[0]
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ConfigError(f"{self.path} is not a journal of autotune in format {FORMAT}", hint="name another file")
        if head.get("model") != self._model:
            hint = "name another journal, or delete this one"
            raise ConfigError(f"{self.path} is the journal of another model", hint=hint)
        number = 1
        try:
            self.baseline = float(head["baseline"])
            for line in lines[1:]:
                number += 1
                if "measured" in line:
                    layers = [Damage(*layer) for layer in line["layers"]]
                    self._measured[line["measured"]] = Measured(layers, dict(line["unmeasured"]))
                else:
                    self._trials[line["config"]] = {key: line[key] for key in TRIAL}
        except (KeyError, TypeError, ValueError) as e:
            hint = "delete that line, or name another journal"
            raise ConfigError(f"{self.path}, line {number} is damaged: {type(e).__name__}: {e}", hint=hint) from e
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def begin(self, baseline: float) -> None:
        """Note the score of the float model, which a new journal starts with."""
        if self.baseline is None:
            self.baseline = baseline
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"format": FORMAT, "model": self._model, "baseline": baseline})

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _key(config: BaseConfig, *more: Any) -> str | None:
    try:
        return json.dumps([config.name, config.to_dict(), *more], sort_keys=True)
    except ConfigError:
        return None
