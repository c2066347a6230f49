"""Tokens become text at once, but never half a character and never a part of a stop string."""

import pathlib

import pytest

from lct.data import tokenizer
from lct.data.detokenizer import Detokenizer

BASE = pathlib.Path(__file__).parents[1] / 'experiments' / 'base' / 'tokenizer.json'
TOKENIZERS = [tokenizer.load('bytes'), tokenizer.load(BASE)]
TEXT = 'Naïve café, 東京 and 🙂🙂 in one line;\n  def f(x): return "€"\n'


@pytest.mark.parametrize('words', TOKENIZERS)
def test_pieces_make_the_text(words):
    stream = Detokenizer(words.decode)
    pieces = [stream.push(token) for token in words.encode(TEXT)] + [stream.finish()]
    assert ''.join(pieces) == TEXT == stream.text and '\ufffd' not in ''.join(pieces)
    assert sum(map(bool, pieces)) > 30  # as they come, not at the end


@pytest.mark.parametrize('words', TOKENIZERS)
@pytest.mark.parametrize(('stops', 'kept'), [
    (('in one line',), 'Naïve café, 東京 and 🙂🙂 '), (('line;\n  def',), 'Naïve café, 東京 and 🙂🙂 in one '),
    (('\n', '東'), 'Naïve café, '), (('京 and',), 'Naïve café, 東'), (('ééé', 'nowhere'), TEXT), (('€"\n!',), TEXT),
])
def test_a_stop_string_ends_the_text_wherever_tokens_end(words, stops, kept):
    stream, out = Detokenizer(words.decode, stops), ''
    for token in words.encode(TEXT):
        out += stream.push(token)
        assert kept.startswith(out)
    assert stream.stopped == (kept != TEXT)
    assert out + stream.finish() == stream.text == kept


def test_bytes_that_are_no_text_are_shown_at_the_end():
    words = tokenizer.load('bytes')
    stream = Detokenizer(words.decode)
    assert stream.push(0xE2) == stream.push(0x82) == '' and stream.finish() == words.decode([0xE2, 0x82])
    with pytest.raises(ValueError, match='a stop string is empty'):
        Detokenizer(words.decode, ['a', ''])
