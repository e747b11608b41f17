"""The autoencoder of the latents: what its folder must hold, and, where diffusers is installed, a tiny real one."""

import json
import sys

import pytest
import torch

from gatewright.recipes.data.autoencoder import load_autoencoder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("lacking", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_folder_that_is_none_is_refused(folder, lacking):
    (folder / lacking).unlink()
    with pytest.raises(FileNotFoundError, match=r"is not the folder of an autoencoder: it must hold config.json and"):
        load_autoencoder(folder)


def test_diffusers_is_named_when_it_is_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="loaded with diffusers, which is not installed: run pip install diffusers"):
        load_autoencoder(folder)


@pytest.fixture
def tiny(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    model.save_pretrained(tmp_path / "vae")
    return model.eval(), tmp_path / "vae"


def test_a_real_one_encodes_and_decodes(tiny):
    model, folder = tiny
    loaded = load_autoencoder(folder)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = model.encode(x).latent_dist
    moments = loaded.encode(x)
    assert moments.shape == (2, 8, 8, 8) and loaded.scale == 0.3
    torch.testing.assert_close(moments.chunk(2, dim=1)[0], expected.mean)
    torch.testing.assert_close(moments.chunk(2, dim=1)[1].clamp(-30, 20), expected.logvar)
    assert loaded.decode(expected.mean).shape == x.shape
    assert loaded.name == load_autoencoder(folder).name


def test_one_that_shifts_is_refused(tiny):
    config = tiny[1] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift_factor": 0.1}))
    with pytest.raises(ValueError, match="shifts its latents"):
        load_autoencoder(tiny[1])
