"""One HTTP request for one file, and what the answer says of it. Used by ``transfer`` alone."""

from __future__ import annotations

import http.client
import re
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPMessage
from typing import IO, Any
from urllib.parse import urlsplit

import craft_fast

TIMEOUT_S = 30.0
_LATER = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_ASKED_S = 30.0


class Again(Exception):
    """It failed in a way that may pass.

    Attributes:
        received: bytes that this attempt brought.
        wait_s: what the server asked for.
    """

    def __init__(self, why: str, received: int = 0, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.received, self.wait_s = received, wait_s


class Gone(Exception):
    """The server has no such file for us.

    Attributes:
        hint: what may help.
    """

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer, and what it says of the whole file.

    Attributes:
        body: has ``read1`` and ``close``.
        status: 200, 206 or 416.
        start: the first byte that it brings.
        total: bytes of the whole file; None: not told.
        sha256: of the whole file, as the hub tells it; may be empty.
        identity: equal when it is the same file as before.
        revision: the commit; may be empty.
    """

    body: Any
    status: int
    start: int
    total: int | None
    sha256: str
    identity: str
    revision: str


class _Nothing:
    """A body without bytes."""

    def read1(self, _count: int) -> bytes:
        return b""

    def close(self) -> None:
        return None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, keeps what the first answer told of the file, and keeps the token from other hosts.

    The hub answers for a large file with a redirect whose headers hold its sha256 and commit; the storage behind it
    knows neither.
    """

    def __init__(self) -> None:
        self.told: dict[str, str] = {}

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        for name in ("X-Linked-ETag", "X-Repo-Commit"):
            if headers.get(name):
                self.told.setdefault(name, str(headers[name]))
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme != "https" and (new.scheme != "http" or old.scheme == "https"):
            fp.close()
            raise Gone(f"{old.hostname} sends on to an address that is not safe: {new.scheme}:")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        # Unredirected headers stay behind by themselves; a renamed repository on the same host still gets the token.
        token = req.get_header("Authorization")
        if request is not None and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.add_unredirected_header("Authorization", token)
        return request


def ask(url: str, have: int, token: str | None) -> Answer:
    """Ask for a file from byte ``have`` on.

    Args:
        url: of the file.
        have: bytes that are here already.
        token: sent to this host alone.

    Raises:
        Again: worth another attempt. Gone: the server will not give it.
    """
    headers = {"User-Agent": f"craft-fast/{craft_fast.__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    redirects = _Redirects()
    try:
        request = urllib.request.Request(url, headers=headers)
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        body = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:
                return _beyond_the_end(error, redirects.told, have)
            raise _refused(error, url, token) from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(error, url) from error
    try:
        return _understand(body, redirects.told)
    except BaseException:
        body.close()
        raise


def _understand(body: Any, told: dict[str, str]) -> Answer:
    headers, host, start, total = body.headers, urlsplit(body.url).hostname, 0, None
    if body.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", "").strip())
        if match is None:
            raise Again(f"{host} answers with a part of the file and does not say which")
        start, total = int(match[1]), int(match[2])
    elif headers.get("Content-Length", "").isdigit():
        total = int(headers["Content-Length"])
    if "html" in headers.get("Content-Type", ""):
        raise Gone(
            f"{host} answers with a web page in the file's place",
            "a proxy or a login page may be in between: open the address in a browser, or check HTTPS_PROXY",
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Gone(f"{host} sends the file in an encoding that was not asked for")
    return Answer(body, body.status, start, total, *_identity(headers, told, total))


def _beyond_the_end(error: urllib.error.HTTPError, told: dict[str, str], have: int) -> Answer:
    """416: either the part is the whole file, or it is not of this file."""
    match = re.fullmatch(r"bytes \*/(\d+)", (error.headers.get("Content-Range") or "").strip())
    total = int(match[1]) if match else None
    return Answer(_Nothing(), 416, have if total == have else 0, total, *_identity(error.headers, told, total))


def _identity(headers: Message, told: dict[str, str], total: int | None) -> tuple[str, str, str]:
    """Sha256 that the hub tells, what says that it is the same file as before, and the commit."""
    linked = (told.get("X-Linked-ETag") or headers.get("X-Linked-ETag") or "").strip('W/"')
    etag = linked or headers.get("ETag") or ""
    commit = told.get("X-Repo-Commit") or headers.get("X-Repo-Commit") or ""
    sha256 = linked if re.fullmatch("[0-9a-f]{64}", linked) else ""
    return sha256, f"{etag} {total}", commit if re.fullmatch("[0-9a-f]{40}", commit) else ""


def _refused(error: urllib.error.HTTPError, url: str, token: str | None) -> Again | Gone:
    host = urlsplit(error.url or url).hostname
    said = f"{host} answered {error.code} {error.reason}"
    if error.code in _LATER:
        asked = error.headers.get("Retry-After") or ""
        return Again(said, 0, min(_LONGEST_ASKED_S, float(asked)) if asked.isdigit() else 0.0)
    hint = ""
    if error.code in (401, 403) and token:
        hint = f"{host} does not take HF_TOKEN for it: see the model's page, or unset it"
    elif error.code in (401, 403):
        hint = "the model's page may ask for an agreement: accept it there, then export HF_TOKEN=..."
    elif error.code in (404, 410):
        hint = "it may have moved: look for the model's page, and put the file at the path above"
    return Gone(said, hint)


def _unreachable(error: Exception, url: str) -> Again | Gone:
    host = urlsplit(url).hostname
    cause = getattr(error, "reason", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Gone(
            f"{host} shows a certificate that is not trusted ({reason(cause)})",
            "a proxy that looks into connections needs its certificate known: export SSL_CERT_FILE=FILE",
        )
    return Again(f"{host} cannot be reached ({reason(cause)})")


def reason(error: object) -> str:
    """An error of the network in a few words."""
    text = str(getattr(error, "strerror", None) or error).strip()
    return (text or type(error).__name__).splitlines()[0][:200]
