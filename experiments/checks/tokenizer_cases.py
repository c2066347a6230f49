"""Tokenizers of all kinds, texts and chats, for check_tokenizers.py. Building them needs transformers.

A case is a function of a folder that fills it. All have small vocabularies, trained on the text below.
"""

import functools
import json
import random

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ['the cat sat on the mat, and the end of the text is near: it is 12345 or 678.\n'
          'def f(x):\n    return x ** 2\n', "don't we'll it's naïve café straße ÉÀ 北京 東京 🙂 \t\r\n "] * 20
CHAT = ('<|user|>', '<|assistant|>', '<|end|>')
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}\n{{ m['content'] }}<|end|> "
            "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}")
MARK = '▁'
FLAGS = {'plain': {}, 'lstrip': {'lstrip': True}, 'rstrip': {'rstrip': True}, 'both': {
    'lstrip': True, 'rstrip': True}, 'word': {'single_word': True}, 'normalized': {'normalized': True},
    'ordinary': {'special': False}, 'ordinary_strip': {'special': False, 'lstrip': True, 'rstrip': True,
                                                       'normalized': False}}


@functools.cache
def trained(kind):
    """The JSON of a trained tokenizers.Tokenizer: byte_level, metaspace, unigram, wordpiece, wordlevel."""
    special = ['<unk>', '<s>', '</s>', *CHAT]
    if kind == 'byte_level':
        model, trainer = models.BPE(), trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False)
    elif kind == 'metaspace':
        model = models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True)
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + [
            f'<0x{i:02X}>' for i in range(256)], show_progress=False)
    elif kind == 'unigram':
        model, trainer = models.Unigram(), trainers.UnigramTrainer(
            vocab_size=160, unk_token='<unk>', special_tokens=special, show_progress=False)
    elif kind == 'wordpiece':
        model, trainer = models.WordPiece(unk_token='<unk>'), trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=special, show_progress=False)
    else:
        model, trainer = models.WordLevel(unk_token='<unk>'), trainers.WordLevelTrainer(
            vocab_size=200, special_tokens=special, show_progress=False)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer, library.decoder = {
        'byte_level': (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        'metaspace': (pre_tokenizers.Metaspace(), spaces_back(True)),
        'unigram': (pre_tokenizers.Metaspace(), decoders.Metaspace()),
    }.get(kind, (pre_tokenizers.Whitespace(), decoders.WordPiece()))
    library.train_from_iterator(CORPUS, trainer)
    definition = json.loads(library.to_str())
    definition['added_tokens'] = [one for one in definition['added_tokens'] if '<0x' not in one['content']]
    return json.dumps(definition)


def spaces_back(strip):
    """SentencePiece's decoder."""
    end = [decoders.Strip(' ', 1, 0)] if strip else []
    return decoders.Sequence([decoders.Replace(MARK, ' '), decoders.ByteFallback(), decoders.Fuse(), *end])


def new(kind, **parts):
    """A trained tokenizer with other parts, by their names in tokenizers.Tokenizer."""
    library = tokenizers.Tokenizer.from_str(trained(kind))
    for name, part in parts.items():
        setattr(library, name, part)
    return library


def without(library, names):
    """The library without tokens: those with the highest ids cannot be among the others."""
    definition = json.loads(library.to_str())
    definition['added_tokens'] = [one for one in definition['added_tokens'] if one['content'] not in names]
    vocab = definition['model']['vocab']
    kept = [one for one in sorted(vocab, key=vocab.get) if one not in names]
    definition['model']['vocab'] = {one: i for i, one in enumerate(kept)}
    for one in definition['added_tokens']:
        one['id'] = definition['model']['vocab'][one['content']]
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def fast(library, folder, **options):
    """Save a tokenizer as PreTrainedTokenizerFast does."""
    import transformers
    options = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'chat_template': TEMPLATE,
               **options}
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, **options).save_pretrained(folder)


