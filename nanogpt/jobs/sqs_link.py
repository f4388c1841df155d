"""The way to SQS: a standard queue for each lane, and errors that say what to mend.

SQS knows no priorities: in one queue requests whose clients wait would stand behind batches, and a
worker that has room for the former only would receive the latter, put them back, and receive them
again. So the queue NAME of the URL is three: NAME-now, NAME-background, NAME-batch.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from nanogpt.errors import ConfigError, StartupError
from nanogpt.jobs.store import Lane, StoreUnavailable
from nanogpt.jobs_config import SQS_URL

CONNECT_S = 2
ANSWER_S = 5  # beyond what a request itself waits
ATTEMPTS = 2  # of a request, by boto3
CONNECTIONS = 64
AT_ONCE = 10  # messages in one request, by SQS
MAX_HIDDEN_S = 12 * 3600  # by SQS

_REGION = re.compile(r"(?:^|\.)sqs(?:-fips)?\.([a-z]{2}(?:-[a-z]+)+-\d)\.")
_MISSING = {"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "InvalidAddress"}
_FORBIDDEN = {
    "AccessDenied",
    "AccessDeniedException",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "MissingAuthenticationToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
RIGHTS = "SendMessage, ReceiveMessage, DeleteMessage, ChangeMessageVisibility, GetQueueAttributes"


class Body(msgspec.Struct, frozen=True):
    """Of a message. The job itself is in Redis."""

    job: str
    name: str  # of the deployment, as several may share a queue


class Message(NamedTuple):
    body: Body | None  # None: not one of ours
    receipt: str


class _Mistake(StoreUnavailable):
    """One that waiting will not mend."""


class Queues:
    """Thread-safe. Does not connect yet. Raises ConfigError without boto3 or a region."""

    def __init__(self, url: str) -> None:
        parts = SQS_URL.fullmatch(url)
        assert parts is not None, "the configuration has checked it"
        base = f"http{'' if parts['plain'] else 's'}://{parts['host']}"
        self._urls = {
            lane: f"{base}/{parts['account']}/{parts['name']}-{lane.name.lower()}" for lane in Lane
        }
        in_host = _REGION.search(parts["host"])
        self._client = _client(base, parts["region"] or (in_host and in_host[1]))

    def close(self) -> None:
        self._client.close()

    def check(self) -> None:
        """That the queues are there and may be used. Raises StartupError when they are not;
        StoreUnavailable when that can't be told now."""
        for lane in Lane:
            try:
                self._ask(lane, "get_queue_attributes", AttributeNames=["VisibilityTimeout"])
            except _Mistake as error:
                raise StartupError(error.message) from error

    def send(self, lane: Lane, bodies: Sequence[Body]) -> None:
        """All, or StoreUnavailable: then some may have been sent."""
        entries = [
            {"Id": str(i), "MessageBody": msgspec.json.encode(body).decode()}
            for i, body in enumerate(bodies)
        ]
        self._batches(lane, "send_message_batch", entries)

    def receive(self, lane: Lane, most: int, wait_s: int, hidden_s: int) -> list[Message]:
        """Up to `most` (10 at the most), hidden from others for a while. With `wait_s` 0 some may
        be overlooked: SQS asks only some of its servers."""
        answer = self._ask(
            lane,
            "receive_message",
            MaxNumberOfMessages=most,
            WaitTimeSeconds=wait_s,
            VisibilityTimeout=hidden_s,
        )
        found = answer.get("Messages", ())
        return [Message(_body(m["Body"]), m["ReceiptHandle"]) for m in found]

    def hide(self, lane: Lane, receipts: Sequence[str], seconds: int) -> None:
        """From now on for so long; with 0 anybody may receive them at once."""
        hidden = min(seconds, MAX_HIDDEN_S)
        entries = [
            {"Id": str(i), "ReceiptHandle": receipt, "VisibilityTimeout": hidden}
            for i, receipt in enumerate(receipts)
        ]
        self._batches(lane, "change_message_visibility_batch", entries)

    def delete(self, lane: Lane, receipt: str) -> None:
        self._ask(lane, "delete_message", ReceiptHandle=receipt)

    def _batches(self, lane: Lane, method: str, entries: Sequence[dict[str, Any]]) -> None:
        for start in range(0, len(entries), AT_ONCE):
            answer = self._ask(lane, method, Entries=entries[start : start + AT_ONCE])
            for failed in answer.get("Failed", ()):
                raise _unavailable(f"{failed.get('Code')}: {failed.get('Message')}")

    def _ask(self, lane: Lane, method: str, **arguments: Any) -> dict[str, Any]:
        """Raises StoreUnavailable."""
        from botocore.exceptions import BotoCoreError, ClientError

        url = self._urls[lane]
        try:
            answer: dict[str, Any] = getattr(self._client, method)(QueueUrl=url, **arguments)
        except ClientError as error:
            raise _refused(error, url) from error
        except BotoCoreError as error:
            raise _failed(error) from error
        return answer


def _client(endpoint: str, region: str | None) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, NoRegionError
    except ImportError as error:
        raise ConfigError("a queue in SQS needs the package boto3: pip install boto3") from error
    settings = Config(
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
    )
    try:
        session = boto3.session.Session(region_name=region)
        return session.client("sqs", endpoint_url=endpoint, config=settings)
    except NoRegionError as error:
        raise ConfigError(
            "queue.url does not tell the region: add ?region=REGION, or set AWS_DEFAULT_REGION"
        ) from error
    except (BotoCoreError, ValueError) as error:  # a profile that isn't there, a wrong endpoint
        raise ConfigError(f"SQS can't be used: {error}") from error


def _body(text: str) -> Body | None:
    try:
        return msgspec.json.decode(text, type=Body)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


def _refused(error: Any, url: str) -> StoreUnavailable:
    """What SQS answered."""
    found = error.response.get("Error", {})
    code, message = found.get("Code", ""), found.get("Message", "")
    if code in _MISSING:
        return _Mistake(
            f"there is no queue {url}: a queue in SQS is three, whose names end in -now, "
            "-background and -batch; make them, or mend queue.url",
            retry_after=30,
        )
    if code in _FORBIDDEN:
        return _Mistake(
            f"SQS refuses these credentials for {url} ({code}: {message}); they need {RIGHTS}",
            retry_after=30,
        )
    return _unavailable(f"{code}: {message}")


def _failed(error: Exception) -> StoreUnavailable:
    """Why there was no answer."""
    from botocore import exceptions

    kinds = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
    )
    if isinstance(error, kinds):
        return _Mistake(
            f"SQS needs credentials ({error}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or use a profile or the role of the machine",
            retry_after=30,
        )
    return _unavailable(str(error))


def _unavailable(why: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"the queue can't be used now ({why}): nothing was accepted; try again later",
        retry_after=5,
    )
