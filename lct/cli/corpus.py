"""The corpus of a config as a source of training rows and held-out documents."""

import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from lct import files
from lct.cli.host_memory import host_memory
from lct.cli.model import find_model
from lct.data import chat_template
from lct.data.batches import packing_plan
from lct.data.batches.memory_source import MemorySource
from lct.data.batches.store_source import StoreSource
from lct.data.batches.upsample import Upsample
from lct.data.corpus import documents, listing
from lct.data.corpus.blocks import Fields
from lct.data.corpus.store import Store, is_store
from lct.data.tokenizer import Tokenizer

DOCUMENTS = 'documents.npy'  # in a work directory: the hashes of the training documents
MEMORY_PER_BYTE = 4  # of a corpus' files: text, token ids, and what decoding leaves
BATCH = 64  # documents tokenized at a time, so that a large corpus is never held as Python ints


def tokenize_documents(tokenizer: Tokenizer, texts: Sequence[documents.Document]) -> list[np.ndarray]:
    """The token ids of each document, int32 [n]."""
    ids = []
    for i in range(0, len(texts), BATCH):
        batch = [document.text for document in texts[i:i + BATCH]]
        ids += [np.asarray(one, np.int32) for one in tokenizer.encode_batch(batch)]
    return ids


def read_documents(spec: str, *, exclude: Sequence[str] = (), max_bytes: int | None = None,
                   text_field: str = 'text', log: Callable[[str], object] | None = None,
                   ) -> list[documents.Document]:
    """The documents of a corpus (see data.corpus.listing.find), after a line on what was read and what was
    not.

    log: takes the line; by default it goes to stderr.
    """
    tally = listing.Tally()
    found = documents.read(spec, max_bytes, Fields(text_field), exclude, tally)
    line = f'corpus {spec}: {tally.sentence(max_bytes)}'
    log(line) if log else print(line, file=sys.stderr, flush=True)
    return found


def check_size(spec: str, exclude: Sequence[str], max_bytes: int | None) -> None:
    """Refuse a corpus that would not fit into the memory that this process may take.

    Raises:
      ValueError: with the remedy, a token store.
    """
    if max_bytes is not None or spec == listing.EMBEDDED:
        return
    memory = host_memory()
    size = sum(os.path.getsize(file.path) for file in listing.find(spec, exclude))
    if MEMORY_PER_BYTE * size > memory:
        raise ValueError(f'config.corpus {spec} has {size / 1e9:.1f} GB, which would take about '
                         f'{MEMORY_PER_BYTE * size / 1e9:.0f} of the {memory / 1e9:.0f} GB of free memory '
                         'here; make a token store of it with experiments/tokenize_corpus.py and give that, '
                         'or read less with --set corpus_bytes=1000000000')


def check_exists(config: ConfigDict) -> None:
    """Refuse a config without a corpus, or with one that does not exist.

    Raises:
      ValueError: with the remedy.
    """
    if not config.corpus:
        raise ValueError('config.corpus is empty; add --set corpus=PATH of your documents: a folder, a glob, '
                         'a file of text, .jsonl or .parquet, or a token store')
    for field in 'corpus', 'evaluation_corpus':
        if (spec := config.get(field)) and not is_store(spec):
            try:
                next(listing.find(spec, config.get('exclude', ())), None)
            except FileNotFoundError as error:
                raise ValueError(f'config.{field}: {error}') from error
        elif spec and field != 'corpus':
            raise ValueError(f'config.{field} {spec} is a token store; give a folder, a glob, or a file of '
                             'text, .jsonl or .parquet')


def open_corpus(config: ConfigDict,
                tokenizer: Tokenizer) -> tuple[MemorySource | StoreSource, list[np.ndarray]]:
    """The training rows of config.corpus, and the ids int32 [n] of its held-out documents.

    A token store (experiments/tokenize_corpus.py) is read during training, each process its own shards.
    For it, config.sequences names a mode of packing_plan (default: packed), config.upsample gives the fields
    of Upsample, and config.chat_template = True renders chats with the model's own template. Any other corpus
    (see data.corpus.listing.find) is tokenized here and kept in memory. With config.eos_target = False, no
    document has an end of text as its last target (default: each has). config.evaluation_corpus is read in
    place of held-out documents; nothing is then held out.

    Raises:
      ValueError: if there is no corpus, or an option does not fit it.
    """
    check_exists(config)
    apart = config.get('evaluation_corpus')
    rows, held_out = (_open_store if is_store(config.corpus) else _read_corpus)(
        config, tokenizer, 0.0 if apart else config.held_out)
    if not config.get('eos_target', True):
        rows.eos_id = None
    return rows, tokenize_documents(tokenizer, _read_into_memory(config, apart)) if apart else held_out