def built(class_name, kind, folder, config=None, **options):
    """Save a tokenizer of a class of transformers from the vocabulary and merges of a kind."""
    import transformers
    model = json.loads(trained(kind))['model']
    options = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'chat_template': TEMPLATE,
               'extra_special_tokens': list(CHAT), **options}
    merges = [tuple(one) for one in model['merges']]
    getattr(transformers, class_name)(vocab=model['vocab'], merges=merges, **options).save_pretrained(folder)
    write(folder, 'config.json', config or {'model_type': 'llama'})


def raw(library, folder, settings, **files):
    """Write a folder as others than transformers 5 write it; files are by name, without their ending."""
    library.save(str(folder / 'tokenizer.json'))
    write(folder, 'tokenizer_config.json', {'chat_template': TEMPLATE, **settings})
    for name, value in files.items():
        write(folder, f'{name}.json', value)


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding='utf-8')


def byte_level_cases():
    llama3 = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                                   r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    parts = {'llama3': {'pre_tokenizer': llama3}, 'digits': {'pre_tokenizer': digits},
             'nfc': {'normalizer': normalizers.NFC()}, 'lowercase': {'normalizer': normalizers.Lowercase()}}
    for space in (True, False):
        for regex in (True, False):
            parts[f'space_{space}_regex_{regex}'] = {
                'pre_tokenizer': pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=regex)}
    for name, one in parts.items():
        yield f'byte_level {name}', lambda folder, one=one: fast(new('byte_level', **one), folder)


def metaspace_cases():
    for kind in ('metaspace', 'unigram'):
        for scheme in ('always', 'first', 'never'):
            for split in (True, False):
                def case(folder, kind=kind, scheme=scheme, split=split):
                    part = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
                    back = spaces_back(scheme != 'never') if kind == 'metaspace' else decoders.Metaspace(
                        prepend_scheme=scheme, split=split)
                    fast(new(kind, pre_tokenizer=part, decoder=back), folder)
                yield f'{kind} {scheme} split_{split}', case
    prepended = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(' ', MARK)])
    prefixed = {'normalizer': prepended, 'pre_tokenizer': None}
    yield 'metaspace prepended', lambda folder: fast(new('metaspace', **prefixed), folder)
    for legacy in (True, False):
        for space in (True, False, None):
            def case(folder, legacy=legacy, space=space):
                settings = {'tokenizer_class': 'LlamaTokenizerFast', 'legacy': legacy, 'bos_token': '<s>',
                            'eos_token': '</s>', 'unk_token': '<unk>', 'add_prefix_space': space}
                raw(new('metaspace', **prefixed), folder, settings, config={'model_type': 'llama'})
            yield f'metaspace prepended as Llama, legacy_{legacy} space_{space}', case
    for model_type in ('mistral', 'phi3'):
        def case(folder, model_type=model_type):
            settings = {'tokenizer_class': 'LlamaTokenizer', 'bos_token': '<s>', 'eos_token': '</s>'}
            raw(new('metaspace', **prefixed), folder, settings, config={'model_type': model_type})
        yield f'metaspace prepended as {model_type}', case


def class_cases():
    for legacy in (True, False):
        for space in (True, False):
            yield f'LlamaTokenizer legacy_{legacy} space_{space}', functools.partial(
                built, 'LlamaTokenizer', 'metaspace', legacy=legacy, add_prefix_space=space)
    for bos in (True, False):
        for eos in (True, False):
            yield f'LlamaTokenizer bos_{bos} eos_{eos}', functools.partial(
                built, 'LlamaTokenizer', 'metaspace', add_bos_token=bos, add_eos_token=eos)
    for space in (True, False):
        yield f'GPT2Tokenizer space_{space}', functools.partial(
            built, 'GPT2Tokenizer', 'byte_level', add_prefix_space=space)
        yield f'Qwen2Tokenizer space_{space}', functools.partial(
            built, 'Qwen2Tokenizer', 'byte_level', add_prefix_space=space, bos_token=None,
            config={'model_type': 'qwen3', 'bos_token_id': 1})
    yield 'Qwen2Tokenizer of PreTrainedTokenizerFast', lambda folder: raw(
        new('byte_level', normalizer=normalizers.NFC()), folder, {'eos_token': '</s>'},
        config={'model_type': 'qwen2'})


