"""Windows come from one document each, and the loss of every token equals the plain forward's."""

import contextlib
import json

import jax
import numpy as np
import pytest

from lct import sharding
from lct.eval.loss import by_position
from lct.models import llama
from lct.ops.blockwise_attention import Chunks
from lct.ops.rope import RopeConfig
from lct.ops.strategies import Attention

CONFIG = llama.LlamaConfig(
    vocab_size=32, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    rope=RopeConfig(theta=10000.0),
)


def test_windows_lie_within_one_document():
    documents = [np.arange(100, 140), np.arange(200, 210), np.arange(300, 320)]
    made, sources = by_position.evaluation_windows(documents, 15, 400, seed=3)
    assert made.shape == (400, 16)
    np.testing.assert_array_equal(made[:, 0] // 100, sources + 1)
    assert set(sources.tolist()) == {0, 2}
    for row in made:  # in order, and from the end of a document to its own beginning
        first, size = (100, 40) if row[0] < 200 else (300, 20)
        np.testing.assert_array_equal(row - first, (row[0] - first + np.arange(16)) % size)
    early, late = made[:, 0][made[:, 0] < 200], made[:, 15][made[:, 15] < 200]
    # Any token comes at any position.
    assert {100, 139} <= set(early.tolist()) and {100, 139} <= set(late.tolist())
    with_bos, _ = by_position.evaluation_windows(documents, 20, 50, seed=3, bos_id=7)
    assert (with_bos[:, 0] == 7).all()
    np.testing.assert_array_equal(with_bos[:, 2:] % 20, (with_bos[:, 1:-1] + 1) % 20)


def test_rotations_put_the_same_tokens_at_every_position():
    made, _ = by_position.evaluation_windows([np.arange(1000, 2000)], 64, 16, seed=0, bos_id=7, rotations=8)
    assert (made[:, 0] == 7).all()
    for group in made[:, 1:].reshape(2, 8, 8, 8):  # [span, rotation, eighth of the window, token]
        for eighth in range(8):
            assert set(group[:, eighth].ravel().tolist()) == set(group.ravel().tolist())
    with pytest.raises(ValueError, match='12 windows are not a multiple of 8 rotations; use for example 16'):
        by_position.evaluation_windows([np.arange(1000)], 64, 12, seed=0, rotations=8)


@pytest.mark.parametrize('rotations', [1, 3])
def test_a_window_depends_on_the_seed_and_its_number_alone(rotations):
    documents = [1000 * i + np.arange(100 + i) for i in range(7)]
    many, sources = by_position.evaluation_windows(documents, 50, 30, seed=5, bos_id=1, rotations=rotations)
    for count in (3, 9, 21, 24):
        few, first = by_position.evaluation_windows(
            documents, 50, count, seed=5, bos_id=1, rotations=rotations
        )
        np.testing.assert_array_equal(few, many[:count])
        np.testing.assert_array_equal(first, sources[:count])
    other, others = by_position.evaluation_windows(documents, 50, 30, seed=6, bos_id=1, rotations=rotations)
    assert (other != many).any() and (others != sources).any()
    spans = sources[::rotations]
    assert sorted(spans[:7].tolist()) == list(range(7))  # all documents before any comes again
    if rotations == 1:
        assert sorted(spans[7:14].tolist()) == list(range(7)) and (spans[7:14] != spans[:7]).any()


def test_documents_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match='the longest has 40; use a seq_len up to 39'):
        by_position.evaluation_windows([np.arange(40)], 50, 1, seed=0)
    with pytest.raises(ValueError, match='use a seq_len up to 40'):
        by_position.evaluation_windows([np.arange(40)], 50, 1, seed=0, bos_id=7)


@pytest.mark.parametrize('degrees', [None, (2, 1, 2, 2)])
def test_losses_equal_those_of_the_plain_forward(degrees):
    windows = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 33)).astype(np.int32)
    params = jax.tree.map(np.asarray, llama.init(CONFIG, jax.random.key(1)))
    logits = llama.logits(params, CONFIG, windows[:, :-1])
    expected = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), windows[:, 1:, None], axis=-1)[..., 0]
    progress = []
    with contextlib.nullcontext() if degrees is None else jax.set_mesh(sharding.make_mesh(degrees)):
        placed = jax.tree.map(sharding.put, params, llama.specs(CONFIG))
        got = by_position.loss_by_position(
            placed,
            CONFIG,
            windows,
            memory=llama.Memory(attention=Attention(chunks=Chunks(8, 8)), loss_chunk=8),
            batch_size=2,
            progress=lambda *args: progress.append(args),
        )
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert progress == [(2, 3), (3, 3)]


