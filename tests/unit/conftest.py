"""Shared by the unit tests: a real S3 server on the loopback, and pictures."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from io import BytesIO

import boto3
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server process of its own, with the AWS environment pointing at it."""
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    environment = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "10"}  # small pages: every longer listing has several
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    address = next(line.split("Running on ")[1].strip() for line in server.stderr if "Running on " in line)
    drain = threading.Thread(target=server.stderr.read)  # its log must not fill the pipe
    drain.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield address
    server.kill()
    server.wait()
    drain.join()
    server.stderr.close()


@pytest.fixture(scope="session")
def new_bucket(s3_server: str) -> Callable[[], str]:
    """Creates an empty bucket and gives its name."""
    client = boto3.client("s3", endpoint_url=s3_server)
    names = (f"bucket-{number}" for number in itertools.count())

    def create() -> str:
        name = next(names)
        client.create_bucket(Bucket=name)
        return name

    return create


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
