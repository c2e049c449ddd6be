import numpy as np

from byline.teachers.noise import NoiseScheme


def test_a_draw_depends_on_its_key_and_index_alone() -> None:
    scheme = NoiseScheme("item", seed=3, draws=16, replicates=4)
    together = scheme.draw("7/x/upright", range(16), (2, 3), 1000)
    alone = scheme.draw("7/x/upright", [11], (2, 3), 1000)
    assert together[0][11] == alone[0][0]
    assert np.array_equal(together[1][11], alone[1][0])


def test_items_captions_and_orientations_get_noise_of_their_own_unless_it_is_shared() -> None:
    own = NoiseScheme("item", 0, 8)
    keys = {own.key(1, "a cat"), own.key(2, "a cat"), own.key(1, "a dog"), own.key(1, "a cat", flipped=True)}
    assert len(keys) == 4
    shared = NoiseScheme("shared", 0, 8)
    assert shared.key(1, "a cat") == shared.key(2, "a dog")


def test_timesteps_are_stratified_in_every_replicate() -> None:
    scheme = NoiseScheme("item", 0, 64, 8)
    timesteps, _ = scheme.draw("k", range(64), (1,), 1000)
    edges = np.arange(65) * 1000 / 64
    assert np.all(timesteps.numpy() > edges[:-1] - 1) and np.all(timesteps.numpy() < edges[1:])
    for replicate in range(8):
        own = timesteps[replicate::8].numpy()
        assert np.all(np.diff(own) > 0) and own[0] < 125 and own[-1] >= 875
