"""Write long documents out of short ones: hard negatives stand between the chunks of each (NExtLong).

    python experiments/interleave.py --corpus data/articles --length 128K --documents 1000 --output long.jsonl
    python experiments/tokenize_corpus.py --corpus long.jsonl --output long_store --tokenizer DIR

A line of the output is a document with the numbers of characters that are its own. Documents that are as long
as --length themselves are left as they are to the rest of your corpus: give both to tokenize_corpus.py. Train
with attention within the whole document (`sequences: packed`), which is what this data is for.
"""

import argparse
import itertools
import json
import pathlib

from lct.cli.corpus import read_documents
from lct.cli.flags import add_exclude_flag
from lct.cli.main import check_positive, run_script
from lct.cli.progress import Progress
from lct.data.corpus import hard_negatives
from lct.files import atomic_path
from lct.text import parse_length

CHARACTERS = 4  # of a token; about what a large tokenizer makes of English and code


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--corpus', default='embedded', help='a folder, glob or file of short documents')
    parser.add_argument('--output', type=pathlib.Path, required=True, help='a .jsonl file')
    parser.add_argument('--length', default='64K', help=f'tokens of a document, {CHARACTERS} characters each')
    parser.add_argument('--documents', type=int, default=100, help='how many to write')
    parser.add_argument('--chunk', type=int, default=2048, help='characters of a chunk, as in the paper')
    parser.add_argument('--seed', type=int, default=0, help='seed of the choice of documents')
    parser.add_argument('--max-bytes', type=int, default=200_000_000,
                        help='read at most so much of the corpus: the index is kept in memory')
    add_exclude_flag(parser)
    args = parser.parse_args()
    check_positive(args, 'documents', 'chunk', 'max_bytes')
    length = CHARACTERS * parse_length(args.length)
    if args.chunk > length // 2:
        raise ValueError(f'--chunk {args.chunk} is more than half of a document of {length:,} characters; '
                         f'use at most {length // 2}')
    documents = read_documents(args.corpus, exclude=args.exclude, max_bytes=args.max_bytes)
    chunks = hard_negatives.Chunks(documents, args.chunk)
    write(args, documents, itertools.islice(
        hard_negatives.interleave(chunks, length, args.seed), args.documents))


def write(args, documents, interleaved):
    """Write the JSONL file, and print what is in it."""
    progress, total, own_total = Progress('writing', 'documents'), 0, 0
    with atomic_path(args.output) as partial, partial.open('w', encoding='utf-8') as file:
        for i, found in enumerate(interleaved):
            text, source = ''.join(chunk.text for chunk in found), found[0].document
            own = sum(len(chunk.text) for chunk in found if chunk.document == source)
            file.write(json.dumps({'text': text, 'source': documents[source].name, 'own_characters': own},
                                  ensure_ascii=False) + '\n')
            total, own_total = total + len(text), own_total + own
            progress(i + 1, args.documents)
    progress.end()
    print(f'wrote {args.documents:,} documents of {total / args.documents:,.0f} characters to {args.output}; '
          f'{own_total / total:.1%} are their own, the rest are hard negatives')


if __name__ == '__main__':
    run_script(main, urls=('--corpus',))
