"""Where answers come from: hashes of the model and its inputs, and the calls that gave the answers.

WORKDIR/about.json holds what all answers in the folder share, and under 'runs' what may differ from call to
call. Every answer names its call by its number there.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lct import json_files, storage
from lct.eval import answers
from lct.files import write_atomically

PER_RUN = ('model', 'template', 'mesh', 'layout', 'piece', 'batch_tokens', 'session', 'device', 'versions',
           'commit')
IDENTITY = ('weights_sha256', 'tokenizer_sha256', 'template_sha256', 'seed', 'samples_from',
            'documents_sha256', 'data')


def enter(workdir: Path, about: Mapping[str, Any]) -> tuple[dict, int]:
    """Add a call to about.json of a folder; refuse to mix the answers of two models or inputs in it.

    A base model and an evaluator may be added later. A folder without answers may be used for anything.

    Returns:
      about, with what earlier calls have stated and with 'runs', and the number of this call.
    Raises:
      ValueError: naming what differs.
    """
    storage.refuse_remote(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'about.json'
    answered = any(file.stat().st_size for file in workdir.glob('*.jsonl'))
    run, runs, shared = {name: about[name] for name in PER_RUN if name in about}, [], {}
    if path.is_file() and (answered or (workdir / 'results.json').is_file()):
        shared = _read(path)
        # Earlier versions knew one call alone.
        runs = shared.pop('runs', None) or [{name: shared[name] for name in PER_RUN if name in shared}]
        different = sorted(name for name in (shared.keys() & about.keys()) - set(PER_RUN)
                           if shared[name] != about[name])
        if different:
            name = different[0]
            raise ValueError(f"{workdir} holds answers made with other {', '.join(different)} "
                             f'({shared[name]!r}, not {about[name]!r}); use another --workdir')
    if run not in runs:
        runs.append(run)
    about = {**shared, **about, 'runs': runs}
    write_atomically(path, json.dumps(about, indent=1) + '\n')
    return about, runs.index(run)


def _read(path):
    try:
        return json_files.read_json(path)
    except ValueError as error:
        raise ValueError(f'{error}, or use another --workdir: without it nothing says which model gave '
                         'the answers beside it') from None


def identity_of(about: Mapping[str, Any]) -> str:
    """A hash of what answers depend on: of the model, its template, and the inputs."""
    return answers.checksum([about.get(name) for name in IDENTITY])


def weights_hash(folder: Path) -> str:
    return files_hash(folder.glob('*.safetensors'))


def files_hash(paths: Iterable[Path]) -> str:
    """sha256 over files in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open('rb') as file:
            digest.update(hashlib.file_digest(file, 'sha256').digest())
    return digest.hexdigest()


def documents_hash(documents: Sequence) -> str:
    """sha256 over the names and texts of all documents."""
    digest = hashlib.sha256()
    for document in documents:
        for text in (document.name, document.text):
            digest.update(bytes.fromhex(text_hash(text)))
    return digest.hexdigest()


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
