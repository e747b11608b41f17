"""A folder of images: classes, crops, what is held out, and files that cannot be read."""

import numpy as np
import pytest
import torch
from made_data import make_images
from PIL import Image

from gatewright.recipes.data import Draw, load_data
from gatewright.recipes.data.imagefolder import read_image
from gatewright.recipes.data.split import hold_out_paths


@pytest.fixture
def root(tmp_path):
    return make_images(tmp_path / "images", {"cat": 10, "ant": 4, "dog": 1})


def test_sub_folders_are_classes_and_some_of_each_is_held_out(root):
    data = load_data(f"imagefolder:{root}", image_size=8, validation_fraction=0.2)
    assert data.class_names == ("ant", "cat", "dog") and data.shape == (3, 8, 8)
    assert data.train.labels.tolist() == [0] * 3 + [1] * 8 + [2] and data.validation.labels.tolist() == [0, 1, 1]
    assert sorted(data.train.paths + data.validation.paths) == sorted(
        str(p.relative_to(root)) for p in root.rglob("*.png")
    )
    x = data.train.images(range(12))
    assert x.shape == (12, 3, 8, 8) and x.dtype == torch.float32 and -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
    assert data.to_pixels(x).shape == (12, 8, 8, 3)
    assert data.validation.images([]).shape == (0, 3, 8, 8)


def test_what_is_held_out_does_not_change_when_a_class_is_added(root):
    before = load_data(f"imagefolder:{root}", image_size=8, validation_fraction=0.3).validation.paths
    make_images(root, {"bee": 5})
    after = load_data(f"imagefolder:{root}", image_size=8, validation_fraction=0.3).validation.paths
    assert [path for path in after if not path.startswith("bee/")] == before


@pytest.mark.parametrize(("count", "fraction", "held"), [(2, 0.01, 1), (2, 0.99, 1), (100, 0.05, 5), (30, 0.5, 15)])
def test_the_share_is_rounded_and_leaves_something_on_both_sides(count, fraction, held):
    assert hold_out_paths([f"a/{i}" for i in range(count)], fraction, name="x").sum() == held


def test_classes_of_one_image_leave_nothing_to_hold_out():
    with pytest.raises(ValueError, match="each class has one image"):
        hold_out_paths(["a/1", "b/1"], 0.5, name="imagefolder:x")


def test_images_are_mirrored_in_training_unless_told_not_to(root):
    draw = Draw(0, 0, tuple(range(12)))
    data = load_data(f"imagefolder:{root}", image_size=16)
    seen, plain = data.train.images(range(12), draw), data.train.images(range(12))
    mirrored = (draw.uniform("flip") < 0.5)[:, None, None, None]
    assert 0 < mirrored.sum() < 12
    torch.testing.assert_close(seen, torch.where(mirrored, plain.flip(-1), plain), rtol=0, atol=0)
    data = load_data(f"imagefolder:{root}", image_size=16, flip=False)
    torch.testing.assert_close(data.train.images(range(12), draw), plain, rtol=0, atol=0)


def test_the_crop_is_the_centre(tmp_path):
    pixels = np.zeros((6, 10, 3), dtype=np.uint8)
    pixels[:, 2:8] = 200  # the square in the middle
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 6) == 200).all()
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (read_image(tmp_path / "tall.png", 6) == 200).all()


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (33, 64), (200, 31), (1, 1)])
def test_every_size_gives_a_square(tmp_path, size):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png", 16)
    assert image.shape == (16, 16, 3) and (image == [10, 20, 30]).all()


def test_a_large_image_is_halved_with_a_box_filter_first(tmp_path):
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(np.repeat(checkers[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "checkers.png")
    assert np.isin(read_image(tmp_path / "checkers.png", 16), (127, 128)).all()


@pytest.mark.parametrize(
    ("mode", "ending"), [("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "bmp"), ("RGB", "webp")]
)
def test_any_kind_of_image_becomes_rgb(tmp_path, mode, ending):
    file = tmp_path / "a" / f"image.{ending}"
    file.parent.mkdir()
    Image.new(mode, (9, 9)).save(file)
    Image.new(mode, (9, 9)).save(file.with_name(f"IMAGE2.{ending.upper()}"))
    data = load_data(f"imagefolder:{tmp_path}", image_size=4)
    assert data.train.images([0]).shape == (1, 3, 4, 4)


def test_other_files_and_hidden_ones_are_no_images(root):
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "._1.png").write_bytes(b"a Macintosh's")
    (root / ".cache").mkdir()
    (root / "cat" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(root / "cat" / "more" / "deep.png")
    data = load_data(f"imagefolder:{root}", image_size=8)
    assert data.class_names == ("ant", "cat", "dog") and len(data.train) + len(data.validation) == 16


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"not an image", lambda content: b""]
)
def test_an_image_that_cannot_be_read_is_named(root, damage):
    file = root / "ant" / "2.png"
    file.write_bytes(damage(file.read_bytes()))
    data = load_data(f"imagefolder:{root}", image_size=8)
    with pytest.raises(ValueError, match=r"ant/2\.png cannot be read as an image .*: replace it, or remove it"):
        for split in (data.train, data.validation):
            split.images(range(len(split)))


def test_an_image_that_is_gone_is_named(root):
    data = load_data(f"imagefolder:{root}", image_size=8)
    (root / data.train.paths[0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"ant/\d\.png was there"):
        data.train.images([0])


def test_sixteen_bits_are_refused_because_rgb_would_clip_them(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        read_image(tmp_path / "deep.png", 8)


def test_folders_without_classes_or_images_are_refused(tmp_path, root):
    def load(folder):
        return load_data(f"imagefolder:{folder}", image_size=8)

    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no sub-folders: put the images of each class"):
        load(root / "cat")
    (root / "elk").mkdir()
    with pytest.raises(ValueError, match="elk holds no image that Pillow reads.*remove the empty one"):
        load(root)


def test_the_size_must_be_given(root):
    with pytest.raises(ValueError, match="needs image_size"):
        load_data(f"imagefolder:{root}")
    with pytest.raises(ValueError, match="image_size=0: choose 1 or more"):
        load_data(f"imagefolder:{root}", image_size=0)
