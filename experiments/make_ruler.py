"""Write RULER's 13 tasks as JSONL for a tokenizer: DIR/LENGTH/TASK/validation.jsonl, one sample on each line.

    python experiments/make_ruler.py DIR --tokenizer FOLDER_OR_FILE --lengths 4096,131072 --samples 500
    python experiments/make_ruler.py DIR --tokenizer bytes --tasks cwe --words wonderwords --placement ruler
    python experiments/make_ruler.py DIR --tokenizer llama3 --read oracle     also predict, score and count

With --read the samples are checked: every prompt is tokenized as a whole, a reference reader answers from the
prompt alone, its predictions are written to DIR/LENGTH/pred/TASK.jsonl for RULER's evaluate.py, and
DIR/check.json keeps scores, fill and seconds. DIR/made_from.json keeps the sources of the texts.
"""

import argparse
import json
import pathlib
import statistics
import time

from lct.cli.corpus import read_documents
from lct.cli.main import check_positive, run_script
from lct.cli.model import parse_lengths
from lct.data import tokenizer as tokenizers
from lct.eval import samples, scoring
from lct.eval.tasks import needle_placement, qa_documents, reference_readers, ruler, ruler_text
from lct.eval.tasks.material import ChatOverhead, Material
from lct.files import write_atomically

READERS = {'oracle': reference_readers.oracle, 'half': reference_readers.coin_flip_oracle,
           'mute': reference_readers.silent}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=pathlib.Path)
    parser.add_argument('--tokenizer', required=True, help="the tokenizer of the model, or 'bytes'")
    parser.add_argument('--tasks', default=','.join(ruler.TASKS), help='names separated by commas')
    parser.add_argument('--lengths', default=','.join(map(str, ruler.LENGTHS)),
                        help='tokens of prompt and answer together')
    parser.add_argument('--samples', type=int, default=500, help='samples of each task')
    parser.add_argument('--seed', type=int, default=42, help='seed of the samples')
    parser.add_argument('--overhead', type=int, default=0, help='tokens that a chat template adds')
    parser.add_argument('--haystack', default='embedded',
                        help='folder, glob, or file of text, .jsonl or .parquet')
    parser.add_argument('--words', default='generated', help="'generated', 'wonderwords' or a word list file")
    parser.add_argument('--placement', choices=('stratified', 'ruler'), default='stratified')
    parser.add_argument('--squad', type=pathlib.Path, help='JSON file for qa_1')
    parser.add_argument('--hotpotqa', type=pathlib.Path, help='JSON file for qa_2')
    parser.add_argument('--read', choices=READERS, help='reference reader that checks the samples')
    args = parser.parse_args()
    check_positive(args, 'samples')
    configs = [ruler.task(name) for name in args.tasks.split(',')]
    lengths = parse_lengths('--lengths', args.lengths)
    material = make_material(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(args.folder / 'made_from.json', json.dumps(material.provenance(), indent=1) + '\n')
    report = []
    for length in lengths:
        for config in configs:
            wall, busy = time.perf_counter(), time.process_time()
            task_samples = [material.sample(config, length, index) for index in range(args.samples)]
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            folder = args.folder / str(length)
            samples.write(folder / config.task / 'validation.jsonl', map(samples.to_ruler, task_samples))
            fill = statistics.median(sample.meta['tokens'] for sample in task_samples) / length
            row = {'length': length, 'task': config.task, 'samples': len(task_samples),
                   'seconds': round(wall, 2), 'cpu_seconds': round(busy, 2), 'fill': round(fill, 4)}
            if args.read:
                predictions = folder / 'pred' / f'{config.task}.jsonl'
                row |= check(material, task_samples, READERS[args.read], predictions)
            report.append(row)
            print(json.dumps(row), flush=True)
    if args.read:
        write_atomically(args.folder / 'check.json', json.dumps(report, indent=1) + '\n')


def make_material(args):
    """The Material that the flags describe."""
    paths = {name: path for name, path in (('squad', args.squad), ('hotpotqa', args.hotpotqa)) if path}
    sources = qa_documents.read_sources(paths)
    placement = needle_placement.RulerFixed if args.placement == 'ruler' else needle_placement.Stratified
    return Material(
        tokenizers.load(args.tokenizer), read_documents(args.haystack), text_source=args.haystack,
        lexicon=ruler_text.load_lexicon(args.words, args.seed), sources=sources, seed=args.seed,
        placement=placement(args.seed), overhead=ChatOverhead(args.overhead))


def check(material, task_samples, reader, path):
    """Count, answer and score the samples of a task; the predictions are written to path."""
    used = [material.tokens_used(sample) for sample in task_samples]
    texts = [reader(sample.text) for sample in task_samples]
    samples.write(path, map(samples.prediction, task_samples, texts))
    score = scoring.task_score([scoring.score(sample.task, text, sample.outputs)
                                for sample, text in zip(task_samples, texts, strict=True)], texts)
    length = task_samples[0].length
    return {'over': sum(size > length for size in used),
            'counted_fill': round(statistics.median(used) / length, 4),
            'lowest_fill': round(min(used) / length, 4),
            'score': score.mean, 'interval': [round(x, 2) for x in score.interval], 'nulls': score.nulls}


if __name__ == '__main__':
    run_script(main, urls=('--tokenizer', '--haystack'))
