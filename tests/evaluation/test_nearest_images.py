import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from diffusers_gmem.evaluation import NearestImages, draw_pairs, similarity_percentiles


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_the_nearest_of_all_batches(batch_size):
    generator = torch.Generator().manual_seed(0)
    queries, images = torch.randn(9, 6, generator=generator), torch.randn(50, 6, generator=generator) * 3
    images[20] = images[10]  # the first of equals
    queries[0] = 2 * images[10]
    search = NearestImages(queries)
    for batch in images.split(batch_size):
        search.update(batch)
    cosines = F.cosine_similarity(queries.double()[:, None], images.double(), dim=2)
    assert search.indices.tolist() == cosines.argmax(dim=1).tolist()
    assert search.indices[0] == 10
    torch.testing.assert_close(search.similarities.double(), cosines.max(dim=1).values, rtol=0, atol=1e-6)


def test_percentiles():
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    found = similarity_percentiles(values)
    assert list(found) == ["mean", "1%", "5%", "25%", "50%", "75%", "95%", "99%", "max"]
    assert found["mean"] == pytest.approx(values.double().mean().item())
    assert found["max"] == values.max().item()
    for percent in (1, 50, 99):
        assert found[f"{percent}%"] == pytest.approx(np.percentile(values.double(), percent), abs=1e-12)


@pytest.mark.parametrize("count", [1, 5])
def test_pairs_lie_side_by_side(count):
    red, blue = PIL.Image.new("RGB", (8, 8), "red"), PIL.Image.new("RGB", (24, 24), "blue")
    pairs = [(red, f"sample {k}", blue, "a very long name of a training image.png", 1 - k / 10) for k in range(count)]
    sheet = np.array(draw_pairs(pairs, "Pairs", columns=2, tile_size=40))
    for color in ([255, 0, 0], [0, 0, 255]):
        assert (sheet == color).all(axis=2).sum() == count * 40 * 40
    # Each blue pixel is 40 columns to the right of a red one
    is_red, is_blue = (sheet == [255, 0, 0]).all(axis=2), (sheet == [0, 0, 255]).all(axis=2)
    assert (np.roll(is_red, 40, axis=1) == is_blue).all()
    # Captions: something dark, which no caption carries over into the next pair
    assert (sheet.sum(axis=2) == 0).any()
