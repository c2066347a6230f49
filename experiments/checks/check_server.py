"""The server under load: 1,000 requests of 8 clients, of which some go away and some send nonsense; then
kill -9 and a new start.

    pip install '.[serve]' httpx
    python experiments/checks/check_server.py --output experiments/results/server.json

Every request must get the status that it deserves, every greedy answer must be that of ask.py, every sampled
one must follow its seed, the memory of the server must not grow, and what was read must be there after the
kill.
"""

import argparse
import collections
import contextlib
import io
import json
import pathlib
import random
import runpy
import socket
import string
import tempfile
import threading
import time
from urllib.parse import urlsplit

import httpx
from server_process import Server, model_with_template

from lct.cli.main import run_script
from lct.cli.paths import experiments_folder

SIZES, NEW = (250, 420, 640), 24  # characters of the texts; tokens of the answers
QUESTIONS = ('What is stated?', 'Which number follows?', 'Who wrote this, and when?', 'What is 1 of 2?')
MEMORY_GROWTH = 1.1  # of the last quarter over the second
BAD = [  # (path, body, status)
    ('/chat/completions', b'{', 400), ('/chat/completions', b'\xff\xfe', 400), ('/completions', b'[]', 400),
    ('/completions', b'{"prompt": 1}', 400), ('/completions', b'{"prompt": "a", "n": 2}', 400),
    ('/completions', b'{"prompt": "a", "max_tokens": 100000}', 400), ('/completions', b'[' * 50_000, 400),
    ('/completions', b'{"prompt": "' + b'text ' * 2000 + b'"}', 400),
    ('/completions', b'{"prompt": "' + b'a' * 3 * 2**20 + b'"}', 413), ('/nothing', b'{}', 404),
    ('/chat/completions', b'{"model": "other", "messages": [{"role": "user", "content": "a"}]}', 404),
    ('/chat/completions', b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ('/chat/completions', b'{"messages": [{"role": "nobody", "content": "a"}]}', 400),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='base')
    parser.add_argument('--mesh', default='1,1,1,1')
    parser.add_argument('--requests', type=int, default=1000)
    parser.add_argument('--clients', type=int, default=8)
    parser.add_argument('--seconds', type=float, default=1800, help='of the load at most')
    parser.add_argument('--output', type=pathlib.Path, help='results')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = check(args, pathlib.Path(folder))
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + '\n')
    raise SystemExit(0 if result['passed'] else 1)


def check(args, folder):
    """-> the results."""
    model = model_with_template(args.model, folder)
    flags = '--model', str(model), '--mesh', args.mesh, '--cache-gib', '0.02', '--max-body-mib', '2'
    expected = ask_all(model, folder / 'texts', args)
    server = Server(folder / 'cache', *flags)
    try:
        load = Load(server, expected, args)
        load.run()
        kept = server.wait_until_saved()
        half = httpx.stream('POST', server.url + '/completions', timeout=60, json={
            'prompt': 'An answer that the kill interrupts', 'stream': True, 'max_tokens': 300})
        with half as response:
            next(response.iter_lines())
            server.kill()
    finally:
        server.kill()
    again = Server(folder / 'cache', *flags)
    try:
        found = [one for one in again.status()['texts'] if 'disk' in one['place']]
        reused = [one for one in continued(again, expected)]
        stopped = again.stop()
    finally:
        again.kill()
    result = load.result() | {
        'texts on disk before kill -9': len(kept), 'after': len(found),
        'answers after it': len(reused), 'equal': sum(equal for equal, _ in reused),
        'tokens reused by the one that reused most': max(tokens for _, tokens in reused),
        'exit status of SIGTERM': stopped}
    after = result['after'] == len(kept) > 0 and result['equal'] == len(reused)
    return result | {'passed': load.passed() and after and max(tokens for _, tokens in reused) > 100}


