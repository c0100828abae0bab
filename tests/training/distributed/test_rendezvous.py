"""Tests of the port that rank 0 publishes for the other ranks."""

from __future__ import annotations

import socket

import pytest

from hpcft.training.distributed import rendezvous


def test_hold_port_keeps_the_port_until_the_process_group_is_set_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch import distributed

    port = rendezvous._hold_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    assert rendezvous._hold_port() != port
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0",
                        "WORLD_SIZE": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    distributed.init_process_group("gloo")
    try:
        assert distributed.get_world_size() == 1
    finally:
        distributed.destroy_process_group()
