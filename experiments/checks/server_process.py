"""A server in a process of its own, with a model folder that has a chat template and sessions of its own."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time

import httpx

from lct.cli.model import find_model

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1]
TEMPLATE = ("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")
START_S = 300


class Server:
    """experiments/serve.py with flags; sessions and other caches lie in `cache`.

    url: of the API. log: the lines that it has printed.
    """

    def __init__(self, cache: pathlib.Path, *flags: str, key: str = ''):
        environment = {**os.environ, 'XDG_CACHE_HOME': str(cache), 'LCT_API_KEY': key}
        command = [sys.executable, str(EXPERIMENTS / 'serve.py'), '--port', '0', *flags]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.log, self.url, self._ready = [], None, threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(START_S) or self.url is None:
            self.process.kill()
            raise RuntimeError('the server did not start: ' + ' / '.join(self.log[-5:]))
        self.headers = {'Authorization': f'Bearer {key}'} if key else {}

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if found := re.search(r'at (http://\S+)', line):
                self.url = found[1] + '/v1'
                self._ready.set()
        self._ready.set()

    def status(self) -> dict:
        return httpx.get(self.url.removesuffix('/v1') + '/status', headers=self.headers, timeout=60).json()

    def resident_mib(self) -> float:
        text = pathlib.Path(f'/proc/{self.process.pid}/status').read_text()
        return int(re.search(r'VmRSS:\s+(\d+)', text)[1]) / 1024

    def wait_until_saved(self, seconds: float = 60) -> list[dict]:
        """The texts on disk, once nothing is computed or written any more."""
        before, end = None, time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(1)
            state = self.status()
            if state['current'] is None and state['texts'] == before:
                break
            before = state['texts']
        return [one for one in before if 'disk' in one['place']]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def model_with_template(name: str, folder: pathlib.Path, positions: int = 0) -> pathlib.Path:
    """A copy of a model, with a chat template if it has none, and with `positions` at least."""
    source, target = find_model(name), folder / pathlib.Path(name).name
    shutil.copytree(source, target)
    if not (target / 'chat_template.jinja').exists():
        (target / 'chat_template.jinja').write_text(TEMPLATE)
    config = json.loads((target / 'config.json').read_text())
    if config['max_position_embeddings'] < positions:
        config['max_position_embeddings'] = positions
        (target / 'config.json').write_text(json.dumps(config))
    return target
