"""The endless, deterministic stream of training sequences over a token store.

Documents come in windows: of each source as many tokens as its weight says, in its order of the epoch, together
enough for a hundred sequences or more. A window is planned by itself, from lengths alone, so the first batch
of ten million documents costs what that of ten thousand does. The state is a small JSON dict; what sequence
number n consists of depends on nothing but it, so any number of processes agree on it without a word.
"""

import copy
from typing import NamedTuple

import numpy as np

from lct.data.batches import packing_plan
from lct.data.batches.epoch_order import EpochOrder
from lct.data.batches.sharded_loader import Documents, ShardedLoader
from lct.data.batches.upsample import token_shares
from lct.data.synthetic import chat, over_store
from lct.data.synthetic.recall import RecallVocabulary

TEXT = 'text'  # all sources in their own proportion
KINDS = ('long', 'chat', 'recall', 'copy')  # sequences that are made over random documents of the store
MIN_SEQUENCES, MIN_TOKENS = 128, 2**22  # of a window
KIND, WINDOW = 0, 1  # what a random key is for


class Window(NamedTuple):
    """documents, begin, lengths int64 [n]: the store's number, where the plan's token 0 lies, the whole length.
    after: {source: (epoch, place)} and owed: {source: tokens}, behind the window."""

    plan: packing_plan.Plan
    documents: np.ndarray
    begin: np.ndarray
    lengths: np.ndarray
    after: dict
    owed: dict


