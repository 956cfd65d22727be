from __future__ import annotations

import errno
import pickle

import botocore.exceptions
import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from raydfkd.store import retry as failures
from raydfkd.store.errors import DamagedError, StoreError, explain, is_missing_bucket
from raydfkd.store.retry import is_transient, patiently


def s3_error(code, status):
    return translate_boto_error(
        ClientError(
            {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
        )
    )


class HttpError(OSError):
    """As gcsfs has it."""

    def __init__(self, code):
        super().__init__("Google says no")
        self.code = code


@pytest.mark.parametrize(
    "error",
    [
        s3_error("SlowDown", 503),
        s3_error("503", 503),
        s3_error("500", 500),
        s3_error("InternalError", 200),
        s3_error("RequestTimeout", 400),
        s3_error("TooManyRequests", 429),
        s3_error("429", 429),
        s3_error("ConditionalRequestConflict", 409),
        HttpError(429),
        HttpError("503"),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
        botocore.exceptions.ConnectTimeoutError(endpoint_url="http://x"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
        botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"),
        ConnectionResetError("reset by peer"),
        TimeoutError(),
        OSError(errno.EBUSY, "busy"),
    ],
    ids=repr,
)
def test_error_that_passes_is_worth_another_attempt(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        s3_error("NoSuchBucket", 404),
        s3_error("NoSuchKey", 404),
        s3_error("404", 404),
        s3_error("403", 403),
        s3_error("AccessDenied", 403),
        s3_error("ExpiredToken", 400),
        s3_error("InvalidAccessKeyId", 403),
        s3_error("SignatureDoesNotMatch", 403),
        s3_error("RequestTimeTooSkewed", 403),
        s3_error("PreconditionFailed", 412),
        s3_error("NotImplemented", 501),
        HttpError(403),
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.SSLError(endpoint_url="http://x", error="certificate verify failed"),
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError("x"),
        PermissionError("Forbidden"),
        ValueError("x"),
        ImportError("x"),
    ],
    ids=repr,
)
def test_error_that_stays_is_not_tried_again(error):
    assert not is_transient(error)


def test_missing_bucket_is_told_from_a_missing_object():
    assert is_missing_bucket(s3_error("NoSuchBucket", 404))
    assert not is_missing_bucket(s3_error("NoSuchKey", 404))
    assert not is_missing_bucket(FileNotFoundError("x"))


def failing(*errors):
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return "done"

    return call


def test_waits_are_random_grow_to_a_ceiling_and_make_about_a_minute_together(monkeypatch):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    for _ in range(200):
        told = []
        assert (
            patiently(failing(*[TimeoutError()] * 7), tell=lambda _, wait_s, told=told: told.append(wait_s)) == "done"
        )
        waits.append(told)
    longest = [max(column) for column in zip(*waits, strict=True)]
    assert all(0.5 * limit < found <= limit for found, limit in zip(longest, (1, 2, 4, 8, 16, 20, 20), strict=True))
    assert 25 < sum(map(sum, waits)) / len(waits) < 45
    assert len({told[0] for told in waits}) > 100


def test_last_error_is_raised_after_so_many_attempts(monkeypatch):
    monkeypatch.setattr(failures, "_FIRST_WAIT_S", 0.0)
    told = []
    errors = [TimeoutError(str(number)) for number in range(9)]
    with pytest.raises(TimeoutError, match="7"):
        patiently(failing(*errors), tell=lambda error, _: told.append(error))
    assert told == errors[:7]


def test_error_that_stays_ends_the_attempts():
    with pytest.raises(PermissionError):
        patiently(failing(PermissionError()), tell=lambda *_: pytest.fail("was tried again"))


def test_nothing_is_tried_again_after_a_minute(monkeypatch):
    monkeypatch.setattr(failures, "_PATIENCE_S", 0.0)
    with pytest.raises(TimeoutError):
        patiently(failing(TimeoutError()), tell=lambda *_: pytest.fail("was tried again"))


def test_reason_is_one_line_without_secrets_of_options_or_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-the-environment")
    error = ValueError("no login with hunter22\n and  from-the-environment at host")
    assert explain(error, ["hunter22"]) == "no login with *** and *** at host"


@pytest.mark.parametrize("error", [DamagedError("s3://b/set", "parts/x", "is gone"), StoreError("cannot")])
def test_errors_survive_the_way_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
