"""Compare the Llama-3 tokenizer with Meta's own code on tiktoken and with the tokenizers library.

The lines mix text, code, emoji, CJK, odd white space and special tokens.

    pip install '.[llama3-tokenizer]'
    python experiments/checks/check_tokenizer.py                      against Meta's class
    python experiments/checks/check_tokenizer.py --tokenizer PATH     and a tokenizer.json in the library
"""

import argparse
import json
import pathlib
import random
import sys
import tempfile

import tokenizers

from lct.cli.main import check_positive, needs, run_script
from lct.data import tokenizer, tokenizer_json

WORDS = ("the of don't we'll I'D it's naïve Straße café résumé Hello WORLD x1y2 e.g. U.S.A. 3.14159 "
         '1,000,000 ½ Ⅷ x² Ελληνικά Привет мир שלום مرحبا नमस्ते สวัสดี 한국어 こんにちは 北京 '
         '東京都 ﬁ İstanbul ǅ '
         'aͤ̈ e\u0301 \u200bzero 👍🏽 👩‍👩‍👧 🏳️‍🌈 🙂 🇫🇷 ♥ ∑∂x → … — “quoted” ‘s ʼn').split(' ')
CODE = ('def f(x):', '\treturn x ** 2  # square', 'for(int i=0;i<n;++i){', '}', 'SELECT * FROM t WHERE a!=b;',
        'https://example.org/a?b=c&d=%20', '<div class="x">', '{"key": [1, 2.5e-7, null]}',
        '#include <stdio.h>', "x = y if z else 'w'", 'snake_case CamelCase', '\\frac{a}{b}$', '=====', '-->',
        '0x1F', '!!??', "'''", '@@ -1,2 +3 @@')
SPACES = (' ', ' ', ' ', '  ', '   ', '\t', '\n', '\r\n', '\n\n', ' \n ', '\u00a0', '\u3000', '\u2003',
          '\x0b', '\x0c', '\u2028', '', '\x00', '\x85', '                        ')
# Special tokens of every release of Llama-3; the last two are not special.
SPECIAL = ('<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>',
           '<|reserved_special_token_0|>', '<|begin_of_text', '<|nothing|>')


def lines(count, seed=0):
    """count lines, each of up to 40 fragments of all kinds."""
    rng = random.Random(seed)

    def any_character():
        while True:
            point = rng.choice((rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x110000)))
            if not 0xD800 <= point < 0xE000:  # surrogates are not characters
                return chr(point)

    kinds = (lambda: rng.choice(WORDS), lambda: rng.choice(CODE), lambda: rng.choice(SPECIAL),
             lambda: str(rng.randrange(10**rng.randrange(1, 12))),
             lambda: ''.join(any_character() for _ in range(rng.randrange(1, 6))))
    weights = (8, 3, 1, 2, 2)
    for _ in range(count):
        makers = rng.choices(kinds, weights, k=rng.randrange(41))
        yield ''.join(make() + rng.choice(SPACES) for make in makers)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokenizer', type=pathlib.Path, metavar='PATH')
    parser.add_argument('--lines', type=int, default=10_000)
    args = parser.parse_args()
    check_positive(args, 'lines')
    ours = tokenizer.load('llama3')
    with needs("'.[llama3-tokenizer]'"):
        from llama_models.llama3.tokenizer import Tokenizer as Meta
    meta = Meta.get_instance()

    with tempfile.TemporaryDirectory() as folder:
        converted = tokenizer_json.from_tiktoken(tokenizer.installed_llama3_path())
        path = pathlib.Path(folder, 'tokenizer.json')
        path.write_text(json.dumps(converted))
        read_converted = tokenizer.load(path)
        checks = {
            "encode == Meta's encode": lambda x: ours.encode(x) == meta.encode(x, bos=False, eos=False),
            "encode_special == Meta's with allowed_special='all'": lambda x: (
                ours.encode_special(x) == meta.encode(x, bos=False, eos=False, allowed_special='all')),
            'decode(encode(x)) == x': lambda x: ours.decode(ours.encode(x)) == x,
            'the converted tokenizer.json == encode': lambda x: read_converted.encode(x) == ours.encode(x),
        }
        if args.tokenizer:
            library = tokenizers.Tokenizer.from_file(str(args.tokenizer))
            read = tokenizer.load(args.tokenizer)
            checks |= {
                'encode_special == the library': lambda x: ours.encode_special(x) == library.encode(
                    x, add_special_tokens=False).ids,
                'tokenizer.json read here == encode': lambda x: read.encode(x) == ours.encode(x),
                '... and encode_special == the library': lambda x: read.encode_special(x) == library.encode(
                    x, add_special_tokens=False).ids,
                '... and decode(encode(x)) == x': lambda x: read.decode(read.encode(x)) == x,
            }
        text = list(lines(args.lines))
        failed = {name: [x for x in text if not check(x)] for name, check in checks.items()}
    tokens = sum(len(ours.encode(x)) for x in text)
    print(f'{len(text)} lines, {sum(map(len, text))} characters, {tokens} tokens')
    for name, wrong in failed.items():
        print(f'{name}: {len(text) - len(wrong)} of {len(text)}', f'first: {wrong[0]!r}' if wrong else '')
    good = not any(failed.values())
    if args.tokenizer:
        given = json.loads(args.tokenizer.read_text())['model']
        for key in ('vocab', 'merges'):
            same = given[key] == converted['model'][key]
            good &= same
            print(f'{len(given[key])} {key}, converted and given: {"equal" if same else "DIFFERENT"}')
    sys.exit(0 if good else 'not the same')


if __name__ == '__main__':
    run_script(main)
