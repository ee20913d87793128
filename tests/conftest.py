"""What every test may use: a real S3 server on the loopback. Fixtures of one folder live in that folder's conftest."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import boto3
import pytest


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
