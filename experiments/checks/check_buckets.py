"""Every path on a bucket of a server on the loopback address, with kill -9 in the middle.

    pip install 'moto[server]' s3fs
    python experiments/checks/check_buckets.py [--workdir runs/buckets] [--only training,store]
    pip install gcp-storage-emulator gcsfs
    python experiments/checks/check_buckets.py --server gcs

Each part runs once with local paths and once with every path under s3://bucket or gs://bucket, is killed
there, continues on "another machine" (an empty cache) or on the same one, and must end with the same bytes.
Takes ten minutes on two cores. Exit status 1 if a part failed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time

from drill import Failed, expect

from lct import storage, upload

EXPERIMENTS = pathlib.Path(__file__).parents[1]
FILES = 60  # of the standard library, as the corpus
LIMIT_S = 900
TRIES = 5  # to kill a process while it uploads a few megabytes


class Place:
    """The folder of all local files, with a cache in it, and the URL of the bucket."""

    def __init__(self, folder, url):
        self.folder, self.cache, self.url = folder, folder / 'cache', url
        os.environ.update(LCT_CACHE_DIR=str(self.cache), LCT_SYNC_S='1', PYTHONUNBUFFERED='1')

    def start(self, script, *arguments, **environment):
        log = (self.folder / 'log.txt').open('a')
        print('$', script, *arguments, file=log, flush=True)
        return subprocess.Popen([sys.executable, EXPERIMENTS / script, *map(str, arguments)], stdout=log,
                                stderr=log, env={**os.environ, **environment})

    def run(self, script, *arguments):
        """Run a script to its end."""
        status = self.start(script, *arguments).wait(LIMIT_S)
        expect(status == 0, f'{script} ended with status {status}; see {self.folder}/log.txt')

    def kill_when(self, condition, script, *arguments):
        """Start a script and kill -9 it once condition() holds."""
        process, end = self.start(script, *arguments), time.monotonic() + LIMIT_S
        while not condition():
            if process.poll() is not None:
                raise Failed(f'{script} ended with status {process.returncode} before it could be killed')
            expect(time.monotonic() < end, f'{script} did not come to where it is killed')
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        expect(process.wait(60) == -signal.SIGKILL, f'{script} ended by itself')

    def other_machine(self):
        """From now on nothing is known here of earlier runs."""
        shutil.rmtree(self.cache, ignore_errors=True)


def objects(url):
    """{name: bytes} of the objects below a URL."""
    return {name: info.size for name, info in storage.Remote(url).list().items()}


def content(url):
    """sha256 of each object below a URL, or of each file below a folder."""
    if storage.scheme_of(url):
        remote = storage.Remote(url)
        contents = {name: remote.read(name) for name in remote.list()}
    else:
        contents = {path.relative_to(url).as_posix(): path.read_bytes()
                    for path in pathlib.Path(url).rglob('*') if path.is_file()}
    return {name: hashlib.sha256(value).hexdigest() for name, value in contents.items()}


def weights(url):
    return {name: digest for name, digest in content(url).items()
            if name.endswith(('.safetensors', '.pth', '.npy', 'index.json'))}


# ---------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------


def training(place):
    """extend.py on the smoke job: killed with one checkpoint in the bucket, twice."""
    def arguments(base):
        return ('--config', EXPERIMENTS / 'configs' / 'smoke.py', '--workdir', f'{base}/run', '--set',
                f'model_folder={base}/model', '--set', f'corpus={base}/corpus', '--set',
                'checkpoint_every=2')

    def committed(step):
        names = {f'checkpoints/{step}.commit.json', f'checkpoints/{step}/commit_success.txt'}
        if storage.scheme_of(place.url) != 'gs':  # to which Orbax writes commits of its own
            names.remove(f'checkpoints/{step}/commit_success.txt')
        return lambda: names & set(objects(f'{place.url}/run'))

    place.run('extend.py', *arguments(place.folder))
    place.kill_when(committed(2), 'extend.py', *arguments(place.url))
    place.other_machine()
    place.kill_when(committed(4), 'extend.py', *arguments(place.url))  # on another machine
    place.run('extend.py', *arguments(place.url))  # on the same one
    local, remote = weights(place.folder / 'run' / 'model'), weights(f'{place.url}/run/model')
    expect(remote == local != {}, f'the weights differ: {remote} and {local}')
    rows = storage.Remote(f'{place.url}/run').read('metrics/metrics.jsonl').decode().splitlines()
    steps = [json.loads(row)['step'] for row in rows]
    expect(steps == [1, 2, 3, 4, 5, 6], f'metrics.jsonl has the steps {steps}')
    expect('results.json' in objects(f'{place.url}/run'), 'results.json is missing')
    return 'killed twice, continued on another machine and on the same one; the same weights, all metrics'


def evaluation(place):
    """evaluate.py: killed after its first answers, continued on another machine."""
    def arguments(base):
        return ('--model', f'{base}/model', '--workdir', f'{base}/evaluation', '--haystack', f'{base}/corpus',
                '--suite', 'ruler', '--tasks', 'niah_single_2,vt', '--lengths', '448,512', '--samples', '8',
                '--batch-tokens', '1024')

    def result(base):
        if base == place.url:
            return json.loads(storage.Remote(f'{place.url}/evaluation').read('results.json'))['results']
        return json.loads((base / 'evaluation' / 'results.json').read_text())['results']

    place.run('evaluate.py', *arguments(place.folder))
    place.kill_when(lambda: objects(f'{place.url}/evaluation').get('ruler.jsonl', 0) > 2000,
                    'evaluate.py', *arguments(place.url))
    kept = storage.Remote(f'{place.url}/evaluation').read('ruler.jsonl').splitlines()
    place.other_machine()
    place.run('evaluate.py', *arguments(place.url))
    local, remote = result(place.folder), result(place.url)
    expect(remote == local, 'the results differ from those of local paths')
    answers = storage.Remote(f'{place.url}/evaluation').read('ruler.jsonl').splitlines()
    expect(set(kept) <= set(answers) and len(kept) < len(answers), 'answers were lost')
    return f'killed after {len(kept)} of {len(answers)} answers, which were kept; the same results'


def store(place):
    """tokenize_corpus.py: killed between two shards, and during its upload; then a run over the store."""
    def arguments(base):
        return (f'{base}/corpus', '--tokenizer', f'{base}/model', '--output', f'{base}/store', '--workers', 1,
                '--shard-tokens', 20_000)

    def spooled(pattern):
        return lambda: any(place.cache.glob(f'outputs/*/{pattern}'))

    place.run('tokenize_corpus.py', *arguments(place.folder))
    place.kill_when(spooled('store.partial/00001.json'), 'tokenize_corpus.py', *arguments(place.url))
    expect(not objects(f'{place.url}/store'), 'something was uploaded before the store was complete')
    place.kill_when(lambda: len(objects(f'{place.url}/store')) > 1, 'tokenize_corpus.py',
                    *arguments(place.url))
    expect('index.json' not in objects(f'{place.url}/store'), 'the index was not the last object')
    place.run('tokenize_corpus.py', *arguments(place.url))
    local, remote = content(place.folder / 'store'), content(f'{place.url}/store')
    expect(remote == local != {}, 'the stores differ')
    place.other_machine()
    place.run('tokenize_corpus.py', '--verify', f'{place.url}/store')
    config = ('--config', EXPERIMENTS / 'configs' / 'smoke.py', '--set', f'model_folder={place.url}/model',
              '--set', 'stages.0.num_steps=1', '--set', 'stages.1.num_steps=1')
    for base in (place.folder, place.url):
        place.run('extend.py', *config, '--workdir', f'{base}/store_run', '--set', f'corpus={base}/store')
    expect(weights(place.folder / 'store_run' / 'model') == weights(f'{place.url}/store_run/model'),
           'the weights trained on the two stores differ')
    return f'killed twice; the same {len(local)} files, verified, and the same weights after training on them'


def export(place):
    """convert_weights.py: to Meta's format and back, killed during an upload."""
    def arguments(base, source, target, to):
        return f'{base}/{source}', f'{base}/{target}', '--to', to, '--verify'

    for base in (place.folder, place.url):
        place.run('convert_weights.py', *arguments(base, 'model', 'meta', 'meta'))
    place.run('convert_weights.py', *arguments(place.folder, 'meta', 'back', 'hf'))
    for _ in range(TRIES):
        storage.Remote(f'{place.url}/back').remove(objects(f'{place.url}/back'))
        place.kill_when(lambda: len(objects(f'{place.url}/back')) > 1, 'convert_weights.py',
                        *arguments(place.url, 'meta', 'back', 'hf'))
        if 'config.json' not in objects(f'{place.url}/back'):
            break
    expect('config.json' not in objects(f'{place.url}/back'), 'config.json was not the last object')
    place.other_machine()
    place.run('convert_weights.py', *arguments(place.url, 'meta', 'back', 'hf'))
    for name in ('meta', 'back'):
        local, remote = weights(place.folder / name), weights(f'{place.url}/{name}')
        expect(remote == local != {}, f'the weights of {name} differ')
    return 'killed during the upload, which no reader takes for a model; the same weights'