def ask_all(model, folder, args):
    """{(text, question): the answer of ask.py}."""
    from lct.data.corpus import bundle

    ask = runpy.run_path(str(experiments_folder() / 'ask.py'))['ask']
    rng, expected = random.Random(0), {}
    for size in SIZES:
        file = folder / str(size) / f'{rng.choice("abc")}.txt'
        file.parent.mkdir(parents=True)
        text = ' '.join(rng.choice(['The key is 12.', 'A line.', 'def f(x):', 'Nothing of note.'])
                        for _ in range(size // 7))
        file.write_text(text[:size] + '\n')
        flags = argparse.Namespace(
            exclude=[],
            model=str(model), mesh=args.mesh, dtype=None, cache_dtype=None, plain=False, batch_tokens=65536,
            piece=32, files=[str(file.parent)], question=list(QUESTIONS), length=None, max_new_tokens=NEW,
            temperature=0.0, top_p=1.0, stop=[], seed=0, cite=False, session=None, session_gb=1.0)
        with contextlib.redirect_stdout(io.StringIO()):
            answers = ask(flags)
        read = bundle.text(bundle.read([str(file.parent)]))
        expected |= {(read, question): one for question, one in zip(QUESTIONS, answers, strict=True)}
    return expected


def chat(text, question):
    return {'messages': [{'role': 'user', 'content': f'{text}\n{question}'}]}


def continued(server, expected):
    """(whether the answer is that of ask.py, tokens reused) for one question on each text."""
    for (text, question), answer in expected.items():
        if question == QUESTIONS[0]:
            body = {**chat(text, question), 'temperature': 0, 'max_tokens': NEW}
            out = httpx.post(server.url + '/chat/completions', json=body, timeout=300).json()
            cached = out['usage']['prompt_tokens_details']['cached_tokens']
            yield out['choices'][0]['message']['content'] == answer, cached


class Load:
    """Clients that send requests of all kinds, and what came of them."""

    def __init__(self, server, expected, args):
        self.server, self.expected, self.args = server, list(expected.items()), args
        self.counts, self.wrong, self.samples = collections.Counter(), [], {}
        self.memory, self._left, self._lock = [], iter(range(args.requests)), threading.Lock()

    def run(self):
        self.start = time.monotonic()
        threads = [threading.Thread(target=self._client, args=(i,)) for i in range(self.args.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds = time.monotonic() - self.start

    def _client(self, number):
        rng = random.Random(number)
        kinds = [self._greedy] * 8 + [self._sampled, self._free] * 2 + [self._cancel, self._bad] * 3 + [
            self._look, self._cut]
        with httpx.Client(base_url=self.server.url, timeout=600) as client:
            while time.monotonic() - self.start < self.args.seconds:
                with self._lock:
                    index = next(self._left, None)
                if index is None:
                    return
                if index % max(self.args.requests // 40, 1) == 0:
                    self.memory.append(self.server.resident_mib())
                kind = rng.choice(kinds)
                try:
                    problem = kind(client, rng)
                except Exception as error:
                    problem = f'{type(error).__name__}: {error}'
                self.counts[kind.__name__.strip('_')] += 1
                if problem:
                    self.wrong.append(f'{kind.__name__.strip("_")}: {problem}'[:300])

    def _greedy(self, client, rng):
        (text, question), answer = rng.choice(self.expected)
        body = {**chat(text, question), 'temperature': 0, 'max_tokens': NEW, 'stream': rng.random() < 0.5}
        got = stream(client, body) if body['stream'] else post(client, body)
        return got != answer and f'{got!r} instead of {answer!r}'

    def _sampled(self, client, rng):
        """Equal seeds give equal answers, whatever other requests did to the kept texts."""
        (text, question), _ = self.expected[rng.randrange(4)]
        body = {**chat(text, question), 'temperature': 1, 'top_p': 0.9, 'seed': rng.randrange(3),
                'max_tokens': 8}
        got = post(client, body)
        first = self.samples.setdefault((text, question, body['seed']), got)
        return got != first and f'{got!r} after {first!r} for the same seed'

    def _free(self, client, rng):
        text = ''.join(rng.choices(string.printable + 'äé\n', k=rng.randint(1, 250)))
        body = {**chat(text, ''), 'temperature': round(rng.uniform(0, 2), 2),
                'max_tokens': rng.randint(1, 40), 'top_p': round(rng.uniform(0.1, 1), 2),
                'stop': rng.choice([None, 'the', ['a', ' 1']]), 'logprobs': rng.random() < 0.5}
        post(client, body)

    def _cancel(self, client, rng):
        (text, question), _ = rng.choice(self.expected)
        body = {**chat(text, question), 'max_tokens': 100, 'stream': rng.random() < 0.7}
        patience = rng.choice([0.001, 0.01, 0.1, 0.5])
        try:
            with client.stream('POST', '/chat/completions', json=body, timeout=patience) as response:
                for _, _ in zip(range(rng.randint(0, 5)), response.iter_lines(), strict=False):
                    pass
        except httpx.TimeoutException:
            pass

    def _bad(self, client, rng):
        path, body, status = rng.choice(BAD)
        response = client.post(path, content=body)
        if response.status_code != status or 'message' not in response.json()['error']:
            return f'{path} {body[:60]!r} got {response.status_code} {response.text[:100]}'
        return None

    def _look(self, client, rng):
        return self.server.status()['model'] != client.get('/models').json()['data'][0]['id']

    def _cut(self, client, rng):
        """A connection that ends within its body, or that sends no HTTP."""
        url = urlsplit(self.server.url)
        with socket.create_connection((url.hostname, url.port), 60) as connection:
            head = f'POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: 900\r\n\r\n{{'
            connection.sendall(rng.choice([head.encode(), rng.randbytes(200), b'']))

    def passed(self):
        complete = sum(self.counts.values()) == self.args.requests
        return complete and not self.wrong and self._growth() < MEMORY_GROWTH

    def _growth(self):
        quarter = len(self.memory) // 4
        return max(self.memory[-quarter:]) / max(self.memory[quarter:2 * quarter])

    def result(self):
        quarter = len(self.memory) // 4
        return {'requests': dict(self.counts), 'total': sum(self.counts.values()), 'wrong': self.wrong[:20],
                'number wrong': len(self.wrong), 'seconds': round(self.seconds),
                'resident MiB, most of each quarter': [
                    round(max(self.memory[i * quarter:(i + 1) * quarter])) for i in range(4)],
                'growth, last quarter over second': round(self._growth(), 3),
                'lines of the log': len(self.server.log), 'log': self.server.log[-5:]}


def post(client, body):
    response = client.post('/chat/completions', json=body)
    if response.status_code != 200:
        raise RuntimeError(f'{response.status_code} {response.text[:200]}')
    return response.json()['choices'][0]['message']['content']


def stream(client, body):
    parts, last = [], ''
    with client.stream('POST', '/chat/completions', json=body) as response:
        for line in response.iter_lines():
            if line.startswith('data: {'):
                (choice,) = json.loads(line[6:])['choices']
                parts.append(choice['delta'].get('content', ''))
            last = line or last
    if last != 'data: [DONE]':
        raise RuntimeError(f'the stream ended with {last!r}')
    return ''.join(parts)


if __name__ == '__main__':
    run_script(main)
