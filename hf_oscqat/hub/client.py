"""What the Hub's errors mean, and which of them pass by themselves."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FIRST_WAIT = 1.0
"""Seconds before the second try; doubled before each further one."""
TRIES = 5
PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP statuses of a server that is busy or being restarted."""


OF_THE_CLIENT = (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
"""What the client raises when the Hub says no, or need not be asked."""


class HubError(ValueError):
    """The Hub cannot do what was asked; the message says why, and what to do."""


def check_repo_id(name: str) -> None:
    """Refuse what is meant as a folder that is not there, before the Hub is asked about it.

    Raises:
        HubError: if it cannot be the name of a repository.
    """
    if name.count("/") != 1 or name[:1] in "/.~":
        raise HubError(f"got {name!r}, expected a folder that exists, or a Hub id such as org/name")


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server is busy, or the connection broke."""
    status = _status(error)
    if status is not None:
        return status in PASSING
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # The client wraps what broke a download or an upload in an error of its own.
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        return is_passing(error.__cause__)
    return isinstance(error, httpx.TransportError | ConnectionError | TimeoutError)


def patiently(request: Callable[[], Answer], what: str) -> Answer:
    """Make a request that may be repeated, until the server has time for it.

    Args:
        request: makes it.
        what: for messages, such as "reading org/name".
    """
    for attempt in range(1, TRIES):
        try:
            return request()
        except Exception as error:
            if not is_passing(error):
                raise
            wait(attempt, what, error)
    return request()


def wait(attempt: int, what: str, error: BaseException) -> None:
    """Sleep before the next attempt, twice as long as before the last one.

    Args:
        attempt: how many have failed.
        what: for messages.
        error: of the last one.
    """
    # Not to the second: two that met once would meet again. And not from the generator that a run has seeded.
    seconds = FIRST_WAIT * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.75, 1.25)
    logger.warning("%s failed (%s); trying again in %.1f s", what, _first_line(error), seconds)
    time.sleep(seconds)


@contextmanager
def explained(repo_id: str, doing: str, endpoint: str) -> Iterator[None]:
    """Turn the client's errors into ones that say what to do.

    Args:
        repo_id: of the repository.
        doing: what is being done, such as "pushing".
        endpoint: address of the Hub, for the page to visit.

    Raises:
        HubError: in place of each of the client's errors.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, HubError) or not (isinstance(error, OF_THE_CLIENT) or is_passing(error)):
            raise
        raise HubError(f"{doing} {repo_id}: {_meaning(error, repo_id, endpoint)}") from error


def _meaning(error: BaseException, repo_id: str, endpoint: str) -> str:
    status, line = _status(error), _first_line(error)
    if isinstance(error, GatedRepoError):
        return f"it is gated; ask for access on {endpoint}/{repo_id}, then use a token of the account that was let in"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and this needs the Hub: unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return "got no token, expected one: run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        if "Invalid" in line and status == 401:
            return "the Hub does not accept the token: run `hf auth login`, or correct HF_TOKEN"
        return (
            "there is no such repository, or it is private and the token does not open it: check name and token, "
            "or the path if a folder was meant"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision: {line}"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"it lacks a file: {line}"
    if isinstance(error, HFValidationError):
        return f"expected a name such as org/model: {line}"
    if status == 401:
        return "the Hub does not accept the token: run `hf auth login`, or correct HF_TOKEN"
    if status == 403:
        return f"the token may not do this; expected one with write permission for it ({line})"
    if status in (409, 412):
        return f"others have committed to it each time; try again when they have finished ({line})"
    if is_passing(error):
        return f"the Hub does not answer as it should, also after {TRIES} tries ({line}); try again later"
    return line


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _first_line(error: BaseException) -> str:
    message = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    return " ".join(message.split())[:300]
