"""Where `inc-graph quantize` gets a model, a config and calibration data from."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from inc_graph.errors import CalibrationError, CaptureError, ConfigError, IncError, IncWarning
from inc_graph.export import export
from inc_graph.graph import val
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.composable import as_config
from inc_graph.registry import CONFIGS
from inc_graph.utils.progress import progress

__all__ = [
    "any_batch",
    "as_example",
    "current_folder_importable",
    "is_graph",
    "read_calls",
    "read_config",
    "read_model",
    "run_calls",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@contextlib.contextmanager
def current_folder_importable() -> Iterator[None]:
    """Modules of the current folder can be imported, as with `python -m`."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _named(reference: str, what: str) -> Any:
    """What `package.module:name` stands for; imports the module. ConfigError if there is no such thing."""
    module, _, name = reference.partition(":")
    if not module or not name:
        hint = "write package.module:function"
        raise ConfigError(f"{what} {reference!r} is neither a file nor package.module:function", hint=hint)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(f"{what}: module {module!r} cannot be imported: {e}") from e
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{what}: module {module!r} has no {name!r}")
        found = getattr(found, part)
    return found


# --------------------------------------------------------------------------------------------------- config and model
def read_config(text: str) -> BaseConfig:
    """The config of a JSON file, or the default one of a method. ConfigError or UnknownNameError if it is none."""
    if not text.endswith(".json") and not Path(text).is_file():
        return CONFIGS.get(text)()
    try:
        data = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{text} cannot be read as JSON: {e}") from e
    if not isinstance(data, dict):
        hint = 'it looks like {"static_quant": {"global": {}, "local": {}}}'
        raise ConfigError(f"{text} holds no config, but {type(data).__name__}", hint=hint)
    return as_config(data)


def read_model(text: str, device: str | None) -> nn.Module:
    """The model of a .pt2 file (as a graph of ours; whoever calls has said that it may execute code), or of a function.

    Raises:
        CaptureError, ConfigError: there is no such model, or it cannot go to the device.
    """
    if text.endswith(".pt2"):
        try:
            program = torch.export.load(text)
            if device is not None:
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
        except Exception as e:  # torch.export.load raises what it likes
            raise CaptureError(f"{text} cannot be read: {type(e).__name__}: {str(e)[:300]}") from e
        return export(program)
    found = _named(text, "model")
    if not isinstance(found, nn.Module | ExportedProgram):
        if not callable(found):
            raise ConfigError(f"{text} is {type(found).__name__}, neither a model nor a function")
        found = found()
    if isinstance(found, ExportedProgram):
        found = export(found)
    if not isinstance(found, nn.Module):
        raise ConfigError(f"{text} gives {type(found).__name__}, not a torch.nn.Module")
    try:
        return found if device is None else found.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ConfigError(f"the model cannot go to {device!r}: {str(e).splitlines()[0]}") from e


def is_graph(model: nn.Module) -> bool:
    """Whether it is a graph of ours already."""
    return isinstance(model, fx.GraphModule) and "inc" in model.meta


# ---------------------------------------------------------------------------------------------------------------- data
def read_calls(
    text: str, model: nn.Module, batch_size: int | None, samples: int | None, device: str | None, any_size: bool
) -> Iterable[Call]:
    """The calls to calibrate with.

    Args:
        text: A .safetensors or .npz file, or `package.module:function`.
        model: That will be called.
        batch_size: Samples in a call; None for what the model was exported for, or 1.
        samples: How many of them at most; of a function, how many calls.
        device: Where the inputs go.
        any_size: Whether the last call may have fewer samples. A graph that takes any batch size knows that itself.

    Raises:
        ConfigError: there is no such data, or its names are not those of the inputs.
    """
    kind = Path(text).suffix
    if kind not in (".safetensors", ".npz"):
        if batch_size is not None:
            raise ConfigError("--batch-size is for data in a file", hint="let the function yield whole batches")
        return itertools.islice(_from_function(text, device), samples)
    arrays = _arrays(Path(text))
    _check_names(text, arrays, model)
    counts = {name: (a.shape[0] if a.ndim else 0) for name, a in arrays.items()}
    if len(set(counts.values())) != 1 or not next(iter(counts.values())):
        raise ConfigError(f"{text}: the first dimension must count the samples, and be the same: {counts}")
    there = next(iter(counts.values()))
    total = min(there, samples or there)
    fixed = _fixed(model)
    batch = batch_size or fixed or 1
    if is_graph(model):
        any_size = fixed is None
    else:
        batch = min(batch, total)
    return _batches(arrays, total, batch, any_size, device)


