"""The HTTP routes: /v1/models, /v1/completions, /v1/chat/completions, /status, and a page at /."""

import asyncio
import contextlib
import hmac
import importlib.resources
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lct.serve import requests, responses
from lct.serve.errors import ApiError
from lct.serve.jobs import Event, Job, ModelThread
from lct.serve.responses import Answer, End

BODY_SECONDS = 60  # for a body to arrive
LOOPBACK = ('127.0.0.1', 'localhost', '::1')
STREAM_HEADERS = [(b'content-type', b'text/event-stream; charset=utf-8'), (b'cache-control', b'no-cache')]
PAGE_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Settings(NamedTuple):
    """Of a server.

    model: its name for clients. length: tokens of a prompt with its answer. max_body: bytes of a request.
    token: the bearer token of the API, None for none. loopback: whether only this machine may ask. chat:
    whether the model has a chat template.
    """

    model: str
    length: int
    max_body: int = 2**24
    token: str | None = None
    loopback: bool = True
    chat: bool = True


def make_app(thread: ModelThread, settings: Settings, texts: Callable[[], list[dict]] = list) -> Starlette:
    """The ASGI app; it starts and stops the thread.

    texts: the kept texts, for /status.
    """
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app):
        thread.start()
        yield
        await asyncio.to_thread(thread.stop)

    async def models(request):
        name = request.path_params.get('name')
        found = responses.models(settings.model, created, settings.length)
        if name not in (None, settings.model):
            raise ApiError(404, f'the model {name!r} does not exist; use {settings.model!r}', 'model',
                           'model_not_found')
        return _json(found['data'][0] if name else found)

    async def status(request):
        return _json({'model': settings.model, 'chat': settings.chat, 'length': settings.length,
                      'waiting': thread.waiting, 'current': _progress(thread.current),
                      'texts': texts()})

    def completion(chat):
        async def respond(request):
            fields = requests.parse_body(await _body(request, settings.max_body))
            query = requests.parse(fields, chat, settings.model)
            return AnswerResponse(thread, query, settings.model)
        return respond

    page = importlib.resources.files('lct.serve').joinpath('page.html').read_bytes()

    async def first_look(request):
        return Response(page, media_type='text/html', headers={'Content-Security-Policy': PAGE_POLICY})

    routes = [Route('/', first_look), Route('/status', status), Route('/v1/models', models),
              Route('/v1/models/{name:path}', models),
              Route('/v1/completions', completion(chat=False), methods=['POST']),
              Route('/v1/chat/completions', completion(chat=True), methods=['POST'])]
    return Starlette(
        routes=routes, lifespan=lifespan, middleware=[Middleware(Guard, settings=settings)],
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_route, Exception: _fail})


class Guard:
    """Middleware: the bearer token of the API, and for a server on the loopback address the names under which
    a browser may reach it, so that no web page that its user visits can ask the model."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] == 'http' and (error := self._error(scope)):
            await _error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _error(self, scope):
        headers = {name.decode('latin-1'): value.decode('latin-1') for name, value in scope['headers']}
        host, origin = headers.get('host', ''), headers.get('origin')
        if self._settings.loopback and _part(f'//{host}', 'hostname') not in LOOPBACK:
            return ApiError(403, f'the host {host[:100]!r} is not this machine; use 127.0.0.1')
        if origin is not None and _part(origin, 'netloc') != host:
            return ApiError(403, f'pages of {origin[:100]!r} may not ask this server')
        token = self._settings.token
        if token is not None and scope['path'] != '/':
            given = headers.get('authorization', '').encode('latin-1')  # the bytes that were sent
            if not hmac.compare_digest(given, f'Bearer {token}'.encode()):
                return ApiError(401, 'the bearer token is missing or wrong; send the API key of this server',
                                code='invalid_api_key')
        return None


def _part(url, name):
    """A part of a URL, None for one that cannot be parsed."""
    try:
        return getattr(urlsplit(url), name)
    except ValueError:
        return None


class AnswerResponse:
    """The ASGI response to a Query: one object, or a stream of server-sent events. If the client goes away,
    its job is cancelled."""

    def __init__(self, thread: ModelThread, query: requests.Query, model: str):
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event):
            with contextlib.suppress(RuntimeError):  # the loop of a server that has stopped
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._query, self._answer, self._job = query, Answer(query, model), Job(query, deliver)
        thread.submit(self._job)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            await (self._stream if self._query.stream else self._whole)(scope, receive, send)
        except OSError:
            pass  # the client is gone
        finally:
            self._job.cancel()
            watch.cancel()

    async def _watch(self, receive):
        while (await receive())['type'] != 'http.disconnect':
            pass
        self._job.cancel()
        self._events.put_nowait(ApiError(499, 'the client is gone'))

    async def _arriving(self) -> AsyncIterator[Event]:
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, (End, ApiError)):
                return

    async def _whole(self, scope, receive, send):
        events = [event async for event in self._arriving()]
        error = events[-1] if isinstance(events[-1], ApiError) else None
        response = _error_response(error) if error else _json(self._answer.whole(events))
        await response(scope, receive, send)

    async def _stream(self, scope, receive, send):
        opened = False
        async for event in self._arriving():
            if isinstance(event, ApiError) and not opened:
                await _error_response(event)(scope, receive, send)
                return
            objects = [event.body()] if isinstance(event, ApiError) else [*self._answer.chunks(event)]
            if not opened:
                await send({'type': 'http.response.start', 'status': 200, 'headers': STREAM_HEADERS})
                objects, opened = [*self._answer.opening(), *objects], True
            body = b''.join(map(responses.server_sent, objects))
            await send({'type': 'http.response.body', 'body': body, 'more_body': True})
        await send({'type': 'http.response.body', 'body': responses.DONE})


async def _body(request: Request, most: int) -> bytes:
    """The body of a request. Raises ApiError for one that is too long or too slow."""
    chunks, size = [], 0
    too_long = ApiError(413, f'the body has more than {most:,} bytes; send a shorter text')
    declared = request.headers.get('content-length', '')
    if declared.isdigit() and int(declared) > most:
        raise too_long
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > most:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f'the body did not arrive within {BODY_SECONDS} s; send it at once') from None
    except ClientDisconnect:
        raise ApiError(499, 'the client is gone') from None
    return b''.join(chunks)


def _progress(job: Job | None) -> dict[str, Any] | None:
    if job is None:
        return None
    return {name: getattr(job, name) for name in ('state', 'prompt', 'reused', 'read', 'answered')}


def _json(value, status=200, headers=None):
    return Response(responses.encode(value), status, headers, 'application/json')


def _error_response(error):
    headers = {401: {'WWW-Authenticate': 'Bearer'}, 429: {'Retry-After': '1'}}.get(error.status)
    return _json(error.body(), error.status, headers)


async def _refuse(request, error):
    return _error_response(error)


async def _refuse_route(request, error):
    sentence = {404: 'is not a route of this server', 405: f'does not take {request.method}'}
    return _json(ApiError(error.status_code, f'{request.url.path} '
                          f'{sentence.get(error.status_code, error.detail)}').body(), error.status_code)


async def _fail(request, error):
    return _error_response(ApiError(500, f'{type(error).__name__} in the server; its log shows where'))
