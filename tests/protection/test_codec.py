"""The codec of messages: its start, its file, what pictures go through."""

import json

import pytest
import torch

from lorry.core.errors import CheckpointError, OptionError
from lorry.protection.codec import FACTS, Codec, CodecShape, digest, load_codec
from lorry.protection.codec_fit import CodecTraining, peak_variation, train_codec
from lorry.protection.distortions import DISTORTIONS, chosen, compressed

SMALL = CodecShape(8, channels=3, size=16, grid=8, picture_channels=3, picture_size=16, decoder="small", width=8)


def test_a_fresh_codec_adds_nothing():
    codec = Codec(CodecShape(12, decoder="small", picture_size=16), 0)
    residual = codec.residual(torch.randint(2, (3, 12), generator=torch.Generator().manual_seed(0)), (24, 16))
    assert residual.shape == (3, 4, 24, 16) and not residual.any()


def test_the_zero_message_has_no_residual_in_one_reading_and_one_in_the_other():
    for zero, without in (("clean", True), ("marked", False)):
        codec = Codec(CodecShape(**{**vars(SMALL), "zero": zero}), 0)
        with torch.no_grad():
            codec.encoder.last.weight.normal_(generator=torch.Generator().manual_seed(0))
        residual = codec.residual(torch.stack([torch.zeros(8), torch.ones(8)]))
        assert bool((residual[0] == 0).all()) is without and residual[1].abs().max() > 0


def test_the_large_reader_takes_pictures():
    shape = CodecShape(**{**vars(SMALL), "decoder": "efficientnet-b1", "picture_size": 32})
    assert Codec(shape).read(torch.zeros(1, 3, 20, 20)).shape == (1, 8)


def test_saved_and_loaded_is_the_same_and_a_changed_file_is_refused(tmp_path):
    codec = Codec(SMALL, 3)
    mark = codec.save(tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert digest(again) == mark == digest(codec)
    facts = json.loads((tmp_path / "codec" / FACTS).read_text())
    (tmp_path / "codec" / FACTS).write_text(json.dumps({**facts, "digest": "0"}))
    with pytest.raises(CheckpointError, match="not the one that was written"):
        load_codec(tmp_path / "codec")
    with pytest.raises(CheckpointError, match="holds no codec"):
        load_codec(tmp_path)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_distortions_change_pictures_and_let_gradients_pass(name):
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).requires_grad_()
    found = chosen([name])[0](pictures, torch.Generator().manual_seed(1))
    assert found.shape == pictures.shape and not torch.equal(found, pictures)
    found.sum().backward()
    assert torch.isfinite(pictures.grad).all() and pictures.grad.abs().sum() > 0


def test_a_better_jpeg_is_nearer():
    g = torch.Generator().manual_seed(0)
    for channels in (1, 3):
        pictures = torch.rand(1, channels, 16, 16, generator=g).mul(2).sub(1)
        errors = [float((compressed(pictures, q) - pictures).abs().mean()) for q in (95, 40)]
        assert errors[0] < errors[1]


def test_the_largest_region_counts():
    change = torch.zeros(1, 3, 8, 8)
    change[..., :4, :4] = 0.5
    assert float(peak_variation(change, 4)) == pytest.approx(0.5)


def test_unknown_distortions_and_wrong_pictures_are_refused():
    with pytest.raises(OptionError, match="no distortion 'jpg'"):
        CodecTraining(distortions=("jpg",))
    with pytest.raises(OptionError, match="reads pictures"):
        Codec(SMALL).logits(torch.zeros(1, 1, 16, 16))


def test_training_does_not_depend_on_what_was_drawn_elsewhere():
    latents, runs = torch.zeros(4, 3, 16, 16), []
    for noise in range(2):
        torch.manual_seed(noise)
        codec = Codec(SMALL, 5)
        train_codec(codec, latents, CodecTraining(steps=3, rows=4), 7)
        runs.append(digest(codec))
    assert runs[0] == runs[1]
