"""lm-evaluation-harness over our model and over transformers with the same weights: equal log-likelihoods.

    pip install '.[lm-eval]' torch transformers accelerate
    python experiments/checks/check_lm_eval.py --model base            prints the differences
    python experiments/checks/check_lm_eval.py --model smollm2 --mesh 1,1,2,1
    python experiments/checks/check_lm_eval.py --model base --golden   and writes tests/golden/lm_eval.json

The tasks are made of a page of text: multiple choice of the next words, perplexity of paragraphs (the longest
takes more than one window), and greedy continuation up to a line end.
"""

import argparse
import json
import pathlib
import random
import sys

from lct.cli.main import needs, run_script
from lct.cli.model import add_model_flags, load_model, mesh_context

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden' / 'page.txt'
GOLDEN = PAGE.with_name('lm_eval.json')
TOLERANCE = 1e-4  # nats of a continuation
PAGE_TOLERANCE = 1e-6  # relative, for a sum over hundreds of tokens, each exact to 1e-5 in our float32
CHOICES, QUESTIONS, CONTINUATIONS, NEW_TOKENS = 4, 12, 3, 16
MAX_LENGTH = 256  # tokens, so that a page takes several windows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument('--golden', action='store_true', help='write the results of transformers')
    parser.add_argument('--their-dtype', default='float64',
                        help='dtype of the model in transformers, whose float32 is less accurate than ours: '
                        '2e-3 nats over 256 tokens of SmolLM2')
    args = parser.parse_args()
    with needs("'.[lm-eval]' torch transformers accelerate"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

    with mesh_context(args.mesh):
        from lct.eval.lm_eval_adapter import ShardedLM
        model, folder = load_model(args)
        hf = HFLM(pretrained=str(folder), dtype=args.their_dtype, device='cpu', batch_size=4,
                  max_length=MAX_LENGTH)
        theirs, ours = (
            simple_evaluate(model=lm, tasks=page_tasks(), task_manager=TaskManager(include_defaults=False),
                            log_samples=True, bootstrap_iters=0)['samples']
            for lm in (hf, ShardedLM(model, MAX_LENGTH)))
    passed = [compare(name, *([sample['resps'] for sample in samples[name]] for samples in (theirs, ours)))
              for name in theirs]
    if args.golden:
        write_golden(hf, theirs)
    sys.exit(0 if all(passed) else 1)


def compare(name, expected, actual):
    """Print and return whether the responses of a task agree."""
    if name == 'page_writing':
        equal = expected == actual
        print(f'{name}: {len(expected)} texts {"equal" if equal else f"DIFFERENT: {expected} {actual}"}')
        return equal
    pairs = list(zip(numbers(expected), numbers(actual), strict=True))
    error = max(abs(x - y) for x, y in pairs)
    relative = max(abs(x - y) / abs(x) for x, y in pairs)
    print(f'{name}: {len(pairs)} log-likelihoods, from {min(x for x, _ in pairs):.2f} to '
          f'{max(x for x, _ in pairs):.2f} nats, largest difference {error:.1e}, relative {relative:.1e}')
    close = all(abs(x - y) <= max(TOLERANCE, PAGE_TOLERANCE * abs(x)) for x, y in pairs)
    return close and [flags(x) for x in expected] == [flags(x) for x in actual]


def page_tasks():
    """The tasks, ConfigurableTask of the harness."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    text, rng = PAGE.read_text(encoding='utf-8'), random.Random(0)
    page_words = text.split(' ')
    questions = []
    for _ in range(QUESTIONS):
        start = rng.randrange(20, len(page_words) - 3)
        wrong = [' '.join(page_words[i:i + rng.randint(1, 3)])
                 for i in rng.sample(range(len(page_words) - 3), CHOICES - 1)]
        right = ' '.join(page_words[start:start + 2])
        questions.append({'question': ' '.join(page_words[start - 20:start]), 'choices': [right, *wrong]})
    pages = [text, *(paragraph for paragraph in text.split('\n\n')[:4] if paragraph.strip())]

    def make(name, rows, **config):
        return ConfigurableTask(config={
            'task': name, 'custom_dataset': lambda **_: {'test': datasets.Dataset.from_list(rows)},
            'test_split': 'test', 'metadata': {'version': 1}, **config})

    return [
        make('page_choice', questions, output_type='multiple_choice', doc_to_text='{{question}}',
             doc_to_target=0, doc_to_choice='{{choices}}', metric_list=[{'metric': 'acc'}]),
        make('page_perplexity', [{'page': page} for page in pages], output_type='loglikelihood_rolling',
             doc_to_text='', doc_to_target='{{page}}', metric_list=[{'metric': 'word_perplexity'}]),
        make('page_writing', questions[:CONTINUATIONS], output_type='generate_until',
             doc_to_text='{{question}}', doc_to_target='',
             generation_kwargs={'until': ['\n'], 'do_sample': False, 'max_gen_toks': NEW_TOKENS},
             metric_list=[{'metric': 'exact_match'}]),
    ]


def numbers(resps):
    """The log-likelihoods in nested lists of (number, flag) or numbers."""
    if isinstance(resps, (list, tuple)):
        return [x for resp in resps for x in numbers(resp)]
    return [] if isinstance(resps, bool) else [float(resps)]


def flags(resps):
    """The flags in nested lists of (number, flag), which are true for greedy continuations."""
    if isinstance(resps, (list, tuple)):
        return [x for resp in resps for x in flags(resp)]
    return [resps] if isinstance(resps, bool) else []


def write_golden(hf, samples):
    """The results of transformers with the token ids of their prompts."""
    pairs, texts = [], []
    for sample in samples['page_choice']:
        for choice, resp in zip(sample['doc']['choices'], sample['filtered_resps'], strict=True):
            context, continuation = hf._encode_pair(sample['doc']['question'], ' ' + choice)
            pairs.append({'context': context, 'continuation': continuation, 'value': float(resp[0]),
                          'greedy': bool(resp[1])})
    for sample in samples['page_writing']:
        texts.append({'prompt': hf.tok_encode(sample['doc']['question']), 'text': sample['resps'][0][0]})
    rolling = [{'text': sample['doc']['page'], 'value': numbers(sample['resps'])[0]}
               for sample in samples['page_perplexity']]
    GOLDEN.write_text(json.dumps({
        'max_length': MAX_LENGTH, 'new': NEW_TOKENS, 'stop': '\n', 'pairs': pairs, 'written': texts,
        'rolling': rolling}, indent=0) + '\n')
    print(f'written: {GOLDEN}, {GOLDEN.stat().st_size} bytes')


if __name__ == '__main__':
    run_script(main)
