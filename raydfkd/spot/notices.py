"""A spot machine's notice that it will go, as its cloud's metadata server gives it."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from typing import Protocol

from typing_extensions import override

AWS_URL = "http://169.254.169.254"
GCP_URL = "http://metadata.google.internal"
AWS_NOTICE_S = 120
GCP_NOTICE_S = 30
GCP_MAINTENANCE_S = 60
"""What Compute Engine promises at least between the event and the machine's end."""
TIMEOUT_S = 2.0
"""Seconds that a metadata server, which is on the same machine, may take to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """The machine will go."""

    reason: str
    """What the cloud said."""
    seconds: int
    """From now to the end."""


class Provider(Protocol):
    """A cloud's metadata server."""

    @property
    def name(self) -> str:
        """Of the cloud."""
        ...

    def notice(self, wait_s: float) -> Notice | None:
        """The notice, if there is one; may wait ``wait_s`` for it.

        Raises:
            OSError: the server did not answer.
            ValueError: it did not say what it should.
        """
        ...


class Aws(Provider):
    """EC2's instance metadata, version 2 only; it does not wait for a notice.

    ``rebalance`` counts its recommendation, which may come long before the notice or in vain, as a notice too.
    """

    @property
    @override
    def name(self) -> str:
        return "aws"

    def __init__(self, url: str = AWS_URL, *, rebalance: bool = False) -> None:
        self._url = url
        self._paths = ["spot/instance-action", *(["events/recommendations/rebalance"] if rebalance else [])]
        self._token = ""

    @override
    def notice(self, wait_s: float) -> Notice | None:
        for path in self._paths:
            found = self._get(path)
            if found is not None:
                said = json.loads(found)
                if not isinstance(said, dict):
                    raise ValueError(f"{path} is {found[:40]!r}")
                at = said.get("time")  # a recommendation has only the time it was made
                seconds = AWS_NOTICE_S if at is None else _seconds_until(str(at))
                return Notice(reason=f"aws {path}: {said.get('action', 'rebalance')}", seconds=seconds)
        return None

    def _get(self, path: str) -> str | None:
        """The text at ``path``, None where there is none."""
        for is_fresh in (False, True):
            if is_fresh or not self._token:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                self._token = _ask(f"{self._url}/latest/api/token", headers, method="PUT")[0]
            try:
                headers = {"X-aws-ec2-metadata-token": self._token}
                return _ask(f"{self._url}/latest/meta-data/{path}", headers)[0]
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or is_fresh:
                    raise
        raise AssertionError("the second time is the last")


class Gcp(Provider):
    """Compute Engine's metadata."""

    @property
    @override
    def name(self) -> str:
        return "gcp"

    def __init__(self, url: str = GCP_URL) -> None:
        self._url = url
        self._seen = ""

    @override
    def notice(self, wait_s: float) -> Notice | None:
        event, _ = self._get("maintenance-event")
        if event.startswith("TERMINATE"):
            return Notice(reason=f"gcp maintenance-event: {event}", seconds=GCP_MAINTENANCE_S)
        query = (
            f"?wait_for_change=true&timeout_sec={max(1, round(wait_s))}&last_etag={self._seen}" if self._seen else ""
        )
        preempted, self._seen = self._get("preempted", query, wait_s if query else 0)
        return Notice(reason="gcp preempted", seconds=GCP_NOTICE_S) if preempted == "TRUE" else None

    def _get(self, path: str, query: str = "", wait_s: float = 0) -> tuple[str, str]:
        """What is at ``path``, and the tag that tells it from what will be there."""
        url = f"{self._url}/computeMetadata/v1/instance/{path}{query}"
        text, headers = _ask(url, {"Metadata-Flavor": "Google"}, timeout_s=TIMEOUT_S + wait_s)
        return text.strip(), headers.get("ETag", "")


class Either(Provider):
    """Whichever cloud answers first, and from then on that one."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        self._providers = list(providers)

    @property
    @override
    def name(self) -> str:
        return " or ".join(provider.name for provider in self._providers)

    @override
    def notice(self, wait_s: float) -> Notice | None:
        failure = OSError("there is no cloud to ask")
        for provider in self._providers:
            try:
                found = provider.notice(wait_s)
            except (OSError, ValueError) as error:
                failure = OSError(str(error))
                continue
            self._providers = [provider]
            return found
        raise failure


def provider_of(name: str, url: str | None = None, *, rebalance: bool = False) -> Provider:
    """A cloud by name: aws, gcp, or auto for whichever answers; at another URL than its own for tests."""
    aws, gcp = Aws(url or AWS_URL, rebalance=rebalance), Gcp(url or GCP_URL)
    clouds: dict[str, Provider] = {"aws": aws, "gcp": gcp, "auto": Either([gcp, aws])}
    return clouds[name]


def _seconds_until(when: str) -> int:
    """Whole seconds from now to an ISO 8601 time, at most what AWS ever grants."""
    left = (datetime.fromisoformat(when).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    return min(AWS_NOTICE_S, max(0, int(left)))


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy, which would answer for its own machine."""


def _ask(
    url: str, headers: Mapping[str, str], *, method: str = "GET", timeout_s: float = TIMEOUT_S
) -> tuple[str, Message]:
    """Text and headers of the answer.

    Raises:
        OSError: there is none, or an error's.
    """
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _DIRECT.open(request, timeout=timeout_s) as answer:
            return answer.read().decode(errors="replace"), answer.headers
    except http.client.HTTPException as error:
        raise OSError(f"{url}: {error!r}") from None
