"""Tokenize a corpus into a store of memory-mapped shards (lct/data/corpus/store.py).

    python experiments/tokenize_corpus.py SOURCE... --tokenizer T --output FOLDER [--workers N]
    python experiments/tokenize_corpus.py --verify FOLDER

SOURCE is a folder, a glob, or a file: text (one document), .jsonl (a document per line) or .parquet (a
document per row), text and .jsonl also as .gz or .zst; 'embedded' is Python's standard library. NAME=SOURCE
names it, for mixes; otherwise the first folder below it does, or the field given by --source-field. The same
command continues a run that was stopped or killed. The store gets its name when it is complete, and is the
same, byte for byte, for any number of workers and of stops.
"""

import argparse
import json
import os
import sys
import time

from lct import storage, watchdog
from lct.cli.flags import length
from lct.cli.main import run_script
from lct.data.corpus.files import Fields
from lct.data.corpus.store import Store, is_store
from lct.data.corpus.tokenize import tokenize_corpus
from lct.upload import new_folder


class StatusLine:
    """A line on stderr, updated every second, or printed every ten seconds if stderr is not a terminal."""

    def __init__(self):
        self.end, self.interval_s = ('   \r', 1) if sys.stderr.isatty() else ('\n', 10)
        self.written_s, self.shown = time.monotonic(), 0

    def show(self, done, total, details=''):
        if time.monotonic() - self.written_s > self.interval_s or self.shown < done == total:
            print(f'{done / total:6.1%} of {total / 1e6:.0f} MB{details}', end=self.end, file=sys.stderr,
                  flush=True)
            self.written_s, self.shown = time.monotonic(), done


class ProgressLine(StatusLine):
    """Shows each Progress of tokenize_corpus. Rates are of this run, which may continue an earlier one."""
    first = None

    def __call__(self, progress):
        watchdog.beat()
        for error in progress.skipped:
            print('skipped:', error, file=sys.stderr)
        if self.first is None:
            self.first, self.start_s = progress, time.monotonic()
        seconds = max(time.monotonic() - self.start_s, 1e-3)
        bytes_left = progress.bytes_total - progress.bytes_done
        left = bytes_left * seconds / max(progress.bytes_done - self.first.bytes_done, 1)
        self.show(progress.bytes_done, progress.bytes_total,
                  f', {progress.documents} documents, {progress.tokens / 1e6:.1f}M tokens, '
                  f'{(progress.tokens - self.first.tokens) / seconds / 1e3:.0f}K tokens/s, '
                  f'{clock(left)} left')


def clock(seconds):
    """Seconds as '1:02:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def write(args, folder):
    """Tokenize into a folder. Returns the Store."""
    if storage.scheme_of(args.output) and is_store(folder):
        print(f'{folder} was complete when its upload was interrupted; delete it to tokenize again')
        return Store(folder)
    return tokenize_corpus(args.sources, args.tokenizer, folder, workers=args.workers,
                           shard_tokens=args.shard_tokens, skip_bad=args.skip_bad,
                           fields=Fields(args.text_field, args.source_field), progress=ProgressLine())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sources', nargs='*', metavar='SOURCE')
    parser.add_argument('--tokenizer',
                        help="a folder, a tokenizer.json, Meta's tokenizer.model, 'llama3' or 'bytes'")
    parser.add_argument('--output', help='the folder to be written')
    parser.add_argument('--workers', type=int, default=os.cpu_count(),
                        help='processes; default: number of cores')
    parser.add_argument('--shard-tokens', type=length, default=2**27,
                        help='a stop loses at most one shard of work')
    parser.add_argument('--text-field', default='text',
                        help="field of a record that holds its text; 'a.b' is field b of the object a")
    parser.add_argument('--source-field', help='field of a record that names its source, such as meta.set')
    parser.add_argument('--skip-bad', action='store_true',
                        help='count documents that are not UTF-8 or not JSON, and continue')
    parser.add_argument('--verify', metavar='FOLDER', help='read a store and compare its checksums')
    args = parser.parse_args()
    if args.verify:
        store = Store(args.verify)
        store.verify(StatusLine().show)
        print(f'{args.verify} is intact: {store.num_documents} documents, {store.num_tokens} tokens')
        return
    if not (args.sources and args.tokenizer and args.output):
        parser.error('give SOURCE, --tokenizer and --output, or --verify FOLDER')
    work = {name: value for name, value in vars(args).items() if name != 'workers'}
    with (new_folder(args.output, key=json.dumps(work)) as folder,
          watchdog.watch({}, os.path.dirname(os.path.abspath(folder)))):  # a worker may hang
        store = write(args, folder)
    print(f'{args.output}: {store.num_documents} documents, {store.num_tokens} tokens, sources '
          f'{", ".join(store.sources)}; left out {store.counts["empty"]} empty and {store.counts["bad"]} bad '
          f'documents; {store.counts["inexact_cuts"]} cuts may have changed ids')


if __name__ == '__main__':
    run_script(main, resumes=True, urls=('', '--tokenizer', '--output', '--verify'))
