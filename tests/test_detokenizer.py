"""Tokens become text at once, but never half a character and never any of a stop string."""

import pathlib

import pytest

from lct.data import tokenizer as tokenizers
from lct.data.detokenizer import Detokenizer

BASE = pathlib.Path(__file__).parents[1] / 'experiments' / 'base' / 'tokenizer.json'
TOKENIZERS = [tokenizers.load('bytes'), tokenizers.load(BASE)]
TEXT = 'Naïve café, 東京 and 🙂🙂 in one line;\n  def f(x): return "€"\n'


@pytest.mark.parametrize('tokenizer', TOKENIZERS)
def test_pieces_make_the_text(tokenizer):
    stream = Detokenizer(tokenizer.decode)
    texts = [stream.push(token) for token in tokenizer.encode(TEXT)] + [stream.finish()]
    assert ''.join(texts) == TEXT == stream.text and '\ufffd' not in ''.join(texts)
    assert sum(map(bool, texts)) > 30  # as tokens arrive, not at the end


@pytest.mark.parametrize('tokenizer', TOKENIZERS)
@pytest.mark.parametrize(('stops', 'kept'), [
    (('in one line',), 'Naïve café, 東京 and 🙂🙂 '),
    (('line;\n  def',), 'Naïve café, 東京 and 🙂🙂 in one '),
    (('\n', '東'), 'Naïve café, '), (('京 and',), 'Naïve café, 東'), (('ééé', 'nowhere'), TEXT),
    (('€"\n!',), TEXT),
])
def test_a_stop_string_ends_the_text_wherever_tokens_end(tokenizer, stops, kept):
    stream, out = Detokenizer(tokenizer.decode, stops), ''
    for token in tokenizer.encode(TEXT):
        out += stream.push(token)
        assert kept.startswith(out)
    assert stream.stopped == (kept != TEXT)
    assert out + stream.finish() == stream.text == kept


def test_bytes_that_are_not_text_are_shown_at_the_end():
    tokenizer = tokenizers.load('bytes')
    stream = Detokenizer(tokenizer.decode)
    assert stream.push(0xE2) == stream.push(0x82) == '' and stream.finish() == tokenizer.decode([0xE2, 0x82])
    with pytest.raises(ValueError, match='a stop string is empty'):
        Detokenizer(tokenizer.decode, ['a', ''])
