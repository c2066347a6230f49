"""Families of models that compute something else than lct.models.llama, and how to tell one whose config.json
was renamed: several have tensors of the names and shapes of a Llama."""

from typing import Any

from lct.json_files import short_repr

EXPERTS = 'its layers route tokens to experts'
LAYER_NORM = 'it has layer norms with means and biases'
IMAGES = 'it reads images too, and its language model is a part of it'
STATE_SPACE = 'some of its layers have a recurrent state instead of attention'
MULTIPLIERS = 'embeddings, residuals and logits have multipliers'
DIFFERENCES = {  # model_type -> what it computes differently
    'gemma': 'norms scale by 1 + weight, embeddings are multiplied by sqrt(embed_dim) and the FFN has a GELU',
    'gemma2': 'norms scale by 1 + weight and follow the layers too, and logits are soft-capped',
    'gemma3_text': 'norms scale by 1 + weight and follow the layers too, and layers have two RoPE thetas',
    'llama4_text': EXPERTS + ' and attend within chunks',
    'granite': MULTIPLIERS, 'minicpm': MULTIPLIERS,
    'cohere': LAYER_NORM + ', and attention and FFN in parallel',
    'cohere2': LAYER_NORM + ', and attention and FFN in parallel',
    'olmo': 'its norms have no weights',
    'olmo2': 'its norms follow the layers, and one norms all heads together',
    'olmo3': 'its norms follow the layers, and one norms all heads together',
    'exaone4': 'its norms follow the layers', 'glm': 'it rotates half of each head, in interleaved pairs',
    'glm4': 'it rotates half of each head, in interleaved pairs, and has norms after the layers',
    'ernie4_5': 'it rotates interleaved pairs', 'helium': 'it rotates interleaved pairs',
    'hunyuan_v1_dense': 'it norms queries and keys after RoPE',
    'nemotron': LAYER_NORM + ' and a squared ReLU', 'arcee': 'its FFN is a squared ReLU without a gate',
    'apertus': 'its FFN is an xIELU without a gate', 'diffllama': 'its attention is a difference of two',
    'deepseek_v2': EXPERTS + ' and keys and values are compressed',
    'deepseek_v3': EXPERTS + ' and keys and values are compressed',
    'gpt_oss': EXPERTS + ' and attention has sinks',
    'baichuan': 'its projections are stored as one, and larger models have ALiBi instead of RoPE',
    'internlm2': 'its projections are stored as one, in groups of heads',
    'qwen': 'its projections are stored as one',
    **dict.fromkeys(('mixtral', 'qwen2_moe', 'qwen3_moe', 'phimoe', 'olmoe', 'granitemoe', 'dbrx', 'jetmoe',
                     'ernie4_5_moe', 'glm4_moe', 'minimax'), EXPERTS),
    **dict.fromkeys(('falcon', 'gpt_neox', 'gptj', 'gpt2', 'phi', 'stablelm', 'starcoder2', 'opt', 'bloom',
                     'mpt', 'persimmon'), LAYER_NORM),
    **dict.fromkeys(('mllama', 'llama4', 'gemma3', 'llava', 'mistral3', 'qwen2_vl', 'qwen2_5_vl', 'qwen3_vl',
                     'phi3_v', 'phi4_multimodal', 'idefics3', 'smolvlm'), IMAGES),
    **dict.fromkeys(('mamba', 'mamba2', 'falcon_h1', 'jamba', 'nemotron_h', 'bamba', 'recurrent_gemma',
                     'qwen3_next', 'granitemoehybrid', 'zamba2', 'lfm2'), STATE_SPACE),
}
# (embed_dim, mlp_dim, num_layers, num_heads, num_kv_heads) -> the model that was published with these sizes.
# Its tensors have the names and shapes of a Llama.
LOOK_ALIKES = {
    (2048, 11008, 36, 16, 4): ('SmolLM3-3B', 'smollm3', 'every fourth layer does not rotate'),
    (2048, 16384, 18, 8, 1): ('Gemma 2B', 'gemma', DIFFERENCES['gemma']),
    (3072, 24576, 28, 16, 16): ('Gemma 7B', 'gemma', DIFFERENCES['gemma']),
    (2048, 8192, 40, 32, 8): ('Granite 3 2B', 'granite', MULTIPLIERS),
    (4096, 12800, 40, 32, 8): ('Granite 3 8B', 'granite', MULTIPLIERS),
    (2304, 5760, 40, 36, 36): ('MiniCPM-2B', 'minicpm', MULTIPLIERS),
    (1024, 3072, 18, 16, 2): ('ERNIE-4.5-0.3B', 'ernie4_5', DIFFERENCES['ernie4_5']),
}
SIZES = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
         'num_key_value_heads')


def refuse(kind: Any, supported: list[str], path: str) -> None:
    """Raise ValueError for a model_type that is not among the supported ones."""
    difference = DIFFERENCES.get(kind) if isinstance(kind, str) else None
    reason = f': {difference}' if difference else ' (under another name its result would be another)'
    raise ValueError(f'{path}: model_type {short_repr(kind)} is not supported{reason}; only '
                     f'{", ".join(supported)} are')


def check(values: dict[str, Any], architecture: str, path: str) -> None:
    """Refuse the dict of a config.json that says it is a Llama but belongs to a model of another family.

    architecture: the class of its model_type.
    Raises:
      ValueError: for a class of its own beside the weights, or for the sizes of a published model of another
        family, whose own fields may have been removed.
    """
    own = values.get('auto_map')
    own = own.get('AutoModelForCausalLM') if isinstance(own, dict) else own
    if own is not None and str(own).rpartition('.')[2] != architecture:
        raise ValueError(f'{path}: auto_map names the class {short_repr(own)} for the model, which may '
                         f'compute something else than {architecture}; remove it if it does not')
    if values['model_type'] != 'llama' or values.get('is_llama_config'):
        return
    sizes = [values.get(field) for field in SIZES]
    for published, (name, kind, difference) in LOOK_ALIKES.items():
        if sizes != list(published):
            continue
        raise ValueError(f"{path} has the sizes of {name}, where {difference}, but says model_type 'llama'; "
                         f"give back model_type '{kind}' and its fields, or is_llama_config true if it was "
                         'trained as a Llama')
