"""Ask transformers how it renders the chat templates of the tests.

Needs the 'oracle' extra (torch and transformers).

    python experiments/golden/make_golden_chat.py                     writes tests/golden/chat.json
    python experiments/golden/make_golden_chat.py --check FOLDER...   renders the tests' messages with the template of
        each folder (or .jinja file) here and there, and compares, ids too where it has a tokenizer.json
"""

import argparse
import json
import pathlib
import sys

import chat_cases
import tokenizers

from lct.cli.main import needs, run_script
from lct.data import chat_template as chat_template_module
from lct.data import tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]




def theirs(template, tokens):
    """A transformers tokenizer that has no vocabulary to speak of but this template."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({'x': 0}, unk_token='x'))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **tokens)
    words.chat_template = template
    return words


def check(path):
    """Compare one folder or .jinja file; True if every case renders alike, or fails in both."""
    if path.is_dir():
        ours = chat_template_module.load(path)
        words = transformers.AutoTokenizer.from_pretrained(path)
    else:
        ours = chat_template_module.ChatTemplate(path.read_text(), chat_cases.TOKENS, str(path))
        words = theirs(ours.source, chat_cases.TOKENS)
    same = refused = 0
    for name, (_, messages, options) in chat_cases.CASES.items():
        try:
            expected = words.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # the template does not take these messages
            expected = type(error)
        try:
            got = ours.render(messages, **options)
        except ValueError:
            got = None
        alike = got == expected if isinstance(expected, str) else got is None
        refused += got is None
        same += alike
        if not alike:
            print(f'{path}, {name}: {got!r} here, {expected!r} there')
        if alike and got is not None and path.is_dir():
            ids = words.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            if ours.encode(tokenizer.load(path), messages, **options) != ids:
                print(f'{path}, {name}: other ids')
                same -= 1
    print(f'{path}: {same} of {len(chat_cases.CASES)} alike ({refused} refused in both)')
    return same == len(chat_cases.CASES)


def main():
    global transformers
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', type=pathlib.Path, nargs='+', metavar='FOLDER')
    args = parser.parse_args()
    with needs("'.[oracle]'"):
        import transformers
    if args.check:
        sys.exit(0 if all([check(path) for path in args.check]) else 'not the same')
    result = {name: theirs(template, chat_cases.TOKENS).apply_chat_template(messages, tokenize=False, **options)
              for name, (template, messages, options) in chat_cases.CASES.items()}
    path = ROOT / 'tests' / 'golden' / 'chat.json'
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + '\n')
    print(f'{path}: {len(result)} texts by transformers {transformers.__version__}')


if __name__ == '__main__':
    run_script(main)
