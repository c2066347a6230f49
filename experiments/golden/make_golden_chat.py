"""Render the chat templates of the tests with transformers.

Needs the 'oracle' extra (torch and transformers).

    python experiments/golden/make_golden_chat.py                     writes tests/golden/chat.json
    python experiments/golden/make_golden_chat.py --check FOLDER...   renders the tests' messages with the
        template of each folder (or .jinja file) with lct and with transformers, and compares the texts; of a
        folder with a tokenizer.json the ids too
"""

import argparse
import json
import pathlib
import sys

import chat_cases
import tokenizers as tokenizers_library

from lct.cli.main import needs, run_script
from lct.data import chat_template
from lct.data import tokenizer as tokenizers

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden' / 'chat.json'


def reference_tokenizer(template, tokens):
    """A transformers tokenizer with a chat template and special tokens but almost no vocabulary."""
    import transformers

    library = tokenizers_library.Tokenizer(tokenizers_library.models.WordLevel({'x': 0}, unk_token='x'))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def check(path):
    """Compare one folder or .jinja file; True if each case renders to the same text, or fails in both."""
    import transformers

    if path.is_dir():
        template = chat_template.load(path)
        reference = transformers.AutoTokenizer.from_pretrained(path)
    else:
        template = chat_template.ChatTemplate(path.read_text(), chat_cases.TOKENS, str(path))
        reference = reference_tokenizer(template.source, chat_cases.TOKENS)
    equal = refused = 0
    for name, (_, messages, options) in chat_cases.CASES.items():
        try:
            expected = reference.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # the template does not take these messages
            expected = type(error)
        try:
            text = template.render(messages, **options)
        except ValueError:
            text = None
        same = text == expected if isinstance(expected, str) else text is None
        refused += text is None
        if not same:
            print(f'{path}, {name}: {text!r} by lct, {expected!r} by transformers')
        if same and text is not None and path.is_dir():
            ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            if template.encode(tokenizers.load(path), messages, **options) != ids:
                print(f'{path}, {name}: the ids differ')
                same = False
        equal += same
    print(f'{path}: {equal} of {len(chat_cases.CASES)} equal ({refused} refused by both)')
    return equal == len(chat_cases.CASES)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', type=pathlib.Path, nargs='+', metavar='FOLDER')
    args = parser.parse_args()
    with needs("'.[oracle]'"):
        import transformers
    if args.check:
        sys.exit(0 if all([check(path) for path in args.check]) else 'some cases differ')
    result = {
        name: reference_tokenizer(template, chat_cases.TOKENS).apply_chat_template(
            messages, tokenize=False, **options)
        for name, (template, messages, options) in chat_cases.CASES.items()}
    GOLDEN.write_text(json.dumps(result, ensure_ascii=False, indent=1) + '\n')
    print(f'{GOLDEN}: {len(result)} texts by transformers {transformers.__version__}')


if __name__ == '__main__':
    run_script(main)
