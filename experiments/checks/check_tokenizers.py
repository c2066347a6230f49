"""Compare tokenizers of every kind with transformers: ids of texts and chats, and decoded streams.

The tokenizers are built with transformers' own classes and options (tokenizer_cases.py). lct must give the
same ids and texts for each, or refuse it in one sentence. A random choice (dropout) has no ids to compare.

    pip install '.[oracle]'
    python experiments/checks/check_tokenizers.py               prints a line for each kind of comparison
    python experiments/checks/check_tokenizers.py --write       writes tests/golden/tokenizers.json too
    python experiments/checks/check_tokenizers.py --check FOLDER...    compares the tokenizers of folders
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

import tokenizer_cases

from lct.cli.main import check_positive, needs, run_script
from lct.data import chat_template
from lct.data import tokenizer as tokenizers
from lct.data.detokenizer import Detokenizer

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden' / 'tokenizers.json'
# The cases whose files and ids go into the golden extract, one of each way to differ.
EXTRACT = (
    'metaspace first split_False', 'metaspace always split_True', 'unigram first split_True',
    'metaspace prepended', 'metaspace prepended as Llama, legacy_False space_None',
    'metaspace added tokens, both', 'byte_level added tokens, word', 'byte_level added tokens, normalized',
    'chat tokens in added_tokens.json', 'chat tokens in added_tokens_decoder, stripping',
    'chat tokens in special_tokens_map.json', 'post-processor none', 'post-processor both',
    'GPT2Tokenizer space_True')
EXTRACT_TEXTS = 14


def compare(reference, ours, template, texts, chats):
    """{kind of comparison: [(input, expected, ours)] of those that differ} and the number of comparisons."""
    wrong = {kind: [] for kind in ('plain', 'special', 'surrounded', 'chat', 'decoded', 'stream')}

    def check(kind, given, expected, found):
        if expected != found:
            wrong[kind].append((given, expected, found))

    for text in texts:
        check('plain', text, reference.encode(text, add_special_tokens=False, split_special_tokens=True),
              ours.encode(text))
        ids = reference.encode(text, add_special_tokens=False)
        check('special', text, ids, ours.encode_special(text))
        surrounded = reference.encode(text)
        begin = [] if ours.bos_id is None else [ours.bos_id]
        end = [ours.eos_id] if surrounded[len(begin) + len(ids):] else []
        check('surrounded', text, surrounded, begin + ours.encode_special(text) + end)
        check_stream(check, reference, ours, ids)
    for messages in chats:
        options = {'add_generation_prompt': len(messages) % 2 == 1}
        ids = reference.apply_chat_template(messages, return_dict=False, **options)
        check('chat', messages, ids, template.encode(ours, messages, **options))
        check_stream(check, reference, ours, ids)
    return wrong


def check_stream(check, reference, ours, ids):
    expected = reference.decode(ids, skip_special_tokens=True)
    check('decoded', ids, expected, ours.decode(ids))
    stream = Detokenizer(ours.decode)
    check('stream', ids, expected, ''.join([*map(stream.push, ids), stream.finish()]))


def load_both(folder):
    """(transformers' tokenizer, ours, the chat template), or the sentence with which lct refuses it."""
    import transformers
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    if getattr(reference._tokenizer.model, 'dropout', None):
        reference._tokenizer.model.dropout = None
    try:
        ours = tokenizers.load(folder)
    except ValueError as error:
        return str(error).replace(str(folder), 'FOLDER')
    try:
        template = chat_template.load(folder)
    except chat_template.MissingTemplate:
        template = chat_template.ChatTemplate(tokenizer_cases.TEMPLATE, reference.special_tokens_map)
        reference.chat_template = tokenizer_cases.TEMPLATE
    return reference, ours, template


def print_differences(name, wrong):
    """A line for each kind of comparison that differs; True if none does."""
    for kind, cases in wrong.items():
        if cases:
            print(f'{name}, {kind}: {len(cases)} differ; {cases[0][0]!r} is {cases[0][1]!r} by '
                  f'transformers and {cases[0][2]!r} by lct')
    return not any(wrong.values())


def check_folders(folders, count, chats):
    """Compare the tokenizers of folders on texts that spell their own special tokens."""
    good = True
    for folder in folders:
        loaded = load_both(folder)
        if isinstance(loaded, str):
            print(f'{folder} is refused: {loaded}')
            continue
        special = list(loaded[1].added_tokens)[:20]
        same = print_differences(folder, compare(
            *loaded, tokenizer_cases.texts(count, special=special), chats))
        print(f'{folder}: {count} texts and {len(chats)} chats {"are equal" if same else "DIFFER"}')
        good &= same
    return good


def golden_case(folder, reference, texts, chats):
    """The files of a folder, and what transformers makes of texts and chats."""
    files = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    files = {name: json.loads(text) if name.endswith('.json') else text for name, text in files.items()}
    return {
        'files': files,
        'plain': [reference.encode(x, add_special_tokens=False, split_special_tokens=True) for x in texts],
        'special': [reference.encode(x, add_special_tokens=False) for x in texts],
        'surrounded': [reference.encode(x) for x in texts],
        'decoded': [reference.decode(reference.encode(x), skip_special_tokens=True) for x in texts],
        'chats': [reference.apply_chat_template(x, return_dict=False) for x in chats]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true')
    parser.add_argument('--texts', type=int, default=160)
    parser.add_argument('--chats', type=int, default=40)
    parser.add_argument('--check', type=pathlib.Path, nargs='+', metavar='FOLDER')
    parser.add_argument('--only', default='', help='the cases whose name contains this')
    args = parser.parse_args()
    check_positive(args, 'texts', 'chats')
    with needs("'.[oracle]'"):
        import transformers
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    transformers.logging.set_verbosity_error()
    texts, chats = list(tokenizer_cases.texts(args.texts)), list(tokenizer_cases.chats(args.chats))
    if args.check:
        sys.exit(0 if check_folders(args.check, args.texts, chats) else 1)
    golden, equal, refused, differ, wrong_total = {}, 0, [], [], {}
    for name, build in tokenizer_cases.cases().items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            build(folder)
            loaded = load_both(folder)
            if isinstance(loaded, str):
                refused.append((name, loaded))
                continue
            wrong = compare(*loaded, texts, chats)
            if name in EXTRACT:
                golden[name] = golden_case(folder, loaded[0], texts[:EXTRACT_TEXTS], chats[:2])
        wrong_total = {kind: wrong_total.get(kind, 0) + len(cases) for kind, cases in wrong.items()}
        same = print_differences(name, wrong)
        differ += [] if same else [name]
        equal += same
    for name, message in refused:
        print(f'refused: {name}: {message}')
    print(f'transformers {transformers.__version__}: {equal + len(differ) + len(refused)} tokenizers x '
          f'{len(texts)} texts and {len(chats)} chats: {equal} equal, {len(refused)} refused, '
          f'{len(differ)} differ')
    print('that differ: ' + ', '.join(f'{kind} {count}' for kind, count in wrong_total.items()))
    if args.write:
        content = {'texts': texts[:EXTRACT_TEXTS], 'chats': chats[:2], 'cases': golden}
        GOLDEN.write_text(json.dumps(content, ensure_ascii=False, separators=(',', ':')) + '\n')
        print(f'{GOLDEN.name}: {len(golden)} tokenizers')
    sys.exit(1 if differ else 0)


if __name__ == '__main__':
    run_script(main)
