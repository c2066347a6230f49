"""The HTTP routes over a pretended model: statuses, streams, limits, keys, and clients that go away."""

import asyncio
import contextlib
import json
import threading

import pytest

from lct.serve import app as app_module
from lct.serve.app import Settings, make_app
from lct.serve.errors import ApiError
from lct.serve.jobs import ModelThread
from lct.serve.responses import End, Text

HOST = (b'host', b'127.0.0.1:8000')


class Pretended:
    """Answers with the prompt, a character at a time; some prompts have other effects."""

    def __init__(self):
        self.gone, self.started, self.go_on = threading.Event(), threading.Event(), threading.Event()
        self.closed = False

    def answer(self, job):
        prompt = job.query.prompt
        if prompt == 'refuse':
            raise ApiError(400, 'refused', 'prompt')
        if prompt == 'fail':
            raise RuntimeError('broken')
        if prompt == 'wait':
            self.started.set()
            self.go_on.wait(10)
        try:
            for character in prompt:
                job.check()
                yield Text(character)
                if prompt == 'endless':
                    self.started.set()
                while prompt == 'endless':
                    job.check()
            if prompt == 'fail late':
                raise RuntimeError('broken')
            yield End('stop', 1, 0, len(prompt))
        finally:
            self.gone.set()

    def idle(self):
        return False

    def close(self):
        self.closed = True


class Client:
    """Sends requests to an app as a server does, without a socket."""

    def __init__(self, app):
        self.app = app

    async def ask(self, path, fields=None, headers=(), gone=None, body=None, host=HOST):
        """-> (status, [bodies that arrived]). gone: awaited before the client goes away."""
        body = json.dumps(fields).encode() if body is None else body
        pieces = [{'type': 'http.request', 'body': body, 'more_body': False}]

        async def receive():
            if pieces:
                return pieces.pop()
            await (gone or asyncio.Future())
            return {'type': 'http.disconnect'}

        sent = []

        async def send(message):
            sent.append(message)

        method = 'GET' if fields is None and not body.strip(b'null') else 'POST'
        scope = {'type': 'http', 'method': method, 'path': path, 'headers': [host, *headers],
                 'query_string': b''}
        await self.app(scope, receive, send)
        status = next((one['status'] for one in sent if one['type'] == 'http.response.start'), None)
        return status, [one['body'] for one in sent if one['type'] == 'http.response.body']

    async def complete(self, prompt, **options):
        status, bodies = await self.ask('/v1/completions', {'prompt': prompt}, **options)
        return status, json.loads(b''.join(bodies)) if bodies else None


def serve(test, max_waiting=8, **settings):
    """Run an async test(client, pretended model) in an app that has started."""
    async def run():
        pretended = Pretended()
        thread = ModelThread(pretended, contextlib.nullcontext, max_waiting)
        app = make_app(thread, Settings('m', 64, **settings))
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(test(Client(app), pretended), 20)
        assert pretended.closed
    asyncio.run(run())


async def waited(event):
    await asyncio.to_thread(event.wait, 10)
    assert event.is_set()


def test_an_answer_and_its_stream():
    async def test(client, _):
        status, answer = await client.complete('abc')
        assert status == 200 and answer['choices'][0]['text'] == 'abc'
        status, bodies = await client.ask('/v1/completions', {'prompt': 'abc', 'stream': True})
        events = b''.join(bodies).decode().split('\n\n')
        assert status == 200 and events[-2:] == ['data: [DONE]', '']
        texts = [json.loads(event[6:])['choices'][0]['text'] for event in events[:-2]]
        assert texts == ['a', 'b', 'c', '']
    serve(test)


def test_the_other_routes():
    async def test(client, _):
        status, (body,) = await client.ask('/v1/models')
        assert status == 200 and json.loads(body)['data'][0]['id'] == 'm'
        status, (body,) = await client.ask('/v1/models/m')
        assert status == 200 and json.loads(body)['max_model_len'] == 64
        assert (await client.ask('/v1/models/x/y'))[0] == 404
        status, (body,) = await client.ask('/status')
        assert status == 200 and json.loads(body)['current'] is None and json.loads(body)['texts'] == []
        status, (body,) = await client.ask('/')
        assert status == 200 and body.startswith(b'<!DOCTYPE html>')
    serve(test)