def test_windows_that_do_not_divide_are_refused():
    by_position.check_window_length(64, ring_size=8, ffn_chunks=4)
    with pytest.raises(ValueError, match='windows of 80 tokens .* use a multiple of 32, for example 64'):
        by_position.check_window_length(80, ring_size=8, ffn_chunks=4)
    with pytest.raises(ValueError, match='windows of 15 tokens'):
        by_position.loss_by_position(None, CONFIG, np.zeros((1, 16), np.int32))
    with pytest.raises(ValueError, match='token id 4294967297 in row 0, column 3'):
        by_position.loss_by_position(None, CONFIG, np.array([[1, 2, 3, 2**32 + 1, 5]]))


def test_the_error_is_over_documents():
    alike = np.array([[1.0, 1.0, 3.0, 3.0], [0.0, 2.0, 5.0, 5.0]])
    for again in (1, 10):  # the same windows again add no information
        mean, error = by_position.mean_over_documents(np.tile(alike, again), np.tile([0, 0, 1, 1], again))
        np.testing.assert_allclose(mean, [2, 3])
        np.testing.assert_allclose(error, [1, 2])  # deviations of the means 1, 3 and 1, 5 by the root of two
    assert np.isnan(by_position.mean_over_documents(alike, [4, 4, 4, 4])[1]).all()
    losses = np.arange(3 * 8, dtype=np.float32).reshape(3, 8)
    made = by_position.bin_losses(losses, (0, 4, 8), [7, 7, 9])
    assert (made.num_windows, made.documents) == (3, 2)
    np.testing.assert_allclose(made.mean, [(5.5 + 17.5) / 2, (9.5 + 21.5) / 2])
    np.testing.assert_allclose(made.stderr, 6)


def test_bins_are_saved_as_json():
    made = by_position.bin_losses(np.ones((2, 8), np.float32), documents=[0, 0])
    again = by_position.LossBins.from_json(made.to_json())
    assert again.documents == 1 and np.isnan(again.stderr).all() and again.to_json() == made.to_json()
    old = {name: value for name, value in made.to_dict().items() if name != 'documents'}
    with pytest.raises(ValueError, match="has no field 'documents': .* remove its file to measure it again"):
        by_position.LossBins.from_json(json.dumps(old))


def test_bins_are_means_with_the_error_over_windows():
    losses = np.arange(2 * 256, dtype=np.float32).reshape(2, 256)
    made = by_position.bin_losses(losses)
    assert made.edges == (0, 64, 128, 256) and made.num_windows == 2
    np.testing.assert_allclose(made.mean, [31.5 + 128, 95.5 + 128, 191.5 + 128])
    np.testing.assert_allclose(made.stderr, 128)
    assert by_position.doubling_edges(8192)[-3:] == (2048, 4096, 8192)
    assert by_position.doubling_edges(100) == (0, 64, 100) and by_position.doubling_edges(32) == (0, 32)
    one = by_position.bin_losses(losses[:1], (0, 128, 256))
    assert np.isnan(one.stderr).all() and one.to_dict()['stderr'] == [None, None]
    with pytest.raises(ValueError, match='must increase within 0..256'):
        by_position.bin_losses(losses, (0, 512))


def test_errors_of_ratios_match_the_spread_over_samples():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, (2000, 30, 3))  # documents of three windows each
    sums = counts * rng.normal(2, 0.5, (2000, 30, 1))
    drawn = [by_position.ratio_over_documents(s.reshape(1, -1), c.reshape(1, -1), np.repeat(np.arange(30), 3))
             for s, c in zip(sums, counts, strict=True)]
    ratios, errors, known = (np.concatenate(x) for x in zip(*drawn, strict=True))
    np.testing.assert_allclose(ratios.mean(), 2, atol=0.01)
    np.testing.assert_allclose(np.sqrt((errors ** 2).mean()), ratios.std(), rtol=0.06)
    assert (known == 30).all()
    ratio, error, known = by_position.ratio_over_documents(
        [[2.0, 4, 0], [3, 0, 0], [0, 0, 0]], [[1, 2, 0], [1, 0, 0], [0, 0, 0]], [7, 8, 9])
    assert ratio[:2].tolist() == [2, 3] and np.isnan(ratio[2]) and known.tolist() == [2, 1, 0]
    assert error[0] == 0 and np.isnan(error[1:]).all()  # one document tells nothing about others
