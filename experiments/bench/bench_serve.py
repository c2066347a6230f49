"""Time to the first token and tokens per second of serve.py and ask.py beside transformers.

    python experiments/serve.py --model smollm2 --port 8333 --session-gb 0 &
    transformers serve FOLDER --port 8334 --dtype float32 --device cpu &      # or leave --theirs out
    python experiments/bench/bench_serve.py --python .venv_hf/bin/python --rounds 3 \\
        --theirs http://127.0.0.1:8334/v1 --output FILE

Each round asks two questions on a new text of about 200 tokens, all sides in turn, greedily: the server,
ask.py (from the start of reading, without the start of its process), and transformers' generate and server.
The second question begins like the first, which transformers alone reads again. --python has torch and
transformers.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from lct.text import table

LINE = 'The river rises in the hills and runs north past the old mill. '
QUESTIONS = ('What does the note say?', 'Where does the river rise?')
NEW = 24
ASK = pathlib.Path(__file__).resolve().parents[1] / 'ask.py'


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--url', default='http://127.0.0.1:8333/v1')
    parser.add_argument('--python', default=sys.executable, help='with torch and transformers')
    parser.add_argument('--model', default='smollm2', help='the one that the server has')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--theirs', help="the address of transformers' server, ending in /v1")
    parser.add_argument('--output', type=pathlib.Path)
    parser.add_argument('--generate', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate:
        generate(args.generate)
    else:
        compare(args)


def compare(args):
    from lct.cli.model import find_model

    folder = str(find_model(args.model))
    process = subprocess.Popen([args.python, __file__, '--generate', folder], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    sides = {'serve.py': lambda text: [ask_server(args.url, text + question) for question in QUESTIONS],
             'ask.py': lambda text: ask(args.model, text),
             'generate': lambda text: [ask_generate(process, text + question) for question in QUESTIONS]}
    if args.theirs:
        sides['transformers serve'] = lambda text: [
            ask_server(args.theirs, text + question, model=folder) for question in QUESTIONS]
    rows = []
    for i in range(args.rounds + 1):  # the first round compiles
        for side, answers in sides.items():
            for number, found in enumerate(answers(f'Note {i}. {LINE * 12}')):
                print(i, side, json.dumps(found), flush=True)
                if i:
                    rows.append({'round': i, 'side': side, 'question': number + 1, **found})
    process.stdin.close()
    process.wait()
    print(summary(rows, sides))
    if args.output:
        content = {'model': args.model, 'new tokens': NEW, 'rows': rows}
        args.output.write_text(json.dumps(content, indent=1) + '\n')


def summary(rows, sides):
    """A table of medians over the rounds."""
    lines = []
    for side in sides:
        for number in (1, 2):
            own = [row for row in rows if (row['side'], row['question']) == (side, number)]
            first, rate = (statistics.median(row[name] for row in own)
                           for name in ('first token, s', 'tokens a second'))
            lines.append((side, number, f'{first:.2f}', f'{rate:.1f}'))
    return table(('side', 'question', 'first token, s', 'tokens a second'), lines, left=(0,))


def ask_generate(process, text):
    """What an answer of generate took."""
    process.stdin.write(json.dumps(text) + '\n')
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def ask(model, text):
    """What two answers of a process of ask.py took, by what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'note.txt'
        path.write_text(text)
        command = [sys.executable, ASK, '--model', model, '--files', path, '--max-new-tokens', NEW,
                   *[part for question in QUESTIONS for part in ('--question', question)]]
        out = subprocess.run(list(map(str, command)), text=True, capture_output=True, check=True).stderr
    seconds = float(re.search(r'tokens in ([\d.]+) s', out)[1])  # to read the text, before the first question
    pattern = r'(\d+) tokens of question read in ([\d.]+) s.*?(\d+) tokens answered, ([\d.]+) a second'
    first, second = ((int(a), float(b), float(d)) for a, b, c, d in re.findall(pattern, out))
    return [{'first token, s': round(seconds + first[1], 3), 'tokens a second': first[2]},
            {'first token, s': second[1], 'tokens a second': second[2]}]


def measured(start, times, **counts):
    rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
    return {'first token, s': round(times[0] - start, 3), 'tokens a second': round(rate, 1), **counts}


def ask_server(url, text, **fields):
    """What an answer of a server took."""
    import httpx

    body = {'messages': [{'role': 'user', 'content': text}], 'temperature': 0, 'max_tokens': NEW,
            'stream': True, 'stream_options': {'include_usage': True}, **fields}
    start, times, usage = time.monotonic(), [], None
    with httpx.stream('POST', url + '/chat/completions', json=body, timeout=600) as response:
        for line in response.iter_lines():
            event = json.loads(line[6:]) if line.startswith('data: {') else {'choices': []}
            if event['choices'] and event['choices'][0]['delta'].get('content'):
                times.append(time.monotonic())
            usage = event.get('usage') or usage
    if fields:  # transformers says nothing about what it reuses
        return measured(start, times)
    return measured(start, times, prompt=usage['prompt_tokens'],
                    reused=usage['prompt_tokens_details']['cached_tokens'])


def generate(folder):
    """In a process of its own: a line of JSON for each text on stdin."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    class Times(BaseStreamer):
        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(time.monotonic())

        def end(self):
            pass

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pathlib.Path(folder))
    print('ready', flush=True)
    for line in sys.stdin:
        messages = [{'role': 'user', 'content': json.loads(line)}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt',
                                               return_dict=True)
        streamer, start = Times(), time.monotonic()
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False, streamer=streamer)
        tokens = streamer.times[1:]  # the first is the prompt
        print(json.dumps(measured(start, tokens, prompt=inputs['input_ids'].shape[1])), flush=True)


if __name__ == '__main__':
    main()
