"""Folders of sources as long documents, a repository each, for tokenize_corpus.py.

    python experiments/repositories.py ROOT OUT.jsonl

Every folder directly under ROOT becomes one document: its files under lines with their paths, a Python file after
those that it imports; --order path: in the order of their paths alone.
"""

import argparse
import json
import pathlib

from lct.cli.main import run_script


def run():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root')
    parser.add_argument('out', type=pathlib.Path)
    parser.add_argument('--order', choices=('dependency', 'path'), default='dependency')
    args = parser.parse_args()
    from lct import files
    from lct.data.corpus import repositories

    order = {'dependency': repositories.by_dependency, 'path': repositories.by_path}[args.order]
    with files.atomic_file(args.out) as file:
        for one in repositories.repositories(args.root, order):
            file.write(json.dumps({'name': one.name, 'text': one.text}) + '\n')
            print(f'{one.name}: {len(one.text):,} characters')


if __name__ == '__main__':
    run_script(run)
