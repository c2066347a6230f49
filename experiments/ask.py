"""Ask a model about whole files. They are read into the cache once, for any number of questions.

    python experiments/ask.py --model smollm2 --files 'lct/ops/r*.py' \\
        --question 'What does ring_attention return?'
    python experiments/ask.py --model runs/8b/model --mesh 1,1,8,1 --files 'repo/**/*.py' 'repo/**/*.md'
    python experiments/ask.py --model DIR --files mails/ --temperature 0.8 --top-p 0.9 \\
        --question 'Write a letter that declines an invitation, in the style of the letters above.'

Without --question it reads questions from the terminal until an empty line. An answer ends with the model's
own end of turn, at a --stop string, or after --max-new-tokens.
"""

import argparse
import os
import sys
import time

from lct.cli.main import check_positive, run_script
from lct.cli.model import add_model_flags, load_model, mesh_context
from lct.cli.progress import Progress, bold, status

QUESTION_ROOM = 512  # tokens reserved for questions that are typed later
PREFILL_CHUNK = 512  # tokens of one forward pass, so that progress shows
PROBE_QUESTIONS = ('What', '0', '(', 'é')  # their prompts share what precedes any question


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument('--files', nargs='+', required=True, help='folders, globs in quotes, or files')
    parser.add_argument('--question', action='append', help='may be given several times')
    parser.add_argument('--length', type=int,
                        help='most tokens of prompt and answer; default: all positions of the model')
    parser.add_argument('--max-new-tokens', type=int, default=256, help='most tokens of each answer')
    parser.add_argument('--temperature', type=float, default=0.0, help='0 for greedy decoding')
    parser.add_argument('--top-p', type=float, default=1.0,
                        help='sample from the most probable tokens of this total probability')
    parser.add_argument('--stop', action='append', default=[],
                        help='a string that ends an answer; may be given several times')
    parser.add_argument('--seed', type=int, default=0, help='seed of sampling')
    ask(parser.parse_args())


def ask(args):
    """Print the answers and return their texts."""
    from lct.data.corpus import bundle
    from lct.data.detokenizer import Detokenizer
    from lct.models.sampling import Sampling

    if args.max_new_tokens < 1:
        raise ValueError(f'--max-new-tokens {args.max_new_tokens} must be at least 1')
    check_positive(args, 'length')
    Detokenizer(str, args.stop)  # refuses empty stop strings before anything is read
    sampling = None
    if args.temperature or args.top_p != 1:
        sampling = Sampling(args.temperature or 1.0, args.top_p)
    files = bundle.read(args.files)
    with mesh_context(args.mesh):
        model, _ = load_model(args)
        reader = Reader(model, files, args)
        reader.read()
        answers = []
        for question in args.question or typed_questions():
            try:
                answers.append(reader.answer(question, sampling))
            except ValueError as error:
                if args.question:
                    raise
                print('error:', error, file=sys.stderr)  # the next question may be a valid one
        return answers


def typed_questions():
    """Questions from the terminal or a pipe, up to an empty line."""
    while True:
        try:
            question = input(bold('question: ') if sys.stdin.isatty() else '').strip()
        except EOFError:
            return
        if not question:
            return
        yield question


class Reader:
    """A model with a bundle of files in its cache."""

    def __init__(self, model, files, args):
        from lct import sharding
        from lct.data.corpus import bundle
        from lct.models import llama, prompt_layout

        self.model, self.args, self.text = model, args, bundle.text(files)
        positions = model.config.max_position_embeddings
        self.length = args.length or positions
        if not 1 <= self.length <= positions:
            raise ValueError(f'--length {self.length} is not within the {positions} positions of the model; '
                             f'use {positions} or less')
        self.prefix = os.path.commonprefix([self.prompt(question) for question in PROBE_QUESTIONS])
        longest = max(len(self.prompt(question)) for question in args.question or PROBE_QUESTIONS)
        needed = longest + args.max_new_tokens
        status('model', f'{args.model}, {llama.num_params(model.config) / 1e6:,.0f} million parameters')
        status('files', f'{len(files)}, {len(self.text):,} characters')
        bundle.check_fits(files, model.tokenizer, needed, self.length)
        status('prompt', f'{len(self.prefix):,} tokens; with question and answer {needed:,} of '
                         f'{self.length:,}: it fits')
        total = needed if args.question else min(needed + QUESTION_ROOM, self.length)
        seq_len = prompt_layout.cache_len(total, sharding.axis_size('sequence'), model.memory.ffn_chunks)
        self.session = model.session(sharding.axis_size('data') * sharding.axis_size('fsdp'), seq_len, total)
        self.seconds_to_read = 0.0

    def prompt(self, question):
        """Token ids of the files, the question after them, and the answer prefix."""
        from lct.eval.samples import Sample

        plain = self.model.template is None
        text = f'{self.text}\n{"Question: " * plain}{question}{chr(10) * plain}'
        return self.model.prompt_ids(Sample('', 0, 0, text, 'Answer:' * plain, [], 0, {}))

    def read(self):
        """Fill the cache with the files."""
        import jax

        start, unit = time.monotonic(), self.session.unit
        chunk = self.args.piece or -(-min(PREFILL_CHUNK, len(self.prefix)) // unit) * unit
        progress = Progress('reading', 'tokens') if sys.stderr.isatty() else None
        self.session.read([self.prefix], chunk, progress)
        jax.block_until_ready(self.session.logits)
        self.seconds_to_read = time.monotonic() - start
        status('read', f'{len(self.prefix):,} tokens in {self.seconds_to_read:.1f} s, with compilation')

    def answer(self, question, sampling):
        """Print an answer while it is generated, and return its text."""
        start = time.monotonic()
        ids = self.prompt(question)
        room = min(self.length, self.session.seq_len)
        limit = min(self.args.max_new_tokens, room - len(ids))
        if limit < 1:
            raise ValueError(f'the question takes the prompt to {len(ids):,} tokens, which leaves no room '
                             f'for an answer within {room:,}; ask a shorter one')
        shared = len(os.path.commonprefix([self.prefix, ids]))
        if shared < len(self.prefix):  # the tokenizer merges this question with the text before it
            self.prefix = self.prefix[:shared]
            self.session.rewind([shared, *self.session.lengths[1:]])
        print(bold(f'\n{question}'), flush=True)
        text, count, first = self._generate(ids[shared:], limit, sampling)
        seconds_to_first = first - start if first else 0
        seconds = time.monotonic() - start - seconds_to_first
        status('', f'{len(ids) - shared} tokens of question read in {seconds_to_first:.2f} s; without the '
                   f'cache {self.seconds_to_read:.1f} s more. {count} tokens answered, '
                   f'{(count - 1) / max(seconds, 1e-9):.1f} a second')
        return text

    def _generate(self, question, limit, sampling):
        """Print an answer token by token; returns (text, number of tokens, time of the first token)."""
        import jax

        from lct.data.detokenizer import Detokenizer

        out = Detokenizer(self.model.tokenizer.decode, self.args.stop)
        stop, count, first = self.model.stop_mask(one_line=False), 0, None
        tokens = self.session.stream([question], limit, sampling, jax.random.key(self.args.seed))
        try:
            for (token,) in tokens:
                first = first or time.monotonic()
                count += 1
                if stop[token]:
                    break
                print(out.push(token), end='', flush=True)
                if out.stopped:
                    break
        except KeyboardInterrupt:
            if self.args.question:
                raise
        finally:
            tokens.close()
        print(out.finish())
        return out.text, count, first


if __name__ == '__main__':
    run_script(main)
