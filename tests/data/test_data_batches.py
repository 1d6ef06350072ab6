"""Multi-scale batches: constant pixels, epochs, processes, and where flips and windows land."""

from collections import Counter

import numpy as np
import pytest
import torch

from pyrdiff.data import ImageLevels, MultiScaleBatches, seed_of


def make_levels(sizes, count: int = 10, channels: int = 1) -> ImageLevels:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8) for height, width in sizes]
    return ImageLevels(sizes, arrays, [str(index) for index in range(count)])


def make_position_levels(count: int = 6) -> ImageLevels:
    """Pixels say where they are: channels are (row, column, image)."""
    sizes, arrays = [(12, 10), (24, 20)], []
    for height, width in sizes:
        array = np.empty((count, height, width, 3), np.uint8)
        array[..., 0] = np.arange(height)[:, None]
        array[..., 1] = np.arange(width)
        array[..., 2] = np.arange(count)[:, None, None]
        arrays.append(array)
    return ImageLevels(sizes, arrays, [str(index) for index in range(count)])


def equal(one, two) -> bool:
    boxes = (one.boxes is None and two.boxes is None) or torch.equal(one.boxes, two.boxes)
    images = torch.equal(one.images, two.images) and torch.equal(one.indices, two.indices)
    return boxes and images and one.level == two.level


def test_constant_pixels():
    levels = make_levels([(64, 64), (128, 128), (256, 256)], count=2)
    batches = MultiScaleBatches(levels, 48)
    assert batches.batch_sizes == [48, 12, 3]
    shapes = {batches.level_of(step): tuple(batches.draw(step).images.shape) for step in range(9)}
    assert shapes == {0: (48, 1, 64, 64), 1: (12, 1, 128, 128), 2: (3, 1, 256, 256)}
    assert MultiScaleBatches(levels, 4).batch_sizes == [4, 1, 1]
    assert MultiScaleBatches(levels, 48, patch_size=64).batch_sizes == [48, 48, 48]
    assert MultiScaleBatches(levels, 48, patch_size=(64, 128)).batch_sizes == [48, 24, 24]


def test_whole_images_are_the_images():
    levels = make_levels([(4, 6), (8, 12)], channels=3)
    batches = MultiScaleBatches(levels, 8)
    for step in range(6):
        batch = batches.draw(step)
        expected = levels.arrays[batch.level][batch.indices.numpy()].transpose(0, 3, 1, 2)
        assert np.array_equal(batch.images.numpy(), expected)
        assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
        assert batch.boxes is None and batch.indices.dtype == torch.int64


@pytest.mark.parametrize("share", [[1, 1, 1], [1, 2, 3], [2, 1, 1]])
def test_each_round_visits_every_level_by_its_share_in_changing_order(share):
    batches = MultiScaleBatches(make_levels([(2, 2), (4, 4), (8, 8)]), 1, level_share=share)
    count = sum(share)
    rounds = [tuple(batches.level_of(count * index + place) for place in range(count)) for index in range(50)]
    expected = [level for level in range(3) for _ in range(share[level])]
    assert all(sorted(visited) == expected for visited in rounds)
    assert len(set(rounds)) >= 6


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ([(16, 16), (32, 32), (64, 64)], dict(batch_size=64), [1, 2, 6]),
        ([(32, 32), (64, 64), (128, 128), (256, 256)], dict(batch_size=64), [1, 2, 6, 15]),
        ([(16, 16), (32, 32), (64, 64)], dict(batch_size=8), [1, 2, 4]),  # 8, 2 and 1 images a step, not half a one
        ([(48, 48), (64, 64)], dict(batch_size=18), [1, 1]),
        ([(32, 32), (64, 64), (128, 128)], dict(batch_size=4, patch_size=32), [1, 1, 1]),
        ([(16, 16), (32, 32), (64, 64)], dict(batch_size=8, patch_size=32), [1, 2, 2]),
        ([(64, 64)], dict(batch_size=4), [1]),
    ],
)
def test_by_default_levels_that_show_fewer_images_come_more_often(sizes, options, expected):
    assert MultiScaleBatches(make_levels(sizes, count=1), **options).level_share == expected


