import base64
import json
import re

import pytest
import tokenizers as library

from lct.data import tokenizer as tokenizers
from lct.data import tokenizer_files, tokenizer_json
from lct.data.added_tokens import add_tokens

TEXTS = ['', 'Hello world!', "it's 12345.\n\n  def f(x):\n\treturn x", 'naïve 北京 🙂 \x00',
         '<|end_of_text|> </s>']
WORDS = ('amber', 'falcon', 'zyzzyva')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('trained') / 'tokenizer.json'
    return tokenizers.train(['the cat sat on the mat, the end\n'] * 50, 600, path, WORDS), path


@pytest.fixture(scope='module')
def tiktoken_path(tmp_path_factory):
    tokens = [bytes([i]) for i in range(256)] + [b' w', b'or', b' wor', b'  ']
    path = tmp_path_factory.mktemp('meta') / 'tokenizer.model'
    path.write_bytes(b''.join(base64.b64encode(t) + f' {i}\n'.encode() for i, t in enumerate(tokens)))
    return path


def test_all_kinds_round_trip_without_specials(trained, tiktoken_path):
    for tok in (tokenizers.load('bytes'), trained[0], tokenizers.load(tiktoken_path)):
        for text in TEXTS:
            ids = tok.encode(text)
            assert tok.decode(ids) == text
            assert tok.bos_id not in ids and tok.eos_id not in ids  # even where the text spells one
            assert tok.decode([tok.bos_id, *ids, tok.eos_id]) == text
            assert all(0 <= i < tok.vocab_size for i in [*ids, tok.bos_id, tok.eos_id])
        assert tok.encode_batch(TEXTS) == [tok.encode(text) for text in TEXTS]


def test_training_makes_words_and_pairs_of_digits_single_tokens(trained):
    tok, _ = trained
    assert all(len(tok.encode(f' {word}')) == 1 for word in WORDS)
    assert [tok.decode([i]) for i in tok.encode('482913')] == ['48', '29', '13']
    assert tok.vocab_size <= 600


def test_training_without_room_is_refused(tmp_path):
    with pytest.raises(ValueError, match='vocab_size 300 has no room for .* use a larger one'):
        tokenizers.train(['text'], 300, tmp_path / 'tokenizer.json', WORDS)


def test_added_tokens_leave_the_others_as_they_are(trained, tmp_path):
    tok, path = trained
    (tmp_path / 'tokenizer.json').write_bytes(path.read_bytes())
    strings = ['falcon', '-falcon', 'zyzzyva', '-zyzzyva', ' that']
    vocabulary = add_tokens(tmp_path / 'tokenizer.json', strings)
    grown = tokenizers.load(tmp_path / 'tokenizer.json')
    assert all(len(grown.encode(string)) == 1 < len(tok.encode(string)) for string in strings)
    assert sorted(vocabulary.values()) == list(range(grown.vocab_size))
    for text in ('the cat sat', ' amber falcon 482913', 'an amber-coloured zyzzyva'):
        kept = [i for i in grown.encode(text) if i < tok.vocab_size]
        assert kept == [i for i in tok.encode(text) if i in kept] and grown.decode(grown.encode(text)) == text
    assert grown.encode('the cat, amber 48') == tok.encode('the cat, amber 48')
    with pytest.raises(ValueError, match="'two words' cannot become one token, since the pattern"):
        add_tokens(tmp_path / 'tokenizer.json', ['two words'])


def test_training_is_deterministic_and_the_fingerprint_follows_the_definition(trained, tmp_path):
    tok, path = trained
    same = tokenizers.train(['the cat sat on the mat, the end\n'] * 50, 600, tmp_path / 'a.json', WORDS)
    assert same.fingerprint == tok.fingerprint and len(tok.fingerprint) == 64
    (tmp_path / 'spaced.json').write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert tokenizers.load(tmp_path / 'spaced.json').fingerprint == tok.fingerprint
    other = tokenizers.train(['another text altogether\n'] * 50, 600, tmp_path / 'b.json', WORDS)
    assert len({tok.fingerprint, other.fingerprint, tokenizers.load('bytes').fingerprint}) == 3


