"""`collector_paused` leaves the garbage collector as it found it."""

from __future__ import annotations

import gc

import pytest

from inc_graph.collector import collector_paused


def test_paused_within_and_on_afterwards() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_on_after_an_error() -> None:
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()


def test_as_a_decorator() -> None:
    assert collector_paused()(gc.isenabled)() is False
    assert gc.isenabled()


def test_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