class StoreSource:
    """store: see store.Store. weights: {'text', a source, or one of KINDS: share}, of the tokens among sources
    and of the sequences between them and each kind, for example {'books': 0.5, 'code': 0.4, 'chat': 0.1}.

    mode: one of the functions of sequences. upsample: upsample.Upsample or None. held_out: the fraction of each
    source's documents that is never trained on. template: chat.ChatTemplate of the chats, or None.
    """

    def __init__(self, store, tokenizer, weights=None, seed=0, mode=packing_plan.packed, upsample=None, held_out=0.0,
                 template=None):
        if store.tokenizer_hash != tokenizer.fingerprint:
            raise ValueError(f'the store was made with the tokenizer {store.tokenizer_hash[:12]}, the model has '
                             f'{tokenizer.fingerprint[:12]}; tokenize the corpus again with the one of the checkpoint')
        if not 0 <= held_out < 1:
            raise ValueError(f'held_out {held_out} is not a fraction in [0, 1); use for example 0.01')
        if taken := {TEXT, *KINDS} & set(store.sources):
            raise ValueError(f'the store has a source named {min(taken)!r}, which is a kind of sequence; give it another '
                             'name')
        self.tokenizer, self.seed = tokenizer, seed
        self.documents = Documents(store, tokenizer.bos_id)
        self._store, self._mode, self._held_out = store, mode, held_out
        self._upsample = None if upsample is None else upsample.check()
        self._template, self._frame, self._words = template, None, None
        self._epochs, self._window = {}, None
        self._makes = (self._long, self._chat, self._recall, self._copy)  # of KINDS
        self._state = {'store': store.fingerprint, 'seed': seed, 'sequence': 0, 'cursors': {}, 'owed': {},
                       'windows': []}
        self.weights = weights or {TEXT: 1.0}

    @property
    def weights(self):
        return dict(self._weights)

    @weights.setter
    def weights(self, weights):
        unknown = sorted(set(weights) - {TEXT, *KINDS, *self._store.sources})
        if unknown:
            raise ValueError(f'mixture weight {unknown[0]!r} is neither {TEXT}, {", ".join(KINDS)} nor a source of the '
                             f'store, which has {", ".join(self._store.sources)}')
        if min(weights.values(), default=0) < 0 or not 0 < sum(weights.values()) < float('inf'):
            raise ValueError(f'mixture weights {weights} must be non-negative with a positive sum; '
                             "use for example {'text': 1.0}")
        self._weights = dict(weights)
        shares = {name: weight for name, weight in weights.items() if weight and name not in KINDS}
        if self._upsample is not None and TEXT in shares:
            # Long documents are not equally frequent everywhere: source by source, or the mix would move.
            text = shares.pop(TEXT)
            for name, share in token_shares(self._store).items():
                shares[name] = shares.get(name, 0) + text * share
        total = sum(shares.values())
        self._shares = {name: share / total for name, share in shares.items()}

    @property
    def state(self):
        """{store, seed, sequence, cursors, owed, windows}: how many sequences were taken; {source: [epoch, place]} and
        {source: tokens by which it is behind its weight} before the window; the window's {opened, seq_len, tokens
        by source, sequences taken}, after a change of length or weights one for each, which begins with what is
        left of the one before."""
        return copy.deepcopy(self._state)

    @state.setter
    def state(self, state):
        if not isinstance(state, dict) or set(state) != set(self._state):
            raise ValueError(f'data state {state} is not one of a token store, {{{", ".join(self._state)}}}; give the '
                             'state that this loader returned')
        for name, what in (('store', 'another corpus'), ('seed', 'another seed')):
            if state[name] != self._state[name]:
                raise ValueError(f'data state is of {what}: {name} {state[name]!r}, here {self._state[name]!r}; resume with '
                                 'the one of the run, or start a new run')
        self._state, self._window = copy.deepcopy(state), None

    @property
    def num_tokens(self):
        """Tokens of all documents, the bos of each included."""
        return self._store.num_tokens + self.documents.num_bos * self._store.num_documents

    def stats(self):
        """{'documents', 'empty', 'without target'}: of those without, a sequence holds the one token, and no loss. One
        pass over the lengths."""
        lengths = self._store.lengths[:] + self.documents.num_bos * (self._store.lengths[:] > 0)
        return {'documents': len(lengths), 'empty': int((lengths == 0).sum()), 'without target': int((lengths == 1).sum())}

    def check_length(self, seq_len):
        """Refuses a corpus shorter than one sequence, or without what the weights ask for: plans one sequence of each
        kind, and reads nothing."""
        if self.num_tokens < seq_len:
            raise ValueError(f'the store has {self.num_tokens} tokens, fewer than one sequence of seq_len {seq_len}; '
                             'add documents or use a shorter sequence')
        for name in self._shares:
            self._epochs_of(name).take((0, 0), 1, past_end=True)
        for kind, make in zip(KINDS, self._makes):
            if self._weights.get(kind):
                make(np.random.default_rng(0), seq_len)

    def held_out(self, num_tokens):
        """[ids int32 [n]] of held-out documents, without bos, until they have num_tokens or there are no more."""
        source = self._epochs_of(TEXT)
        return [self._store.tokens(int(d), 0, int(self._store.lengths[d])) for d in source.held_out(num_tokens)]

    def loader(self, batch_size, seq_len, layout, ring_size, vocab_size, held):
        return ShardedLoader(self, batch_size, seq_len, layout, ring_size, vocab_size, held)

    def next_sequence(self, seq_len):
        """-> the next sequences.Sequence, and moves the state on."""
        rng = np.random.default_rng((self.seed, KIND, self._state['sequence']))
        shares = [self._weights.get(kind, 0) for kind in KINDS]
        kind = int(np.searchsorted(np.cumsum(shares) / sum(self._weights.values()), rng.random(), side='right'))
        if kind == len(KINDS) and not self._shares:  # the sum of the shares may round to less than 1
            kind = int(np.flatnonzero(shares)[-1])
        result = (*self._makes, self._text)[kind](rng, seq_len)
        self._state['sequence'] += 1
        return result

    def _text(self, _rng, seq_len):
        windows = self._state['windows']
        wanted = {'seq_len': seq_len, 'tokens': self._budget(max(MIN_SEQUENCES * seq_len, MIN_TOKENS))}
        if not windows or any(windows[-1][key] != value for key, value in wanted.items()):
            if windows and not windows[-1]['taken']:
                windows.pop()
            windows.append({'opened': self._state['sequence'], **wanted, 'taken': 0})
            self._window = None
        if self._window is None:
            self._window = self._planned()
        window, current = self._window, windows[-1]
        result = packing_plan.sequence_of(window.plan, current['taken'], window.documents, window.begin, window.lengths)
        current['taken'] += 1
        if current['taken'] == window.plan.num_sequences:
            self._state['cursors'] = {name: list(cursor) for name, cursor in window.after.items()}
            self._state['owed'] = window.owed
            self._state['windows'], self._window = [], None
        return result

    def _budget(self, num_tokens):
        """{source: tokens} of a window. What a source got too much or too little, since documents are not cut, is made
        up for; a lone one owes itself nothing."""
        even = {name: share * num_tokens for name, share in sorted(self._shares.items())}
        fair = {name: max(round(n + self._state['owed'].get(name, 0)), 0) for name, n in even.items()}
        return fair if any(fair.values()) else {name: round(n) for name, n in even.items()}

    def _planned(self):
        """The Window of the state."""
        cursors = {name: tuple(cursor) for name, cursor in self._state['cursors'].items()}
        documents = begin = end = lengths = np.zeros(0, np.int64)
        owner = np.zeros(0, object)  # the name of each document's source
        for window in self._state['windows']:
            for name, wanted in window['tokens'].items():
                left = int((end - begin)[owner == name].sum())
                cursor, alone = cursors.get(name, (0, 0)), len(window['tokens']) == 1
                # An epoch of a lone source ends with a window: no document is twice in one.
                if left >= wanted or (alone and left and cursor[1] == 0):
                    continue
                more, sizes, cursors[name] = self._epochs_of(name).take(cursor, wanted - left, past_end=not alone)
                documents, lengths = np.append(documents, more), np.append(lengths, sizes)
                begin, end = np.append(begin, np.zeros_like(sizes)), np.append(end, sizes)
                owner = np.append(owner, np.full(len(more), name, object))
            rng = np.random.default_rng((self.seed, WINDOW, window['opened']))
            plan = self._mode(end - begin, window['seq_len'], rng)
            if window is not self._state['windows'][-1]:
                first, last = packing_plan.remaining(plan, window['taken'], len(documents))
                begin, end = begin + first, begin + last
                kept = begin < end
                documents, begin, end, lengths, owner = (x[kept] for x in (documents, begin, end, lengths, owner))
        owed = {}
        if len(window['tokens']) > 1:
            owed = {name: wanted - int((end - begin)[owner == name].sum()) for name, wanted in window['tokens'].items()}
        return Window(plan, documents, begin, lengths, cursors, owed)

    def _epochs_of(self, name):
        if name not in self._epochs:
            chosen = None
            if name != TEXT:
                chosen = np.flatnonzero(np.asarray(self._store.source_of) == self._store.sources.index(name))
            self._epochs[name] = EpochOrder(name, self.documents, self._store.num_documents, chosen, seed=self.seed,
                                         held_out=self._held_out, upsample=self._upsample)
        return self._epochs[name]

    def _long(self, rng, seq_len):
        return over_store.long(rng, self._epochs_of(TEXT), self.documents, seq_len)

    def _chat(self, rng, seq_len):
        if self._frame is None:
            self._frame = chat.delimiters(self.tokenizer, self._template)
        return chat.sequence(rng, self._frame, self._facts(), self._epochs_of(TEXT), self.documents, seq_len)

    def _recall(self, rng, seq_len):
        return over_store.recall(rng, self._facts(), self._spans(rng, seq_len), seq_len)

    def _copy(self, rng, seq_len):
        special = [*self.tokenizer.special_tokens.values(), *self.documents.bos]
        vocabulary = np.setdiff1d(np.arange(self._store.vocab_size), special)
        return over_store.copy(rng, self._spans(rng, seq_len), seq_len, vocabulary, self.documents.bos)

    def _spans(self, rng, seq_len):
        return chat.random_spans(rng, self._epochs_of(TEXT), self.documents, seq_len, least=2)

    def _facts(self):
        if self._words is None:
            self._words = RecallVocabulary(self.tokenizer)
        return self._words
