"""Tokenize a corpus into a store of memory-mapped shards (lct/data/store.py).

    python experiments/tokenize_corpus.py SOURCE... --tokenizer T --output FOLDER [--workers N]
    python experiments/tokenize_corpus.py --verify FOLDER

SOURCE is a folder, a glob, or a file: text (a document each), .jsonl (a document a line) or .parquet (a document a
row), text and .jsonl also as .gz or .zst. NAME=SOURCE names it, for mixes; otherwise the first folder below it does,
or the field that --source-field names. The same command continues a run that was stopped or killed; the store gets
its name when it is whole, and is the same, byte for byte, for any number of workers and of stops.
"""

import argparse
import os
import sys
import time

from lct.cli.main import run_script
from lct.data.corpus import files
from lct.data.corpus import tokenize as tokenize_module
from lct.data.corpus.store import Store


class Line:
    """A line on stderr that is written again every second, or anew every ten where stderr is no terminal."""

    def __init__(self):
        self.end, self.pause = ('   \r', 1) if sys.stderr.isatty() else ('\n', 10)
        self.written, self.shown = time.monotonic(), 0

    def show(self, done, total, more=''):
        if time.monotonic() - self.written > self.pause or self.shown < done == total:
            print(f'{done / total:6.1%} of {total / 1e6:.0f} MB{more}', end=self.end, file=sys.stderr, flush=True)
            self.written, self.shown = time.monotonic(), done


class Watch(Line):
    """Shows a corpus.Progress. Rates are of this run, which may continue what another one began."""
    first = None

    def __call__(self, progress):
        for sentence in progress.skipped:
            print('skipped:', sentence, file=sys.stderr)
        if self.first is None:
            self.first, self.start = progress, time.monotonic()
        seconds = max(time.monotonic() - self.start, 1e-3)
        left = (progress.bytes_total - progress.bytes_done) * seconds / max(progress.bytes_done - self.first.bytes_done, 1)
        self.show(progress.bytes_done, progress.bytes_total,
                  f', {progress.documents} documents, {progress.tokens / 1e6:.1f}M tokens, '
                  f'{(progress.tokens - self.first.tokens) / seconds / 1e3:.0f}K tokens/s, {clock(left)} left')


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sources', nargs='*', metavar='SOURCE')
    parser.add_argument('--tokenizer', help="a folder, a tokenizer.json, Meta's tokenizer.model, 'llama3' or 'bytes'")
    parser.add_argument('--output', help='the folder to be written')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes, default: cores')
    parser.add_argument('--shard-tokens', type=int, default=2**27, help='a stop loses at most one shard of work')
    parser.add_argument('--field', default='text', help="of a record: where its text is; 'a.b' is b of the object a")
    parser.add_argument('--source-field', help='of a record: the name of its source, as meta.set')
    parser.add_argument('--skip-bad', action='store_true', help='count what is no UTF-8 or no JSON and go on')
    parser.add_argument('--verify', metavar='FOLDER', help='read a store again and compare its checksums')
    args = parser.parse_args()
    if args.verify:
        store = Store(args.verify)
        store.verify(Line().show)
        print(f'{args.verify} is as it was written: {store.num_documents} documents, {store.num_tokens} tokens')
        return
    if not (args.sources and args.tokenizer and args.output):
        parser.error('give SOURCE, --tokenizer and --output, or --verify FOLDER')
    store = tokenize_module.tokenize_corpus(args.sources, args.tokenizer, args.output, workers=args.workers,
                            shard_tokens=args.shard_tokens, skip_bad=args.skip_bad,
                            fields=files.Fields(args.field, args.source_field), progress=Watch())
    print(f'{args.output}: {store.num_documents} documents, {store.num_tokens} tokens, sources '
          f'{", ".join(store.sources)}; left out {store.counts["empty"]} empty and {store.counts["bad"]} bad documents; '
          f'{store.counts["inexact_cuts"]} cuts may have changed ids')


if __name__ == '__main__':
    run_script(main, resumes=True)
