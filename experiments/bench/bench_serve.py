"""Time to the first token and tokens per second of a running server beside transformers' generate.

    python experiments/serve.py --model smollm2 --port 8333 --session-gb 0 &
    python experiments/bench/bench_serve.py --python .venv_hf/bin/python --rounds 3

Each round asks two questions on a new text of about 200 tokens, both sides in turn, greedily. The second one
begins like the first, which the server reuses and generate does not. --python has torch and transformers.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

LINE = 'The river rises in the hills and runs north past the old mill. '
QUESTIONS = ('What does the note say?', 'Where does the river rise?')
NEW = 24


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--url', default='http://127.0.0.1:8333/v1')
    parser.add_argument('--python', default=sys.executable, help='with torch and transformers')
    parser.add_argument('--model', default='smollm2', help='the one that the server has')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--generate', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate:
        generate(args.generate)
    else:
        compare(args)


def compare(args):
    from lct.cli.model import find_model

    command = [args.python, __file__, '--generate', str(find_model(args.model))]
    theirs = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    theirs.stdout.readline()
    for i in range(args.rounds):
        for question in QUESTIONS:
            text = f'Note {i}. {LINE * 12}{question}'
            print(i, 'serve', json.dumps(ask_server(args.url, text)), flush=True)
            theirs.stdin.write(json.dumps(text) + '\n')
            theirs.stdin.flush()
            print(i, 'generate', theirs.stdout.readline().strip(), flush=True)
    theirs.stdin.close()
    theirs.wait()


def measured(start, times, **counts):
    rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
    return {'first token, s': round(times[0] - start, 3), 'tokens a second': round(rate, 1), **counts}


def ask_server(url, text):
    """What an answer of the server took."""
    import httpx

    body = {'messages': [{'role': 'user', 'content': text}], 'temperature': 0, 'max_tokens': NEW,
            'stream': True, 'stream_options': {'include_usage': True}}
    start, times, usage = time.monotonic(), [], None
    with httpx.stream('POST', url + '/chat/completions', json=body, timeout=600) as response:
        for line in response.iter_lines():
            event = json.loads(line[6:]) if line.startswith('data: {') else {'choices': []}
            if event['choices'] and event['choices'][0]['delta'].get('content'):
                times.append(time.monotonic())
            usage = event.get('usage') or usage
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
