"""Train the small base checkpoint (a Llama-3 with native context 512) and write it as a Hugging Face folder.

    python experiments/studies/pretrain_base.py --workdir runs/base

The text is the standard library of this Python; the recall data comes from lct.data.synthetic.recall.
"""

import json
import pathlib
import shutil
import sys

from lct import exit_status
from lct.cli.config import as_plain, make_run, parse_args, setup_devices
from lct.cli.corpus import tokenize_documents
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder

TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'config.json', 'generation_config.json')


def train_tokenizer(texts, vocab_size, folder, max_length):
    """Write TOKENIZER_FILES of a tokenizer trained on texts into folder."""
    from lct.data import tokenizer as tokenizers
    from lct.data.synthetic import recall
    tokenizers.train(texts, vocab_size, folder / 'tokenizer.json', recall.ADJECTIVES + recall.NOUNS)
    (folder / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': tokenizers.LLAMA3_BOS,
        'eos_token': tokenizers.EOS_NAMES[0], 'model_max_length': max_length,
    }, indent=2))
    ids = {'bos_token_id': 0, 'eos_token_id': 1}  # the order in which tokenizers.train adds them
    for name in ('config.json', 'generation_config.json'):
        (folder / name).write_text(json.dumps(ids, indent=2))


def copy_tokenizer(source, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(pathlib.Path(source, name), folder)


def run():
    config, args = parse_args(__doc__, experiments_folder() / 'configs' / 'base.py', 'runs/base')
    setup_devices(config)
    import jax

    from lct.data import tokenizer as tokenizers
    from lct.data.batches.memory_source import MemorySource
    from lct.data.corpus import documents
    from lct.models import llama
    from lct.ops.rope import RopeConfig
    from lct.train import loop, stopping
    from lct.train.metrics import log
    from lct.train.workdir import lock_workdir
    from lct.weights import llama_hf

    workdir, run_config = pathlib.Path(args.workdir), make_run(config)
    lock = lock_workdir(workdir, as_plain(config), may_change=True)  # noqa: F841  held while the process lives
    training, _ = documents.split(documents.read(config.corpus, config.corpus_bytes), config.held_out)
    texts = [document.text for document in training]
    folder = workdir / 'tokenizer'
    if not (folder / 'generation_config.json').exists():  # the last file written
        if config.start_folder:
            copy_tokenizer(config.start_folder, folder)
        else:
            train_tokenizer(texts, config.model.vocab_size, folder, config.model.max_position_embeddings)
    tokenizer = tokenizers.load(folder)
    mixture = MemorySource(tokenize_documents(tokenizer, training), tokenizer, seed=config.seed)

    fields = config.model.to_dict()
    rope = RopeConfig(theta=fields.pop('rope_theta'))
    model = llama.LlamaConfig(**fields, rope=rope)

    def first_weights():
        if not config.start_folder:
            return llama.init(model, jax.random.key(config.seed))
        loaded, params = llama_hf.load(config.start_folder, dtype='float32')
        if loaded != model:
            raise ValueError(f'{config.start_folder} holds {loaded}, but config.model is {model}; '
                             'change one of them')
        return params

    log(f'{llama.num_params(model):,} parameters, {mixture.num_tokens:,} tokens of text')
    with stopping.catch_signals() as stop_requested:
        try:
            model, params, _ = loop.train(
                run_config, model, first_weights, mixture, workdir, stop_requested,
            )
        except stopping.Interrupted as stop:
            log(str(stop))
            sys.exit(exit_status.STOPPED)
    llama_hf.save(workdir / 'model', model, params, dtype='float32', tokenizer_from=folder, overwrite=True)
    log(f'wrote {workdir / "model"}')


if __name__ == '__main__':
    run_script(run, resumes=True)