@pytest.mark.parametrize(('path', 'body', 'status', 'message'), [
    ('/v1/completions', b'{', 400, 'not valid JSON'),
    ('/v1/completions', b'{"prompt": 1}', 400, 'prompt must be'),
    ('/v1/completions', b'', 405, 'does not take GET'), ('/v1/nothing', b'{}', 404, 'is not a route'),
    ('/v1/completions', b'{"prompt": "refuse"}', 400, 'refused'),
    ('/v1/completions', b'{"prompt": "refuse", "stream": true}', 400, 'refused'),
    ('/v1/completions', b'{"prompt": "fail"}', 500, 'RuntimeError in the server'),
    ('/v1/completions', b' ' * 101, 413, 'more than 100 bytes'),
])
def test_errors_are_objects_of_the_api(path, body, status, message, capsys):
    async def test(client, _):
        got, (answer,) = await client.ask(path, body=body)
        assert got == status and message in json.loads(answer)['error']['message']
        assert (await client.complete('ab'))[0] == 200  # the next request is answered
    serve(test, max_body=100)


def test_an_error_within_a_stream_is_its_last_event(capsys):
    async def test(client, _):
        status, bodies = await client.ask('/v1/completions', {'prompt': 'fail late', 'stream': True})
        *_, error, done = b''.join(bodies).decode().strip().split('\n\n')
        assert status == 200 and done == 'data: [DONE]'
        assert json.loads(error[6:])['error']['message'].startswith('RuntimeError in the server')
    serve(test)


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(app_module, 'BODY_SECONDS', 0.05)

    async def test(client, _):
        async def receive():
            await asyncio.Future()

        sent = []

        async def send(message):
            sent.append(message)

        scope = {'type': 'http', 'method': 'POST', 'path': '/v1/completions', 'headers': [HOST],
                 'query_string': b''}
        await client.app(scope, receive, send)
        assert sent[0]['status'] == 408
    serve(test)


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_goes_away_ends_its_computation(stream):
    async def test(client, model):
        fields = {'prompt': 'endless', 'stream': stream}
        await client.ask('/v1/completions', fields, gone=waited(model.started))
        await waited(model.gone)
        assert (await client.complete('ab'))[0] == 200
    serve(test)


def test_a_client_that_goes_away_leaves_the_queue():
    async def test(client, model):
        first = asyncio.create_task(client.complete('wait'))
        await waited(model.started)
        await client.complete('endless', gone=asyncio.sleep(0))
        model.started.clear()
        model.go_on.set()
        assert (await first)[0] == (await client.complete('ab'))[0] == 200
        assert not model.started.is_set()
    serve(test)


def test_a_full_queue_refuses_more():
    async def test(client, model):
        tasks = [asyncio.create_task(client.complete('wait'))]
        await waited(model.started)
        tasks += [asyncio.create_task(client.complete('ab')) for _ in range(2)]
        await asyncio.sleep(0.01)
        status, error = await client.complete('ab')
        assert status == 429 and error['error']['code'] == 'rate_limit_exceeded'
        model.go_on.set()
        assert [status for status, _ in await asyncio.gather(*tasks)] == [200] * 3
    serve(test, max_waiting=2)


def test_the_end_of_the_server_ends_all_requests():
    async def run():
        pretended = Pretended()
        thread = ModelThread(pretended, contextlib.nullcontext, 8)
        app = make_app(thread, Settings('m', 64))
        async with app.router.lifespan_context(app):
            client = Client(app)
            tasks = [asyncio.create_task(client.complete(prompt)) for prompt in ('endless', 'ab')]
            await waited(pretended.started)
        assert [status for status, _ in await asyncio.gather(*tasks)] == [503, 503]
        assert (await client.complete('ab'))[0] == 503
    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_key_is_asked_for():
    async def test(client, _):
        for headers, status in (((), 401), (((b'authorization', b'Bearer wrong'),), 401),
                                (((b'authorization', b'Bearer s3cret'),), 200)):
            got, answer = await client.complete('ab', headers=headers)
            assert got == status
            assert (await client.ask('/v1/models', headers=headers))[0] == status
        assert (await client.ask('/'))[0] == 200
    serve(test, token='s3cret')


@pytest.mark.parametrize(('host', 'origin', 'status'), [
    (b'localhost:8000', None, 200), (b'[::1]:8000', None, 200),
    (b'localhost:8000', b'http://localhost:8000', 200),
    (b'evil.example:8000', None, 403), (b'localhost:8000', b'http://evil.example', 403),
    (b'localhost:8000', b'null', 403), (b'localhost:8000', b'http://localhost:9000', 403), (b'[', None, 403),
    (b'localhost:8000', b'http://[', 403),
])
def test_pages_of_other_sites_are_refused(host, origin, status):
    async def test(client, _):
        headers = () if origin is None else ((b'origin', origin),)
        assert (await client.complete('ab', headers=headers, host=(b'host', host)))[0] == status
    serve(test)


def test_any_name_reaches_a_server_for_others():
    async def test(client, _):
        assert (await client.complete('ab', host=(b'host', b'gpu7.example:8000')))[0] == 200
    serve(test, loopback=False)
