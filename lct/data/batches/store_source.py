"""Training sequences over a token store: an endless, deterministic stream.

Documents come in windows. A window takes from each source as many tokens as its weight says, in the order of
the epoch, enough in total for a hundred sequences or more. It is planned by itself, from lengths alone, so
the first batch over ten million documents costs as much as over ten thousand. The state is a small JSON dict;
sequence number n is a function of it alone, so any number of processes agree on it without communication.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lct.data.batches import packing_plan
from lct.data.batches.descriptions import Extent, describe_row
from lct.data.batches.epoch_order import Cursor, EpochOrder
from lct.data.batches.memory_source import check_weights
from lct.data.batches.sharded_loader import ShardedLoader
from lct.data.batches.store_documents import StoreDocuments
from lct.data.batches.upsample import Upsample, token_shares
from lct.data.chat_template import ChatTemplate
from lct.data.corpus.store import Store
from lct.data.sequence import KINDS, TEXT, Sequence
from lct.data.synthetic import chat, over_store
from lct.data.synthetic.forms.passages import PassageEncoder
from lct.data.synthetic.over_store import Span
from lct.data.synthetic.recall import RecallVocabulary
from lct.data.tokenizer import Tokenizer

MIN_SEQUENCES, MIN_TOKENS = 128, 2**22  # of a window
MIN_SPAN = 2  # tokens of a document, for the text of recall, copy and forms rows
KIND, WINDOW = 0, 1  # second component of a random key: what it decides

State = dict[str, Any]


class Drawn(NamedTuple):
    """Documents of a window: [begin, end) is the range of their tokens that the window still holds.

    documents, begin, end, lengths (of the whole documents): int64 [n]. source: object [n], the source's name.
    """
    documents: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    lengths: np.ndarray
    source: np.ndarray

    def tokens_of(self, source: str) -> int:
        return int((self.end - self.begin)[self.source == source].sum())


class Window(NamedTuple):
    """A window of the stream.

    plan: over the documents drawn; its token 0 is at their begin. cursors, deficits: after the window, by
    source; a deficit is the number of tokens by which a source is behind its weight.
    """

    plan: packing_plan.Plan
    drawn: Drawn
    cursors: dict[str, Cursor]
    deficits: dict[str, int]


class StoreSource:
    """Sequences over the documents of a store.

    weights: {'text', a source, or one of KINDS: share}, such as {'books': 0.5, 'code': 0.4, 'chat': 0.1}.
      Shares are of the tokens among sources, and of the sequences between sources and each kind.

    mode: one of the modes of packing_plan. held_out: the fraction of each source's documents that is never
    trained on. template: of the chats, or None. eos_id: the target of the last token of each document of
    text, at first the tokenizer's; None for no target.

    Raises:
      ValueError: if the store was made with another tokenizer, or an option is out of range.
    """

    def __init__(self, store: Store, tokenizer: Tokenizer, weights: dict[str, float] | None = None,
                 seed: int = 0, mode: packing_plan.Mode = packing_plan.packed,
                 upsample: Upsample | None = None, held_out: float = 0.0,
                 template: ChatTemplate | None = None):
        if store.tokenizer_hash != tokenizer.fingerprint:
            raise ValueError(f'the store was made with the tokenizer {store.tokenizer_hash[:12]} but the '
                             f'model has {tokenizer.fingerprint[:12]}; '
                             'tokenize the corpus again with the one of the checkpoint')
        if not 0 <= held_out < 1:
            raise ValueError(f'held_out {held_out} is not a fraction in [0, 1); use for example 0.01')
        if taken := {TEXT, *KINDS} & set(store.sources):
            raise ValueError(f'the store has a source named {min(taken)!r}, which is a kind of sequence; '
                             'give it another name')
        self.tokenizer, self.seed = tokenizer, seed
        self.documents = StoreDocuments(store, tokenizer.bos_id, tokenizer.eos_id)
        self._store, self._mode, self._held_out = store, mode, held_out
        self._upsample = None if upsample is None else upsample.check()
        self._template, self._delimiters = template, None
        self._recall_vocabulary = self._form_encoder = None
        self._orders, self._window = {}, None
        self._state = {'store': store.fingerprint, 'seed': seed, 'sequence': 0, 'cursors': {}, 'owed': {},
                       'windows': []}
        self.weights = weights or {TEXT: 1.0}

    @property
    def weights(self) -> dict[str, float]:
        return dict(self._weights)

    @weights.setter
    def weights(self, weights: dict[str, float]) -> None:
        unknown = sorted(set(weights) - {TEXT, *KINDS, *self._store.sources})
        if unknown:
            raise ValueError(f'mixture weight {unknown[0]!r} is neither {TEXT}, {", ".join(KINDS)} nor a '
                             f'source of the store, which has {", ".join(self._store.sources)}')
        check_weights(weights)
        self._weights = dict(weights)
        shares = {name: weight for name, weight in weights.items() if weight and name not in KINDS}
        if self._upsample is not None and TEXT in shares:
            # Sources differ in their share of long documents: up-sample each by itself, to keep the mix.
            text = shares.pop(TEXT)
            for name, share in token_shares(self._store).items():
                shares[name] = shares.get(name, 0) + text * share
        total = sum(shares.values())
        self._shares = {name: share / total for name, share in shares.items()}

    @property
    def eos_id(self) -> int | None:
        return self.documents.eos_id

    @eos_id.setter
    def eos_id(self, eos_id: int | None) -> None:
        self.documents.eos_id = eos_id

    @property
    def state(self) -> State:
        """A JSON dict, saved in every checkpoint:

        store, seed: fingerprint and seed, which must not change. eos: eos_id, which setting the state takes
          over; without it the state is of a version whose documents had no EOS. sequence: sequences taken.
        cursors: {source: [epoch, place]} before the current window.
        owed: {source: tokens by which it is behind its weight} before the current window.
        windows: the current window as {opened, seq_len, tokens by source, taken (sequences)}. After a change
          of length or weights there is another entry; it begins with what the window before it left over.
        """
        return {**copy.deepcopy(self._state), 'eos': self.eos_id}

    @state.setter
    def state(self, state: State) -> None:
        here = self.state
        if not isinstance(state, dict) or set(state) | {'eos'} != set(here):
            raise ValueError(f'data state {state} is not one of a token store, {{{", ".join(here)}}}; '
                             'give the state that this loader returned')
        for name, label in (('store', 'another corpus'), ('seed', 'another seed')):
            if state.get(name, here[name]) != here[name]:
                raise ValueError(f'data state is of {label}: {name} {state[name]!r}, here '
                                 f'{here[name]!r}; resume with the {label.split()[1]} of the run, '
                                 'or start a new run')
        state = copy.deepcopy(state)
        self.eos_id, self._state, self._window = state.pop('eos', None), state, None

    @property
    def fingerprint(self) -> str:
        """That of the store."""
        return self._store.fingerprint

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, the bos of each included."""
        return self._store.num_tokens + self.documents.num_bos * self._store.num_documents

    def stats(self) -> dict[str, int]:
        """{'documents', 'empty', 'without target'}, in one pass over the lengths.

        A document without target has one token, which is in a sequence but has no loss.
        """
        surrounding = self.documents.num_bos + int(self.eos_id is not None)
        lengths = self._store.lengths[:] + surrounding * (self._store.lengths[:] > 0)
        return {'documents': len(lengths), 'empty': int((lengths == 0).sum()),
                'without target': int((lengths == 1).sum())}

    def check_length(self, seq_len: int) -> None:
        """Refuse a corpus shorter than one sequence, or without the documents that the weights need.

        This plans one sequence of each kind, and reads nothing.
        """
        if self.num_tokens < seq_len:
            raise ValueError(f'the store has {self.num_tokens} tokens, fewer than one sequence of seq_len '
                             f'{seq_len}; add documents or use a shorter sequence')
        for name in self._shares:
            self._order_of(name).take((0, 0), 1, past_end=True)
        for kind, make in zip(KINDS, self._makers()):
            if self._weights.get(kind):
                make(np.random.default_rng(0), seq_len)

    def held_out(self, num_tokens: int) -> list[np.ndarray]:
        """ids int32 [n] of held-out documents, without bos, until they hold num_tokens or none is left."""
        documents = self._order_of(TEXT).held_out(num_tokens)
        return [self._store.tokens(int(d), 0, int(self._store.lengths[d])) for d in documents]

    def loader(self, batch_size: int, seq_len: int, layout: str, ring_size: int, vocab_size: int | None,
               held: list[tuple[np.ndarray, slice]] | None) -> ShardedLoader:
        """A ShardedLoader of the shards `held` by this process."""
        return ShardedLoader(self, batch_size, seq_len, layout, ring_size, vocab_size, held)

    def next_sequence(self, seq_len: int) -> Sequence:
        """The next Sequence of at most seq_len tokens."""
        rng, kind = self._draw_kind()
        result = (*self._makers(), self._text)[kind](rng, seq_len)
        self._state['sequence'] += 1
        return result

    def describe(self, state: State, count: int, seq_len: int) -> list[dict[str, Any]]:
        """The `count` sequences after a state, as dicts for JSON (descriptions)."""
        twin = copy.copy(self)  # the state of this one belongs to its loader's thread
        twin._state, twin._window, twin._orders = copy.deepcopy(state), None, dict(self._orders)
        return [twin._describe_next(seq_len) for _ in range(count)]

    def _describe_next(self, seq_len: int) -> dict[str, Any]:
        number, kind = self._state['sequence'], (*KINDS, TEXT)[self._draw_kind()[1]]
        result, names = self.next_sequence(seq_len), self._store.names
        extents = [Extent(names[int(document)], start, stop - start) for document, start, stop in zip(
            result.document, result.start, result.stop) if document >= 0]
        return describe_row(number, kind, self.seed, extents)

    def _makers(self) -> tuple[Callable, ...]:
        """The functions that make sequences, in the order of KINDS."""
        return self._long, self._chat, self._recall, self._copy, self._forms

    def _draw_kind(self) -> tuple[np.random.Generator, int]:
        """(random numbers of the next sequence, index of its kind in (*KINDS, TEXT))."""
        rng = np.random.default_rng((self.seed, KIND, self._state['sequence']))
        shares = [self._weights.get(kind, 0) for kind in KINDS]
        ends = np.cumsum(shares) / sum(self._weights.values())
        kind = int(np.searchsorted(ends, rng.random(), side='right'))
        if kind == len(KINDS) and not self._shares:  # the sum of the shares may round to less than 1
            kind = int(np.flatnonzero(shares)[-1])
        return rng, kind

    def _text(self, _rng: np.random.Generator, seq_len: int) -> Sequence:
        self._open_window(seq_len)
        window, current = self._window, self._state['windows'][-1]
        drawn = window.drawn
        result = packing_plan.sequence_of(window.plan, current['taken'], drawn.documents, drawn.begin,
                                          drawn.lengths + int(self.eos_id is not None))
        current['taken'] += 1
        if current['taken'] == window.plan.num_sequences:
            self._state['cursors'] = {name: list(cursor) for name, cursor in window.cursors.items()}
            self._state['owed'] = window.deficits
            self._state['windows'], self._window = [], None
        return result

    def _open_window(self, seq_len: int) -> None:
        """Make the window current from which the next sequence of seq_len tokens is taken."""
        windows = self._state['windows']
        tokens = self._tokens_by_source(max(MIN_SEQUENCES * seq_len, MIN_TOKENS))
        request = {'seq_len': seq_len, 'tokens': tokens}
        if not windows or any(windows[-1][key] != value for key, value in request.items()):
            if windows and not windows[-1]['taken']:
                windows.pop()
            windows.append({'opened': self._state['sequence'], **request, 'taken': 0})
            self._window = None
        if self._window is None:
            self._window = self._plan_window()

    def _tokens_by_source(self, num_tokens: int) -> dict[str, int]:
        """{source: tokens} of a window.

        Documents are not cut, so a source gets too many or too few tokens; its deficit is made up for in the
        next window. A single source has no deficit.
        """
        even = {name: share * num_tokens for name, share in sorted(self._shares.items())}
        fair = {name: max(round(n + self._state['owed'].get(name, 0)), 0) for name, n in even.items()}
        return fair if any(fair.values()) else {name: round(n) for name, n in even.items()}

    def _plan_window(self) -> Window:
        """The current Window, planned again from the state."""
        windows = self._state['windows']
        cursors = {name: tuple(cursor) for name, cursor in self._state['cursors'].items()}
        none = np.zeros(0, np.int64)
        drawn = Drawn(none, none, none, none, np.zeros(0, object))
        for window in windows:
            drawn = self._fill(drawn, cursors, window['tokens'])
            rng = np.random.default_rng((self.seed, WINDOW, window['opened']))
            plan = self._mode(drawn.end - drawn.begin, window['seq_len'], rng)
            if window is not windows[-1]:
                first, last = packing_plan.remaining(plan, window['taken'], len(drawn.documents))
                drawn = drawn._replace(begin=drawn.begin + first, end=drawn.begin + last)
                kept = drawn.begin < drawn.end
                drawn = Drawn(*(array[kept] for array in drawn))
        deficits, tokens = {}, windows[-1]['tokens']
        if len(tokens) > 1:
            deficits = {name: wanted - drawn.tokens_of(name) for name, wanted in tokens.items()}
        return Window(plan, drawn, cursors, deficits)

    def _fill(self, drawn: Drawn, cursors: dict[str, Cursor], tokens: dict[str, int]) -> Drawn:
        """drawn with more documents, up to `tokens` {source: tokens}; moves cursors past them."""
        for name, wanted in tokens.items():
            left = drawn.tokens_of(name)
            cursor, alone = cursors.get(name, (0, 0)), len(tokens) == 1
            # An epoch of a single source ends with a window, so no document is twice in one window.
            if left >= wanted or (alone and left and cursor[1] == 0):
                continue
            new, sizes, cursors[name] = self._order_of(name).take(cursor, wanted - left, past_end=not alone)
            added = Drawn(new, np.zeros_like(sizes), sizes, sizes, np.full(len(new), name, object))
            drawn = Drawn(*(np.append(old, more) for old, more in zip(drawn, added)))
        return drawn

    def _order_of(self, name: str) -> EpochOrder:
        if name not in self._orders:
            subset = None
            if name != TEXT:
                subset = np.flatnonzero(np.asarray(self._store.source_of) == self._store.sources.index(name))
            self._orders[name] = EpochOrder(name, self.documents, self._store.num_documents, subset,
                                            seed=self.seed, held_out=self._held_out, upsample=self._upsample)
        return self._orders[name]

    def _long(self, rng: np.random.Generator, seq_len: int) -> Sequence:
        return over_store.long(rng, self._order_of(TEXT), self.documents, seq_len)

    def _chat(self, rng: np.random.Generator, seq_len: int) -> Sequence:
        if self._delimiters is None:
            self._delimiters = chat.delimiters(self.tokenizer, self._template)
        return chat.sequence(rng, self._delimiters, self._vocabulary(), self._order_of(TEXT), self.documents,
                             seq_len)

    def _recall(self, rng: np.random.Generator, seq_len: int) -> Sequence:
        return over_store.recall(rng, self._vocabulary(), self._spans(rng, seq_len), seq_len)

    def _copy(self, rng: np.random.Generator, seq_len: int) -> Sequence:
        special = [*self.tokenizer.special_tokens.values(), *self.documents.bos]
        vocab_ids = np.setdiff1d(np.arange(self._store.vocab_size), special)
        return over_store.copy(rng, self._spans(rng, seq_len), seq_len, vocab_ids, self.documents.bos)

    def _forms(self, rng: np.random.Generator, seq_len: int) -> Sequence:
        self._form_encoder = self._form_encoder or PassageEncoder(self.tokenizer)
        return over_store.forms(rng, self._form_encoder, self._spans(rng, seq_len), seq_len)

    def _spans(self, rng: np.random.Generator, seq_len: int) -> list[Span]:
        return over_store.random_spans(rng, self._order_of(TEXT), self.documents, seq_len, MIN_SPAN)

    def _vocabulary(self) -> RecallVocabulary:
        if self._recall_vocabulary is None:
            self._recall_vocabulary = RecallVocabulary(self.tokenizer)
        return self._recall_vocabulary
