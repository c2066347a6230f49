"""Put whole files into one prompt and ask a model about them. They are read once, for any number of
questions.

    python experiments/ask.py --model smollm2 --files 'lct/ops/r*.py' --question 'What does ring_attention return?'
    python experiments/ask.py --model runs/8b/model --mesh 1,1,8,1 --files 'repo/**/*.py' 'repo/**/*.md'
    python experiments/ask.py --model DIR --files mails/ --temperature 0.8 --top-p 0.9 \\
        --question 'Write a letter that declines an invitation, in the style of the letters above.'

Without --question it asks for questions until an empty line. An answer ends with the model's own end of turn,
at a --stop string, or after --max-new-tokens.
"""

import argparse
import os
import sys
import time

from lct.cli.main import run_script
from lct.cli.model import add_model_flags, load_model, mesh_context

QUESTION_ROOM = 512  # tokens of a question that is yet to come
PIECE = 512  # tokens of one forward, so that progress shows
FIRST_WORDS = ('What', '0', '(', 'é')  # what any question has before it is the same whichever of these begins it
BAR = 30


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument('--files', nargs='+', required=True, help='folders, globs in quotes, or files')
    parser.add_argument('--question', action='append', help='may be given several times')
    parser.add_argument('--length', type=int, help='tokens of prompt and answer at most; default all positions')
    parser.add_argument('--max-new-tokens', type=int, default=256, help='of each answer')
    parser.add_argument('--temperature', type=float, default=0.0, help='0 takes the likeliest token every time')
    parser.add_argument('--top-p', type=float, default=1.0, help='draw from the likeliest words of this probability')
    parser.add_argument('--stop', action='append', default=[], help='a string that ends an answer; several times')
    parser.add_argument('--seed', type=int, default=0, help='of what is drawn')
    ask(parser.parse_args())


def ask(args):
    """Returns the answers."""
    from lct.data.corpus import bundle
    from lct.models.sampling import Sampling

    if args.max_new_tokens < 1:
        raise ValueError(f'--max-new-tokens {args.max_new_tokens} must be at least 1')
    sampling = None
    if args.temperature or args.top_p < 1:
        sampling = Sampling(args.temperature or 1.0, args.top_p)
    files = bundle.read(args.files)
    with mesh_context(args.mesh):
        model, _ = load_model(args)
        reader = Reader(model, files, args)
        reader.read()
        answers = []
        for question in args.question or typed():
            try:
                answers.append(reader.answer(question, sampling))
            except ValueError as error:
                if args.question:
                    raise
                print('error:', error, file=sys.stderr)  # the next question may be a better one
        return answers


def typed():
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
        from lct.models import decode, llama

        self.model, self.args, self.text = model, args, bundle.text(files)
        positions = model.config.max_position_embeddings
        self.length = args.length or positions
        if not 1 <= self.length <= positions:
            raise ValueError(f'--length {self.length} is not within the {positions} positions of the model; use '
                             f'{positions} or less')
        prompts = [self.prompt(word) for word in FIRST_WORDS]
        self.prefix = os.path.commonprefix(prompts)
        asked = max(len(self.prompt(question)) for question in args.question or FIRST_WORDS)
        needed = asked + args.max_new_tokens
        say('model', f'{args.model}, {llama.num_params(model.config) / 1e6:,.0f} million parameters')
        say('files', f'{len(files)}, {len(self.text):,} characters')
        bundle.check_fits(files, model.tokenizer, needed, self.length)
        say('prompt', f'{len(self.prefix):,} tokens; with question and answer {needed:,} of {self.length:,}: it fits')
        total = needed if args.question else min(needed + QUESTION_ROOM, self.length)
        seq_len = decode.cache_len(total, sharding.axis_size('sequence'), model.memory.ffn_chunks)
        self.session = model.session(sharding.axis_size('data') * sharding.axis_size('fsdp'), seq_len, total)
        self.first_reading = 0.0

    def prompt(self, question):
        """Token ids of the files and a question behind them, and the opening of the answer."""
        from lct.eval.samples import Sample

        plain = self.model.template is None
        text = f'{self.text}\n{"Question: " * plain}{question}{chr(10) * plain}'
        return self.model.prompt_ids(Sample('', 0, 0, text, 'Answer:' * plain, [], 0, {}))

    def read(self):
        """Fill the cache with the files."""
        import jax

        start, unit = time.monotonic(), self.session.unit
        piece = self.args.piece or -(-min(PIECE, len(self.prefix)) // unit) * unit

        def progress(done, total):
            spent = time.monotonic() - start
            say('reading', f'{"█" * (BAR * done // total):░<{BAR}} {done:,} of {total:,} tokens, {spent:.1f} s, '
                           f'{spent / done * (total - done):.0f} s left', '')

        self.session.read([self.prefix], piece, progress if sys.stderr.isatty() else None)
        jax.block_until_ready(self.session.logits)
        self.first_reading = time.monotonic() - start
        say('read', f'{len(self.prefix):,} tokens in {self.first_reading:.1f} s, with compilation')

    def answer(self, question, sampling):
        """Print an answer as it comes; returns it."""
        import jax

        from lct.data.detokenizer import Detokenizer

        start = time.monotonic()
        ids = self.prompt(question)
        room = min(self.length, self.session.seq_len)
        limit = min(self.args.max_new_tokens, room - len(ids))
        if limit < 1:
            raise ValueError(f'the question takes the prompt to {len(ids):,} tokens, which leaves no room for an answer '
                             f'within {room:,}; ask a shorter one')
        shared = len(os.path.commonprefix([self.prefix, ids]))
        if shared < len(self.prefix):  # a tokenizer that joins the beginning of this question to what is before
            self.prefix = self.prefix[:shared]
            self.session.rewind([shared, *self.session.lengths[1:]])
        print(bold(f'\n{question}'), flush=True)
        out = Detokenizer(self.model.tokenizer.decode, self.args.stop)
        ends, count, waited = self.model.stop_mask(one_line=False), 0, None
        tokens = self.session.stream([ids[shared:]], limit, sampling, jax.random.key(self.args.seed))
        try:
            for (token,) in tokens:
                waited = waited or time.monotonic() - start
                count += 1
                if ends[token]:
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
        spent = time.monotonic() - start - (waited or 0)
        say('', f'{len(ids) - shared} tokens of question read in {waited or 0:.2f} s; without the cache '
                f'{self.first_reading:.1f} s more. {count} tokens answered, {(count - 1) / max(spent, 1e-9):.1f} a second')
        return out.text


def styled(code, text, stream):
    return f'\033[{code}m{text}\033[0m' if stream.isatty() and 'NO_COLOR' not in os.environ else text


def bold(text):
    return styled(1, text, sys.stdout)


def say(name, text, end='\n'):
    """A line about what happens, apart from the answers; in a terminal it takes the place of a passing
    one."""
    clear = '\r\033[K' if sys.stderr.isatty() else ''
    print(clear + styled(2, f'{name:8} {text}', sys.stderr), end=end, file=sys.stderr, flush=True)


if __name__ == '__main__':
    run_script(main)
