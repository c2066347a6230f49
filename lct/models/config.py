"""The architecture of a Llama or of a family like it, which together with the memory policy decides the
compiled program."""

import dataclasses

from lct.ops.rope import RopeConfig
from lct.text import divisors_near


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture of a model: the fields of a Hugging Face config.json under the names of this package.

    family: the model_type of its config.json, for export; nothing that is computed depends on it.
    qkv_bias, out_bias, mlp_bias: whether wq, wk and wv, wo, and the three weights of the FFN have biases.
    qk_norm: whether the queries and keys of every head are normed before they are rotated.
    rope_layers: whether each layer rotates; None if all do.

    Raises:
      ValueError: for sizes that no model can have.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_position_embeddings: int = 8192
    rope: RopeConfig = RopeConfig(theta=500000.0)
    window: int | None = None  # tokens that a query attends to, itself included; None for all before it
    family: str = 'llama'
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_layers: tuple[bool, ...] | None = None

    def __post_init__(self):
        for field in ('vocab_size', 'embed_dim', 'mlp_dim', 'num_layers', 'num_heads', 'num_kv_heads',
                      'head_dim', 'max_position_embeddings'):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{field} must be a positive integer, got {value!r}')
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f'num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; '
                'every key/value head must serve the same number of query heads'
            )
        if self.head_dim % 2:
            raise ValueError(f'head_dim {self.head_dim} must be even: RoPE rotates pairs of dims')
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f'window {self.window!r} must be an integer of at least 1, because a query '
                             'attends to itself, or None for full causal attention')

        if self.rope_layers is not None and len(self.rope_layers) != self.num_layers:
            raise ValueError(f'rope_layers has {len(self.rope_layers)} entries but there are '
                             f'{self.num_layers} layers; give one for each')

    @property
    def rope_theta(self) -> float:
        return self.rope.theta

    def architecture(self) -> 'LlamaConfig':
        """The config without its positions and its family: equal for a model before and after extension, so
        that one compiled program serves both (the rotary tables are arguments)."""
        return dataclasses.replace(
            self, max_position_embeddings=1, rope=RopeConfig(theta=1.0), family='llama')


def check_mesh(config: LlamaConfig, degrees: tuple[int, ...]) -> None:
    """Check that the weights divide over a mesh of the degrees (data, fsdp, sequence, tensor).

    Raises:
      ValueError: naming the size that does not divide.
    """
    _, fsdp, sequence, tensor = degrees
    for name, axis, degree in (
        ('embed_dim', 'fsdp * sequence', fsdp * sequence), ('num_heads', 'tensor', tensor),
        ('num_kv_heads', 'tensor', tensor), ('mlp_dim', 'tensor', tensor), ('vocab_size', 'tensor', tensor),
    ):
        value = getattr(config, name)
        if value % degree:
            raise ValueError(
                f'{name} {value} is not a multiple of the mesh degree {axis} = {degree}, over which it is '
                f'split; use a degree of {divisors_near(value, degree)}'
            )
