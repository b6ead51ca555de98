"""Why something failed, in words that say what to do, and another try where waiting helps (Hub, Kaggle)."""

import errno
import re
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WAITS = (2.0, 8.0, 20.0)  # seconds before the second, third and fourth try
LONGEST_WAIT = 60.0  # of what a server may ask for with Retry-After
CUT = "the download was cut"
# By name, because requests, urllib3, httpx, zipfile and safetensors each have classes of their own.
_CUT = {"ChunkedEncodingError", "IncompleteRead", "ProtocolError", "RemoteProtocolError", "ReadError",
        "RemoteDisconnected", "ReadTimeout", "BadZipFile", "DataCorruptionError", "SafetensorError"}
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "NewConnectionError", "ConnectTimeoutError", "gaierror",
                  "ConnectionError", "ConnectionRefusedError", "OfflineModeIsEnabled",
                  "LocalEntryNotFoundError"}


@contextmanager
def user_errors() -> Iterator[None]:
    """A command ends with one line and status 2 where a user can mend the cause, with a traceback for a bug.

    A user can mend what this package raises itself, and a disk that is full or may not be written.
    """
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(last.filename).is_relative_to(Path(__file__).parent) and last.line.startswith("raise ")
        if not ours and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        print("; ".join(map(str.strip, str(error).splitlines())), file=sys.stderr)
        sys.exit(2)


def exception_chain(error: BaseException | None) -> list[BaseException]:
    """The error, what it was raised from, and so on."""
    return [error, *exception_chain(error.__cause__ or error.__context__)] if error else []


def http_response(error: BaseException):
    """The HTTP response in the error's chain, or None."""
    found = (getattr(one, "response", None) for one in exception_chain(error))
    return next((response for response in found if response is not None), None)


def hub_reason(error: BaseException, site: str = "the Hub") -> str:
    """The cause of a failed download in one clause, for example `"too many requests (429)"`."""
    names, response = [type(one).__name__ for one in exception_chain(error)], http_response(error)
    status = getattr(response, "status_code", None)
    if "GatedRepoError" in names or status == 403 or "is a gated dataset" in str(error):
        return f"needs a login or accepted conditions ({status or 'gated'})"
    if status == 401 and "authorization" in {name.lower() for name in response.request.headers}:
        return f"{site} refused the token (401): it is wrong or expired; renew HF_TOKEN, or remove it"
    if status in (401, 404) or "DatasetNotFoundError" in names:
        return f"{site} has no such repository or file, or it is private ({status or 404})"
    if status == 429:
        return "too many requests (429)"
    if status is not None:
        return f"{site} answered {status}"
    if _CUT.intersection(names) or re.search("Consistency check failed|Unsupported archive type", str(error)):
        return CUT
    if _NO_CONNECTION.intersection(names):
        return f"no connection to {site}"
    words = re.sub(r"hf_\w+", "hf_...", " ".join(str(error).split()))  # a token in a quoted request header
    return f"{type(error).__name__}: {words[:200]}"


def hub_answers() -> bool:
    """Whether anything answers at the Hub's address. Without asking, transformers would try for minutes."""
    from huggingface_hub.constants import ENDPOINT

    try:
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=10).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)
    return True


def try_again(fetch: Callable, what: str, site: str = "the Hub"):
    """`fetch()`, up to four times while the download is cut or the server is busy (429, 5xx), saying why.

    The Hub's client waits by itself while the Hub is busy, so that is not done twice.
    """
    for wait in WAITS:
        try:
            return fetch()
        except Exception as error:
            reason, response = hub_reason(error, site), http_response(error)
            status = getattr(response, "status_code", 0)
            is_busy = site != "the Hub" and (status == 429 or status >= 500)
            if reason != CUT and not is_busy:
                raise
            asked = str(response.headers.get("Retry-After", "")) if status else ""
            wait = min(float(asked), LONGEST_WAIT) if asked.isdigit() else wait
            print(f"{what}: {reason}. Trying again in {wait:.0f} s.")
            time.sleep(wait)
    return fetch()
