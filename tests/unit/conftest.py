"""Shared by the unit tests: places to store things, and pictures."""

from collections.abc import Callable
from io import BytesIO

import pytest
from PIL import Image


@pytest.fixture(params=["local", "s3"])
def storage_uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh place to store things, once as a folder and once in a bucket."""
    if request.param == "local":
        return str(tmp_path_factory.mktemp("store"))
    return f"s3://{request.getfixturevalue('new_bucket')()}/some/prefix"


@pytest.fixture
def picture_bytes() -> Callable[..., bytes]:
    """Encodes a plain picture of a colour."""

    def make(colour: str = "red", size: tuple[int, int] = (16, 12), kind: str = "PNG") -> bytes:
        buffer = BytesIO()
        Image.new("RGB", size, colour).save(buffer, format=kind)
        return buffer.getvalue()

    return make
