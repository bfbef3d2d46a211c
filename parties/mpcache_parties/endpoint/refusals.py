"""Say what went wrong as OpenAI's API does: a status, and one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from mpcache.errors import BadInput, MpcacheError, PeerTimeout, one_line

_TYPES = {HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error", HTTPStatus.UNAUTHORIZED: "authentication_error"}


class Refusal(Exception):
    """A request that is not answered.

    param: the field that is wrong.  code: a word for programs.  headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        text: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(one_line(text))
        self.status = HTTPStatus(status)
        self.param, self.code, self.headers = param, code, dict(headers or {})

    @classmethod
    def of(cls, error: BaseException) -> Refusal:
        """Tell an error of the session.

        A caller's own fault is told in full; of a private error about this machine, its name alone.
        """
        match error:
            case Refusal():
                return error
            case BadInput():
                return cls(400, str(error))
            case PeerTimeout():
                return cls(504, str(error), code="timeout")
            case MpcacheError():
                return cls(503, error.for_peers, code="session_failed")
        return cls(500, "the endpoint has failed; its own output says where", code="internal_error")

    def to_dict(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code},
        }
