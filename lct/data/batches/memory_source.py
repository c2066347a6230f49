"""Training rows over documents in memory: an endless, deterministic stream.

A row holds shuffled documents packed together, a long stretch of one document, recall text, copies, entries
of random tokens, or generated forms of reading back.

The kind of row r, and every random number in it, is a function of (seed, r) and the weights; the next token
of text is a cursor. The two together are the state: four integers, from which the stream continues anywhere,
beside the fingerprint of the documents and the seed, without which it would be another stream.
"""

import copy
import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lct.data.batches.descriptions import Extent, describe_row
from lct.data.batches.loader import Loader
from lct.data.batches.packing import Segment, pack, segment, take_segments
from lct.data.synthetic.entries import entries_row
from lct.data.synthetic.forms.documents import form_documents
from lct.data.synthetic.forms.passages import PassageEncoder
from lct.data.synthetic.recall import RecallVocabulary, copy_row, recall_documents
from lct.data.tokenizer import Tokenizer

KINDS = ('text', 'recall', 'copy', 'long', 'forms', 'entries')


def check_weights(weights: dict[str, float]) -> None:
    """Refuse mixture weights that are negative or do not have a positive sum."""
    if min(weights.values(), default=0) < 0 or not 0 < sum(weights.values()) < float('inf'):
        raise ValueError(f'mixture weights {weights} must be non-negative with a positive sum; '
                         "use for example {'text': 1.0}")