def hosts(place):
    """extend.py on two hosts that share nothing but a gs:// bucket: killed, and continued by one process."""
    if storage.scheme_of(place.url) != 'gs':
        return 'only for gs://, to which Orbax writes by itself'
    arguments = ('--config', EXPERIMENTS / 'configs' / 'smoke.py', '--mesh', '1,1,2,1', '--workdir',
                 f'{place.url}/hosts', '--set', f'model_folder={place.url}/model', '--set',
                 f'corpus={place.url}/corpus')
    with socket.create_server(('127.0.0.1', 0)) as probe:
        address = f'127.0.0.1:{probe.getsockname()[1]}'
    processes = [place.start('extend.py', *arguments, LCT_CACHE_DIR=str(place.folder / f'host {index}'),
                             JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES='2',
                             JAX_PROCESS_ID=str(index)) for index in range(2)]
    end = time.monotonic() + LIMIT_S
    while 'hosts/checkpoints/3/commit_success.txt' not in objects(place.url):
        expect(all(process.poll() is None for process in processes), 'a process ended by itself')
        expect(time.monotonic() < end, 'no checkpoint was written')
        time.sleep(0.1)
    processes[1].kill()
    statuses = [process.wait(120) for process in processes]
    expect(statuses == [76, -signal.SIGKILL], f'the processes ended with {statuses}')
    place.run('extend.py', *arguments)
    rows = storage.Remote(f'{place.url}/hosts').read('metrics/metrics.jsonl').decode().splitlines()
    steps = [json.loads(row)['step'] for row in rows]
    expect(steps == [1, 2, 3, 4, 5, 6], f'metrics.jsonl has the steps {steps}')
    return 'process 1 killed, process 0 ended with 76; one process continued to the end'


