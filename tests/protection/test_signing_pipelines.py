"""The objective ``signing`` on pipelines: found by name, its two losses, and what does not fit."""

import pytest
import torch
from diffusion import tiny
from diffusion.test_training import folder, trained  # noqa: F401  a fixture

import lorry
from lorry.diffusion import family_of
from lorry.diffusion.task import noising_of
from lorry.protection.autoencoding import decoding, latents_of
from lorry.protection.bake import new_secret, sign
from lorry.protection.codec import Codec, CodecShape
from lorry.protection.messages import from_text
from lorry.protection.signing_task import Signing
from lorry.training.data_errors import DataError
from lorry.training.objectives import OBJECTIVES
from lorry.training.task import Setting


@pytest.fixture
def codec():
    """A codec that adds something, for latents of four channels."""
    shape = CodecShape(8, size=8, grid=8, picture_size=16, decoder="small", width=8)
    made = Codec(shape, 0)
    with torch.no_grad():
        made.encoder.last.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


def job(pictures, codec, **more):
    objective = {"objective": "signing", "codec": str(codec), "resolution": 16, **more.pop("task", {})}
    method = {"method": "authen-lora", "bits": 8, "rank": 4}
    plain = {"method": method, "targets": "attention", "steps": 2, "batch_size": 2, "learning_rate": 1e-2}
    return {"name": "signed", "data": str(pictures), "objective": objective, **plain, **more}


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_job_by_name_trains_a_signing_adapter(name, folder, codec, tmp_path):  # noqa: F811
    codec.save(tmp_path / "codec")
    prior = {"prior_data": str(folder), "prior_prompt": "a photo"} if name == "sd" else {}
    jobs = [job(folder, tmp_path / "codec", task=prior)]
    result, tensors = trained(tiny.pipeline(name), jobs, tmp_path / "out")
    assert result.ok, result["signed"]["status"]
    assert any(t.abs().max() > 0 for k, t in tensors["signed"].items() if k.endswith(".B"))
    assert lorry.open(tmp_path / "out" / "signed" / "adapter").method.info.slug == "authen-lora"


def test_both_objectives_are_found_by_name():
    assert {"signing", "signing-latents"} <= set(OBJECTIVES)


@pytest.mark.parametrize("name, prior", [("sd", False), ("sd", True), ("sd3", False)])
def test_the_losses_are_those_of_the_marked_picture(name, prior, folder, codec):  # noqa: F811
    """Written out: noise on the latent with its residual, the network's target for that, the bare network's word."""
    pipeline = tiny.pipeline(name)
    network = pipeline.unet if name == "sd" else pipeline.transformer
    more = {"prior_data": str(folder)} if prior else {}
    task = Signing(
        resolution=16, codec=codec, message="11001010", lambda_style=0.7, lambda_wm=0.4, zero_rate=0.0,
        sample_latents=False, **more,
    )  # fmt: skip
    setting = Setting(network, pipeline)
    shots = task.examples(setting, [{"image": str(folder / "0.png"), "text": "red square"}]).examples
    adapter = lorry.attach(network, "lora", targets="attention", name="plain")
    try:
        (drawn,) = task.draw(shots, torch.Generator().manual_seed(2), setting, "plain")
        batch = task.collate(setting, [drawn])
        found, _ = task.losses(task.forward(setting, batch), batch.targets)
    finally:
        adapter.detach()
    noising, residual = noising_of(setting, None), codec.residual(batch.facts["message"][:1])[0].detach()
    assert batch.facts["message"].shape == (len(drawn.times), 8)
    pictures = [shots[0], shots[0].priors[0]] if prior else [shots[0]]
    errors, shifts = [], []
    for row, shot in enumerate(pictures):
        time = float(drawn.times[row])
        zero = torch.zeros_like(shot.mean)
        # the noise that was drawn: what is left of the noisy picture once the marked one is taken off
        signal, share = noising.mixed(zero + 1, zero, time)[0], noising.mixed(zero, zero + 1, time)[0]
        if prior and row:
            choices = [(drawn.noisy[row] - signal * (each.mean + residual)) / share for each in shots[0].priors]
            which = min(range(len(choices)), key=lambda i: abs(float(choices[i].std()) - 1))
            shot, noise = shots[0].priors[which], choices[which]
        else:
            noise = (drawn.noisy[row] - signal * (shot.mean + residual)) / share
        told = batch.inputs["conditions"].take([row])
        with torch.no_grad():
            family = family_of(pipeline)
            at = drawn.times[row : row + 1]
            said = family.predict(network, drawn.noisy[row][None], at, told)[0]
            clean = family.predict(network, noising.mixed(shot.mean, noise, time)[0][None], at, told)[0]
        target = noising.mixed(shot.mean + residual, noise, time)[1]
        errors.append(float((said.detach() - target).square().mean()))
        shifts.append(float((said - clean).square().mean()))
    assert float(found.detach()) == pytest.approx(0.7 * errors[0] + 0.4 * shifts[-1], rel=1e-3)


