"""From digits to a signed adapter: the codec, joint training, bakes, verification, attacks."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import lorry
from lorry.cli.main import app
from lorry.core.errors import AdapterError, CheckpointError, OptionError
from lorry.formats.reader import open_adapter
from lorry.formats.snapshot import as_file
from lorry.protection.bake import bake, load_secret, new_secret, sign
from lorry.protection.codec import Codec, CodecShape
from lorry.protection.codec_fit import CodecTraining, train_codec
from lorry.protection.messages import from_text
from lorry.protection.robustness import curve, pruned, rounded
from lorry.protection.signing_latents import SigningLatents, alphas
from lorry.protection.verify import bit_accuracy, verify
from lorry.systems.authenlora.digits import SCHEDULE, base, pictures, sample
from lorry.training import DataError, Job, train

USERS = (from_text("11001010"), from_text("00110101"))


def trained_codec(steps):
    """A codec for digits and inverted ones."""
    shape = CodecShape(8, channels=1, size=8, grid=8, picture_channels=1, picture_size=8, decoder="small")
    settings = CodecTraining(steps, rate=2e-3, perceptual=2.0, variation=0.2, region=3, distortions=("noise",))
    codec = Codec(shape, 0)
    train_codec(codec, torch.cat([pictures(), pictures(inverted=True)]), settings, 0)
    return codec


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A denoiser, a codec, and an adapter that learned to draw inverted digits with messages."""
    folder = tmp_path_factory.mktemp("signing")
    model, codec = base(0, 300), trained_codec(800)
    codec.save(folder / "codec")
    records = [{"latent": picture} for picture in pictures(inverted=True)]
    job = Job(
        "signed",
        records,
        {"method": "authen-lora", "bits": 8, "rank": 16},
        objective=SigningLatents(codec=str(folder / "codec"), lambda_wm=0.0, schedule=SCHEDULE),
        targets="all",
        steps=450,
        batch_size=64,
        learning_rate=4e-3,
        schedule="cosine",
    )
    result = train(model, None, job, folder / "run")
    assert result.ok, result.report
    return model, codec, folder


def made(model, message=None, count=100):
    facts = {} if message is None else {"message": message}
    with lorry.context(model, **facts):
        return sample(model, count, 3)


def test_the_codec_reads_held_out_pictures_and_unmarked_ones_as_zero(world):
    _, codec, _ = world
    held = pictures("test", inverted=True)
    message = torch.randint(2, (len(held), 8), generator=torch.Generator().manual_seed(5))
    assert bit_accuracy(codec, held + codec.residual(message), message) > 0.9
    assert bit_accuracy(codec, held, torch.zeros(8)) > 0.9


def test_pictures_carry_the_message_and_those_of_the_base_do_not(world):
    model, codec, _ = world
    message = torch.randint(2, (100, 8), generator=torch.Generator().manual_seed(6))
    with lorry.activate(model, "signed"):
        signed = bit_accuracy(codec, made(model, message), message)
    with lorry.activate(model, None):
        bare = bit_accuracy(codec, made(model), message)
    assert signed > 0.62 and signed - bare > 0.1
    assert 0.4 < bare < 0.6


def test_two_bakes_read_their_own_message_and_the_curve_is_whole(world):
    model, codec, _ = world
    file = as_file(lorry.adapters(model)["signed"])
    lorry.activate(model, None)
    for user, other in (USERS, USERS[::-1]):
        found = curve(model, bake(file, user), codec, user, lambda: made(model), other=bake(file, other))
        # the messages are each other's opposite, so that one's bits read right are the other's read wrong
        assert found["none"] > 0.6
        assert set(found) > {"rounded to 8 bits", "pruned by 20 %", "merged at 0.8", "averaged with another", "JPEG 50"}
    assert set(lorry.adapters(model)) == {"signed"}


def test_sign_and_verify_on_the_command_line(world, tmp_path):
    model, _, folder = world
    adapter, secret, program = folder / "run" / "signed" / "adapter", tmp_path / "private" / "anna.json", CliRunner()
    given = ["--private", str(secret), "--message", "11001010", "--codec", str(folder / "codec"), "--user", "anna"]
    result = program.invoke(app, ["sign", str(adapter), "--out", str(tmp_path / "anna"), *given])
    assert result.exit_code == 0, result.output
    public = "".join(p.read_text(errors="ignore") for p in (tmp_path / "anna").iterdir())
    assert "11001010" not in public and "anna.json" not in public and str(folder / "codec") not in public
    signed = open_adapter(tmp_path / "anna")
    assert signed.metadata["signed"]["mark"] == load_secret(secret).mark and signed.method.info.slug == "lora"
    assert secret.stat().st_mode & 0o077 == 0
    lorry.load(model, tmp_path / "anna", name="anna", activate=False)
    with lorry.activate(model, "anna"):
        drawn = made(model, count=24)
    lorry.adapters(model)["anna"].detach()
    with lorry.activate(model, None):
        plain = made(model, count=24)
    for name, several in (("signed", drawn), ("plain", plain)):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(several):
            levels = ((picture[0] + 1) * 127.5).round().to(torch.uint8)
            Image.fromarray(levels.numpy()).save(tmp_path / name / f"{number:02}.png")
    asked = ["--codec", str(folder / "codec"), "--private", str(secret), "--fpr", "0.05", "--json"]
    found = {n: program.invoke(app, ["verify", str(tmp_path / n), *asked]) for n in ("signed", "plain")}
    assert [r.exit_code for r in found.values()] == [0, 1], [r.output for r in found.values()]
    told = json.loads(found["signed"].stdout)
    assert len(told["pictures"]) == 24 and told["together"]["matching"] >= told["together"]["threshold"] == 7
    refused = program.invoke(app, ["sign", str(adapter), "--out", str(tmp_path / "b"), *given])
    assert refused.exit_code == 2 and not (tmp_path / "b").exists()


def test_what_cannot_be_signed_is_refused_and_nothing_is_written(world, tmp_path):
    model, codec, _ = world
    file = as_file(lorry.adapters(model)["signed"])
    with pytest.raises(OptionError, match="zero message"):
        bake(file, torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(AdapterError, match=r"cannot be signed.*'lora'"):
        bake(bake(file, USERS[0]), USERS[1])
    with pytest.raises(CheckpointError, match="would lie inside"):
        sign(file, tmp_path / "public", new_secret(USERS[0]), tmp_path / "public" / "secret.json")
    assert not (tmp_path / "public").exists()
    with pytest.raises(OptionError, match="has 6 bits, the codec reads 8"):
        verify(codec, torch.zeros(1, 1, 8, 8), torch.ones(6))
    with pytest.raises(DataError, match="needs a codec"):
        SigningLatents()


def test_what_an_attack_does_to_a_tensor():
    tensor = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    assert (rounded(tensor) - tensor).abs().max() <= tensor.abs().max() / 127 / 2 + 1e-6
    left = pruned(tensor, 0.2)
    assert int((left == 0).sum()) == 42 and tensor.abs()[left == 0].max() < tensor.abs()[left != 0].min()


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear", "cosine", "flow"])
def test_schedules_end_in_noise(schedule):
    share = alphas(schedule)
    assert (share[1:] < share[:-1]).all() and share[0] > 0.99 and 0 <= share[-1] < 0.01
