"""Speed and memory of tokenizing a corpus, against the tokenizers library alone.

    python experiments/bench/bench_tokenize.py --tokenizer tokenizer.json speed [--megabytes 100] [--rounds 3]
    python experiments/bench/bench_tokenize.py --tokenizer tokenizer.json memory [--sizes 100,1000]

The corpus is JSONL of the text files of this interpreter's packages (or of --corpus, a folder), repeated
until it is long enough, in a temporary folder.
speed: interleaved, the seconds of the library's encode_batch with --workers threads (its calls alone: no
reading, no ids in Python, no store), and the seconds of the command tokenize_corpus.py with as many workers,
from start to end.
memory: by size, the rate of that command and the peak resident memory of its writing process and of its
largest worker.
--output FILE adds the figures to a JSON file.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time

from lct.cli.main import run_script

HERE = pathlib.Path(__file__).resolve()
MAX_FILE = 1_000_000  # bytes of a text file; larger ones are tables of data
CORPUS_FILE = 50_000_000  # bytes of a file of the corpus
BATCH = 1000  # documents per call of encode_batch


def write_corpus(folder, source, num_bytes):
    """JSONL of about num_bytes of text from the files of source. Returns its bytes of UTF-8 text."""
    from lct.data.corpus import files as corpus_files
    from lct.data.corpus import listing

    files = [file.path for file in listing.find(source)
             if file.path.endswith(tuple(corpus_files.COMPRESSIBLE))
             and os.path.getsize(file.path) <= MAX_FILE]
    folder.mkdir(parents=True)
    written = 0
    while written < num_bytes:
        with open(folder / f'part-{written // CORPUS_FILE:03d}.jsonl', 'w', encoding='utf-8') as out:
            end = min(written + CORPUS_FILE, num_bytes)
            while written < end:
                path = files.pop(0)
                files.append(path)
                text = pathlib.Path(path).read_bytes().decode('utf-8', 'replace')
                out.write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
                written += len(text.encode())
    return written


def library_child(tokenizer, corpus):
    """Seconds of encode_batch over a corpus, in a new process: the library reads its thread count once."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(tokenizer)
    library.encode_special_tokens = True
    seconds = num_tokens = 0
    for path in sorted(pathlib.Path(corpus).iterdir()):
        with open(path, encoding='utf-8') as file:
            texts = [json.loads(line)['text'] for line in file]
        for i in range(0, len(texts), BATCH):
            start = time.perf_counter()
            encodings = library.encode_batch(texts[i:i + BATCH], add_special_tokens=False)
            seconds += time.perf_counter() - start
            num_tokens += sum(map(len, encodings))
    print(json.dumps({'seconds': seconds, 'tokens': num_tokens}))


def library_seconds(args, corpus):
    command = [sys.executable, HERE, '--tokenizer', args.tokenizer, 'library', '--corpus', corpus]
    environment = {**os.environ, 'RAYON_NUM_THREADS': str(args.workers)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True,
                          timeout=7200)
    return json.loads(done.stdout)


def store_seconds(args, corpus, output):
    """Seconds, tokens and peak bytes of a run of the command."""
    from lct.data.corpus.store import Store

    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, HERE.parents[1] / 'tokenize_corpus.py', corpus, '--tokenizer', args.tokenizer,
         '--output', output, '--workers', str(args.workers)], stdout=subprocess.DEVNULL)
    peaks = {}
    while process.poll() is None:
        for pid in [process.pid, *children(process.pid)]:
            peaks[pid] = max(peaks.get(pid, 0), peak(pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise ValueError('tokenize_corpus.py failed; see its message above')
    return {'seconds': seconds, 'tokens': Store(output).num_tokens, 'peak_writer': peaks.pop(process.pid),
            'peak_worker': max(peaks.values())}


def children(pid):
    try:
        return [int(child) for child in pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except FileNotFoundError:
        return []


def peak(pid):
    """Peak resident bytes of a process so far."""
    try:
        with open(f'/proc/{pid}/status') as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM')), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def speed(args, folder):
    num_bytes = write_corpus(folder / 'corpus', args.corpus, args.megabytes * 10**6)
    rounds = []
    for number in range(args.rounds):
        library = library_seconds(args, folder / 'corpus')
        store = store_seconds(args, folder / 'corpus', folder / f'store{number}')
        if store['tokens'] != library['tokens']:
            raise ValueError(f'the store has {store["tokens"]} tokens, the library makes {library["tokens"]}')
        rates = {'library_mb_s': num_bytes / library['seconds'] / 1e6,
                 'store_mb_s': num_bytes / store['seconds'] / 1e6}
        rounds.append({**rates, 'ratio': rates['store_mb_s'] / rates['library_mb_s']})
        print(' '.join(f'{key} {value:.3f}' for key, value in rounds[-1].items()), flush=True)
    ratio = statistics.median(each['ratio'] for each in rounds)
    print(f'speed of tokenize_corpus.py / encode_batch: {ratio:.2f}, median of {args.rounds} rounds '
          '(target 0.80)')
    return {'bytes': num_bytes, 'tokens': library['tokens'], 'rounds': rounds, 'ratio': ratio}


def memory(args, folder):
    out = []
    for size in args.sizes.split(','):
        num_bytes = write_corpus(folder / size, args.corpus, int(size) * 10**6)
        found = store_seconds(args, folder / size, folder / f'store{size}')
        out.append({'bytes': num_bytes, **found, 'mb_s': num_bytes / found['seconds'] / 1e6})
        print(f'{num_bytes / 1e6:.0f} MB, {found["tokens"] / 1e6:.1f}M tokens: {found["seconds"]:.1f} s, '
              f'{out[-1]["mb_s"]:.2f} MB/s, peak {found["peak_writer"] / 1e6:.0f} MB (writer) and '
              f'{found["peak_worker"] / 1e6:.0f} MB (worker)', flush=True)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('benchmark', choices=('speed', 'memory', 'library'))
    parser.add_argument('--tokenizer', required=True, help='a tokenizer.json')
    parser.add_argument('--corpus', default=sysconfig.get_paths()['purelib'])
    parser.add_argument('--megabytes', type=int, default=100)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--sizes', default='100,1000')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    if args.benchmark == 'library':
        return library_child(args.tokenizer, args.corpus)
    with tempfile.TemporaryDirectory() as folder:
        found = {'speed': speed, 'memory': memory}[args.benchmark](args, pathlib.Path(folder))
    if args.output:
        import tokenizers

        before = json.loads(args.output.read_text()) if args.output.exists() else {}
        with open('/proc/cpuinfo') as file:
            cpu = next((line.split(':')[1].strip() for line in file if line.startswith('model name')),
                       platform.machine())
        machine = {'cpu': cpu, 'cores': os.cpu_count(), 'python': platform.python_version(),
                   'tokenizers': tokenizers.__version__}
        found = {**before, 'machine': machine, args.benchmark: {'workers': args.workers, 'found': found}}
        args.output.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    run_script(main)
