"""One engine and one image for all tests of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from deployment.engine import BASE, Engine, own_engine, torch_index


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with own_engine() as started:
        yield started


@pytest.fixture(scope="session")
def index() -> Iterator[str]:
    with torch_index() as address:
        yield address


@pytest.fixture(scope="session")
def image(engine: Engine, index: str) -> str:
    engine.build("Dockerfile", "whorl", BASE=BASE, TORCH_INDEX=index)
    return "whorl"


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
