"""The corpus of a config as training rows and held-out documents."""

import pathlib

from lct.cli.model import find_model


def tokenize_documents(words, documents):
    """Token ids, one int32 array a document; in slices, so that a large corpus is never held as Python ints."""
    import numpy as np

    ids = []
    for i in range(0, len(documents), 64):
        texts = [document.text for document in documents[i:i + 64]]
        ids += [np.asarray(one, np.int32) for one in words.encode_batch(texts)]
    return ids


def open_corpus(config, words):
    """The rows of config.corpus to train on, and its held-out documents as [ids int32 [n]].

    The folder of a token store (experiments/tokenize_corpus.py) is read as it is trained on, each process its
    part; config.sequences names a mode of lct.data.sequences (default: packed), config.upsample gives at_least
    and keep of lct.data.upsample, config.chat_template = True puts chats into the model's own template. Anything
    else is tokenized here and kept in memory.
    """
    from lct.data import chat_template
    from lct.data.batches import packing_plan
    from lct.data.batches.memory_source import MemorySource
    from lct.data.batches.store_source import StoreSource
    from lct.data.batches.upsample import Upsample
    from lct.data.corpus import documents, store
    from lct.train.metrics import log

    if not config.corpus:
        raise ValueError('config.corpus is empty; add --set corpus=PATH of your documents: a folder, glob, JSONL or '
                         'text file, or a token store')
    if not (pathlib.Path(config.corpus) / 'index.json').is_file():
        training, held_out = documents.split(documents.read(config.corpus, config.corpus_bytes), config.held_out)
        return MemorySource(tokenize_documents(words, training), words, seed=config.seed), tokenize_documents(words, held_out)
    mode = config.get('sequences', 'packed')
    if mode not in packing_plan.MODES:
        raise ValueError(f'config.sequences {mode!r} is not one of {", ".join(packing_plan.MODES)}')
    upsample = Upsample(**config.upsample) if config.get('upsample') else None
    template = chat_template.load(find_model(config.model_folder)) if config.get('chat_template') else None
    rows = StoreSource(store.Store(config.corpus), words, seed=config.seed, mode=getattr(packing_plan, mode),
                  upsample=upsample, held_out=config.held_out, template=template)
    log(', '.join(f'{count:,} {what}' for what, count in rows.stats().items()) + f' in the store {config.corpus}')
    # enough for the loss windows and the haystack, not a hundredth of a terabyte
    wanted = 2 * max(config.loss.seq_len * config.loss.windows, *config.needle.lengths)
    return rows, rows.held_out(wanted) if config.held_out else []
