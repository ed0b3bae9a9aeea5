"""Versions that compare with versions of any kind: texts, tuples, those of torch and those of packaging."""

from __future__ import annotations

from typing import Any

import torch
from torch.torch_version import TorchVersion

__all__ = [
    "GT_OR_EQUAL_TORCH_VERSION_2_5", "TORCH_VERSION_2_2_2", "TORCH_VERSION_2_7_0", "TORCH_VERSION_2_8_0",
    "TORCH_VERSION_2_11_0", "Version", "get_torch_version",
]  # fmt: skip


class Version(TorchVersion):
    """A version, which is also its text."""

    def __lt__(self, other: Any) -> Any:
        return super().__lt__(_known(other))

    def __le__(self, other: Any) -> Any:
        return super().__le__(_known(other))

    def __eq__(self, other: Any) -> Any:
        return super().__eq__(_known(other))

    def __ge__(self, other: Any) -> Any:
        return super().__ge__(_known(other))

    def __gt__(self, other: Any) -> Any:
        return super().__gt__(_known(other))

    __hash__ = TorchVersion.__hash__

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers of "2.13.0": (2, 13, 0)."""
        return tuple(int(part) for part in self.partition("+")[0].split(".") if part.isdecimal())

    major = property(lambda self: self.release[0])
    minor = property(lambda self: (*self.release, 0)[1])
    micro = property(lambda self: (*self.release, 0, 0)[2])


def _known(other: Any) -> Any:
    """A version of the packaging library as text: torch has a copy of that library, and does not know its classes."""
    return str(other) if type(other).__name__ == "Version" else other


def get_torch_version() -> Version:
    """The version of torch without its build ("2.13.0")."""
    return Version(str(torch.__version__).partition("+")[0])


TORCH_VERSION_2_2_2 = Version("2.2.2")
TORCH_VERSION_2_7_0 = Version("2.7.0")
TORCH_VERSION_2_8_0 = Version("2.8.0")
TORCH_VERSION_2_11_0 = Version("2.11.0")
GT_OR_EQUAL_TORCH_VERSION_2_5 = get_torch_version() >= "2.5"
