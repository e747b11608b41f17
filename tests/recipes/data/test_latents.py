"""Latents: written and read back equal, continued after a kill at any point, and refused when damaged."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_data import encode, make_images

from gatewright.recipes.data import Draw, batches, load_data
from gatewright.recipes.data import autoencoder as autoencoder_module
from gatewright.recipes.data.latents import SD_VAE_SCALE, main, write_latents

SETTINGS = {"image_size": 8, "encoder": "tiny", "shard_size": 4, "batch_size": 3}
COUNTS = {"ant": 5, "cat": 6}  # eleven images: shards of 4, 4 and 3


class Killed(BaseException):
    """Ends the writer as a kill would: nothing catches it."""


@pytest.fixture
def root(tmp_path):
    return make_images(tmp_path / "images", COUNTS)


@pytest.fixture
def written(tmp_path, root):
    write_latents(root, tmp_path / "latents", encode, **SETTINGS)
    return tmp_path / "latents"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".unfinished"}


def test_latents_are_those_of_the_same_images(root, written):
    pixels = load_data(f"imagefolder:{root}", image_size=8, validation_fraction=0.3)
    data = load_data(f"latents:{written}", image_size=8, validation_fraction=0.3)
    assert data.shape == (4, 2, 2) and data.class_names == pixels.class_names and data.latent_scale == SD_VAE_SCALE
    for split, images in ((data.train, pixels.train), (data.validation, pixels.validation)):
        assert split.labels.tolist() == images.labels.tolist() and len(split) > 1
        mean = encode(images.images(range(len(images)))).chunk(2, dim=1)[0]
        torch.testing.assert_close(split.images(range(len(split))), mean * SD_VAE_SCALE)
    assert data.validation.images([]).shape == (0, 4, 2, 2)


def test_training_samples_one_of_the_two_moments(root, written):
    images = load_data(f"imagefolder:{root}", image_size=8).train
    train = load_data(f"latents:{written}").train
    everything = range(len(train))
    draw = Draw(0, 0, tuple(everything))
    mirrored = (draw.uniform("flip") < 0.5)[:, None, None, None]
    assert 0 < mirrored.sum() < len(train)
    for flip, x in ((None, images.images(everything, draw)), (False, images.images(everything))):
        mean, logvar = encode(x).chunk(2, dim=1)
        expected = (mean + (logvar / 2).exp() * draw.normal("latent", (4, 2, 2))) * SD_VAE_SCALE
        sampled = load_data(f"latents:{written}", flip=flip).train.images(everything, draw)
        torch.testing.assert_close(sampled, expected)


def test_samples_do_not_depend_on_the_layout_and_change_every_step(written):
    train = load_data(f"latents:{written}").train
    step = {"global_batch": len(train), "seed": 0}
    whole = next(batches(train, **step, step=4))
    pieces = [batch.images for batch in batches(train, **step, step=4, micro_batches=len(train))]
    torch.testing.assert_close(torch.cat(pieces), whole.images, rtol=0, atol=0)
    other = next(batches(train, **step, step=5))
    assert (whole.images[whole.ids.argsort()] != other.images[other.ids.argsort()]).flatten(1).any(1).all()


def test_the_index_says_what_is_there(root, written):
    index = json.loads((written / "index.json").read_text())
    assert index["version"] == 1 and index["class_names"] == ["ant", "cat"] and index["moments"] == [8, 2, 2]
    assert index["settings"]["images"] == 11 and index["settings"]["scale"] == SD_VAE_SCALE
    assert [(shard["file"], shard["count"]) for shard in index["shards"]] == [
        ("shard-00000.safetensors", 4),
        ("shard-00001.safetensors", 4),
        ("shard-00002.safetensors", 3),
    ]
    assert all(shard["bytes"] == (written / shard["file"]).stat().st_size for shard in index["shards"])


def test_a_finished_folder_is_left_as_it_is(root, written):
    before = {file: file.stat().st_mtime_ns for file in written.glob("shard-*")}

    def no_encoder(x):
        raise AssertionError("nothing is left to encode")

    write_latents(root, written, no_encoder, **SETTINGS)
    assert {file: file.stat().st_mtime_ns for file in written.glob("shard-*")} == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_at_any_point_it_continues_and_ends_the_same(tmp_path, root, written, monkeypatch, call):
    real, whole = getattr(os, call), content(written)
    points = {"fsync": 14, "replace": 7}[call]  # three shards and four states of the index; a file and a folder each
    for point in range(points):
        out, calls = tmp_path / f"{call}-{point}", iter(range(points))

        def killed(*arguments, calls=calls, point=point):
            if next(calls) == point:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(os, call, killed)
            write_latents(root, out, encode, **SETTINGS)
        if (out / "index.json").exists() and len(json.loads((out / "index.json").read_text())["shards"]) < 3:
            with pytest.raises(ValueError, match=r"is unfinished: it has \d of 3 shards.*it continues"):
                load_data(f"latents:{out}")
        write_latents(root, out, encode, **SETTINGS)
        assert content(out) == whole


def test_what_was_encoded_before_a_kill_is_not_encoded_again(tmp_path, root):
    seen = []

    def killed(x):
        seen.append(len(x))
        if sum(seen) > 2 * 8:  # both sides of two shards of four
            raise Killed
        return encode(x)

    with pytest.raises(Killed):
        write_latents(root, tmp_path / "out", killed, **SETTINGS)
    again = []
    write_latents(root, tmp_path / "out", lambda x: again.append(len(x)) or encode(x), **SETTINGS)
    assert sum(again) == 2 * 3


def test_a_real_kill_leaves_a_folder_that_continues(tmp_path, root, written):
    out = tmp_path / "killed"
    program = (
        "import os, signal, sys\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from made_data import encode\n"
        "from gatewright.recipes.data.latents import write_latents\n"
        "calls = []\n"
        "def killed(x):\n"
        "    calls.append(x)\n"
        "    if len(calls) == 7:\n"  # in the second shard; two batches a shard, both sides
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return encode(x)\n"
        f"write_latents({str(root)!r}, {str(out)!r}, killed, **{SETTINGS!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [shard["file"] for shard in json.loads((out / "index.json").read_text())["shards"]] == [
        "shard-00000.safetensors"
    ]
    write_latents(root, out, encode, **SETTINGS)
    assert content(out) == content(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 16}, r"image_size 8, now 16"),
        ({"shard_size": 5}, r"shard_size 4, now 5"),
        ({"encoder": "other"}, r"encoder 'tiny', now 'other'"),
        ({"scale": 1.0}, r"scale 0.18215, now 1.0"),
    ],
)
def test_other_settings_are_refused(root, written, change, message):
    with pytest.raises(ValueError, match=f"was written with other settings .*{message}.* use those again"):
        write_latents(root, written, encode, **{**SETTINGS, **change})


def test_other_images_are_refused(root, written):
    (root / "ant" / "0.png").write_bytes((root / "ant" / "1.png").read_bytes() + b"more")
    with pytest.raises(ValueError, match="other settings .*images_sha256"):
        write_latents(root, written, encode, **SETTINGS)
    make_images(root, {"bee": 1})
    with pytest.raises(ValueError, match="other settings .*images 11, now 12"):
        write_latents(root, written, encode, **SETTINGS)


def test_a_second_writer_is_refused_while_the_first_one_writes(tmp_path, root):
    def encode_while_another_starts(x):
        with pytest.raises(ValueError, match="is being written to by another process"):
            write_latents(root, tmp_path / "out", encode, **SETTINGS)
        return encode(x)

    write_latents(root, tmp_path / "out", encode_while_another_starts, **SETTINGS)
    assert len(load_data(f"latents:{tmp_path / 'out'}").train) > 0


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def blank(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"is damaged: the index says \d+ bytes, it has \d+; delete it and run the command again"),
        (blank, r"is damaged: expected a safetensors file .*; delete it and run the command again"),
        (Path.unlink, "is missing: run the command again"),
    ],
)
def test_a_damaged_shard_is_named_and_mended_by_the_command(root, written, damage, message):
    whole = content(written)
    damage(written / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=f"shard-00001.safetensors {message}"):
        load_data(f"latents:{written}")
    write_latents(root, written, encode, **SETTINGS)
    assert content(written) == whole


def test_a_flipped_bit_is_found_by_the_command(root, written):
    whole, file = content(written), written / "shard-00002.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    write_latents(root, written, encode, **SETTINGS)
    assert content(written) == whole


def test_a_shard_of_another_folder_is_refused(root, written, tmp_path):
    write_latents(root, tmp_path / "other", lambda x: encode(x)[..., :1], **{**SETTINGS, "encoder": "narrow"})
    index = json.loads((written / "index.json").read_text())
    shard = (tmp_path / "other" / "shard-00000.safetensors").read_bytes()
    (written / "shard-00000.safetensors").write_bytes(shard)
    index["shards"][0]["bytes"] = len(shard)
    (written / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected moments \[4, 2, 8, 2, 2\] and 4 paths, it has \[4, 2, 8, 2, 1\]"):
        load_data(f"latents:{written}")


def test_an_image_that_is_there_twice_is_refused(written):
    index = json.loads((written / "index.json").read_text())
    (written / "shard-00001.safetensors").write_bytes((written / "shard-00000.safetensors").read_bytes())
    index["shards"][1]["bytes"] = index["shards"][0]["bytes"]
    (written / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not hold each image once: expected 11 images"):
        load_data(f"latents:{written}")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(version=2),
        lambda index: index.pop("settings"),
        lambda index: index["settings"].pop("scale"),
        lambda index: index["settings"].update(images=0),
        lambda index: index["shards"][0].update(file="../elsewhere.safetensors"),
        lambda index: index["shards"][0].update(file="shard-00009.safetensors"),
        lambda index: index.update(moments=None),
        lambda index: index.update(shards=3),
    ],
)
def test_a_damaged_index_is_named(written, change):
    index = json.loads((written / "index.json").read_text())
    change(index)
    (written / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json is damaged or no index of latents .*delete it and write"):
        load_data(f"latents:{written}")


def test_an_index_that_is_no_json_is_named(root, written):
    truncate(written / "index.json")
    with pytest.raises(ValueError, match="index.json is damaged"):
        load_data(f"latents:{written}")
    with pytest.raises(ValueError, match="index.json is damaged"):
        write_latents(root, written, encode, **SETTINGS)


def test_what_is_not_there_is_named(tmp_path, root, written):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: write the latents with python -m"):
        load_data(f"latents:{tmp_path / 'nowhere'}")
    with pytest.raises(FileNotFoundError, match=r"there is no index.json in .*images: write the latents with"):
        load_data(f"latents:{root}")
    with pytest.raises(ValueError, match="image_size=16: .* holds latents of images of 8 pixels; leave image_size out"):
        load_data(f"latents:{written}", image_size=16)


def test_pixels_need_a_decoder(written):
    data = load_data(f"latents:{written}")
    x = data.validation.images([0])
    with pytest.raises(ValueError, match="holds latents, which are no pixels: give decode="):
        data.to_pixels(x)
    picture = data.to_pixels(x, decode=lambda z: z[:, :3])
    assert picture.shape == (1, 2, 2, 3) and picture.dtype == torch.uint8
    expected = (x[0, 0, 0, 0] / SD_VAE_SCALE + 1) * 127.5
    assert abs(picture[0, 0, 0, 0].item() - expected.item()) <= 0.5


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (lambda x: encode(x)[0], r"returned torch.float32 \(8, 2, 2\) for 3 images: expected floats \(3, 2C, h, w\)"),
        (lambda x: encode(x)[:-1], r"for 3 images"),
        (lambda x: encode(x)[:, :7], r"\(3, 7, 2, 2\)"),
        (lambda x: encode(x).int(), "returned torch.int32"),
        (lambda x: encode(x).where(torch.arange(3).view(3, 1, 1, 1) != 1, torch.nan), r"not finite for .*ant/1.png"),
    ],
)
def test_an_encoder_that_returns_no_moments_is_refused(tmp_path, root, moments, message):
    with pytest.raises(ValueError, match=message):
        write_latents(root, tmp_path / "out", moments, **SETTINGS)


def test_an_encoder_that_changes_its_shape_is_refused(tmp_path, root):
    calls = []

    def narrower(x):
        calls.append(x)
        return encode(x) if len(calls) <= 4 else encode(x)[..., :1]  # two batches a shard, both sides

    with pytest.raises(ValueError, match=r"moments \(8, 2, 1\) for ant/4.png and \(8, 2, 2\) for the shards before"):
        write_latents(root, tmp_path / "out", narrower, **SETTINGS)


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, root):
    for name in ("image_size", "shard_size", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0: choose 1 or more"):
            write_latents(root, tmp_path / "out", encode, **{**SETTINGS, name: 0})
    with pytest.raises(ValueError, match="where it would be taken for a class: choose another --out"):
        write_latents(root, root / "latents", encode, **SETTINGS)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_latents(tmp_path / "nowhere", tmp_path / "out", encode, **SETTINGS)
    assert not (tmp_path / "out").exists() and not (root / "latents").exists()


def test_an_image_that_cannot_be_read_stops_the_command_and_is_named(tmp_path, root):
    (root / "cat" / "5.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cat/5.png cannot be read as an image"):
        write_latents(root, tmp_path / "out", encode, **SETTINGS)


def test_moments_keep_the_type_of_the_encoder(tmp_path, root):
    write_latents(root, tmp_path / "half", lambda x: encode(x).half(), **SETTINGS)
    data = load_data(f"latents:{tmp_path / 'half'}")
    assert data.train.images([0]).dtype == torch.float32
    sizes = [data.train._moments(0, side).dtype for side in (0, 1)]
    assert sizes == [torch.float16] * 2


def test_the_command_writes_what_a_recipe_reads(tmp_path, root, monkeypatch, capsys):
    fake = SimpleNamespace(encode=encode, scale=0.5, name="tiny")
    monkeypatch.setattr(autoencoder_module, "load_autoencoder", lambda folder, device: fake)
    out = tmp_path / "out"
    main([str(root), "--out", str(out), "--vae", "vae", "--image-size", "8", "--shard-size", "4", "--device", "cpu"])
    assert f"--data latents:{out}" in capsys.readouterr().out
    data = load_data(f"latents:{out}")
    assert data.latent_scale == 0.5 and len(data.train) + len(data.validation) == 11


def test_the_command_ends_with_one_line_when_it_cannot_go_on(tmp_path, root):
    with pytest.raises(SystemExit, match="error: .*vae is not the folder of an autoencoder"):
        main([str(root), "--out", str(tmp_path / "out"), "--vae", str(tmp_path / "vae")])