def test_what_cannot_sign_is_refused_before_it_trains(folder, codec, tmp_path):  # noqa: F811
    sd = tiny.pipeline("sd")
    with pytest.raises(DataError, match="needs a codec"):
        Signing()
    other = Codec(CodecShape(8, channels=3, size=8, grid=8, picture_size=16, decoder="small", width=8))
    with pytest.raises(DataError, match="latents of 3 channels, the pipeline's have 4"):
        Signing(codec=other).check_model(Setting(sd.unet, sd))
    codec.save(tmp_path / "codec")
    plain = job(folder, tmp_path / "codec", method={"method": "lora", "rank": 2})
    with pytest.raises(DataError, match="knows no messages"):
        trained(sd, [plain], tmp_path / "out")
    short = job(folder, tmp_path / "codec", method={"method": "authen-lora", "bits": 6, "rank": 8})
    with pytest.raises(DataError, match="messages of 6 bits, the codec of 8"):
        trained(sd, [short], tmp_path / "again")


def test_an_autoencoder_gives_gradients_to_latents_alone():
    sd = tiny.pipeline("sd")
    latents = latents_of(sd, torch.zeros(2, 3, 16, 16)).requires_grad_()
    before = [p.requires_grad for p in sd.vae.parameters()]
    with decoding(sd) as decode:
        decode(latents).sum().backward()
    assert latents.grad.abs().sum() > 0 and all(p.grad is None for p in sd.vae.parameters())
    assert before == [p.requires_grad for p in sd.vae.parameters()]


def test_an_adapter_over_several_models_is_signed_in_all_of_them(tmp_path):
    sd = tiny.pipeline("sd")
    method = {"method": "authen-lora", "bits": 8, "rank": 4}
    targets = {"unet": "attention", "text_encoder": ["q_proj"]}
    bundle = lorry.attach(sd, method, targets=targets, name="both", activate=False)
    message, g = from_text("11001010"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bundle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    try:
        bundle.save(tmp_path / "both")
        secret = new_secret(message, user="anna")
        sign(tmp_path / "both", tmp_path / "anna", secret, tmp_path / "private" / "anna.json")
        copy = lorry.load(sd, tmp_path / "anna", name="anna", activate=False)
        assert set(copy.parts) == {"unet", "text_encoder"}
        ids = torch.tensor([[1, 2, 3]])
        with lorry.activate(sd, "both"), lorry.context(sd, message=message):
            told = sd.text_encoder(ids).last_hidden_state
            noise = sd.unet(torch.ones(1, 4, 8, 8), 5, told).sample
        with lorry.activate(sd, "anna"):
            again = sd.text_encoder(ids).last_hidden_state
            baked = sd.unet(torch.ones(1, 4, 8, 8), 5, again).sample
        with lorry.activate(sd, None):
            assert not torch.allclose(sd.text_encoder(ids).last_hidden_state, again, atol=1e-3)
        torch.testing.assert_close(again, told, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(baked, noise, atol=1e-3, rtol=1e-3)
        assert lorry.open(tmp_path / "anna").metadata["signed"]["mark"] == secret.mark
    finally:
        for each in lorry.adapters(sd).values():
            each.detach()


def test_a_codec_for_a_pipeline_on_the_command_line(folder, tmp_path):  # noqa: F811
    from typer.testing import CliRunner

    from lorry.cli.main import app
    from lorry.protection.codec import load_codec

    sd = tiny.pipeline("sd")
    sd.save_pretrained(tmp_path / "base")
    given = ["codec", str(folder), "--out", str(tmp_path / "codec"), "--base", str(tmp_path / "base")]
    result = CliRunner().invoke(app, [*given, "--shape", "bits=8", "-o", "steps=2", "-o", "rows=2"])
    assert result.exit_code == 0, result.output
    shape = load_codec(tmp_path / "codec").shape
    assert (shape.bits, shape.channels, shape.size, shape.picture_size, shape.decoder) == (8, 4, 8, 16, "small")
    Signing(codec=str(tmp_path / "codec")).check_model(Setting(sd.unet, sd))
