"""The token stores of recipe_study.py: the training documents of its other arms, and long documents made of
them with hard negatives between the chunks. The held-out documents are those of the other arms."""

import json
import pathlib

import child_script

from lct.cli.corpus import read_documents
from lct.cli.paths import experiments_folder
from lct.data.corpus import documents
from lct.files import atomic_path

TRAINING, HARD_NEGATIVES, HELD_OUT = 'training', 'hard_negatives', 'held_out.jsonl'
LENGTH, DOCUMENTS = '4K', 200  # of four characters each: the base makes about 8,192 tokens of 4K


def make(folder: pathlib.Path, corpus: str, max_bytes: int, held_out: float) -> None:
    """Write what is missing.

    Raises:
      ValueError: if a script fails; its last line says why.
    """
    if (folder / HARD_NEGATIVES).is_dir():  # the last one
        return
    folder.mkdir(parents=True, exist_ok=True)
    training, held = documents.split(read_documents(corpus, max_bytes=max_bytes), held_out)
    for name, found in ((f'{TRAINING}.jsonl', training), (HELD_OUT, held)):
        with atomic_path(folder / name) as partial:
            partial.write_text(''.join(json.dumps({'text': one.text}) + '\n' for one in found))
    long = folder / f'{HARD_NEGATIVES}.jsonl'
    child_script.call('interleave.py', '--corpus', folder / f'{TRAINING}.jsonl', '--output', long,
                      '--length', LENGTH, '--documents', DOCUMENTS)
    for name in (TRAINING, HARD_NEGATIVES):
        if not (folder / name).is_dir():
            child_script.call('tokenize_corpus.py', f'python={folder / name}.jsonl',
                              '--output', folder / name, '--tokenizer', experiments_folder() / 'base')
