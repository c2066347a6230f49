"""Ask a model about whole files. They are read into the cache once, for any number of questions.

    python experiments/ask.py --model smollm2 --files 'lct/ops/r*.py' \\
        --question 'What does ring_attention return?'
    python experiments/ask.py --model runs/8b/model --mesh 1,1,8,1 --files 'repo/**/*.py' 'repo/**/*.md' \\
        --session repo --cite
    python experiments/ask.py --model DIR --files mails/ --temperature 0.8 --top-p 0.9 \\
        --question 'Write a letter that declines an invitation, in the style of the letters above.'
    python experiments/ask.py --sessions

Without --question it reads questions from the terminal until an empty line. An answer ends with the model's
own end of turn, at a --stop string, or after --max-new-tokens; Ctrl-C ends it earlier, and the next question
works. With --session the text that was read is kept on disk: the next process maps it, on any mesh, and reads
only what follows the first change.
"""

import argparse
import sys
import time

from lct.cli import sessions
from lct.cli.flags import add_exclude_flag, length
from lct.cli.main import check_positive, run_script
from lct.cli.model import add_model_flags, load_model, mesh_context
from lct.cli.progress import bold, status


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if sessions.manage(sys.argv[1:]):
        return
    add_model_flags(parser, mesh='auto')
    parser.add_argument('--files', nargs='+', required=True,
                        help='folders, globs in quotes, or files; mail and notebooks are decoded')
    add_exclude_flag(parser)
    parser.add_argument('--question', action='append', help='may be given several times')
    parser.add_argument('--length', type=length,
                        help='most tokens of prompt and answer; default: all positions of the model')
    parser.add_argument('--max-new-tokens', type=length, default=256, help='most tokens of each answer')
    parser.add_argument('--temperature', type=float, default=0.0, help='0 for greedy decoding')
    parser.add_argument('--top-p', type=float, default=1.0,
                        help='sample from the most probable tokens of this total probability')
    parser.add_argument('--stop', action='append', default=[],
                        help='a string that ends an answer; may be given several times')
    parser.add_argument('--seed', type=int, default=0, help='seed of sampling; every question advances it')
    parser.add_argument('--cite', action='store_true',
                        help='ask for the names of files, and check those in the answer')
    sessions.add_flags(parser)
    ask(parser.parse_args())


def ask(args):
    """Print the answers and return their texts."""
    from lct.cli.reader import Reader, Saved
    from lct.data.corpus import bundle, listing
    from lct.data.detokenizer import Detokenizer

    if args.max_new_tokens < 1:
        raise ValueError(f'--max-new-tokens {args.max_new_tokens} must be at least 1')
    check_positive(args, 'length')
    Detokenizer(str, args.stop)  # refuses empty stop strings before anything is read
    folder = sessions.folder_of_flags(args)
    status('files', 'reading', transient=True)
    tally = listing.Tally()
    files = bundle.read(args.files, args.exclude, tally)
    status('files', f'{tally.sentence()}; {sum(len(one.text) for one in files):,} characters')
    with mesh_context(args.mesh):
        from lct.models.sampling import at_temperature

        sampling = at_temperature(args.temperature, args.top_p)
        status('model', f'{args.model}, loading', transient=True)
        model, model_folder = load_model(args)
        saved = folder and Saved(folder, sessions.model_facts(model, model_folder), args.model)
        reader = Reader(model, files, args.question or (), args.length, args.max_new_tokens, args.cite, saved)
        describe(args, reader)
        answers = converse(args, reader, sampling)
    if folder:
        sessions.keep_within(args.session_gb, [folder])
    return answers


def describe(args, reader):
    """Status lines on the model, the prompt, and what was read before."""
    from lct.models import llama

    status('model', f'{args.model}, {llama.num_params(reader.model.config) / 1e6:,.0f} million parameters')
    total = len(reader.prefix)
    status('prompt', f'{total:,} tokens; with question and answer {reader.needed:,} of {reader.length:,}: it '
                     'fits')
    start = time.monotonic()
    problem = reader.restore()
    if problem:
        status('session', problem)
    if reader.saved is not None:
        status('session', f'{reader.reused:,} of {total:,} tokens reused from {reader.saved.folder} in '
                          f'{time.monotonic() - start:.2f} s')


def converse(args, reader, sampling):
    """Ask the questions of the flags, or those that are typed -> the answers. Ctrl-C ends an answer, or a
    reading that the next question continues."""
    questions = iter(args.question) if args.question else iter(typed_question, '')
    answers, number, stopped = [], -1, False
    while True:
        try:
            if not stopped:
                read(reader)
            question, number = next(questions, None), number + 1
            if question is None:
                return answers
            read(reader)
            print(bold(f'\n{question}'), flush=True)
            answers.append(answer(args, reader, question, sampling, number))
        except KeyboardInterrupt:
            if args.question:
                raise
            stopped = True
            print()
            status('stopped', 'the next question continues; an empty line ends')
        except ValueError as error:
            if args.question:
                raise
            print('error:', error, file=sys.stderr)  # the next question may be a valid one


def typed_question():
    """A line from the terminal or a pipe; '' at its end."""
    try:
        return input(bold('question: ') if sys.stdin.isatty() else '').strip()
    except EOFError:
        return ''


def read(reader):
    if reader.is_read:
        return
    count = len(reader.prefix) - reader.num_read
    reader.read()
    status('read', f'{count:,} tokens in {reader.seconds_to_read:.1f} s, with compilation')


def answer(args, reader, question, sampling, number):
    """Print an answer while it is generated, and return its text."""
    import jax

    from lct.data.corpus import citations

    start, first, pieces = time.monotonic(), None, []
    key = sampling and jax.random.fold_in(jax.random.key(args.seed), number)
    for piece in reader.answer(question, sampling, key, args.stop):
        first = first or time.monotonic()
        print(piece, end='', flush=True)
        pieces.append(piece)
    print()
    end, text = time.monotonic(), ''.join(pieces)
    first = first or end
    of_question, count = reader.num_tokens
    status('', f'{of_question} tokens of question read in {first - start:.2f} s; without the cache '
               f'{reader.seconds_to_read:.1f} s more. {count} tokens answered, '
               f'{(count - 1) / max(end - first, 1e-9):.1f} a second')
    if args.cite:
        report_citations(citations.check(text, [one.name for one in reader.files]))
    return text


def report_citations(found):
    """A status line on the files that an answer names."""
    parts = [f'read: {", ".join(found.read)}'] if found.read else []
    parts += [f'NOT among the files that were read: {", ".join(found.unknown)}'] if found.unknown else []
    status('cited', '; '.join(parts) or 'the answer names no file')


if __name__ == '__main__':
    run_script(main, urls=('--model', '--files'))
