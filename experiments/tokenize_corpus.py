"""Tokenize a corpus into a store of memory-mapped shards (lct/data/corpus/store.py).

    python experiments/tokenize_corpus.py SOURCE... --tokenizer T --output FOLDER [--workers N]
    python experiments/tokenize_corpus.py SOURCE... --tokenizer T --output FOLDER --part 3/16   each machine
    python experiments/tokenize_corpus.py --join --output FOLDER                              once, at the end
    python experiments/tokenize_corpus.py --verify FOLDER

SOURCE is a folder, a glob, or a file: text (one document), .jsonl (a document per line), .parquet or .arrow
(a document per row), mail, notebooks, .tar; 'embedded' is Python's standard library. NAME=SOURCE
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
from lct.cli.flags import add_exclude_flag, length
from lct.cli.main import run_script
from lct.data.corpus import listing, parts
from lct.data.corpus.blocks import Fields
from lct.data.corpus.store import Store, is_store
from lct.data.corpus.tokenize import Options, tokenize_corpus
from lct.text import clock
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


def write(args, folder):
    """Tokenize into a folder. Returns the Store."""
    if storage.scheme_of(args.output) and is_store(folder):
        print(f'{folder} was complete when its upload was interrupted; delete it to tokenize again')
        return Store(folder)
    tally = listing.Tally()
    options = Options(args.skip_bad, tuple(args.exclude), tally, args.part)
    store = tokenize_corpus(args.sources, args.tokenizer, folder, workers=args.workers,
                            shard_tokens=args.shard_tokens, options=options,
                            fields=Fields(args.text_field, args.source_field), progress=ProgressLine())
    not_read = ', '.join(f'{count:,} {name}' for name, count in tally.skipped.most_common())
    print(f'{tally.files:,} files' + f'; not read: {not_read}' * bool(not_read))
    return store


def part_of(text):
    """'3/16' -> (3, 16)."""
    part, slash, parts = text.partition('/')
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f'{text!r} is not a part; write 1/4 for the first of four')
    return int(part), int(parts)


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
    add_exclude_flag(parser)
    parser.add_argument('--part', type=part_of, metavar='I/N',
                        help='tokenize part I of N into OUTPUT.parts, as one of N jobs with the same flags')
    parser.add_argument('--join', action='store_true', help='make OUTPUT of the parts in OUTPUT.parts')
    parser.add_argument('--verify', metavar='FOLDER', help='read a store and compare its checksums')
    args = parser.parse_args()
    if args.verify:
        store = Store(args.verify)
        store.verify(StatusLine().show)
        print(f'{args.verify} is intact: {store.num_documents} documents, {store.num_tokens} tokens')
        return
    if args.join and args.output:
        storage.refuse_remote(args.output, '--output with --join')
        return describe(args, parts.join(args.output))
    if not (args.sources and args.tokenizer and args.output):
        parser.error('give SOURCE, --tokenizer and --output, or --join and --output, or --verify FOLDER')
    if args.part:
        storage.refuse_remote(args.output, '--output with --part')
        write(args, args.output)
        folder = parts.folder_of(args.output, *args.part)
        print(f'{folder} is complete; after the last part: tokenize_corpus.py --join --output {args.output}')
        return
    work = {name: value for name, value in vars(args).items() if name != 'workers'}
    with (new_folder(args.output, key=json.dumps(work)) as folder,
          watchdog.watch({}, os.path.dirname(os.path.abspath(folder)))):  # a worker may hang
        store = write(args, folder)
    describe(args, store)


def describe(args, store):
    """What a finished store holds, in one line."""
    print(f'{args.output}: {store.num_documents} documents, {store.num_tokens} tokens, sources '
          f'{", ".join(store.sources)}; left out {store.counts["empty"]} empty and {store.counts["bad"]} bad '
          f'documents; {store.counts["inexact_cuts"]} cuts may have changed ids')


if __name__ == '__main__':
    run_script(main, resumes=True, urls=('', '--tokenizer', '--output', '--verify'))
