"""Many calls on one text: a loop that asks a running server about every file of a folder, in turn.

    python experiments/serve.py --model smollm2 &
    python experiments/many_calls.py --files 'lct/ops/r*.py' --ask 'In one sentence, what does {name} do?'

The whole text stands at the beginning of every call, so the model may use all of it for each answer, and the
server reads it once: every call after the first costs its question and its answer. Needs no package.
"""

import argparse
import json
import os
import time
import urllib.error
import urllib.request

from lct.cli.flags import add_exclude_flag, length
from lct.cli.main import run_script
from lct.data.corpus import bundle


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--url', default='http://127.0.0.1:8000/v1', help='of the server')
    parser.add_argument('--files', nargs='+', required=True, help='folders, globs in quotes, or files')
    add_exclude_flag(parser)
    parser.add_argument('--ask', default='In one sentence, what does {name} do?', help='{name}: of each file')
    parser.add_argument('--max-new-tokens', type=length, default=64, help='most tokens of each answer')
    loop(parser.parse_args())


def loop(args):
    """Print every answer and what it cost; return them by file."""
    files = bundle.read(args.files, args.exclude)
    text, answers, read, total = bundle.text(files), {}, 0, 0
    for file in files:
        start = time.monotonic()
        content = f'{text}\n{args.ask.format(name=file.name)}'
        answer, usage = call(args.url, content, args.max_new_tokens)
        reused = usage['prompt_tokens_details']['cached_tokens']
        answers[file.name] = answer
        read, total = read + usage['prompt_tokens'] - reused, total + usage['prompt_tokens']
        print(f'{file.name}: {answer.strip()}\n    {usage["prompt_tokens"]:,} tokens, {reused:,} of them '
              f'reused, {time.monotonic() - start:.1f} s', flush=True)
    print(f'{len(files)} calls read {read:,} tokens; each by itself would have read {total:,} in total')
    return answers


def call(url, content, limit):
    """-> (answer, usage) of one greedy call."""
    body = {'messages': [{'role': 'user', 'content': content}], 'max_tokens': limit, 'temperature': 0}
    key = os.environ.get('LCT_API_KEY', '')
    headers = {'Content-Type': 'application/json', 'Authorization': f'Bearer {key}'}
    request = urllib.request.Request(f'{url}/chat/completions', json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)['error']['message']) from None
    except urllib.error.URLError as error:
        raise ValueError(f'no server answers at {url} ({error.reason}); start experiments/serve.py') from None
    return answer['choices'][0]['message']['content'], answer['usage']


if __name__ == '__main__':
    run_script(main)