def _read_corpus(config, tokenizer, fraction):
    """(MemorySource of config.corpus, ids of the held-out fraction of its documents)."""
    training, held_out = documents.split(_read_into_memory(config, config.corpus), fraction)
    rows = MemorySource(tokenize_documents(tokenizer, training), tokenizer, seed=config.seed,
                        names=[document.name for document in training])
    return rows, tokenize_documents(tokenizer, held_out)


def _read_into_memory(config, spec):
    from lct.train.metrics import log  # imports jax, which scripts set up first

    exclude, max_bytes = config.get('exclude', ()), config.get('corpus_bytes')
    check_size(spec, exclude, max_bytes)
    return read_documents(spec, exclude=exclude, max_bytes=max_bytes,
                          text_field=config.get('text_field', 'text'), log=log)


def corpus_identity(rows: MemorySource | StoreSource, held_out: Sequence[np.ndarray]) -> dict[str, str | int]:
    """What must stay the same in a corpus, to be recorded with a config. How much of a store's held-out part
    is read depends on the evaluations; which documents it has follows from the store."""
    identity = {'tokens': rows.num_tokens, 'training': rows.fingerprint}
    if isinstance(rows, MemorySource):
        identity['held_out'] = zlib.crc32(np.concatenate(held_out).tobytes())
    return identity


def check_documents(rows: MemorySource | StoreSource, workdir: pathlib.Path) -> None:
    """Compare every training document in memory with the one that the run in workdir began with. A store has
    a fingerprint, which is in every checkpoint.

    Raises:
      ValueError: naming the first document that differs.
    """
    path = workdir / DOCUMENTS
    if not isinstance(rows, MemorySource) or not path.is_file():
        return
    hashes = rows.document_hashes()
    try:
        before = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f'{path} is damaged ({error}); delete it to continue without naming documents that '
                         'changed') from error
    if len(before) != len(hashes):
        raise ValueError(f'{workdir} holds a run over {len(before):,} training documents, but the corpus has '
                         f'{len(hashes):,}; restore the corpus, or choose another --workdir')
    differ = np.flatnonzero(before != hashes)
    if len(differ):
        more = f' and {len(differ) - 1:,} more' if len(differ) > 1 else ''
        raise ValueError(f'training document {differ[0] + 1:,} of {len(hashes):,} '
                         f'({rows.beginning(differ[0])!r} ...){more} had another text when the run in '
                         f'{workdir} began; restore the corpus, or choose another --workdir')


def record_documents(rows: MemorySource | StoreSource, workdir: pathlib.Path) -> None:
    """Write what check_documents compares with, once."""
    path = workdir / DOCUMENTS
    if isinstance(rows, MemorySource) and not path.is_file():
        with files.atomic_file(path, 'wb') as file:
            np.save(file, rows.document_hashes())


def _open_store(config, tokenizer, fraction):
    """(StoreSource of config.corpus, ids of held-out documents of it)."""
    from lct.train.metrics import log

    mode = config.get('sequences', 'packed')
    if mode not in packing_plan.MODES:
        raise ValueError(f'config.sequences {mode!r} is not one of {", ".join(packing_plan.MODES)}')
    upsample = Upsample(**config.upsample) if config.get('upsample') else None
    template = chat_template.load(find_model(config.model_folder)) if config.get('chat_template') else None
    store = Store(config.corpus)
    if store.version == 1:
        log(f'the store {config.corpus} has checksums of complete shards only, each of which is read in full '
            'at its first use; tokenize the corpus again to verify just what is read')
    rows = StoreSource(store, tokenizer, seed=config.seed, mode=getattr(packing_plan, mode),
                       upsample=upsample, held_out=fraction, template=template)
    log(', '.join(f'{count:,} {name}' for name, count in rows.stats().items())
        + f' in the store {config.corpus}')
    # Enough for the loss windows and the haystack; a hundredth of a large store would not fit into memory.
    num_tokens = 2 * max([config.loss.seq_len * config.loss.windows, *config.needle.lengths])
    return rows, rows.held_out(num_tokens) if fraction else []
