"""Refused requests, in the error format of the OpenAI API."""

from typing import Any


class ApiError(Exception):
    """A request that gets an error instead of an answer.

    status: of HTTP. param: the field that is wrong. code: a name that clients test for.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object that a client gets."""
        kind = 'server_error' if self.status >= 500 else 'invalid_request_error'
        return {'error': {'message': self.message, 'type': kind, 'param': self.param, 'code': self.code}}


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """The error of a field: `param` and what is wrong with it."""
    return ApiError(400, f'{param} {message}', param, code)