def flag_cases():
    for kind in ('byte_level', 'metaspace', 'unigram'):
        for name, flags in FLAGS.items():
            def case(folder, kind=kind, flags=flags):
                parts = {} if kind == 'byte_level' else {'pre_tokenizer': pre_tokenizers.Metaspace(
                    prepend_scheme='first')}
                if kind == 'unigram':
                    parts['normalizer'] = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
                library = new(kind, **parts)
                library.add_tokens([
                    AddedToken(one, **{'special': True, **flags}) for one in (*CHAT, '<New>')])
                fast(library, folder)
            yield f'{kind} added tokens, {name}', case


def file_cases():
    named = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '</s>', 'unk_token': '<unk>'}

    def chat(kind='byte_level'):
        return without(new(kind), CHAT)

    def numbered(library, **flags):
        size = library.get_vocab_size()
        return {str(size + i): {'content': one, 'lstrip': False, 'rstrip': False, 'single_word': False,
                                'normalized': False, 'special': True, **flags} for i, one in enumerate(CHAT)}

    def added(library):
        return {one: int(i) for i, one in ((i, one['content']) for i, one in numbered(library).items())}

    def decoder(folder, **flags):
        raw(chat(), folder, {**named, 'added_tokens_decoder': numbered(chat(), **flags)})

    yield 'chat tokens in added_tokens.json', lambda folder: raw(
        chat(), folder, named, added_tokens=added(chat()))
    yield 'chat tokens in added_tokens.json and special_tokens_map.json', lambda folder: raw(
        chat(), folder, named, added_tokens=added(chat()),
        special_tokens_map={'additional_special_tokens': list(CHAT), 'pad_token': '<|end|>'})
    yield 'chat tokens in special_tokens_map.json', lambda folder: raw(
        chat(), folder, named, special_tokens_map={'additional_special_tokens': list(CHAT)})
    yield 'bos with flags in special_tokens_map.json', lambda folder: raw(
        chat(), folder, named, special_tokens_map={'bos_token': {
            'content': '<s>', 'lstrip': True, 'rstrip': True, 'single_word': False, 'normalized': False}})
    yield 'chat tokens in added_tokens_decoder', decoder
    yield 'chat tokens in added_tokens_decoder, stripping', lambda folder: decoder(
        folder, lstrip=True, rstrip=True)
    yield 'chat tokens in added_tokens_decoder, ordinary', lambda folder: decoder(folder, special=False)
    yield 'chat tokens in additional_special_tokens', lambda folder: raw(
        chat(), folder, {**named, 'additional_special_tokens': list(CHAT)})
    yield 'chat tokens in extra_special_tokens', lambda folder: raw(
        chat(), folder, {**named, 'extra_special_tokens': list(CHAT)})
    yield 'chat tokens by name', lambda folder: raw(
        chat(), folder, {**named, 'user_token': CHAT[0], 'extra_special_tokens': {'end_token': CHAT[2]}})
    yield 'Llama, chat tokens in added_tokens.json', lambda folder: raw(
        chat('metaspace'), folder, {**named, 'tokenizer_class': 'LlamaTokenizer', 'legacy': False},
        added_tokens=added(chat('metaspace')), config={'model_type': 'llama', 'bos_token_id': 1})
    yield 'an id that contradicts', lambda folder: raw(
        chat(), folder, named, added_tokens={one: i + 1 for one, i in added(chat()).items()})


