"""experiments/studies/grow_base.py: a grown model has the old outputs where the tokens are the same."""

import jax
import numpy as np
from grow_base import grow

from lct.models import llama


def test_a_grown_model_has_the_old_logits_of_old_tokens():
    config = llama.LlamaConfig(
        vocab_size=1010, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        max_position_embeddings=32, tie_embeddings=True)
    params = llama.init(config, jax.random.key(0))
    vocabulary = {f't{i}': i for i in range(1008)} | {'Ġfox': 1008, '-': 1009}
    grown, grown_params = grow(config, params, vocabulary | {'fox': 1010, '-fox': 1011, 'fo': 1012})
    assert (grown.vocab_size, grown.num_layers) == (1013, 3)
    tokens = np.arange(20)[None]
    old, new = llama.logits(params, config, tokens), llama.logits(grown_params, grown, tokens)
    np.testing.assert_allclose(new[..., :1010], old, atol=1e-5)
    # New words begin near the word after a space.
    one, joined, word = (np.asarray(grown_params.embed[i]) for i in (1010, 1011, 1008))
    assert np.corrcoef(one, word)[0, 1] > 0.9 and np.corrcoef(joined, word)[0, 1] > 0.6
