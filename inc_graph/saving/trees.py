"""The nesting of a model's inputs and outputs (pytree specs), as JSON and back.

A leaf is "*". A list is a JSON list; everything else an object with one key: {"tuple": [...]}, {"dict": [[key, tree]]},
{"ordered": [[key, tree]]}, {"namedtuple": [name, fields, trees]}, {"class": [name, context, trees]}.

Reading never imports anything. A class that the reading program has not registered as a pytree node (the outputs of
transformers, where transformers is not imported) is replaced by an `Output`, which has the same keys.
"""

from __future__ import annotations

import collections
import warnings
from typing import Any

from torch.utils import _pytree as pytree

from inc_graph.errors import IncWarning, SavedModelError
from inc_graph.saving.values import decode, encode

__all__ = ["Output", "read_tree", "write_tree"]

_LEAF = object()


class Output(collections.OrderedDict[str, Any]):
    """Stands for an output class that is not known where the model was loaded: `y.logits`, `y["logits"]` and `y[0]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this output has the fields {', '.join(self)}, not {name!r}") from None

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


pytree.register_pytree_node(
    Output,
    lambda x: (list(x.values()), list(x)),
    lambda values, names: Output(zip(names, values, strict=True)),
    serialized_type_name="inc_graph.saving.Output",
)


def _parts(spec: Any) -> tuple[Any, Any, list[Any]]:
    """(type, context, children) of a spec; the names of the fields differ between versions of torch."""
    children = spec._children if hasattr(spec, "_children") else spec.children_specs
    return spec.type, spec._context if hasattr(spec, "_context") else spec.context, list(children)


def write_tree(spec: Any) -> Any:
    """JSON-able form of a `TreeSpec`. SavedModelError that names a class whose context has no such form."""
    kind, context, children = _parts(spec)
    trees = [write_tree(c) for c in children]
    if kind is None:
        return "*"
    if kind is list:
        return trees
    if kind is tuple:
        return {"tuple": trees}
    if kind in (dict, collections.OrderedDict):
        keys = [encode(k) for k in context]
        return {"dict" if kind is dict else "ordered": [list(p) for p in zip(keys, trees, strict=True)]}
    if kind is collections.namedtuple:
        return {"namedtuple": [context.__name__, list(context._fields), trees]}
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        return {"class": [name, encode(context), trees]}
    except SavedModelError as e:
        hint = "let the model take and give tuples, lists and dictionaries of tensors"
        raise SavedModelError(f"{name} among the inputs or outputs cannot be saved: {e.message}", hint=hint) from e


def read_tree(data: Any) -> Any:
    """The `TreeSpec` of what `write_tree` gave. SavedModelError if it is no such form."""
    return pytree.tree_flatten(_example(data))[1]


def _example(data: Any) -> Any:
    """An object of that structure: its spec is then the one that this version of torch makes."""
    if data == "*":
        return _LEAF
    if isinstance(data, list):
        return [_example(d) for d in data]
    if isinstance(data, dict) and len(data) == 1:
        ((kind, inner),) = data.items()
        if kind == "tuple" and isinstance(inner, list):
            return tuple(_example(d) for d in inner)
        if kind in ("dict", "ordered") and isinstance(inner, list) and all(_is_pair(p) for p in inner):
            pairs = [(decode(k), _example(d)) for k, d in inner]
            try:
                return dict(pairs) if kind == "dict" else collections.OrderedDict(pairs)
            except TypeError as e:  # a key that is a list
                raise SavedModelError(f"the keys of a dictionary cannot be read: {e}") from e
        if kind in ("namedtuple", "class") and isinstance(inner, list) and len(inner) == 3:
            name, context, trees = inner
            if isinstance(name, str) and isinstance(trees, list):
                children = [_example(d) for d in trees]
                return _named(name, context, children) if kind == "namedtuple" else _other(name, context, children)
    raise SavedModelError("the structure of inputs or outputs cannot be read")


def _is_pair(data: Any) -> bool:
    return isinstance(data, list) and len(data) == 2


def _named(name: str, fields: Any, children: list[Any]) -> Any:
    if not isinstance(fields, list) or len(fields) != len(children):
        raise SavedModelError(f"the fields of the namedtuple {name!r} cannot be read")
    try:
        return collections.namedtuple(name, fields)(*children)
    except (TypeError, ValueError) as e:  # a keyword, a name twice
        raise SavedModelError(f"the fields of the namedtuple {name!r} cannot be read: {e}") from e


def _other(name: str, context: Any, children: list[Any]) -> Any:
    context = decode(context)
    for kind, node in pytree.SUPPORTED_NODES.items():
        if isinstance(kind, type) and f"{kind.__module__}.{kind.__qualname__}" == name:
            try:
                return node.unflatten_fn(children, context)
            except Exception as e:
                raise SavedModelError(f"{name} does not take what was saved of it: {e}") from e
    keys = context if isinstance(context, list) and len(context) == len(children) else range(len(children))
    text = f"{name} is not known here: outputs of this class are given as {Output.__name__}, with the same fields"
    warnings.warn(text, IncWarning, stacklevel=2)
    return Output(zip(map(str, keys), children, strict=True))