def test_specials_come_from_the_files_beside_the_tokenizer(trained, tmp_path):
    (tmp_path / 'tokenizer.json').write_bytes(trained[1].read_bytes())
    assert (tokenizers.load(tmp_path).bos_id, tokenizers.load(tmp_path).eos_id) == (0, 1)
    config = {'bos_token': None, 'eos_token': {'content': '<|begin_of_text|>'}}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    assert (tokenizers.load(tmp_path).bos_id, tokenizers.load(tmp_path).eos_id) == (None, 0)
    (tmp_path / 'tokenizer_config.json').write_text('{}')
    (tmp_path / 'config.json').write_text('{"bos_token_id": 1, "eos_token_id": [0, 7]}')
    assert (tokenizers.load(tmp_path).bos_id, tokenizers.load(tmp_path).eos_id) == (0, 0)
    (tmp_path / 'config.json').write_text('{"bos_token_id": 1, "eos_token_id": 7}')  # an ordinary token
    assert (tokenizers.load(tmp_path).bos_id, tokenizers.load(tmp_path).eos_id) == (0, 1)
    (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": "<none>"}')
    with pytest.raises(ValueError, match="names bos_token '<none>', which tokenizer.json does not have"):
        tokenizers.load(tmp_path)


def test_truncation_in_the_file_is_ignored(trained, tmp_path):
    definition = json.loads(trained[1].read_text())
    definition['truncation'] = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst',
                                'stride': 0}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(definition))
    text = 'one two three four five six'
    assert tokenizers.load(tmp_path).encode(text) == trained[0].encode(text)


def test_tiktoken_layout_of_ids(tiktoken_path):
    tok = tokenizers.load(tiktoken_path.parent)
    assert (tok.vocab_size, tok.bos_id, tok.eos_id) == (260 + 256, 260, 261)
    assert tok.encode(' wor') == [258]


@pytest.mark.parametrize('text', ['x' * 60_001, ' ' * 60_001, 'ab ' * 5,
                                  'a' * 24_999 + ' ' * 25_001 + 'b' * 25_000])
def test_long_runs_are_cut_and_nothing_is_lost(text):
    segments = list(tokenizers._tiktoken_segments(text, max_segment=70_000))
    assert ''.join(segments) == text
    assert all(len(segment) <= 70_000 for segment in segments)
    assert all(len(run) <= 25_000 for segment in segments for run in re.findall(r'\s+|\S+', segment))


def test_tiktoken_cuts_long_text_between_words(tiktoken_path):
    tok = tokenizers.load(tiktoken_path)
    text = 'some words\n\nor  more,\nit wor 12345\n' * 300 + 'wor ' * 500
    segments = list(tokenizers._tiktoken_segments(text, max_segment=777))
    assert ''.join(segments) == text and len(segments) > 10
    assert all(len(segment) <= 777 for segment in segments)
    ids = [i for segment in segments for i in tok._encoding.encode_ordinary(segment)]
    assert ids == tok._encoding.encode_ordinary(text)


SEGMENTED = (
    'one two\nthree  four\n\nfive,\tsix 7890 12\r\nseven "x" naïve 北京\n🙂 end\n', 'a b ', 'x z\r\ny w\r\n')


