"""Models of the Hugging Face libraries. These are imported when a function needs them, and not before."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from inc_graph.errors import IncError

__all__ = ["dowload_hf_model", "load_empty_model"]


def load_empty_model(pretrained_model_name_or_path: str | os.PathLike[str], cls: Any = None, **kwargs: Any) -> Any:
    """A model of transformers in eval mode whose parameters have shapes and no values; it takes hardly any memory.

    Parameters are on the meta device until they are loaded (`load_state_dict(..., assign=True)`); buffers, which often
    are in no file, have their values. Attribute `path` is where the model comes from. No weights are read or fetched.

    Args:
        pretrained_model_name_or_path: A folder with a `config.json`, or the name of a model on the hub.
        cls: A class of transformers; `AutoModelForCausalLM` if it is None.
        **kwargs: For the config and the model, as `from_pretrained` takes them. What says how weights are loaded
            (`device_map`, `low_cpu_mem_usage`) has nothing to do here.

    Raises:
        IncError: transformers is not installed.
        Whatever transformers raises where there is no such config.
    """
    transformers = _library("transformers")
    cls = transformers.AutoModelForCausalLM if cls is None else cls
    path = os.fspath(pretrained_model_name_or_path)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device_map", "low_cpu_mem_usage", "max_memory")}
    trust = {k: v for k, v in kwargs.items() if k == "trust_remote_code"}  # the model needs it as well as the config
    auto = getattr(cls, "config_class", None) is None
    source = transformers.AutoConfig if auto else cls.config_class
    from_file = [name for name in ("dtype", "torch_dtype") if kwargs.get(name) == "auto"]
    for name in from_file:
        del kwargs[name]  # the config would take the word for a dtype
    config, rest = source.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    for name in from_file:
        rest[name] = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    with _empty_parameters():
        model = cls.from_config(config, **{**rest, **trust}) if auto else cls._from_config(config, **rest)
    model.tie_weights()
    model.eval()
    model.path = path
    return model


@contextlib.contextmanager
def _empty_parameters() -> Iterator[None]:
    """In the block every parameter that a module gets goes to the meta device at once; buffers stay where they are."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: Any) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def dowload_hf_model(
    repo_id: str, cache_dir: str | None = None, repo_type: str | None = None, revision: str | None = None
) -> str:
    """The folder of a model of the Hugging Face hub, fetched if it is not in the cache. (The name is that of old.)

    Of weights that are there in both forms, those in safetensors are fetched.

    Args:
        repo_id: "owner/name".
        cache_dir, repo_type, revision: As for `huggingface_hub.snapshot_download`.

    Raises:
        IncError: huggingface_hub is not installed.
        Whatever huggingface_hub raises if there is no such model, or no network.
    """
    hub = _library("huggingface_hub")
    which = {"repo_type": repo_type, "revision": revision}
    try:
        folder = hub.snapshot_download(repo_id, cache_dir=cache_dir, local_files_only=True, **which)
        if any(name.endswith((".bin", ".safetensors")) for name in os.listdir(folder)):
            return str(folder)
    except FileNotFoundError:  # not in the cache
        pass
    names = hub.list_repo_files(repo_id, **which)
    both = all(any(name.endswith(end) for name in names) for end in (".bin", ".safetensors"))
    skipped = ["*.bin", "*.bin.index.json"] if both else None
    return str(hub.snapshot_download(repo_id, cache_dir=cache_dir, ignore_patterns=skipped, **which))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise IncError(f"{name} is not installed: {e}", hint="pip install 'inc_graph[hf]'") from e
