"""DECA and DEPA against the formulas: crossing, paths, symmetry, range, counts."""

import pytest
import torch
from torch import Tensor, nn

from lorry.core.errors import OptionError
from lorry.systems.deyolo import DEA, DECA, DEPA
from lorry.systems.deyolo.fusion import VARIANTS


def maps(channels: int = 8, side: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 2, channels, side, side, generator=g, dtype=torch.float64)
    return a, b


def settled(module: nn.Module) -> nn.Module:
    """In double precision and evaluation mode, with statistics that are no identity."""
    g = torch.Generator().manual_seed(2)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.copy_(0.1 * torch.randn(each.num_features, generator=g))
            each.running_var.copy_(0.5 + torch.rand(each.num_features, generator=g))
    return module.double().eval()


class OneForTheFirst(nn.Module):
    """Weights of one for the first map that asks, of zero for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        return torch.full_like(x, float(self.asked == 1))


@pytest.mark.parametrize("crossed", [True, False])
def test_channels_of_each_modality_are_weighed_by_the_other(crossed):
    part = settled(DECA(8, 4, (2, 2), reduction=4, crossed=crossed))
    part.squeeze = OneForTheFirst()  # w_v = 1, w_i = 0
    rgb, infrared = maps()
    a, b = part(rgb, infrared)
    halved, weighed = ((a, rgb), (b, infrared)) if crossed else ((b, infrared), (a, rgb))
    assert torch.equal(halved[0], halved[1] / 2)
    g = part.mixed(part.compress(torch.cat([rgb, infrared], 1)))
    torch.testing.assert_close(weighed[0], weighed[1] * g.sigmoid(), rtol=1e-12, atol=0)


def test_pixels_of_each_modality_are_weighed_by_the_other():
    part = settled(DEPA(8))
    rgb, infrared = maps()
    q = (part.compress_rgb(rgb) + part.compress_infrared(infrared)).sigmoid()
    a, b = part(rgb, infrared)
    torch.testing.assert_close(a, rgb * (q + part.of_infrared(infrared)).sigmoid(), rtol=1e-12, atol=0)
    torch.testing.assert_close(b, infrared * (q + part.of_rgb(rgb)).sigmoid(), rtol=1e-12, atol=0)


def test_the_figure_has_softmax_and_products():
    part = settled(DECA(8, 4, (2, 2), reduction=4, variant="figure"))
    rgb, infrared = maps()
    g = part.mixed(part.compress(torch.cat([rgb, infrared], 1))).softmax(1)
    w = part.squeeze(infrared.mean((2, 3)))[..., None, None]
    torch.testing.assert_close(part(rgb, infrared)[0], rgb * g * w, rtol=1e-12, atol=1e-15)
    pixels = settled(DEPA(8, variant="figure"))
    product = pixels.compress_rgb(rgb) * pixels.compress_infrared(infrared)
    q = product.exp() / product.exp().sum((2, 3), keepdim=True)
    expected = rgb * q * pixels.of_infrared(infrared).sigmoid()
    torch.testing.assert_close(pixels(rgb, infrared)[0], expected, rtol=1e-9, atol=1e-15)


def test_the_pyramid_ends_in_one_cell_and_differs_from_the_mean():
    part = settled(DECA(8, 4, (2, 2), reduction=4))
    both = maps()[0]
    assert part.pyramid(both).shape == (2, 8, 1, 1)
    assert torch.equal(part.mixed(both), part.pyramid(both))
    assert not torch.allclose(part.mixed(both), both.mean((2, 3), keepdim=True))
    small = both[..., :3]
    assert torch.equal(part.mixed(small), small.mean((2, 3), keepdim=True))
    constant = torch.full((1, 8, 3, 3), 0.3, dtype=torch.float64)
    torch.testing.assert_close(part.mixed(constant), constant[..., :1, :1], rtol=1e-12, atol=0)


def test_one_path_can_be_chosen_for_maps_of_every_size():
    always, never = (settled(DECA(8, 4, (2, 2), reduction=4, path=path)) for path in ("pyramid", "mean"))
    both = maps(side=4)[0]
    assert torch.equal(always.mixed(both), always.pyramid(both))
    assert always.mixed(both[..., :3]).shape == (2, 8, 1, 1)
    assert not torch.allclose(always.mixed(both[..., :3]), both[..., :3].mean((2, 3), keepdim=True))
    assert torch.equal(never.mixed(both), both.mean((2, 3), keepdim=True))


def test_maps_of_twice_the_expected_size_are_fused():
    part = settled(DEA(8, 4, (2, 2), reduction=4))
    rgb, infrared = maps(side=8)
    assert part.channels.pyramid(rgb).shape[-2:] == (2, 2)
    assert part(rgb, infrared).shape == rgb.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_exchanging_the_modalities_with_their_weights_changes_nothing(variant):
    part, other = (settled(DEA(8, 4, (2, 2), reduction=4, variant=variant)) for _ in range(2))
    state = part.state_dict()
    swapped = {
        "pixels.of_rgb": "pixels.of_infrared",
        "pixels.of_infrared": "pixels.of_rgb",
        "pixels.compress_rgb": "pixels.compress_infrared",
        "pixels.compress_infrared": "pixels.compress_rgb",
    }
    for name in list(state):
        for a, b in swapped.items():
            if name.startswith(f"{a}."):
                state[name] = part.state_dict()[name.replace(a, b, 1)]
    state["channels.compress.0.weight"] = state["channels.compress.0.weight"].roll(8, 1)
    other.load_state_dict(state)
    rgb, infrared = maps()
    torch.testing.assert_close(other(infrared, rgb), part(rgb, infrared), rtol=1e-11, atol=1e-13)
    assert not torch.allclose(part(infrared, rgb), part(rgb, infrared))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_amplified(variant):
    rgb, infrared = maps()
    options = {"variant": variant}
    for part in (settled(DECA(8, 4, (2, 2), reduction=4, **options)), settled(DEPA(8, **options))):
        for before, after in zip((rgb, infrared), part(rgb, infrared), strict=True):
            assert bool((after.abs() <= before.abs()).all())
    fused = settled(DEA(8, 4, (2, 2), reduction=4, **options))(rgb, infrared).detach()
    if variant == "code":
        assert 0 < float(fused.min()) and float(fused.max()) < 1
    else:
        assert float(fused.min()) < 0


@pytest.mark.parametrize(("channels", "size", "deca", "depa"), [(64, 80, 78208, 8692), (128, 40, 303360, 17268)])
def test_parameters_are_as_many_as_published(channels, size, deca, depa):
    assert sum(each.numel() for each in DECA(channels, size).parameters()) == deca
    assert sum(each.numel() for each in DEPA(channels).parameters()) == depa == 134 * channels + 116


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="steps of 5 and 4 do not divide"):
        DECA(16, 30)
    with pytest.raises(OptionError, match="cannot be reduced 16 times"):
        DECA(8, 20)
    with pytest.raises(OptionError, match="Did you mean 'figure'"):
        DEPA(8, variant="figur")
    with pytest.raises(OptionError, match="path is one of"):
        DECA(16, 20, path="sum")
