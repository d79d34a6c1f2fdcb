"""Who may use the server, and what every response carries: two ASGI middlewares around the routes of app.py."""

import base64
import hashlib
import hmac
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanogpt.serve import KEY
from nanogpt.serve.completions import ApiError
from nanogpt.serve.metrics import Metrics

OPEN = ("/", "/health")  # paths that need no key
PATHS = (*OPEN, "/metrics", "/losses", "/v1/models", "/v1/completions")
GONE = 499  # counted if the client disconnects before the response starts; nginx's number
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def with_headers_and_counts(app: ASGIApp, headers: dict[str, str], metrics: Metrics) -> ASGIApp:
    """`app` with `headers` on every response, requests counted, and requests of ambiguous length refused."""
    added = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        status, inner = GONE, app
        # If the length is given twice, a proxy may use one value and this server the other. What the proxy sees as the
        # end of this request would then be the next request here (RFC 9112, section 6.3).
        if len({value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")}) > 1:
            inner = ApiError(400, "expected a single Content-Length or Transfer-Encoding").response()
            inner.headers["connection"] = "close"

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            await inner(scope, receive, counted_send)
        finally:
            metrics.requests.labels(scope["path"] if scope["path"] in PATHS else "other", status).inc()

    return wrapped


def with_access_control(app: ASGIApp, key: str | None, listens_on: str) -> ASGIApp:
    """`app` for requests with the right key or host; paths that do not exist are checked too."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        headers, error = Headers(scope=scope), None
        if key is None and listens_on in LOOPBACK:
            # A page of another server may let its own name point to this machine, and could then read the responses.
            if re.sub(r":\d+$", "", headers.get("host", "")).strip("[]").lower() not in LOOPBACK:
                why = "without an API key, this server responds to the names localhost and 127.0.0.1 only"
                error = ApiError(403, f"{why}; with one ({KEY} or --api_key_file), to every name")
        elif key is not None and scope["path"] not in OPEN:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                why = "wrong API key" if given else "this server requires an API key, as Authorization: Bearer KEY"
                error = ApiError(401, why, code="invalid_api_key")
        await (error.response() if error else app)(scope, receive, send)

    return wrapped


def security_headers(page: str) -> dict[str, str]:
    """With these, a browser runs the page's own script and no other, and does not embed the page in another one."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.S)
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }
