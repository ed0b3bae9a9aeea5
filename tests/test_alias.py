"""Names of the same memory are found by storage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inc_graph.alias import Aliases, alias_groups, aliases_of, is_tied, weight_users
from inc_graph.capture import capture
from inc_graph.errors import IncError
from inc_graph.graph import clone, module_path, set_tensor


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.body(self.embed(ids))))


def test_tied_weights() -> None:
    gm = capture(Tied(), (torch.zeros(2, 3, dtype=torch.int64),))
    name = next(n for n in gm.state_dict() if "body" not in n)  # one of the two names is left
    users = weight_users(gm, name)
    assert [module_path(u) for u in users] == ["embed", "head"]
    assert is_tied(gm, name) and is_tied(gm, "body.weight")  # a layer that is called twice is tied to itself
    assert alias_groups(gm) == []
    other = set_tensor(gm, "other", gm.get_parameter(name))
    assert alias_groups(gm) == [{name, other}] and aliases_of(gm, other) == {name, other}
    assert weight_users(gm, other) == users


def test_views_share_and_copies_do_not() -> None:
    gm = capture(nn.Linear(4, 4), (torch.ones(1, 4),))
    row = set_tensor(gm, "row", gm.weight[1])
    copy = set_tensor(gm, "copy", gm.weight.detach().clone())
    empty = [set_tensor(gm, "empty", torch.empty(0)) for _ in range(2)]
    index = Aliases(gm)
    assert index.groups() == [{row, "weight"}] and index.names(copy) == {copy}
    assert all(index.names(e) == {e} for e in empty)
    assert len(index.users("weight")) == 1 and not index.is_tied("weight")
    assert index.users(copy) == []  # nothing reads it


def test_modules_under_two_names() -> None:
    block = nn.Linear(4, 4)
    gm = capture(nn.Sequential(block, block), (torch.ones(1, 4),))
    assert len(weight_users(clone(gm), next(iter(gm.state_dict())))) == 2


def test_unknown_names() -> None:
    gm = capture(nn.Linear(4, 4), (torch.ones(1, 4),))
    with pytest.raises(IncError, match="no tensor attribute 'nothing'"):
        Aliases(gm).users("nothing")
