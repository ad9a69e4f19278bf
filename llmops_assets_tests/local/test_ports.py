"""Ports are kept over restarts, because gateways, bookmarks and scripts name them."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest

from llmops_assets.errors import StackError
from llmops_assets.local.ports import PortRequest, claim_ports, read_ports, release_ports

HOST = "127.0.0.1"


def claim(file: Path, *requests: PortRequest) -> dict[str, int]:
    return claim_ports(file, HOST, requests)


def test_a_port_is_kept_and_replaced_only_when_somebody_else_took_it(tmp_path: Path) -> None:
    """A restart must not move a server, unless it could not start otherwise."""
    file = tmp_path / "stack.json"
    first = claim(file, PortRequest("server"))["server"]
    assert claim(file, PortRequest("server", preferred=first + 1)) == {"server": first}
    with socket.create_server((HOST, first)):
        second = claim(file, PortRequest("server"))["server"]
    assert second != first
    assert read_ports(file) == {"server": second}


def test_a_configured_port_is_never_exchanged(tmp_path: Path) -> None:
    """Whoever configured a port opened it elsewhere, too; another one would be no use."""
    file = tmp_path / "stack.json"
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=rf"{port}.*LLMOPS_X"):
            claim(file, PortRequest("server", configured=port, variable="LLMOPS_X"))
    assert claim(file, PortRequest("server", configured=port)) == {"server": port}


def test_remembered_ports_of_stopped_servers_are_not_given_away(tmp_path: Path) -> None:
    """A slot that is down would find its port taken by the slot started meanwhile."""
    file = tmp_path / "stack.json"
    first = claim(file, PortRequest("a"))["a"]
    assert claim(file, PortRequest("b", preferred=first))["b"] != first
    release_ports(file, ["a"])
    assert claim(file, PortRequest("c", preferred=first))["c"] == first


def test_processes_that_claim_at_once_get_different_ports(tmp_path: Path) -> None:
    """Two releases may be deployed at the same moment by two run workers."""
    file = tmp_path / "stack.json"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        claims = pool.starmap(claim, [(file, PortRequest(f"slot-{n}")) for n in range(12)])
    ports = [port for claimed in claims for port in claimed.values()]
    assert len(set(ports)) == 12
    assert len(read_ports(file)) == 12
