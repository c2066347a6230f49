"""Make a JSONL corpus for tokenize_corpus.py in which every repository is one long document.

    python experiments/repositories.py ROOT OUT.jsonl

Every folder directly under ROOT becomes one document: its files, each under a line with its path, a Python
file after the files that it imports (with --order path, in the order of their paths alone).
"""

import argparse
import json
import pathlib

from lct.cli.main import run_script


def run():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root')
    parser.add_argument('out', type=pathlib.Path)
    parser.add_argument('--order', choices=('dependency', 'path'), default='dependency')
    args = parser.parse_args()
    from lct.data.corpus import repositories
    from lct.files import atomic_file

    order = {'dependency': repositories.by_dependency, 'path': repositories.by_path}[args.order]
    with atomic_file(args.out) as file:
        for document in repositories.repositories(args.root, order):
            file.write(json.dumps(document._asdict()) + '\n')
            print(f'{document.name}: {len(document.text):,} characters')


if __name__ == '__main__':
    run_script(run)
