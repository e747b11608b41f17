"""The order of samples: each once an epoch, a function of (seed, step) alone, cut alike on every layout."""

import pytest
import torch

from gatewright.recipes.data import Draw, batches, sample_ids
from gatewright.recipes.data.split import ArraySplit


@pytest.fixture
def split() -> ArraySplit:
    """24 images whose four pixels say which they are, half of them mirrored in training."""
    pixels = torch.arange(24 * 4, dtype=torch.uint8).view(24, 2, 2)
    return ArraySplit(pixels, torch.arange(24) % 3, top=255, flip=True)


def deal(num_samples: int, *, global_batch: int, seed: int, steps: int) -> list[int]:
    ids = [sample_ids(num_samples, global_batch=global_batch, seed=seed, step=step) for step in range(steps)]
    return torch.cat(ids).tolist()


@pytest.mark.parametrize("global_batch", [1, 4, 7, 10, 25])
def test_each_sample_comes_once_an_epoch_in_an_order_of_its_own(global_batch):
    cards = deal(10, global_batch=global_batch, seed=3, steps=-(-40 // global_batch))[:40]
    epochs = [tuple(cards[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_the_order_does_not_depend_on_the_batch_size():
    assert deal(10, global_batch=4, seed=0, steps=5) == deal(10, global_batch=5, seed=0, steps=4)


def test_another_seed_gives_another_order():
    assert deal(50, global_batch=50, seed=0, steps=1) != deal(50, global_batch=50, seed=1, steps=1)


def test_every_place_of_an_order_is_equally_likely():
    first = torch.tensor([deal(4, global_batch=4, seed=seed, steps=1) for seed in range(2000)])
    counts = torch.stack([(first == card).sum(0) for card in range(4)])
    assert (counts - 500).abs().max() < 100  # five standard deviations


def test_the_order_is_the_same_in_every_version():
    assert deal(10, global_batch=10, seed=7, steps=1) == [6, 7, 0, 4, 2, 5, 8, 1, 9, 3]


def test_one_step_is_independent_of_the_steps_before(split):
    def step(number: int) -> torch.Tensor:
        return next(batches(split, global_batch=8, seed=1, step=number)).images

    run = [step(number) for number in range(12)]
    for number in (11, 0, 5):
        torch.testing.assert_close(step(number), run[number], rtol=0, atol=0)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 6), (2, 1), (2, 3), (3, 2), (6, 1)])
def test_ranks_and_micro_batches_see_together_what_one_process_sees(split, ranks, micro_batches):
    whole = next(batches(split, global_batch=12, seed=5, step=3))
    pieces = [
        piece
        for rank in range(ranks)
        for piece in batches(
            split, global_batch=12, seed=5, step=3, rank=rank, ranks=ranks, micro_batches=micro_batches
        )
    ]
    assert len(pieces) == ranks * micro_batches
    for field in ("images", "labels", "ids"):
        together = torch.cat([getattr(piece, field) for piece in pieces])
        torch.testing.assert_close(together, getattr(whole, field), rtol=0, atol=0)
    noise = torch.cat([piece.draw.normal("noise", (3,)) for piece in pieces])
    torch.testing.assert_close(noise, whole.draw.normal("noise", (3,)), rtol=0, atol=0)


def test_two_ranks_of_one_micro_batch_are_one_process_with_two(split):
    step = {"global_batch": 8, "seed": 0, "step": 2}
    one = [batch.ids.tolist() for batch in batches(split, **step, micro_batches=2)]
    two = [batch.ids.tolist() for rank in range(2) for batch in batches(split, **step, rank=rank, ranks=2)]
    assert one == two


def test_labels_and_images_belong_to_the_ids(split):
    batch = next(batches(split, global_batch=24, seed=0, step=0))
    assert batch.labels.tolist() == split.labels[batch.ids].tolist()
    seen, plain = batch.images, split.images(batch.ids)
    mirrored = (seen != plain).flatten(1).any(1)
    assert 0 < mirrored.sum() < 24
    torch.testing.assert_close(torch.where(mirrored[:, None, None, None], plain.flip(-1), plain), seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "ranks": 2}, r"rank=2 of ranks=2: rank must be 0 to ranks - 1"),
        ({"ranks": 0}, r"ranks=0"),
        ({"micro_batches": 0}, r"micro_batches=0: choose 1 or more"),
        ({"ranks": 3, "micro_batches": 2}, r"global_batch=8 does not divide over 3 rank.* choose a multiple of 6"),
        ({"global_batch": 0}, r"global_batch=0: choose 1 or more"),
        ({"step": -1}, r"step=-1: neither may be negative"),
        ({"seed": -1}, r"seed=-1"),
        ({"seed": 2**64}, r"must be below 2\*\*64"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(split, options, message):
    with pytest.raises(ValueError, match=message):
        batches(split, **{"global_batch": 8, "seed": 0, "step": 0, **options})


def test_an_empty_split_is_refused():
    empty = ArraySplit(torch.empty(0, 2, 2, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), top=255)
    with pytest.raises(ValueError, match="no samples"):
        batches(empty, global_batch=8, seed=0, step=0)


def test_uniform_numbers_are_uniform_and_differ_by_purpose_step_and_seed():
    positions = tuple(range(2000))
    u = Draw(0, 0, positions).uniform("a")
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 0.03 and abs(float(u.var()) - 1 / 12) < 0.01
    for seed, step, purpose in ((0, 0, "b"), (0, 1, "a"), (1, 0, "a")):
        other = Draw(seed, step, positions).uniform(purpose)
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 0.1


def test_normal_numbers_are_normal_and_belong_to_their_position():
    noise = Draw(0, 4, tuple(range(100))).normal("noise", (2, 5, 5))
    assert noise.shape == (100, 2, 5, 5) and noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    torch.testing.assert_close(Draw(0, 4, (42, 7)).normal("noise", (2, 5, 5)), noise[[42, 7]], rtol=0, atol=0)
    assert noise.flatten(1).unique(dim=0).shape[0] == 100