PARTS = {function.__name__: function for function in (training, evaluation, store, export, hosts)}


SERVERS = {  # name: (scheme, command, environment), of which {port} is replaced
    's3': ('s3', ['-m', 'moto.server', '-p', '{port}'], {
        'AWS_ENDPOINT_URL': 'http://127.0.0.1:{port}', 'AWS_ACCESS_KEY_ID': 'a',
        'AWS_SECRET_ACCESS_KEY': 'b', 'AWS_DEFAULT_REGION': 'us-east-1'}),
    'gcs': ('gs', ['-m', 'gcp_storage_emulator', 'start', '--port={port}', '--in-memory'], {
        'STORAGE_EMULATOR_HOST': 'http://127.0.0.1:{port}', 'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
        'TENSORSTORE_GCS_HTTP_URL': 'http://127.0.0.1:{port}', 'GOOGLE_CLOUD_PROJECT': 'project',
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token'}),
}


@contextlib.contextmanager
def server(name, log):
    """The URL of a bucket of a server that lives in the block."""
    scheme, command, environment = SERVERS[name]
    with socket.create_server(('127.0.0.1', 0)) as probe:
        port = probe.getsockname()[1]
    os.environ.update({key: value.format(port=port) for key, value in environment.items()})
    process = subprocess.Popen([sys.executable, *[part.format(port=port) for part in command]], stdout=log,
                               stderr=log)
    try:
        end = time.monotonic() + 60
        while socket.socket().connect_ex(('127.0.0.1', port)):
            expect(process.poll() is None and time.monotonic() < end, 'no server; install its package')
            time.sleep(0.2)
        yield f'{scheme}://bucket'
    finally:
        process.terminate()
        process.wait()


def prepare(place):
    """Model and corpus, locally and in the bucket."""
    import fsspec

    fsspec.filesystem(storage.scheme_of(place.url)).mkdir('bucket')
    shutil.copytree(EXPERIMENTS / 'base', place.folder / 'model')
    (place.folder / 'corpus').mkdir()
    for path in sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py'))[:FILES]:
        shutil.copy2(path, place.folder / 'corpus')
    for name in ('model', 'corpus'):
        upload.upload(place.folder / name, storage.Remote(f'{place.url}/{name}'))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/buckets'))
    parser.add_argument('--only', default=','.join(PARTS), help='parts, separated by commas; default: all')
    parser.add_argument('--server', choices=SERVERS, default='s3')
    args = parser.parse_args()
    shutil.rmtree(args.workdir, ignore_errors=True)
    args.workdir.mkdir(parents=True)
    failed = False
    with (args.workdir / 'server.txt').open('w') as log, server(args.server, log) as url:
        place = Place(args.workdir.absolute(), url)
        prepare(place)
        for name in args.only.split(','):
            began, result = time.monotonic(), 'pass'
            try:
                happened = PARTS[name](place)
            except Failed as error:
                happened, result, failed = str(error), 'FAIL', True
            print(f'{name} | {happened} | {result} | {time.monotonic() - began:.0f} s', flush=True)
    raise SystemExit(failed)


if __name__ == '__main__':
    main()
