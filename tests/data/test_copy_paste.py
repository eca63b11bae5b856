import pytest
import torch

from semiseg.data import copy_paste, region_map, zero_box_mask


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("patch", "box"), [((9, 8, 7), (4, 8, 1)), ((12, 10), (8, 7))])
def test_the_mask_is_one_box_of_zeros(patch, box):
    for seed in range(10):
        mask = zero_box_mask(patch, box, generator(seed))
        assert mask.shape == patch and mask.dtype == torch.bool
        inside = (~mask).nonzero()
        assert len(inside) == torch.tensor(box).prod()
        assert (inside.amax(0) - inside.amin(0) + 1).tolist() == list(box)


def test_every_corner_is_equally_likely():
    draws = generator()
    corners = torch.stack([(~zero_box_mask((5, 4), (3, 3), draws)).nonzero()[0] for _ in range(1200)])
    values, counts = corners.unique(dim=0, return_counts=True)
    assert values.tolist() == [[row, column] for row in range(3) for column in range(2)]
    assert counts.min() > 140  # 200 expected, standard deviation 13


def test_the_seed_decides_the_mask():
    torch.testing.assert_close(
        zero_box_mask((20, 20), (3, 3), generator(1)), zero_box_mask((20, 20), (3, 3), generator(1))
    )


@pytest.mark.parametrize("box", [(5, 3), (0, 3), (3, 3, 3), (3,)])
def test_a_box_that_does_not_fit_is_refused(box):
    with pytest.raises(ValueError, match=r"box is .*, accepted are 2 sizes from 1 up to the patch \(4, 6\)"):
        zero_box_mask((4, 6), box, generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("channel", [(), (1,)])
def test_outside_and_inside(dtype, channel):
    mask = zero_box_mask((6, 5, 4), (3, 3, 3), generator())
    outside, inside = (torch.randint(0, 9, (2, *channel, 6, 5, 4)).to(dtype) for _ in range(2))
    mixed = copy_paste(mask, outside, inside)
    assert mixed.dtype == dtype
    assert torch.equal(mixed[..., mask], outside[..., mask])
    assert torch.equal(mixed[..., ~mask], inside[..., ~mask])


def test_nan_stays_on_its_own_side():
    mask = zero_box_mask((6, 5), (3, 3), generator())
    mixed = copy_paste(mask, torch.zeros(1, 1, 6, 5), torch.full((1, 1, 6, 5), torch.nan))
    assert torch.equal(mixed[0, 0].isnan(), ~mask)


def test_parts_must_match():
    mask = zero_box_mask((6, 5), (3, 3), generator())
    with pytest.raises(ValueError, match="inside is torch.int64"):
        copy_paste(mask, torch.zeros(1, 6, 5, dtype=torch.uint8), torch.zeros(1, 6, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"inside is torch.float32 \(2, 6, 5\)"):
        copy_paste(mask, torch.zeros(1, 6, 5), torch.zeros(2, 6, 5))


@pytest.mark.parametrize("labelled", ["outside", "inside"])
def test_region_map_marks_the_pseudo_labelled_part(labelled):
    mask = zero_box_mask((6, 5, 4), (3, 3, 3), generator())
    of_labelled, of_unlabelled = (
        torch.zeros(2, 6, 5, 4, dtype=torch.uint8),
        torch.ones(2, 6, 5, 4, dtype=torch.uint8),
    )
    parts = (of_labelled, of_unlabelled) if labelled == "outside" else (of_unlabelled, of_labelled)
    regions = region_map(mask, 2, labelled)
    assert regions.is_contiguous() and regions.dtype == torch.uint8
    assert torch.equal(regions, copy_paste(mask, *parts))


def test_region_map_refuses_other_sides():
    with pytest.raises(ValueError, match="labelled is 'left', accepted are 'outside' and 'inside'"):
        region_map(torch.ones(2, 2, dtype=torch.bool), 1, "left")
