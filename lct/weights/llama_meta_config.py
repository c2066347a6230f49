"""params.json of Meta's Llama folders, read and written strictly: a field that would change the result is
either understood or refused."""

import dataclasses
from typing import Any

from lct.json_files import short_repr
from lct.models.llama import LlamaConfig
from lct.ops.rope import RopeConfig
from lct.weights.config_checks import check_sizes, is_number, read_required, refuse_unknown

REQUIRED = {'dim': 'embed_dim', 'n_layers': 'num_layers', 'n_heads': 'num_heads', 'vocab_size': 'vocab_size'}
OPTIONAL = {'n_kv_heads', 'norm_eps', 'rope_theta', 'use_scaled_rope', 'multiple_of', 'ffn_dim_multiplier'}
HARMLESS = {'max_batch_size', 'max_seq_len'}  # of a run of Meta's program, not of the model

# The meaning of use_scaled_rope in Llama 3.1 and later: params.json does not contain these numbers.
SCALED = RopeConfig(theta=500000.0, type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position=8192)
FACTORS = {2048: 32.0, 3072: 32.0}  # embed_dim of Llama 3.2 1B and 3B -> their published factor
CONTEXT, SCALED_CONTEXT = 8192, 131072  # positions of Llama 3, and of 3.1 and later


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the MLP by Meta's rule (llama-models, FeedForward): 8/3 of dim, scaled, rounded up."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def config_from_params(
        values: dict[str, Any], path: str = 'params.json', *, rope_factor: float | None = None,
        max_position_embeddings: int | None = None) -> LlamaConfig:
    """LlamaConfig of the dict in a params.json, its embedding untied.

    Args:
      path: the file, for error messages.
      rope_factor: of a scaled RoPE, which params.json does not contain; None takes the factor of the
        published model of that width (32 for 3.2 1B and 3B, else 8).
      max_position_embeddings: None means 8,192, or 131,072 with a scaled RoPE.
    Raises:
      ValueError: naming path and field, for anything that this model would not compute as described.
    """
    refuse_unknown(values, HARMLESS | OPTIONAL | set(REQUIRED), path)
    fields = _read_sizes(values, path)
    eps = values.get('norm_eps')
    if not (is_number(eps) and 0 < eps < 1):
        raise ValueError(f'{path}: norm_eps is {short_repr(eps)}; it must be a number between 0 and 1')
    rope = _read_rope(values, fields['embed_dim'], rope_factor, path)
    context = SCALED_CONTEXT if values.get('use_scaled_rope') else CONTEXT
    try:
        return LlamaConfig(
            **fields, head_dim=fields['embed_dim'] // fields['num_heads'], norm_eps=float(eps), rope=rope,
            max_position_embeddings=max_position_embeddings or context)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def _read_sizes(values, path):
    """{LlamaConfig field: size}, with the widths of the MLP and of the key/value heads."""
    fields = read_required(values, REQUIRED, path)
    multiple_of, multiplier = values.get('multiple_of'), values.get('ffn_dim_multiplier')
    fields['num_kv_heads'] = fields['num_heads'] if values.get('n_kv_heads') is None else values['n_kv_heads']
    counts = {field: values[field] for field in REQUIRED}
    check_sizes({**counts, 'n_kv_heads': fields['num_kv_heads'], 'multiple_of': multiple_of}, path)
    if fields['embed_dim'] % fields['num_heads']:
        raise ValueError(
            f"{path}: dim {fields['embed_dim']} must be a multiple of n_heads {fields['num_heads']}; fix one")
    if multiplier is not None and not (is_number(multiplier) and 0 < multiplier < 1000):
        raise ValueError(
            f'{path}: ffn_dim_multiplier is {short_repr(multiplier)}; it must be a positive number')
    fields['mlp_dim'] = ffn_dim(fields['embed_dim'], multiple_of, multiplier)
    return fields


def _read_rope(values, embed_dim, rope_factor, path):
    theta, scaled = values.get('rope_theta'), values.get('use_scaled_rope')
    if not (is_number(theta) and 1 <= theta < 1e30):
        raise ValueError(
            f'{path}: rope_theta is {short_repr(theta)}; it must be a number >= 1, 500000.0 for Llama-3')
    if scaled not in (None, True, False):
        raise ValueError(f'{path}: use_scaled_rope is {short_repr(scaled)}; it must be true or false')
    if not scaled:
        if rope_factor is not None:
            raise ValueError(
                f'rope_factor {rope_factor} has no effect because {path} does not set use_scaled_rope; '
                'leave it out')
        return RopeConfig(theta=float(theta))
    factor = FACTORS.get(embed_dim, SCALED.factor) if rope_factor is None else float(rope_factor)
    return dataclasses.replace(SCALED, theta=float(theta), factor=factor)


def params_from_config(config: LlamaConfig) -> dict[str, Any]:
    """The dict of a params.json. max_position_embeddings is left out: Meta's programs take the context length
    at run time.

    Raises:
      ValueError: if Meta's model cannot compute the config.
    """
    if config.window is not None:
        raise ValueError(
            f'window {config.window}: params.json has no sliding window, and its readers would compute full '
            'attention; export a model with window None')
    for field in ('qkv_bias', 'out_bias', 'mlp_bias', 'qk_norm', 'rope_layers'):
        if getattr(config, field):
            raise ValueError(
                f'params.json cannot express {field} of a model of family {config.family!r}, and its readers '
                'would compute it without; save a Hugging Face folder')
    scaled = config.rope.type != 'default'
    if scaled and config.rope != dataclasses.replace(
            SCALED, theta=config.rope.theta, factor=FACTORS.get(config.embed_dim, SCALED.factor)):
        raise ValueError(
            f'params.json cannot express the RoPE scaling {config.rope.type!r} with factor '
            f'{config.rope.factor} for a model of this width; save a Hugging Face folder')
    if config.head_dim * config.num_heads != config.embed_dim:
        raise ValueError(
            f'params.json cannot express head_dim {config.head_dim}: there it is embed_dim '
            f'{config.embed_dim} / num_heads {config.num_heads}; save a Hugging Face folder')
    multiple_of, multiplier = _ffn_fields(config)
    return {
        'dim': config.embed_dim, 'n_layers': config.num_layers, 'n_heads': config.num_heads,
        'n_kv_heads': config.num_kv_heads, 'vocab_size': config.vocab_size, 'multiple_of': multiple_of,
        'ffn_dim_multiplier': multiplier, 'norm_eps': config.norm_eps, 'rope_theta': config.rope.theta,
        'use_scaled_rope': scaled,
    }


def _ffn_fields(config):
    """(multiple_of, ffn_dim_multiplier) that give mlp_dim, round as in the published models if possible."""
    for tenths in range(10, 20):
        for multiple_of in (4096, 1024, 256):
            if ffn_dim(config.embed_dim, multiple_of, tenths / 10) == config.mlp_dim:
                return multiple_of, tenths / 10
    return 1, (config.mlp_dim + 0.5) / int(2 * 4 * config.embed_dim / 3)
