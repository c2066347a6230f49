"""lm-evaluation-harness over our model and over transformers' with the same weights: equal log-likelihoods.

    pip install '.[lm-eval]' torch transformers accelerate
    python experiments/checks/check_lm_eval.py --model base                    prints the differences
    python experiments/checks/check_lm_eval.py --model smollm2 --mesh 1,1,2,1
    python experiments/checks/check_lm_eval.py --model base --golden           and writes tests/golden/lm_eval.json

The tasks are made here of a page of text: multiple choice of the next word, perplexity of paragraphs (the longest
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
BAR = 1e-4  # nats, of a continuation
OF_A_PAGE = 1e-6  # of its nats: it is a sum over hundreds of tokens, each known to 1e-5 in our float32
CHOICES, QUESTIONS, WRITTEN, NEW = 4, 12, 3, 16
MAX_LENGTH = 256  # tokens, so that a page takes several windows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument('--golden', action='store_true', help='write what transformers says')
    parser.add_argument('--their-dtype', default='float64', help="of transformers' model; its float32 is off by more "
                        'than ours: 2e-3 nats over 256 tokens of SmolLM2')
    args = parser.parse_args()
    with needs("'.[lm-eval]' torch transformers accelerate"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

    with mesh_context(args.mesh):
        from lct.eval.lm_eval_adapter import ShardedLM
        model, folder = load_model(args)
        hf = HFLM(pretrained=str(folder), dtype=args.their_dtype, device='cpu', batch_size=4, max_length=MAX_LENGTH)
        theirs, ours = (
            simple_evaluate(model=lm, tasks=page_tasks(), task_manager=TaskManager(include_defaults=False),
                            log_samples=True, bootstrap_iters=0)['samples']
            for lm in (hf, ShardedLM(model, MAX_LENGTH)))
    bad = 0
    for name in theirs:
        a, b = ([sample['resps'] for sample in samples[name]] for samples in (theirs, ours))
        if name == 'page_writing':
            good = a == b
            print(f'{name}: {len(a)} texts {"equal" if good else f"DIFFERENT: {a} {b}"}')
        else:
            pairs = list(zip(numbers(a), numbers(b), strict=True))
            error = max(abs(x - y) for x, y in pairs)
            relative = max(abs(x - y) / abs(x) for x, y in pairs)
            good = all(abs(x - y) <= max(BAR, OF_A_PAGE * abs(x)) for x, y in pairs)
            print(f'{name}: {len(pairs)} log-likelihoods, from {min(x for x, _ in pairs):.2f} to '
                  f'{max(x for x, _ in pairs):.2f} nats, largest difference {error:.1e}, relative {relative:.1e}')
            good &= [flags(x) for x in a] == [flags(x) for x in b]
        bad += not good
    if args.golden:
        write_golden(hf, theirs)
    sys.exit(1 if bad else 0)


def page_tasks():
    """[ConfigurableTask] of the page."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    text, draw = PAGE.read_text(encoding='utf-8'), random.Random(0)
    words = text.split(' ')
    questions = []
    for _ in range(QUESTIONS):
        at = draw.randrange(20, len(words) - 3)
        wrong = [' '.join(words[i:i + draw.randint(1, 3)]) for i in draw.sample(range(len(words) - 3), CHOICES - 1)]
        questions.append({'question': ' '.join(words[at - 20:at]), 'choices': [' '.join(words[at:at + 2]), *wrong]})
    paragraphs = [{'page': text}, *({'page': part} for part in text.split('\n\n')[:4] if part.strip())]

    def make(name, rows, **config):
        return ConfigurableTask(config={
            'task': name, 'custom_dataset': lambda **_: {'test': datasets.Dataset.from_list(rows)},
            'test_split': 'test', 'metadata': {'version': 1}, **config})

    return [
        make('page_choice', questions, output_type='multiple_choice', doc_to_text='{{question}}', doc_to_target=0,
             doc_to_choice='{{choices}}', metric_list=[{'metric': 'acc'}]),
        make('page_perplexity', paragraphs, output_type='loglikelihood_rolling', doc_to_text='', doc_to_target='{{page}}',
             metric_list=[{'metric': 'word_perplexity'}]),
        make('page_writing', questions[:WRITTEN], output_type='generate_until', doc_to_text='{{question}}',
             doc_to_target='', generation_kwargs={'until': ['\n'], 'do_sample': False, 'max_gen_toks': NEW},
             metric_list=[{'metric': 'exact_match'}]),
    ]


def numbers(resps):
    """The log-likelihoods in nested lists of (number, flag) or numbers."""
    if isinstance(resps, (list, tuple)):
        return [x for part in resps for x in numbers(part)]
    return [] if isinstance(resps, bool) else [float(resps)]


def flags(resps):
    """The answers to whether greedy decoding would have written it."""
    if isinstance(resps, (list, tuple)):
        return [x for part in resps for x in flags(part)]
    return [resps] if isinstance(resps, bool) else []


def write_golden(hf, samples):
    """What transformers' model gave, with the token ids that it was asked with."""
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
    GOLDEN.write_text(json.dumps({'max_length': MAX_LENGTH, 'new': NEW, 'stop': '\n', 'pairs': pairs, 'written': texts,
                                  'rolling': rolling}, indent=0) + '\n')
    print(f'written: {GOLDEN}, {GOLDEN.stat().st_size} bytes')


if __name__ == '__main__':
    run_script(main)
