"""The API key: with one, nothing is served without it. Programs send it as a bearer token; the page keeps it in a cookie."""

from __future__ import annotations

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "ctinstruct_key"


class KeyGuard:
    """Refuses requests without the key; `/?key=…` sets the page's cookie."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.digest = app, _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._fits(_bearer(headers)) or self._fits(_cookie(headers)):
            await self.app(scope, receive, send)
            return
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [""])[0]
        answer: Response
        if scope["path"] == "/" and self._fits(given):
            answer = RedirectResponse("/", status_code=303, headers={"Cache-Control": "no-store"})
            answer.set_cookie(COOKIE, given, httponly=True, samesite="strict")
        else:
            answer = _refusal(scope["path"])
        await answer(scope, receive, send)

    def _fits(self, given: str) -> bool:
        return hmac.compare_digest(_digest(given), self.digest)


def _digest(text: str) -> bytes:
    """Of one length for every key, so that comparing takes as long for each."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _bearer(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _refusal(path: str) -> JSONResponse:
    sentence = "The API key is missing or wrong: send it as 'Authorization: Bearer …', or open the page by /?key=…."
    error = api_error(401, sentence) if path.startswith("/v1/") else {"error": sentence}
    return JSONResponse(error, status_code=401, headers={"WWW-Authenticate": "Bearer", "Cache-Control": "no-store"})


def api_error(status: int, sentence: str, code: str | None = None) -> dict[str, object]:
    """The error object of the OpenAI interface."""
    kinds = {401: "authentication_error", 404: "not_found_error", 403: "permission_error", 503: "overloaded_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or {401: "invalid_api_key"}.get(status)
    return {"error": {"message": sentence, "type": kind, "param": None, "code": code}}


__all__ = ["KeyGuard", "api_error"]