@pytest.mark.parametrize('text', SEGMENTED)
def test_segments_leave_ids_as_they_are(trained, tiktoken_path, text):
    gpt2 = library.Tokenizer.from_str(trained[0]._tokenizer.to_str())
    gpt2.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    gpt2.save(str(trained[1].parent / 'gpt2.json'))
    text = text * (20_000 // len(text))
    for tok in (tokenizers.load('bytes'), trained[0], tokenizers.load(trained[1].parent / 'gpt2.json'),
                tokenizers.load(tiktoken_path)):
        for chunks in ([text], [text[i:i + 77] for i in range(0, len(text), 77)]):
            segments = list(tok.split_stream(chunks, size=1000))
            assert ''.join(segment for segment, _ in segments) == text and all(exact for _, exact in segments)
            assert len(segments) > 15 and max(len(segment) for segment, _ in segments) <= 1000
            encoded = tok.encode_batch(segment for segment, _ in segments)
            assert [i for ids in encoded for i in ids] == tok.encode(text)


def test_segments_that_cannot_be_exact_say_so(trained):
    tok = trained[0]
    assert list(tok.split_stream([])) == list(tok.split_stream([''])) == [('', True)]
    assert list(tok.split_stream(['x' * 50], size=10, max_size=20)) == [
        ('x' * 20, False), ('x' * 20, False), ('x' * 10, True)]
    first, *_ = tok.split_stream(['x' * 15 + ' y' * 9], size=10, max_size=20)
    assert first == ('x' * 15 + ' y' * 2, True)

    class Marked(tokenizers.BytesTokenizer):  # writes a mark before every text, as SentencePiece's do
        def encode(self, text):
            return [0, *super().encode(text)]

    segments = Marked().split_stream(['a b\n' * 30], size=20, max_size=100)
    assert [exact for _, exact in segments] == [False, True]


def test_errors_say_what_to_do(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match='does not exist; give a tokenizer.json'):
        tokenizers.load(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='holds neither tokenizer.json nor tokenizer.model'):
        tokenizers.load(tmp_path)
    (tmp_path / 'other.json').write_text('{}')
    message = r'other.json is not a tokenizer.json of the tokenizers library \(Model missing'
    with pytest.raises(ValueError, match=message):
        tokenizers.load(tmp_path / 'other.json')
    (tmp_path / 'tokenizer.model').write_bytes(b'\n\x0esentencepiece')
    with pytest.raises(ValueError, match="line 1 is not 'base64 rank'.*use the tokenizer.json"):
        tokenizers.load(tmp_path / 'tokenizer.model')
    (tmp_path / 'tokenizer.model').write_bytes(b'QQ== 0\nQg== 2\n')
    with pytest.raises(ValueError, match=r'ranks are not 0\.\.1'):
        tokenizers.load(tmp_path / 'tokenizer.model')
    (tmp_path / 'tokenizer.model').write_bytes(b'QQ== 0\nQg== 1\n')
    with pytest.raises(ValueError, match='has no token for 254 of the 256 bytes, such as 0; fetch it again'):
        tokenizers.load(tmp_path / 'tokenizer.model')
    (tmp_path / 'tokenizer.json').write_text('{')
    with pytest.raises(ValueError, match='is not valid JSON'):
        tokenizers.load(tmp_path)


def nested(levels):
    return '[' * levels + ']' * levels


@pytest.mark.parametrize('old, new, message', [
    ('"version": "1.0"', '"version": ' + nested(101), 'nested more than 100 deep'),
    ('"version": "1.0"', '"version": ' + nested(99_999), 'not valid JSON'),
    ('"version": "1.0"', '"version": ' + '9' * 5000, '5000 digits'),
    ('"version": "1.0"', '"version": 1, "version": 1', "names 'version' twice"),
    ('"version": "1.0"', '"version": "1.0", "normalizer": 5', 'names .normalizer. twice'),
    ('"normalizer": null', '"normalizer": 5', 'is not a tokenizer.json of the tokenizers library'),
    ('"type": "BPE"', '"type": "Spiral"', 'is not a tokenizer.json of the tokenizers library'),
    ('"Regex": "', '"Regex": "(', 'is not a tokenizer.json of the tokenizers library .Onig'),
    ('"id": 0', '"id": 4294967296', 'an added token of id 4294967296, which is not a token id'),
])
def test_a_damaged_tokenizer_json_is_refused_in_one_sentence(trained, tmp_path, old, new, message):
    text = json.dumps(json.loads(trained[1].read_text()))
    assert old in text
    path = tmp_path / 'tokenizer.json'
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.load(tmp_path)
    assert str(path) in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 700


def test_panics_of_the_library_are_errors():
    class PanicException(BaseException):
        pass

    with pytest.raises(ValueError, match=r'a/b fails \(Onig: retry limit over\); give the tokenizer of'):
        with tokenizer_files.library_errors('a/b', 'fails'):
            raise PanicException('Onig: retry\nlimit over')
    with pytest.raises(KeyboardInterrupt), tokenizer_files.library_errors('a/b', 'fails'):
        raise KeyboardInterrupt


def test_a_pattern_that_takes_long_is_refused(trained, monkeypatch):
    monkeypatch.setattr(tokenizers, 'SLOW_S', -1)
    with pytest.raises(ValueError, match='takes 0.0 s for a text of 2 times .a.; its regex is broken'):
        tokenizers.load(trained[1])


@pytest.mark.parametrize('value', [True, 1, 0.5, [], {}, ['<s>'], {'content': 700}, '\ud800'])
def test_bos_is_a_token(trained, tmp_path, value):
    (tmp_path / 'tokenizer.json').write_bytes(trained[1].read_bytes())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'bos_token': value}))
    with pytest.raises(ValueError, match='bos_token .*, which (is neither a token nor|tokenizer.json does)'):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize('value', [True, -1, 10**400, 0.5, [], '1x', None, 2**32])
def test_an_added_token_has_an_id(trained, tmp_path, value):
    (tmp_path / 'tokenizer.json').write_bytes(trained[1].read_bytes())
    (tmp_path / 'added_tokens.json').write_text(json.dumps({'<|end|>': value}))
    with pytest.raises(ValueError, match='added_tokens.json has an added token of id .*, which is not a'):
        tokenizers.load(tmp_path)


