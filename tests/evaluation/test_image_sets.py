import io
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_gmem.data import ImageSource, center_crop
from diffusers_gmem.evaluation import (
    CroppedImages,
    GeneratedImages,
    InceptionV3,
    read_published_statistics,
)


PIXELS = np.random.default_rng(0).integers(256, size=(5, 6, 7, 3), dtype=np.uint8)


def assert_are_the_pixels(images):
    assert len(images) == 5 and tuple(images.size) == (6, 7)
    for k in range(5):
        assert images[k].dtype == torch.uint8
        np.testing.assert_array_equal(images[k].permute(1, 2, 0), PIXELS[k])


def write_folder(folder):
    for k in (4, 0, 2, 1, 3):
        path = folder / f"{k // 2:05d}" / f"{k:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(PIXELS[k]).save(path)


def test_png_files_in_the_order_of_their_numbers(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "protocol.json").write_text("{}")
    np.savez(tmp_path / "images.npz", arr_0=PIXELS)
    assert_are_the_pixels(GeneratedImages(tmp_path))


def test_npz_files(tmp_path):
    np.savez(tmp_path / "stored.npz", PIXELS, labels=np.arange(5))
    images = GeneratedImages(tmp_path / "stored.npz")
    assert_are_the_pixels(images)
    assert isinstance(images._array, np.memmap)
    np.savez_compressed(tmp_path / "compressed.npz", PIXELS)
    assert_are_the_pixels(GeneratedImages(tmp_path / "compressed.npz"))
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(PIXELS))
    assert_are_the_pixels(GeneratedImages(tmp_path / "fortran.npz"))
    # With the longer header of arrays that are written without knowing how large they get
    content = io.BytesIO()
    np.save(content, PIXELS)
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            member.write(content.getvalue())
    assert_are_the_pixels(GeneratedImages(tmp_path / "large.npz"))


def test_what_holds_no_images_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.npz"):
        GeneratedImages(tmp_path / "missing.npz")
    with pytest.raises(ValueError, match="no PNG files"):
        GeneratedImages(tmp_path)
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match="neither a folder nor a readable .npz file"):
        GeneratedImages(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", images=PIXELS)
    with pytest.raises(ValueError, match="no array arr_0 .*images.npy"):
        GeneratedImages(tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", PIXELS / 255)
    with pytest.raises(ValueError, match=r"must be uint8 of shape .* got float64 of shape \(5, 6, 7, 3\)"):
        GeneratedImages(tmp_path / "floats.npz")
    np.savez(tmp_path / "first.npz", PIXELS.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"got uint8 of shape \(5, 3, 6, 7\)"):
        GeneratedImages(tmp_path / "first.npz")


def test_images_of_another_size_are_named(tmp_path):
    write_folder(tmp_path)
    PIL.Image.new("RGB", (6, 6)).save(tmp_path / "00001/000003.png")
    images = GeneratedImages(tmp_path)
    with pytest.raises(ValueError, match="000003.png has 6 x 6 pixels, .*000000.png has 6 x 7"):
        images[3]


def test_real_images_are_cropped_as_adm_does(tmp_path):
    picture = PIL.Image.fromarray(np.random.default_rng(1).integers(256, size=(40, 30, 3), dtype=np.uint8))
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images/a.png")
    images = CroppedImages(ImageSource(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache")), 8)
    assert len(images) == 1
    assert images[0].dtype == torch.uint8
    np.testing.assert_array_equal(images[0].permute(1, 2, 0), np.array(center_crop(picture, 8)))


def test_published_statistics(tmp_path):
    dim = InceptionV3.spatial_dim
    mean, scale = np.linspace(0, 1, dim), np.linspace(1, 2, dim)
    np.savez(tmp_path / "reference.npz", arr_0=PIXELS, mu_s=mean, sigma_s=np.diag(scale))
    statistics = read_published_statistics(tmp_path / "reference.npz")
    assert list(statistics) == ["spatial"]
    np.testing.assert_allclose(statistics["spatial"].mean, mean)
    np.testing.assert_allclose(statistics["spatial"].covariance.diagonal(), scale)
    # As many images as there are in the file would allow a covariance of rank 4 only
    assert statistics["spatial"].count > dim
    np.savez(tmp_path / "images.npz", arr_0=PIXELS)
    assert read_published_statistics(tmp_path / "images.npz") == {}
    np.savez(tmp_path / "other.npz", mu=np.zeros(768), sigma=np.eye(768))
    with pytest.raises(ValueError, match=r"mu in .*other.npz must have the shape \(2048,\), got \(768,\)"):
        read_published_statistics(tmp_path / "other.npz")
