"""Convert a tiny model between all pairs of formats and back, and compare what comes back: a table.

    python experiments/checks/check_formats.py [--output experiments/results/formats.json]

Per pair and dtype: whether the weights (to the last bit), their dtype, the positions, the special token ids,
the chat template and the ids of some texts are those of the source, and whether --verify agrees. Needs the
extra 'gguf'. Exit status 1 if anything was lost.
"""

import argparse
import base64
import dataclasses
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np

from lct.cli import convert
from lct.data import chat_template, tokenizer_json
from lct.data import tokenizer as tokenizers
from lct.models import llama
from lct.ops.rope import RopeConfig
from lct.text import table
from lct.weights import llama_hf, plain_readers

TEXTS = ('hello hell', 'naïve 北京 🙂\n', 'a12 <|eot_id|>', ' x' * 50)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
RANKS = [bytes([i]) for i in range(256)] + [b'he', b'll', b'hell', b'hello']
CONFIG = llama.LlamaConfig(
    vocab_size=len(RANKS) + 256, embed_dim=64, mlp_dim=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=12345, rope=RopeConfig(theta=500000.0))
FACTS = ('weights', 'dtype', 'positions', 'token ids', 'template', 'texts', 'verified')


def write_source(folder, dtype):
    """A Hugging Face folder with a tokenizer of both kinds and a chat template."""
    beside = folder.with_name(folder.name + '_beside')
    beside.mkdir()
    lines = (base64.b64encode(token) + f' {i}\n'.encode() for i, token in enumerate(RANKS))
    (beside / 'tokenizer.model').write_bytes(b''.join(lines))
    made = tokenizer_json.companions_of_tiktoken(beside / 'tokenizer.model', CONFIG.max_position_embeddings)
    made['config.json'] = made['config.json'] | {'eos_token_id': [len(RANKS) + 1, len(RANKS) + 9]}
    for name, values in made.items():
        (beside / name).write_text(json.dumps(values))
    (beside / 'chat_template.jinja').write_text(TEMPLATE)
    params = llama.init(CONFIG, jax.random.key(0), dtype)
    llama_hf.save(folder, CONFIG, params, dtype=dtype, tokenizer_from=beside)


def write_gguf(path, folder, dtype):
    """The GGUF file of a Hugging Face folder, as llama.cpp's converter writes it."""
    import gguf

    kind = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}[dtype]
    kind = gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_layers)
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.embed_dim)
    writer.add_feed_forward_length(CONFIG.mlp_dim)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_rope_freq_base(CONFIG.rope.theta)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    definition = json.loads((folder / 'tokenizer.json').read_text())
    tokens = list(definition['model']['vocab']) + [token['content'] for token in definition['added_tokens']]
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('llama-bpe')
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(RANKS) + [3] * 256)
    writer.add_token_merges(definition['model']['merges'])
    writer.add_bos_token_id(len(RANKS))
    writer.add_eos_token_id(len(RANKS) + 1)
    writer.add_eot_token_id(len(RANKS) + 9)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    for name, read in plain_readers.hf(folder).items():
        values, heads = read(), {'q_proj': CONFIG.num_heads, 'k_proj': CONFIG.num_kv_heads}
        module = name.split('.')[-2]
        if module in heads:
            halves = values.reshape(heads[module], 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        name = names.get_name(name, try_suffixes=('.weight',))
        if values.ndim == 1 or dtype != 'bfloat16':
            writer.add_tensor(name, values.astype(np.float32 if values.ndim == 1 else dtype))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def facts_of(folder):
    """What is compared of a Hugging Face folder."""
    tokenizer = tokenizers.load(folder)
    values = json.loads((folder / 'config.json').read_text())
    tensors = {name: read() for name, read in plain_readers.hf(folder).items()}
    try:
        template = chat_template.load(folder).source
    except chat_template.MissingTemplate:
        template = None
    return {
        'weights': {name: (value.dtype.name, value.tobytes()) for name, value in tensors.items()},
        'dtype': sorted({value.dtype.name for value in tensors.values()}),
        'positions': values['max_position_embeddings'],
        'token ids': [values.get(key) for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')],
        'template': template,
        'texts': [tokenizer.encode(text) + tokenizer.encode_special(text) for text in TEXTS],
    }


def round_trip(source, formats, folder, expected):
    """{fact: whether it is the expected one} after conversions of a source to the formats, and to Hugging
    Face's."""
    kept = {'verified': True}
    folder.mkdir()
    for i, to in enumerate((*formats, 'hf')):
        target = folder / f'{i}_{to}'
        convert.convert(source, target, to)
        try:
            convert.check(source, target, to)
        except ValueError as error:
            print(error)
            kept['verified'] = False
        source = target
    found = facts_of(source)
    shutil.rmtree(folder)
    return {fact: found[fact] == value for fact, value in expected.items()} | kept


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=pathlib.Path, help='write the rows as JSON')
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in ('float32', 'bfloat16', 'float16'):
            folder = pathlib.Path(temporary) / dtype
            write_source(folder, dtype)
            write_gguf(folder.with_suffix('.gguf'), folder, dtype)
            expected = facts_of(folder)
            for first in ('hf', 'meta', 'orbax', 'gguf'):
                for second in ('hf', 'meta', 'orbax'):
                    source = folder if first != 'gguf' else folder.with_suffix('.gguf')
                    formats = (first, second) if first not in ('hf', 'gguf') else (second,)
                    kept = round_trip(source, formats, pathlib.Path(temporary) / 'work', expected)
                    rows.append({'stored as': dtype, 'from': first, 'to': second, **kept})
    marks = [[row['stored as'], row['from'], row['to'], *('kept' if row[fact] else 'LOST' for fact in FACTS)]
             for row in rows]
    print(table(('stored as', 'from', 'to', *FACTS), marks, left=range(10)))
    if args.output:
        args.output.write_text(json.dumps({'config': dataclasses.asdict(CONFIG), 'rows': rows}, indent=1))
    raise SystemExit(not all(row[fact] for row in rows for fact in FACTS))


if __name__ == '__main__':
    main()