def processor_cases():
    bos, eos = ('<s>', 1), ('</s>', 2)

    def template(single, *special):
        return processors.TemplateProcessing(single=single, pair=None, special_tokens=list(special))

    found = {
        'none': None, 'bytes': processors.ByteLevel(), 'nothing': template('$A'),
        'bos': template('<s> $A', bos), 'eos': template('$A </s>', eos),
        'both': template('<s> $A </s>', bos, eos), 'roberta': processors.RobertaProcessing(eos, bos),
        'bert': processors.BertProcessing(eos, bos), 'two': template('<s> <unk> $A', bos, ('<unk>', 0)),
        'sequence': processors.Sequence([processors.ByteLevel(), template('<s> $A', bos)]),
    }
    for name, one in found.items():
        yield f'post-processor {name}', lambda folder, one=one: raw(
            new('byte_level', post_processor=one) if one else new('byte_level'), folder,
            {'bos_token': '<s>', 'eos_token': '</s>'}, config={'model_type': 'llama', 'bos_token_id': 5})
    for flag in (True, False):
        yield f'post-processor bos, add_bos_token {flag}', lambda folder, flag=flag: raw(
            new('byte_level', post_processor=found['bos']), folder,
            {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': flag})
        yield f'post-processor bytes, add_bos_token {flag}', lambda folder, flag=flag: raw(
            new('byte_level', post_processor=found['bytes']), folder,
            {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': flag})


def option_cases():
    def truncated(folder):
        library = new('byte_level')
        library.enable_truncation(3)
        library.enable_padding(length=8, pad_id=0, pad_token='<unk>')
        fast(library, folder, model_max_length=4)

    def dropout(folder):
        built('LlamaTokenizer', 'metaspace', folder)
        definition = json.loads((folder / 'tokenizer.json').read_text())
        definition['model']['dropout'] = 0.5
        write(folder, 'tokenizer.json', definition)

    yield 'truncation and padding', truncated
    yield 'dropout', dropout
    yield 'clean_up_tokenization_spaces of a BPE', lambda folder: fast(
        new('byte_level'), folder, clean_up_tokenization_spaces=True)
    yield 'clean_up_tokenization_spaces of a Unigram', lambda folder: fast(
        new('unigram'), folder, clean_up_tokenization_spaces=True)
    yield 'split_special_tokens', lambda folder: fast(new('byte_level'), folder, split_special_tokens=True)
    yield 'no decoder', lambda folder: fast(without_decoder(new('wordlevel')), folder)
    yield 'word level', lambda folder: fast(new('wordlevel', decoder=decoders.Fuse()), folder)
    yield 'wordpiece', lambda folder: fast(new('wordpiece'), folder)
    yield 'BertTokenizer', lambda folder: raw(
        new('wordpiece'), folder, {'tokenizer_class': 'BertTokenizer', 'unk_token': '<unk>'})
    yield 'only tokenizer.json', lambda folder: new('byte_level').save(str(folder / 'tokenizer.json'))


def without_decoder(library):
    definition = json.loads(library.to_str()) | {'decoder': None}
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def cases():
    """{name: function of a folder}."""
    return dict([*byte_level_cases(), *metaspace_cases(), *class_cases(), *flag_cases(), *file_cases(),
                 *processor_cases(), *option_cases()])


def texts(count, seed=0, special=()):
    """Texts of all kinds, in which special tokens are spelled among spaces and words."""
    rng = random.Random(seed)
    fragments = [*("the cat sat on the mat 12345 678 ÉÀ naïve e\u0301 café 北京 🙂 ﬁ x<s>y it's don't near: "
                   f'{MARK} {MARK}the def f(x): a.b "q" \x00').split(' '), *CHAT, '<s>', '</s>', '<New>',
                 '<new>', '<unk>', 'word', '0x1F', *special]
    spaces = (' ', ' ', ' ', '', '', '  ', '   ', '\n', '\t', '\u00a0', '\r\n', '\n\n')
    fixed = ['', ' ', '  ', ' the', 'the ', '\n', f'{MARK}', '<|end|>', ' <|end|> ', '<|end|> the',
             'the <|end|>  the', 'x<|end|>y', '<s> the </s>', '<|user|><|end|>', '<|us<|end|>er|>']
    yield from fixed[:count]
    for _ in range(count - len(fixed)):
        yield ''.join(rng.choice(spaces) + rng.choice(fragments) for _ in range(rng.randrange(1, 14)))


def chats(count, seed=1):
    """Messages without special tokens in them."""
    rng = random.Random(seed)
    plain = [text for text in texts(20 * count + 20, seed) if '<' not in text]
    for _ in range(count):
        turns = rng.randrange(1, 5)
        yield [{'role': ('user', 'assistant')[i % 2], 'content': rng.choice(plain)} for i in range(turns)]