@pytest.mark.parametrize("share", [[1, 1], [2, 3]])
def test_every_image_once_an_epoch_at_every_level(share):
    levels = make_levels([(2, 2), (4, 4)], count=10)
    batches = MultiScaleBatches(levels, 12, accumulation=2, level_share=share)  # 12 and 3 a draw: neither divides 10
    seen = [[], []]
    for step in range(50):
        for micro in range(2):
            batch = batches.draw(step, micro)
            seen[batch.level] += batch.indices.tolist()
    for stream in seen:
        epochs = [tuple(stream[start : start + 10]) for start in range(0, len(stream) - 9, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs) >= 12
    assert seen[0][:10] != seen[1][:10]


def test_a_draw_depends_on_its_step_alone():
    levels = make_levels([(8, 8), (16, 16)])
    options = {"batch_size": 8, "patch_size": 6, "random_flip": True, "seed": 3, "accumulation": 2}
    batches = MultiScaleBatches(levels, **options)
    forward = {(step, micro): batches.draw(step, micro) for step in range(12) for micro in range(2)}
    for (step, micro), batch in reversed(forward.items()):
        assert equal(batch, batches.draw(step, micro))
        assert equal(batch, MultiScaleBatches(levels, **options).draw(step, micro))
    other = MultiScaleBatches(levels, **options | {"seed": 4})
    assert not any(equal(batch, other.draw(*place)) for place, batch in forward.items())


@pytest.mark.parametrize("patch_size", [None, 4])
def test_two_processes_see_what_one_sees(patch_size):
    levels = make_levels([(4, 4), (8, 8)], count=7)
    options = {"patch_size": patch_size, "random_flip": True, "accumulation": 2}
    whole = MultiScaleBatches(levels, 8, **options)
    halves = [MultiScaleBatches(levels, 4, num_processes=2, process_index=index, **options) for index in range(2)]
    for step in range(20):
        for micro in range(2):
            one, (first, second) = whole.draw(step, micro), [half.draw(step, micro) for half in halves]
            assert one.level == first.level == second.level
            assert torch.equal(one.images, torch.cat([first.images, second.images]))
            assert torch.equal(one.indices, torch.cat([first.indices, second.indices]))
            if patch_size:
                assert torch.equal(one.boxes, torch.cat([first.boxes, second.boxes]))


def test_windows_are_where_their_boxes_say():
    levels = make_position_levels()
    batches = MultiScaleBatches(levels, 6, patch_size=(5, 7), random_flip=True)
    flipped = Counter()
    places = set()
    for step in range(60):
        batch = batches.draw(step)
        height, width = levels.sizes[batch.level]
        for image, box, index in zip(batch.images, batch.boxes, batch.indices.tolist(), strict=True):
            top, left, bottom, right = (box * torch.tensor([height, width, height, width])).round().int().tolist()
            assert (bottom - top, right - left) == (5, 7) and top >= 0 and left >= 0
            assert bottom <= height and right <= width
            mirrored = bool(image[1, 0, 0] > image[1, 0, 1])
            original = levels.arrays[batch.level][index]
            upright = original[:, ::-1] if mirrored else original
            assert np.array_equal(image.numpy(), upright[top:bottom, left:right].transpose(2, 0, 1))
            flipped[mirrored] += 1
            places.add((batch.level, top, left))
    assert 0.4 < flipped[True] / flipped.total() < 0.6
    # Every place of the lower level comes up, the last row and column among them.
    assert {(0, top, left) for top in range(12 - 5 + 1) for left in range(10 - 7 + 1)} <= places


def test_windows_are_cut_to_the_level():
    batches = MultiScaleBatches(make_position_levels(), 6, patch_size=16)
    for step in range(4):
        batch = batches.draw(step)
        if batch.level == 0:
            assert batch.images.shape[2:] == (12, 10)
            assert torch.equal(batch.boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 6))
        else:
            assert batch.images.shape[2:] == (16, 16) and not torch.equal(batch.boxes[0], batch.boxes[1])


def test_without_flip_nothing_is_mirrored():
    batches = MultiScaleBatches(make_position_levels(), 6)
    assert all((batches.draw(step).images[:, 1, 0].int().diff() == 1).all() for step in range(10))


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("num_processes", 0),
        ("accumulation", 0),
        ("process_index", 1),
        ("process_index", -1),
        ("patch_size", 0),
        ("patch_size", (4, 4, 4)),
        ("level_share", [1, 1]),
        ("level_share", [0]),
    ],
)
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        MultiScaleBatches(make_levels([(2, 2)]), **{"batch_size": 1} | {name: value})


def test_draws_out_of_range():
    batches = MultiScaleBatches(make_levels([(2, 2)]), 1, accumulation=2)
    with pytest.raises(ValueError, match="^step=-1"):
        batches.draw(-1)
    with pytest.raises(ValueError, match=r"^micro=2: expected 0..1"):
        batches.draw(0, 2)


def test_seeds_differ_by_part_order_and_split():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 23), (12, 3), (-1,)]
    seeds = [seed_of(*each) for each in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2) == seed_of(1, 2)
    for wrong in [(), (1.0,), (True,)]:
        with pytest.raises(ValueError, match="^parts="):
            seed_of(*wrong)
