"""The base model of a plan: a folder, or a name in the tables of published sizes."""

import re
from pathlib import Path
from typing import NamedTuple

from lct.cli.model import find_model
from lct.models.config import LlamaConfig
from lct.models.family_sizes import ALL as SIZES
from lct.ops.rope import RopeConfig
from lct.plan.hardware import lookup
from lct.storage import scheme_of
from lct.weights import llama_hf

# meta-llama/Llama-2-7b-hf, the base model of LWM and EasyContext
MODELS = {**SIZES, 'llama2-7b': LlamaConfig(
    vocab_size=32000, embed_dim=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128, max_position_embeddings=4096, rope=RopeConfig(theta=10000.0))}
LICENCES = {'qwen': 'apache-2.0', 'mistral': 'apache-2.0', 'smollm': 'apache-2.0', 'phi3': 'mit',
            'llama2': 'llama2', 'llama3.1': 'llama3.1', 'llama3.2': 'llama3.2', 'llama3': 'llama3'}


class BaseModel(NamedTuple):
    """A model to extend.

    name: in MODELS, or of the folder. folder: None for a name. path: of the folder, for a config.
    license: its identifier, '' if unknown.
    """

    name: str
    config: LlamaConfig
    folder: Path | None
    path: str
    license: str


def resolve(name: str) -> BaseModel:
    """The BaseModel of a folder or of a name.

    Raises:
      ValueError: for a name that is neither, with the nearest names, or a folder that cannot be trained.
    """
    if name.lower() in MODELS and not Path(name).is_dir():
        name = name.lower()
        license = next((one for start, one in LICENCES.items() if name.startswith(start)), '')
        return BaseModel(name, MODELS[name], None, '', license)
    folder = find_model(name)
    if not folder.exists() and '/' not in name:
        lookup(name, MODELS, 'model')  # raises
    config = llama_hf.read_config(folder)
    llama_hf.check(folder)
    path = name if scheme_of(name) or name == 'smollm2' else str(folder.absolute())
    return BaseModel(folder.resolve().name, config, folder, path, _license_of(folder))


def _license_of(folder):
    """The license in the front matter of a model card."""
    card = folder / 'README.md'
    text = card.read_text(errors='replace')[:4000] if card.is_file() else ''
    match = re.search(r'^license: *([\w.-]+) *$', text, re.MULTILINE) if text.startswith('---') else None
    return match[1] if match else ''
