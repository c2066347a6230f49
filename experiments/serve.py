"""Answer over HTTP, as clients of the OpenAI API ask: what they read once is reused for the next question.

    pip install '.[serve]'
    python experiments/serve.py --model smollm2                      then open http://127.0.0.1:8000
    python experiments/serve.py --model runs/8b/model --length 131072 --cache-gib 40
    LCT_API_KEY=... python experiments/serve.py --model DIR --host 0.0.0.0

Clients need the address http://127.0.0.1:8000/v1, any API key (that of LCT_API_KEY if it is set) and the
name of the model: the routes are models, completions and chat/completions. Requests are answered one after
another; a client that goes away frees its place at once. What was read is kept in memory (--cache-gib) and
on disk (--session-gb, beside the sessions of ask.py, which are continued too), so that a server that starts
again need not read it again; the texts are those of the users, so the folder is readable by its owner alone.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

from lct.cli import sessions
from lct.cli.flags import length
from lct.cli.main import check_positive, needs, run_script
from lct.cli.model import add_model_flags, load_model, mesh_context
from lct.cli.progress import status

API_KEY = 'LCT_API_KEY'  # not a flag: other users of a machine see the flags of its processes
STOP_S = 3  # for open connections to end


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, mesh='auto')
    parser.add_argument('--name', help='of the model for clients; default: the name of its folder')
    parser.add_argument('--host', default='127.0.0.1', help='address; default: this machine only')
    parser.add_argument('--port', type=int, default=8000, help='0 for any free one')
    parser.add_argument('--length', type=length,
                        help='most tokens of prompt and answer; default: all positions of the model')
    parser.add_argument('--max-new-tokens', type=length, default=1024,
                        help='most tokens of each answer, where a request does not say')
    parser.add_argument('--cache-gib', type=float, default=2.0, help='memory for the texts that are kept')
    parser.add_argument('--session-gb', type=float, default=20.0,
                        help='disk space of all sessions; those unused for longest are deleted; 0 for none')
    parser.add_argument('--max-waiting', type=int, default=64, help='requests in the queue')
    parser.add_argument('--max-body-mib', type=int, default=16, help='of a request')
    serve(parser.parse_args())


def serve(args):
    """Serve until Ctrl-C."""
    with needs("'.[serve]'"):
        import uvicorn

        from lct.serve.app import LOOPBACK, Settings, make_app
        from lct.serve.jobs import ModelThread

    check_positive(args, 'length', 'max_new_tokens', 'max_waiting', 'max_body_mib')
    if not args.cache_gib > 0:
        raise ValueError(f'--cache-gib {args.cache_gib} must be above 0')
    if not args.session_gb >= 0:
        raise ValueError(f'--session-gb {args.session_gb} must be 0 or more')
    token, loopback = os.environ.get(API_KEY) or None, args.host in LOOPBACK
    with mesh_context(args.mesh):
        model, folder = load_model(args)
        length = checked_length(args.length, model.config.max_position_embeddings)
        name = args.name or pathlib.Path(args.model).name
        answerer = make_answerer(args, model, folder, length, name)
    settings = Settings(name, length, args.max_body_mib * 2**20, token, loopback, model.template is not None)
    thread = ModelThread(answerer, lambda: mesh_context(args.mesh), args.max_waiting)
    app = make_app(thread, settings, lambda: answerer.texts.listing)
    config = uvicorn.Config(app, args.host, args.port, log_level='warning', timeout_graceful_shutdown=STOP_S,
                            h11_max_incomplete_event_size=2**16)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen()  # who reads the next line may connect
    host, port = socket.getsockname()[:2]
    status('serving', f'{name}, up to {length:,} tokens, at http://{host}:{port}')
    if not (loopback or token):
        print(f'WARNING: anyone who reaches {host} may ask; set {API_KEY} to ask for a key', file=sys.stderr)
    server.run([socket])


def make_answerer(args, model, folder, length, name):
    """The ModelAnswerer of the flags."""
    from lct.data.prefix_tokenizer import PrefixTokenizer
    from lct.serve.answering import Limits, ModelAnswerer
    from lct.weights.disk_texts import DiskTexts

    facts = sessions.model_facts(model, folder) if args.session_gb else None

    def disk(probe):
        return DiskTexts(sessions.root(), probe, facts, {'model': name},
                         lambda new: sessions.prune(args.session_gb * 1e9, [new]))

    limits = Limits(length, args.max_new_tokens, args.piece or Limits._field_defaults['prefill_chunk'],
                    int(args.cache_gib * 2**30))
    model = dataclasses.replace(model, tokenizer=PrefixTokenizer(model.tokenizer))
    return ModelAnswerer(model, limits, disk if facts else None)


def checked_length(length, positions):
    """--length, by default all positions of the model."""
    if length is not None and length > positions:
        raise ValueError(f'--length {length} is more than the {positions} positions of the model; use '
                         f'{positions} or less')
    return length or positions


if __name__ == '__main__':
    run_script(main, urls=('--model',))
