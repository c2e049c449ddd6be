import numpy as np
import pytest

from byline.errors import TeacherNotUsable
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


def test_antithetic_draws_are_pairs_of_one_timestep_and_opposite_noise_in_one_replicate() -> None:
    scheme = NoiseScheme("item", 0, 32, 4, antithetic=True)
    timesteps, noise = scheme.draw("k", range(32), (2, 3), 1000)
    assert np.array_equal(timesteps[0::2], timesteps[1::2])
    assert np.array_equal(noise[0::2], -noise[1::2])
    assert len({n.numpy().tobytes() for n in noise}) == 32, "pairs differ from each other"
    assert all(scheme.replicate_of(d) == scheme.replicate_of(d + 1) for d in range(0, 32, 2))
    alone = scheme.draw("k", [13], (2, 3), 1000)
    assert np.array_equal(alone[1][0], noise[13]) and alone[0][0] == timesteps[13]


@pytest.mark.parametrize("antithetic", [False, True])
def test_replicates_partition_the_draws_and_each_covers_all_timesteps(antithetic: bool) -> None:
    scheme = NoiseScheme("shared", 1, 64, 4, antithetic)
    timesteps = scheme.draw("shared", range(64), (1,), 1000)[0].numpy()
    parts = [scheme.draws_of(replicate) for replicate in range(4)]
    assert sorted(d for part in parts for d in part) == list(range(64))
    for part in parts:
        own = timesteps[list(part)]
        assert len(part) == scheme.draws_per_replicate and own[0] < 250 and own[-1] >= 750
        assert np.all(np.diff(own) >= 0)


def test_antithetic_pairs_cancel_a_loss_that_is_odd_in_the_noise_and_do_not_bias_another() -> None:
    def mean_and_variance(antithetic: bool) -> tuple[float, float, float]:
        scheme = NoiseScheme("item", 0, 8, 1, antithetic)
        linear, square = [], []
        for key in range(200):
            _, noise = scheme.draw(str(key), range(8), (4,), 1000)
            linear.append(float((1.0 + noise.sum(1)).mean()))
            square.append(float(noise.pow(2).sum(1).mean()))
        return float(np.mean(linear)), float(np.var(linear)), float(np.mean(square))

    paired, single = mean_and_variance(True), mean_and_variance(False)
    assert paired[1] < 1e-9 < 0.1 < single[1]
    assert abs(paired[0] - 1) < 1e-6 and abs(single[0] - 1) < 0.2
    assert abs(paired[2] - 4) < 0.3 and abs(single[2] - 4) < 0.3


@pytest.mark.parametrize(("draws", "antithetic"), [(12, False), (24, True), (0, False)])
def test_draws_that_do_not_split_into_equal_replicates_are_refused(draws: int, antithetic: bool) -> None:
    with pytest.raises(TeacherNotUsable, match="multiple"):
        NoiseScheme("item", 0, draws, 8, antithetic)
