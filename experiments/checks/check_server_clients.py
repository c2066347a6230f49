"""The server and clients that others wrote: the openai package, lm-evaluation-harness, and command lines.

    pip install '.[serve]' httpx openai 'lm_eval[api]'
    python experiments/checks/check_server_clients.py --model base
    python experiments/checks/check_server_clients.py --llm .venv_llm/bin/llm --aider .venv_aider/bin/aider

llm and aider need environments of their own; each is a program that speaks to any server of the OpenAI API.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

from server_process import Server, model_with_template

from lct.cli.main import run_script

KEY = 'a key for the check'
QUESTION = 'The key is 12. What is the key?'
NEW = 12


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='base')
    parser.add_argument('--only', help='openai, lm_eval, llm or aider')
    parser.add_argument('--llm', help='path of the program')
    parser.add_argument('--aider', help='path of the program')
    args = parser.parse_args()
    checks = {'openai': check_openai, 'lm_eval': check_lm_eval, 'llm': check_llm, 'aider': check_aider}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # The prompts of a coding assistant are longer than the 512 tokens of the base model.
        model = model_with_template(args.model, folder, 4096)
        server = Server(folder / 'cache', '--model', str(model), '--max-new-tokens', '64', key=KEY)
        try:
            for client, check in checks.items():
                if args.only in (None, client):
                    print(f'{client}: {check(server, args, folder)}', flush=True)
        finally:
            server.stop()


def check_openai(server, args, folder):
    """All routes, fields and errors that the package has names for."""
    import openai

    client = openai.OpenAI(base_url=server.url, api_key=KEY, timeout=300, max_retries=0)
    model = client.models.list().data[0].id
    ask = {'model': model, 'messages': [{'role': 'user', 'content': QUESTION}], 'temperature': 0,
           'max_tokens': NEW}
    whole = client.chat.completions.create(**ask)
    text, usage = whole.choices[0].message.content, whole.usage
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={'include_usage': True}))
    streamed = ''.join(chunk.choices[0].delta.content or '' for chunk in chunks if chunk.choices)
    assert streamed == text and chunks[-1].usage.completion_tokens == usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    tokens = client.chat.completions.create(
        **ask, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(one.logprob == max(other.logprob for other in one.top_logprobs) for one in tokens)
    assert client.completions.create(model=model, prompt=QUESTION, max_tokens=4, logprobs=1).choices[0].text
    with client.chat.completions.create(**{**ask, 'max_tokens': 200}, stream=True) as unfinished:
        next(iter(unfinished))
    refused = 0
    for error, changes, key in ((openai.BadRequestError, {'n': 2}, KEY),
                                (openai.AuthenticationError, {}, 'x'),
                                (openai.NotFoundError, {'model': 'other'}, KEY)):
        try:
            client.with_options(api_key=key).chat.completions.create(**{**ask, **changes})
        except error:
            refused += 1
    assert refused == 3
    assert client.chat.completions.create(**ask).choices[0].message.content == text
    return f'{openai.__version__}, {usage.prompt_tokens} + {usage.completion_tokens} tokens, {text!r}'


def check_lm_eval(server, args, folder):
    """Its model for chat completions generates what the routes answer."""
    import lm_eval
    import openai
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    os.environ['OPENAI_API_KEY'] = KEY
    rows = [{'question': f'{i}. {QUESTION}'} for i in range(6)]
    task = ConfigurableTask(config={
        'task': 'questions', 'custom_dataset': lambda **_: {'test': Dataset.from_list(rows)},
        'test_split': 'test', 'output_type': 'generate_until', 'doc_to_text': '{{question}}',
        'doc_to_target': '', 'generation_kwargs': {'until': ['\n'], 'do_sample': False, 'max_gen_toks': NEW},
        'metric_list': [{'metric': 'exact_match'}], 'metadata': {'version': 1}})
    results = lm_eval.simple_evaluate(
        model='local-chat-completions', tasks=[task], apply_chat_template=True, bootstrap_iters=0,
        model_args={'base_url': server.url + '/chat/completions', 'model': pathlib.Path(args.model).name,
                    'num_concurrent': 3, 'tokenized_requests': False},
        task_manager=TaskManager(include_defaults=False), log_samples=True)
    client = openai.OpenAI(base_url=server.url, api_key=KEY, timeout=300)
    equal = 0
    for row, sample in zip(rows, results['samples']['questions'], strict=True):
        answer = client.chat.completions.create(
            model=pathlib.Path(args.model).name, max_tokens=NEW, temperature=0, stop=['\n'],
            messages=[{'role': 'user', 'content': row['question']}])
        equal += answer.choices[0].message.content == sample['resps'][0][0]
    assert equal == len(rows), f'{equal} of {len(rows)}'
    return f'{lm_eval.__version__}, {equal} of {len(rows)} answers equal'


def check_llm(server, args, folder):
    if not args.llm:
        return 'not given'
    home = folder / 'llm'
    home.mkdir()
    name = pathlib.Path(args.model).name
    (home / 'extra-openai-models.yaml').write_text(
        f'- model_id: ours\n  model_name: {name}\n  api_base: {server.url}\n  api_key_name: ours\n')
    (home / 'keys.json').write_text(json.dumps({'ours': KEY}))
    ran = subprocess.run([args.llm, '-m', 'ours', '-o', 'temperature', '0', '-o', 'max_tokens', str(NEW),
                          QUESTION], env={**os.environ, 'LLM_USER_PATH': str(home)}, timeout=300,
                         capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr[-500:]
    return repr(ran.stdout.strip())


def check_aider(server, args, folder):
    """A coding assistant asks about a file of a repository, without a network."""
    if not args.aider:
        return 'not given'
    repository = folder / 'repository'
    repository.mkdir()
    (repository / 'add.py').write_text('def add(a, b):\n    return a + b\n')
    name = pathlib.Path(args.model).name
    command = [
        args.aider, '--model', f'openai/{name}', '--openai-api-base', server.url, '--openai-api-key', KEY,
        '--no-git', '--yes-always', '--no-check-update', '--analytics-disable', '--no-show-model-warnings',
        '--map-tokens', '0', '--no-auto-lint', '--edit-format', 'ask', '--no-show-release-notes',
        '--no-detect-urls', '--message', 'What does add return?', 'add.py']
    ran = subprocess.run(command, cwd=repository, timeout=400, capture_output=True, text=True,
                         stdin=subprocess.DEVNULL, env={**os.environ, 'HOME': str(folder)})
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    return f'status {ran.returncode}, ' + ' / '.join(lines[-6:])[-600:] + ran.stderr[-300:]


if __name__ == '__main__':
    run_script(main)
