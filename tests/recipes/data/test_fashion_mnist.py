"""Fashion-MNIST's four files, whole and damaged."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import make_fashion_mnist, make_idx

from gatewright.recipes.data import Draw, load, load_data


@pytest.fixture
def folder(tmp_path):
    return make_fashion_mnist(tmp_path / "fashion")


def test_the_split_is_that_of_the_files(folder):
    data = load_data(f"fashion-mnist:{folder}", image_size=28)
    assert (len(data.train), len(data.validation), data.shape, data.num_classes) == (20, 10, (1, 28, 28), 10)
    assert data.class_names[9] == "Ankle boot" and data.train.labels.tolist() == [*range(10)] * 2
    x = data.train.images([0, 3])
    expected = torch.arange(4 * 28 * 28).view(4, 28, 28, 1)[[0, 3]] % 256
    assert data.to_pixels(x).tolist() == expected.tolist()


def test_debians_package_is_read():
    if not Path(load.FASHION_MNIST_FOLDER).is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    data = load_data("fashion-mnist")
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.validation.labels.bincount().tolist() == [1000] * 10


def test_the_folder_is_debians_unless_given(folder, monkeypatch):
    monkeypatch.setattr(load, "FASHION_MNIST_FOLDER", str(folder))
    assert load_data("fashion-mnist").name == "fashion-mnist"


def test_images_are_mirrored_only_when_asked(folder):
    draw = Draw(0, 0, tuple(range(20)))
    for flip, expected in ((None, False), (True, True)):
        data = load_data(f"fashion-mnist:{folder}", flip=flip)
        seen, plain = data.train.images(range(20), draw), data.train.images(range(20))
        assert bool((seen != plain).any()) is expected


def test_missing_files_are_named_with_the_package_that_brings_them(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no t10k-labels-idx1.* in .*dataset-fashion-mnist.*fashion-mnist:DIR"):
        load_data(f"fashion-mnist:{folder}")
    with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte.gz, train-labels"):
        load_data(f"fashion-mnist:{folder / 'nowhere'}")


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def repacked(change):
    return lambda content: gzip.compress(change(gzip.decompress(content)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "truncated or no gzip file"),
        (lambda content: b"not gzip at all", "truncated or no gzip file"),
        (lambda content: content[:40] + b"\x00" * 8 + content[48:], "truncated or no gzip file|holds"),
        (repacked(lambda raw: b"\x00\x00\x08\x01" + raw[4:]), "starts with 0x00000801 and not 0x00000803"),
        (repacked(lambda raw: raw[:2]), "is no idx file"),
        (repacked(lambda raw: raw[:-1]), "promises 20 x 28 x 28 = 15680 bytes and holds 15679"),
    ],
)
def test_a_damaged_file_is_named(folder, damage, message):
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load_data(f"fashion-mnist:{folder}")
    assert f"replace {file} by a whole copy" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-labels-idx1-ubyte.gz", np.zeros(19), "holds 20 images and train-labels-idx1-ubyte.gz 19 labels"),
        ("train-labels-idx1-ubyte.gz", np.full(20, 10), "holds label 10: labels must be 0 to 9"),
        ("t10k-images-idx3-ubyte.gz", np.zeros((10, 8, 8)), "training images are 28 x 28, held-out ones 8 x 8"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(folder, file, content, message):
    make_idx(folder / file, content)
    with pytest.raises(ValueError, match=message):
        load_data(f"fashion-mnist:{folder}")