def test_check_vocab():
    tok = tokenizers.load('bytes')
    tokenizers.check_vocab_size(tok, 258)
    with pytest.raises(ValueError, match='tokenizer has 258 ids but the model has vocab_size 257'):
        tokenizers.check_vocab_size(tok, 257)


def test_special_tokens_are_read_only_when_asked(trained, tiktoken_path):
    tok = tokenizers.load(tiktoken_path)
    assert len(tok.special_tokens) == 256 and tok.special_tokens['<|eot_id|>'] == 260 + 9
    text = 'a<|eot_id|> wor<|eot_id|><|eot_id'
    ids = tok.encode_special(text)
    assert ids == [97, 269, 258, 269, *tok.encode('<|eot_id')]
    assert 269 not in tok.encode(text)
    assert 269 not in tok.encode_special('a<|e\ue000ot_id|>', drop='\ue000')
    tok, path = trained
    theirs = library.Tokenizer.from_file(str(path))
    for text in (*TEXTS, 'the <|begin_of_text|>cat<|end_of_text|>'):
        assert tok.encode_special(text) == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizers.load('bytes').encode_special('<|eot_id|>') == list(b'<|eot_id|>')


def test_special_names_are_those_of_llama31(tiktoken_path):
    """Ids 4, 8, 10 after the ranks have names since Llama-3.1; what is reserved is counted on around them."""
    special = tokenizers.load(tiktoken_path).special_tokens
    names = sorted(special, key=special.get)
    assert [name[2:-2] for name in names[:11]] == [
        'begin_of_text', 'end_of_text', 'reserved_special_token_0', 'reserved_special_token_1',
        'finetune_right_pad_id', 'reserved_special_token_2', 'start_header_id', 'end_header_id', 'eom_id',
        'eot_id', 'python_tag']
    assert names[11:] == [f'<|reserved_special_token_{i}|>' for i in range(3, 248)]


def test_tokenizer_json_made_of_metas_file_gives_the_same_ids(tiktoken_path, tmp_path):
    """Against tiktoken on the ranks, and the library on the merges that we make of them."""
    tok = tokenizers.load(tiktoken_path)
    made = tokenizer_json.from_tiktoken(tiktoken_path)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(made))
    read = tokenizers.load(tmp_path)
    assert made['model']['merges'] == ['Ġ w', 'o r', 'Ġw or', 'Ġ Ġ']
    assert (read.vocab_size, read.bos_id, read.eos_id) == (tok.vocab_size, tok.bos_id, tok.eos_id)
    assert read.special_tokens == tok.special_tokens
    for text in (*TEXTS, ' word   wor w', '<|eot_id|>12345'):
        assert read.encode(text) == tok.encode(text)
        assert read.encode_special(text) == tok.encode_special(text)
    theirs = library.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    assert theirs.encode('a').ids == [tok.bos_id, 97]  # as Llama-3.1's own file


def test_gguf_pre_tokenizers_split_as_their_models_do():
    split = {}
    for name in tokenizer_json.PRE_TOKENIZERS:
        definition = tokenizer_json.from_gguf(tokenizer_json.byte_alphabet(), [1] * 256, [], name)
        theirs = library.Tokenizer.from_str(json.dumps(definition))
        split[name] = [word for word, _ in theirs.pre_tokenizer.pre_tokenize_str("I'LL 1234 x")]
    assert split['llama-bpe'] == ['I', "'LL", 'Ġ', '123', '4', 'Ġx']
    assert split['smollm'] == ['I', "'", 'LL', 'Ġ', '1', '2', '3', '4', 'Ġx']
    assert split['gpt-2'] == ['I', "'", 'LL', 'Ġ1234', 'Ġx']


def test_the_installed_llama3_tokenizer_is_found_not_imported(tmp_path, monkeypatch, tiktoken_path):
    with monkeypatch.context() as none:
        none.setattr('importlib.util.find_spec', lambda name: None)
        with pytest.raises(FileNotFoundError, match=r"pip install '\.\[llama3-tokenizer\]'"):
            tokenizers.load('llama3')
    (tmp_path / 'llama_models' / 'llama3').mkdir(parents=True)
    (tmp_path / 'llama_models' / '__init__.py').write_text('raise RuntimeError("not to be imported")')
    (tmp_path / 'llama_models' / 'llama3' / 'tokenizer.model').write_bytes(tiktoken_path.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert tokenizers.load('llama3').fingerprint == tokenizers.load(tiktoken_path).fingerprint