def _from_function(text: str, device: str | None) -> Iterator[Call]:
    made = _named(text, "calibration data")
    made = made() if callable(made) else made
    if not isinstance(made, Iterable):
        raise ConfigError(f"{text} gives {type(made).__name__}, not an iterable of calls")
    for call in made:
        args, kwargs = ((), call) if isinstance(call, dict) else (call if isinstance(call, tuple) else (call,), {})
        yield pytree.tree_map(lambda x: _moved(x, device), (tuple(args), dict(kwargs)))


def _moved(x: Any, device: str | None) -> Any:
    return x.to(device) if device is not None and isinstance(x, torch.Tensor) else x


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            import numpy

            with numpy.load(path, allow_pickle=False) as file:
                found = {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as e:  # each of the libraries has errors of its own
        raise ConfigError(f"{path} cannot be read: {type(e).__name__}: {str(e)[:200]}") from e
    if not found:
        raise ConfigError(f"{path} holds no arrays")
    return found


def _check_names(text: str, arrays: dict[str, torch.Tensor], model: nn.Module) -> None:
    """The arrays are named as inputs of the model, and all that it must have are there."""
    takes = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if any(p.kind is p.VAR_KEYWORD for p in takes):
        return
    names = [p.name for p in takes]
    unknown = [name for name in arrays if name not in names]
    missing = [p.name for p in takes if p.default is p.empty and p.name not in arrays]
    if unknown or missing:
        hint = f"name the arrays as the inputs of the model: {', '.join(names)}"
        raise ConfigError(f"{text} has the arrays {', '.join(arrays)}", hint=hint)


def _fixed(model: nn.Module) -> int | None:
    """The batch size that an exported graph was made for; None if it takes any."""
    if not is_graph(model):
        return None
    values = [val(n) for n in cast(fx.GraphModule, model).graph.find_nodes(op="placeholder")]
    first = {v.shape[0] for v in values if isinstance(v, torch.Tensor) and v.ndim}
    found = first.pop() if len(first) == 1 else None
    return found if isinstance(found, int) else None


def _batches(
    arrays: dict[str, torch.Tensor], total: int, batch: int, any_size: bool, device: str | None
) -> Iterator[Call]:
    for start in range(0, total, batch):
        end = min(start + batch, total)
        if end - start < batch and not any_size:
            text = f"the last {end - start} samples are not used: the model is exported for batches of {batch}"
            warnings.warn(text, IncWarning, stacklevel=2)
            return
        yield (), {name: _moved(array[start:end], device) for name, array in arrays.items()}


def as_example(model: nn.Module, call: Call) -> Any:
    """Example inputs for `prepare`. ConfigError if the call has positional and named inputs at once."""
    args, kwargs = call
    if not args:
        return kwargs
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else args


def any_batch(example: Any) -> Any:
    """`dynamic_shapes` that leave the first dimension of every input open, as far as the model allows.

    Raises:
        ConfigError: an input has one sample, which torch.export takes for a size that is always 1.
    """

    def of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return None
        if value.shape[0] == 1:
            raise ConfigError("--dynamic-batch needs a first call of 2 samples or more", hint="give a --batch-size")
        return {0: torch.export.Dim.AUTO}

    return pytree.tree_map(of, example)


def run_calls(prepared: nn.Module, calls: Iterable[Call]) -> int:
    """Run calibration data through a prepared model; how many calls. CalibrationError says which call failed."""
    count = 0
    with progress("calibrate") as step, torch.no_grad():
        for args, kwargs in calls:
            step(f"call {count + 1}")
            try:
                prepared(*args, **kwargs)
            except IncError:
                raise
            except Exception as e:  # whatever the user's model says
                message = f"the model failed in call {count + 1} of the calibration: {type(e).__name__}: {str(e)[:300]}"
                raise CalibrationError(message, hint="--debug shows where") from e
            count += 1
    return count
