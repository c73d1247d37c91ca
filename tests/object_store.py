"""An S3 server in this process, with one bucket, that pyarrow finds by its environment."""

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto import server

BUCKET = "searches"


@contextmanager
def s3_server() -> Iterator[str]:
    """The URI of its bucket. Child processes find it, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("no_proxy", "127.0.0.1")
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
        running.stop()
