"""Tensors that wait in a temporary file: they come back as they were, and their room is used again."""

from __future__ import annotations

import copy
import gc
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inc_graph import aside as module
from inc_graph.aside import Aside, Kept
from inc_graph.errors import IncError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from(DTYPES),
    permuted=st.booleans(),
    step=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_what_comes_back(shape: list[int], dtype: torch.dtype, permuted: bool, step: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2 if dtype is torch.bool else 200, [*shape, 64], generator=g).to(dtype)[..., ::step]
    x = x.transpose(0, -1) if permuted else x
    tree = {"a": [x, 3, None], "b": (x[:1], "text")}
    put = Aside().put(tree)
    want = x.clone()
    x.zero_()
    for _ in range(2):
        found = put.get()
        assert torch.equal(found["a"][0], want) and found["a"][0].dtype == dtype
        assert found["a"][0].stride() == want.stride() and found["a"][1:] == [3, None]
        assert torch.equal(found["b"][0], want[:1]) and found["b"][1] == "text"
        found["a"][0].fill_(1)  # its own memory


def test_it_is_in_the_file_and_not_in_memory() -> None:
    aside = Aside()
    put = aside.put([torch.zeros(10_000), torch.zeros(3)])
    assert aside.size == 40_000, "what is small stays in memory"
    assert sum(x.nbytes for x in vars(put)["leaves"] if isinstance(x, Tensor)) == 12


def test_room_is_used_again() -> None:
    aside = Aside()
    kept = Kept([aside.put(torch.full((2000,), float(i))) for i in range(4)], aside)
    for _ in range(10):
        for i in range(4):
            kept[i] = kept[i] + 1
    assert [float(x[0]) for x in kept] == [10.0, 11.0, 12.0, 13.0]
    assert aside.size == 5 * 8000, "one more than there are, since the old value goes after the new one is there"


def test_copies_share_it() -> None:
    aside = Aside()
    put = aside.put(torch.arange(2000))
    other = copy.deepcopy({"aside": aside, "put": put})
    assert other["aside"] is aside
    del put
    gc.collect()
    more = aside.put(torch.zeros(2000, dtype=torch.int64))
    assert torch.equal(other["put"].get(), torch.arange(2000)) and int(more.get().sum()) == 0


def test_in_memory() -> None:
    x = torch.zeros(2000)
    kept = Kept([x], None)
    assert kept[0] is x and len(kept) == 1
    kept[0] = y = torch.ones(2000)
    assert kept[0] is y


class Slow:
    """A file that takes and gives what it likes."""

    def __init__(self, file: Any) -> None:
        self.file, self.seek = file, file.seek

    def write(self, data: memoryview) -> int:
        return self.file.write(data[:1000])

    def readinto(self, data: memoryview) -> int:
        return self.file.readinto(data[:700])


class Full(Slow):
    def write(self, data: memoryview) -> int:
        raise OSError(28, "No space left on device")


def with_file(monkeypatch: pytest.MonkeyPatch, kind: type[Slow]) -> None:
    def made(**kwargs: Any) -> Any:
        return kind(open(tempfile.mkstemp()[1], "r+b", buffering=0))

    monkeypatch.setattr(module.tempfile, "TemporaryFile", made)


def test_the_system_may_move_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with_file(monkeypatch, Slow)
    x = torch.randn(3000)
    assert torch.equal(Aside().put(x).get(), x)


def test_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with_file(monkeypatch, Full)
    with pytest.raises(IncError, match=r"(?s)12000 bytes cannot be put.*No space left.*TMPDIR"):
        Aside().put(torch.zeros(3000))
