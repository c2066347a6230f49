"""Long prompts that begin alike get the ids of the whole text, and what they share is encoded once."""

import pathlib

import pytest

from lct.data import prefix_tokenizer
from lct.data import tokenizer as tokenizers
from lct.data.corpus.citations import check
from lct.data.prefix_tokenizer import PrefixTokenizer, common_length

BASE = pathlib.Path(__file__).parents[1] / 'experiments' / 'base'
TEXT = ''.join(f'def f{i}(x):\n    return  x + {i * 7919}  # höher als {i}\n\n' for i in range(120))


class Counting(tokenizers.BytesTokenizer):
    """Counts the characters that are encoded."""

    def __init__(self):
        super().__init__()
        self.encoded = 0

    def encode(self, text):
        self.encoded += len(text)
        return super().encode(text)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(prefix_tokenizer, 'SEGMENT', 256)


def test_ids_are_those_of_the_whole_text():
    tokenizer = tokenizers.load(BASE)
    fast = PrefixTokenizer(tokenizer)
    for text in (TEXT, TEXT + 'What?', TEXT[:3000] + 'x' + TEXT[3000:], TEXT[:-1] + '\n\n\nWhy?', 'x' * 2000):
        assert fast.encode(text) == tokenizer.encode(text)
        chat = f'<|begin_of_text|>{text}<|end_of_text|>'
        assert fast.encode_special(chat, '\ue000') == tokenizer.encode_special(chat, '\ue000')


def test_what_prompts_share_is_encoded_once():
    counting = Counting()
    fast = PrefixTokenizer(counting)
    fast.encode(TEXT)
    first, counting.encoded = counting.encoded, 0
    fast.encode(TEXT + 'What?')
    assert first > len(TEXT) and counting.encoded < 2500  # a segment, and the tries of where to cut


def test_the_length_that_two_texts_share():
    pairs = ('', 'a'), ('abc', 'abd'), ('ab', 'abc'), ('x', 'y')
    assert [common_length(*pair) for pair in pairs] == [0, 2, 2, 0]
    assert common_length('a' * 999 + 'b', 'a' * 1000) == 999


def test_file_names_of_an_answer_are_checked_against_those_that_were_read():
    names = ['lct/ops/rope.py', 'lct/ops/masks.py', 'README.md', 'mail/inbox.mbox:3']
    answer = ('It is in `lct/ops/rope.py` and masks.py, see README.md. Not in lct/ops/ropes.py or setup.py, '
              'version 3.5, e.g. jax.lax, nor mail/inbox.mbox:3.')
    assert check(answer, names) == (['lct/ops/rope.py', 'lct/ops/masks.py', 'README.md', 'mail/inbox.mbox:3'],
                                    ['lct/ops/ropes.py', 'setup.py'])
    assert check('I do not know.', names) == ([], [])