class MemorySource:
    """Rows of documents, int arrays [n] without special tokens.

    weights: {kind: share of the rows}, for example {'text': 0.4, 'recall': 0.3, 'copy': 0.3}.
    names: of the documents, for describe(); their numbers if there are none.
    eos_id: the target of the last token of each document in 'text' rows, at first the tokenizer's; None for
      no target. In the other kinds, nothing says that the text ends where the row does.
    """

    def __init__(self, documents: Sequence[np.ndarray], tokenizer: Tokenizer,
                 weights: dict[str, float] | None = None, seed: int = 0,
                 names: Sequence[str] | None = None):
        self.tokenizer = tokenizer
        self.seed, self.eos_id = seed, tokenizer.eos_id
        self.weights = weights or {'text': 1.0}
        names = range(len(documents)) if names is None else names
        self._names = [name for name, ids in zip(names, documents, strict=True) if len(ids)]
        documents = [_as_ids(ids, number, tokenizer.vocab_size) for number, ids in enumerate(documents)
                     if len(ids)]
        if not documents:
            raise ValueError('the corpus has no tokens; give documents with text')
        # One array, to draw random stretches of text from; the documents are views of it.
        self._text = np.concatenate(documents)
        self._documents = np.split(self._text, np.cumsum([len(ids) for ids in documents])[:-1])
        self._vocab_ids = np.unique(self._text)
        self._bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._recall_vocabulary = self._form_encoder = None
        self._permutation = (None, None)
        self._identity = {'corpus': self.fingerprint, 'seed': seed}
        self._state = {'row': 0, 'epoch': 0, 'document': 0, 'offset': 0, **self._identity}

    @property
    def weights(self) -> dict[str, float]:
        return dict(self._weights)

    @weights.setter
    def weights(self, weights: dict[str, float]) -> None:
        unknown = sorted(set(weights) - set(KINDS))
        if unknown:
            raise ValueError(f'mixture weight {unknown[0]!r} is not one of {", ".join(KINDS)}')
        check_weights(weights)
        self._weights = dict(weights)

    @property
    def state(self) -> dict[str, int]:
        """{row, epoch, document, offset, corpus, seed, eos}: the next row, the next token of text in the
        epoch's order, the fingerprint, the seed and eos_id.

        Setting it takes over its eos_id; one without is of a version whose documents had no EOS.
        """
        return {**self._state, 'eos': self.eos_id}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        numbers = {name: n for name, n in state.items() if name not in {*self._identity, 'eos'}}
        if set(numbers) != set(self._state) - set(self._identity) or not all(
                isinstance(n, int) and n >= 0 for n in numbers.values()):
            raise ValueError(f'data state {state} is not {{row, epoch, document, offset}} of integers >= 0; '
                             'give the state that this loader returned')
        for name, value in self._identity.items():
            if state.get(name, value) != value:  # earlier versions recorded neither
                raise ValueError(f'data state is of another {name}: {state[name]!r}, here {value!r}; resume '
                                 f'with the {name} of the run, or start a new run')
        count = len(self._documents)
        if state['document'] >= count:
            raise ValueError(f'data state is at document {state["document"]} of an epoch of {count}: it '
                             'belongs to another corpus; resume with the one of the run, or start a new run')
        length = len(self._document(state['epoch'], state['document'])) + len(self._bos)
        if state['offset'] >= length:
            raise ValueError(f'data state is at token {state["offset"]} of a document of {length}: it '
                             'belongs to another corpus; resume with the one of the run, or start a new run')
        self._state, self.eos_id = {**numbers, **self._identity}, state.get('eos')

    @property
    def fingerprint(self) -> str:
        """sha256 of the ids of all documents in their order."""
        sizes = np.array([len(ids) for ids in self._documents], np.int64)
        digest = hashlib.sha256(sizes)
        digest.update(self._text)
        return digest.hexdigest()

    def document_hashes(self) -> np.ndarray:
        """uint32 [documents]: the CRC-32 of the ids of each."""
        return np.array([zlib.crc32(ids) for ids in self._documents], np.uint32)

    def beginning(self, document: int) -> str:
        """The first words of a document, to name it by."""
        return self.tokenizer.decode(self._documents[document][:16].tolist())

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch of text, the bos of each document included."""
        return len(self._text) + len(self._bos) * len(self._documents)

    def kind(self, row: int) -> str:
        """The kind of row number `row` under the current weights, one of KINDS."""
        return self._kind(self._rng(row))

    def next_row(self, seq_len: int) -> dict[str, np.ndarray]:
        """The next row of seq_len tokens: a dict of [T] arrays, see packing."""
        self.check_length(seq_len)
        rng = self._rng(self._state['row'])
        kind = self._kind(rng)
        make = {'text': self._text_row, 'recall': self._recall_row, 'copy': self._copy_row,
                'long': self._long_row, 'forms': self._forms_row, 'entries': self._entries_row}[kind]
        segments = make(rng, seq_len)
        self._state['row'] += 1
        return pack(segments, seq_len)

    def describe(self, state: dict[str, int], count: int, seq_len: int) -> list[dict[str, Any]]:
        """The `count` rows of seq_len tokens after a state, as dicts for JSON (descriptions)."""
        twin = copy.copy(self)  # the state of this one belongs to its loader's thread
        twin._state = dict(state)
        return [twin._describe_next(seq_len) for _ in range(count)]

    def _describe_next(self, seq_len: int) -> dict[str, Any]:
        state, rng, extents = self._state, self._rng(self._state['row']), []
        epoch, first, offset = state['epoch'], state['document'], state['offset']
        kind, row = self._kind(rng), state['row']
        sizes = np.bincount(self.next_row(seq_len)['segment_ids'])[1:]
        if kind == 'text':
            extents = [Extent(self._names[self._number(epoch, first + i)], 0 if i else offset, n)
                       for i, n in enumerate(sizes)]
        elif kind == 'long':
            document, start = self._stretch(rng, seq_len)
            extents = [Extent(self._names[document], start + len(self._bos), seq_len - len(self._bos))]
        return describe_row(row, kind, self.seed, extents)

    def loader(self, batch_size: int, seq_len: int, layout: str, ring_size: int, vocab_size: int | None,
               held: object) -> Loader:
        """A Loader of complete batches; `held` is not used, since every process has the whole corpus."""
        return Loader(self, batch_size, seq_len, layout, ring_size, vocab_size)

    def check_length(self, seq_len: int) -> None:
        """Refuse a corpus shorter than one sequence, or without a document that is long enough for 'long'."""
        if self.num_tokens < seq_len:
            raise ValueError(f'the corpus has {self.num_tokens} tokens, fewer than one sequence of seq_len '
                             f'{seq_len}; add documents or use a shorter sequence')
        if self._weights.get('long', 0) > 0 and not self._starts(seq_len).any():
            longest = max(map(len, self._documents))
            raise ValueError(f"mixture kind 'long' needs a document of seq_len {seq_len} tokens, but the "
                             f'longest has {longest}; add longer documents, '
                             "or use kind 'text', which packs short ones")

    def _rng(self, row: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, 0, row))

    def _kind(self, rng: np.random.Generator) -> str:
        shares = np.array([self._weights.get(kind, 0) for kind in KINDS], np.float64)
        drawn = np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(), side='right')
        return KINDS[min(drawn, np.flatnonzero(shares)[-1])]  # the sum of the shares may round to less than 1

    def _document(self, epoch: int, index: int) -> np.ndarray:
        """Document `index` in the order of an epoch, or of the epochs after it."""
        return self._documents[self._number(epoch, index)]

    def _number(self, epoch: int, index: int) -> int:
        count = len(self._documents)
        epoch, index = epoch + index // count, index % count
        if self._permutation[0] != epoch:
            self._permutation = (epoch, np.random.default_rng((self.seed, 1, epoch)).permutation(count))
        return int(self._permutation[1][index])

    def _text_row(self, rng: np.random.Generator, seq_len: int) -> list[Segment]:
        state, count = self._state, len(self._documents)

        def document(index):
            return self._document(state['epoch'], index)

        cursor = (state['document'], state['offset'])
        segments, (index, offset) = take_segments(document, cursor, seq_len, self.tokenizer.bos_id,
                                                  self.eos_id)
        epoch = state['epoch'] + index // count
        self._state = {**state, 'epoch': epoch, 'document': index % count, 'offset': offset}
        return segments

    def _starts(self, seq_len: int) -> np.ndarray:
        """int [documents]: the number of stretches of a whole row in each document."""
        sizes = np.array([len(ids) for ids in self._documents])
        return np.maximum(sizes - (seq_len - len(self._bos)) + 1, 0)

    def _long_row(self, rng: np.random.Generator, seq_len: int) -> list[Segment]:
        """A stretch of one document that fills the row.

        Most documents are short, and rows packed with them teach nothing about the far end of the context.
        """
        document, start = self._stretch(rng, seq_len)
        ids = self._documents[document][start:start + seq_len - len(self._bos)]
        return [segment(ids, None, self.tokenizer.bos_id)]

    def _stretch(self, rng: np.random.Generator, seq_len: int) -> tuple[int, int]:
        """(document, start) of a random stretch of a whole row."""
        starts = self._starts(seq_len)
        document = rng.choice(len(starts), p=starts / starts.sum())
        return int(document), int(rng.integers(starts[document]))

    def _recall_row(self, rng: np.random.Generator, seq_len: int) -> list[Segment]:
        self._recall_vocabulary = self._recall_vocabulary or RecallVocabulary(self.tokenizer)
        return [segment(ids, weights, self.tokenizer.bos_id)
                for ids, weights in recall_documents(rng, self._recall_vocabulary, self._text, seq_len)]

    def _forms_row(self, rng: np.random.Generator, seq_len: int) -> list[Segment]:
        self._form_encoder = self._form_encoder or PassageEncoder(self.tokenizer)
        return [segment(ids, weights, self.tokenizer.bos_id)
                for ids, weights in form_documents(rng, self._form_encoder, self._text, seq_len)]

    def _copy_row(self, rng: np.random.Generator, seq_len: int) -> list[Segment]:
        ids, weights = copy_row(rng, self._text, seq_len - len(self._bos), vocab_ids=self._vocab_ids)
        return [segment(ids, weights, self.tokenizer.bos_id)]

    def _entries_row(self, rng: np.random.Generator, seq_len: int) -> list[Segment]:
        ids, weights = entries_row(rng, self._vocab_ids, seq_len - len(self._bos))
        return [segment(ids, weights, self.tokenizer.bos_id)]


def _as_ids(ids: Sequence[int] | np.ndarray, number: int, vocab_size: int) -> np.ndarray:
    """int32 [n]. An id outside the vocabulary is refused here, because a cast or a device would turn it into
    another one."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in 'iu':
        raise ValueError(f'document {number} is {ids.dtype} {list(ids.shape)}; '
                         'give a flat array of integer token ids')
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f'document {number} has token id {ids[at]} at {at}, which is not in '
                         f'0..{vocab_size - 1}; tokenize it again with the tokenizer of the model')
    return ids.astype(np.int32, copy=False)
