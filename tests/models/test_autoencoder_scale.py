import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pyrdiff.models.autoencoder_scale import PRESETS, ScaleAutoencoder

TINY = dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, latent_dim=5, bottleneck_channels=4)


def network(**changes) -> ScaleAutoencoder:
    torch.manual_seed(0)
    return ScaleAutoencoder(**{**TINY, **changes}).eval()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform in [0.004, 1]."""
    return 0.004 + 0.996 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def mixture() -> dict[str, torch.Tensor]:
    """Three components on the dimensions 3 and 1 of 5, in that order."""
    factors = normals(3, 2, 2, seed=1).double()
    return dict(
        weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        means=2 * normals(3, 2, seed=2).double(),
        covariances=factors @ factors.mT + 0.1 * torch.eye(2, dtype=torch.float64),
        active=torch.tensor([3, 1]),
    )


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("paper-cifar10", 30.3, 0.01),
        ("paper-celeba", 61.3, 0.01),
        ("small", 4.1, 0.02),
        ("mini", 0.59, 0.02),
        ("tiny", 0.46, 0.02),
    ],
)
def test_presets_have_the_size_that_is_said(name, millions, tolerance):
    with torch.device("meta"):
        model = ScaleAutoencoder.from_preset(name)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=tolerance)
    assert set(PRESETS) == {"paper-cifar10", "paper-celeba", "small", "mini", "tiny"}


@pytest.mark.parametrize(("name", "size"), [("paper-cifar10", 32), ("paper-celeba", 128)])
def test_paper_presets_have_attention_at_16_and_a_bottleneck_of_4(name, size):
    with torch.device("meta"):
        model, seen = ScaleAutoencoder.from_preset(name), []
        for module in model.modules():
            if type(module).__name__ == "Attention":
                module.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[-2:])))
        output = model(torch.empty(1, 3, size, size))
    assert seen == [(16, 16)] * 4  # two blocks, down and up
    assert model.encoder_out.out_channels == 64 and model.to_moments.in_features == 64 * 4 * 4
    assert output.structure.shape == (1, 3, size, size) and output.mean.shape == (1, model.config.latent_dim)


@pytest.mark.parametrize("name", ["small", "mini", "tiny"])
def test_small_presets_take_other_sizes(name):
    """Every value of the image reaches the latents, and the latents every value of the structure."""
    torch.manual_seed(0)
    model = ScaleAutoencoder.from_preset(name, sample_size=(32, 48), image_channels=2, latent_dim=7).eval()
    image = numbers(2, 2, 32, 48).requires_grad_()
    output = model(image)
    assert output.structure.shape == (2, 2, 32, 48) and output.mean.shape == (2, 7)
    (gradient,) = torch.autograd.grad(output.mean.square().sum(), image)
    assert (gradient != 0).all()
    with torch.no_grad():
        structures = [model.decode(latents) for latents in (torch.zeros(1, 7), torch.ones(1, 7))]
    assert (structures[0] != structures[1]).all()


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "patch_size"), [(8, 8, 1), (8, 8, 2), (16, 32, 2), (24, 12, 1), (24, 12, 3)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(channels, height, width, patch_size, attention):
    longest = max(height, width) // patch_size
    model = network(
        sample_size=(height, width) if height != width else height,
        patch_size=patch_size,
        image_channels=channels,
        attention_sizes=(longest, longest // 2) if attention else (),
    )
    assert sum(type(module).__name__ == "Attention" for module in model.modules()) == 4 * attention
    image = numbers(2, channels, height, width)
    mean, log_variance = model.encode(image, 3)
    assert mean.shape == log_variance.shape == (2, 5)
    assert model.decode(mean).shape == image.shape
    output = model(image, 3)
    assert torch.equal(output.mean, mean) and torch.equal(output.log_variance, log_variance)
    assert torch.equal(output.structure, model.decode(mean))
    assert all(torch.equal(a, b) for a, b in zip(model(image, 3, return_dict=False), output.to_tuple(), strict=True))
    white = torch.cat([torch.randn((1, 5), generator=one) for one in generators(2)])
    output = model(image, 3, posterior_noise=white)
    assert torch.equal(output.structure, model.decode(model.sample_latents(mean, log_variance, generators(2))))


def test_every_convolution_but_the_first_and_the_resamplers_reads_a_normed_map():
    model, before, fed = network(layers_per_block=2), [], {}

    def record(name):
        def hook(module, inputs, output):
            if isinstance(module, torch.nn.Conv2d):
                fed[name] = before[-1]
            before.append(type(module).__name__)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.Linear)):
            module.register_forward_hook(record(name))
    before.append("image")
    model(numbers(1, 3, 8, 8), 3)
    exempt = ("conv_in", "decoder_in", "samplers", "shortcut")
    inner = {name: kind for name, kind in fed.items() if not any(word in name for word in exempt)}
    assert len(inner) == 2 * 2 * 2 * 2 + 2
    assert set(inner.values()) == {"GroupNorm"}


def test_squares_of_pixels_are_channels():
    """The first and the last convolution see the squares as `pixel_unshuffle` has them."""
    model, seen = network(patch_size=2), {}
    model.conv_in.register_forward_hook(lambda _, inputs, __: seen.update(image=inputs[0]))
    model.conv_out.register_forward_hook(lambda _, __, output: seen.update(logits=output))
    image = numbers(1, 3, 8, 8)
    structure = model(image).structure
    assert torch.equal(seen["image"][0, :4, 1, 2], image[0, 0, 2:4, 4:6].flatten())
    logits = torch.logit((structure - 0.004) / 0.996)
    torch.testing.assert_close(seen["logits"][0, 4:8, 3, 0], logits[0, 1, 6:8, 0:2].flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("output", "lowest"), [("structure", 0.004), ("scale", 0.0)])
def test_range_of_what_is_decoded(output, lowest):
    model = network(output=output)
    inside = model.decode(normals(4, 5))
    assert lowest < inside.min() and inside.max() < 1
    model.conv_out.weight.data.mul_(1e4)  # saturated, both ways
    ends = model.decode(normals(4, 5))
    assert ends.min().item() == pytest.approx(lowest, abs=1e-9) and ends.min() >= lowest
    assert ends.max() == 1


def test_other_epsilon():
    model = network(epsilon=0.1)
    scale = network(output="scale").decode(normals(4, 5))
    torch.testing.assert_close(model.decode(normals(4, 5)), 0.1 + 0.9 * scale)


def test_the_encoder_sees_the_time_and_the_decoder_does_not():
    model, image = network(), numbers(2, 3, 8, 8)
    early, late = model.encode(image, 0), model.encode(image, 150)
    assert (early[0] - late[0]).abs().max() > 1e-3 and (early[1] - late[1]).abs().max() > 1e-3
    gradients = torch.autograd.grad(model(image, 3).structure.sum(), model.time_embedding.parameters())
    assert all(gradient.abs().sum() > 0 for gradient in gradients)  # through the encoder alone
    model.decode(normals(2, 5)).sum().backward()
    used = {name.split(".")[0] for name, part in model.named_parameters() if part.grad is not None}
    assert used == {"from_latents", "decoder_in", "upsamplers", "up_levels", "decoder_norm", "conv_out"}
    assert not any("time" in name for name, _ in model.up_levels.named_parameters())


def test_time_steps_of_a_batch_are_those_of_its_rows():
    model, image, steps = network(), numbers(3, 3, 8, 8), [0, 7.5, 200]
    together = model.encode(image, torch.tensor(steps))
    for row, step in enumerate(steps):
        for alone in (
            model.encode(image[row : row + 1], step),
            model.encode(image[row : row + 1], torch.tensor([step])),
        ):
            for part in (0, 1):
                torch.testing.assert_close(alone[part][0], together[part][row], rtol=1e-5, atol=1e-6)
    assert torch.equal(model.encode(image)[0], model.encode(image, torch.zeros(3, dtype=torch.long))[0])


def test_the_noise_starts_small_beside_what_kl_asks_for():
    _, log_variance = network().encode(numbers(4, 3, 8, 8))
    assert (log_variance + 4).abs().max() < 1


def test_log_variance_is_bounded():
    model = network()
    model.to_moments.weight.data.mul_(1e4)
    _, log_variance = model.encode(numbers(8, 3, 8, 8))
    assert log_variance.min() == -20 and log_variance.max() == 10


def test_kl():
    mean, log_variance = 2 * normals(6, 5), normals(6, 5, seed=1)
    posterior = Normal(mean.double(), torch.exp(log_variance.double() / 2))
    wanted = kl_divergence(posterior, Normal(torch.zeros(()).double(), torch.ones(()).double())).sum(1)
    torch.testing.assert_close(ScaleAutoencoder.kl(mean, log_variance).double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(ScaleAutoencoder.kl(torch.zeros(2, 5), torch.zeros(2, 5)), torch.zeros(2))


def test_moments_of_posterior_samples():
    model, count = network(), 40000
    mean, log_variance = torch.tensor([0.0, 3, -1, 0.5, 9]), torch.tensor([0.0, -2, 1.5, -20, 0.3])
    rows = model.sample_latents(mean.expand(count, 5), log_variance.expand(count, 5), torch.Generator().manual_seed(0))
    deviation = torch.exp(log_variance / 2)
    assert ((rows.mean(0) - mean).abs() <= 4 * deviation / math.sqrt(count) + 1e-6).all()
    torch.testing.assert_close(rows.std(0), deviation, rtol=4 / math.sqrt(2 * count), atol=1e-6)


def test_posterior_samples_have_a_generator_each():
    model, mean, log_variance = network(), normals(3, 5), normals(3, 5, seed=1)
    together = model.sample_latents(mean, log_variance, generators(3))
    for row, generator in enumerate(generators(3)):
        alone = model.sample_latents(mean[row : row + 1], log_variance[row : row + 1], generator)
        assert torch.equal(alone[0], together[row])


def test_one_standard_component_on_all_dimensions_is_the_normal_prior():
    model = network()
    model.set_prior(np.ones(1), np.zeros((1, 5)), np.eye(5)[None], np.arange(5))
    assert torch.equal(model.sample_prior(4, generators(4)), model.sample_prior(4, generators(4), "normal"))


def test_moments_of_the_prior():
    model, given, count = network(), mixture(), 100000
    model.set_prior(**given)
    rows = model.sample_prior(count, torch.Generator().manual_seed(0)).double()
    weights, means = given["weights"], given["means"]
    mean = (weights[:, None] * means).sum(0)
    second = given["covariances"] + means[:, :, None] * means[:, None, :]
    covariance = torch.eye(5, dtype=torch.float64)
    covariance[[[3], [1]], [3, 1]] = (weights[:, None, None] * second).sum(0) - mean[:, None] * mean
    centre = torch.zeros(5, dtype=torch.float64)
    centre[[3, 1]] = mean
    assert ((rows.mean(0) - centre).abs() < 4 * covariance.diagonal().sqrt() / math.sqrt(count)).all()
    torch.testing.assert_close(torch.cov(rows.T), covariance, rtol=0.03, atol=0.03)


def test_each_component_is_drawn_as_often_as_it_weighs():
    model, given, count = network(), mixture(), 30000
    given["means"] = torch.tensor([[-50.0, 0], [0, 50], [50, -50]], dtype=torch.float64)
    model.set_prior(**given)
    rows = model.sample_prior(count, torch.Generator().manual_seed(0)).double()[:, [3, 1]]
    component = torch.cdist(rows, given["means"]).argmin(1)
    share = torch.bincount(component, minlength=3) / count
    torch.testing.assert_close(share.double(), given["weights"], rtol=0, atol=0.01)
    for index in range(3):
        torch.testing.assert_close(
            torch.cov(rows[component == index].T), given["covariances"][index], rtol=0.06, atol=0.03
        )


def test_a_component_of_no_weight_is_not_drawn():
    model, given = network(), mixture()
    given["weights"] = torch.tensor([0.0, 1, 0])
    given["means"] = torch.tensor([[100.0, 100], [0, 0], [-100, -100]])
    model.set_prior(**given)
    assert model.sample_prior(2000, torch.Generator().manual_seed(0)).abs().max() < 50


@pytest.mark.parametrize("prior", ["gmm", "normal"])
def test_rows_of_the_prior_have_a_generator_each(prior):
    model = network()
    model.set_prior(**mixture())
    together = model.sample_prior(6, generators(6), prior=prior)
    for row, generator in enumerate(generators(6)):
        assert torch.equal(model.sample_prior(1, generator, prior=prior)[0], together[row])
    assert len(together.unique(dim=0)) == 6


def test_normal_prior_needs_no_mixture():
    rows = network().sample_prior(2000, torch.Generator().manual_seed(0), prior="normal")
    assert torch.equal(rows, network(prior="normal").sample_prior(2000, torch.Generator().manual_seed(0)))
    assert rows.shape == (2000, 5) and rows.dtype == torch.float32
    assert rows.mean().abs() < 0.04 and abs(rows.std() - 1) < 0.03


@pytest.mark.parametrize("low_memory", [True, False])
def test_the_prior_is_saved_with_the_weights(tmp_path, low_memory):
    model = network(prior="normal")
    model.set_prior(**mixture())
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    loaded = ScaleAutoencoder.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory)
    config = loaded.config
    assert (config.prior, config.prior_components, config.active_latents) == ("gmm", 3, 2)
    assert torch.equal(loaded.sample_prior(4, generators(4)), model.sample_prior(4, generators(4)))
    image = numbers(2, 3, 8, 8)
    assert all(torch.equal(loaded(image, 5)[key], value) for key, value in model(image, 5).items())
    loaded.set_prior([1.0], [[0.0]], [[[4.0]]], [2])  # another size replaces it
    loaded.save_pretrained(tmp_path)
    again = ScaleAutoencoder.from_pretrained(tmp_path)
    assert again.prior_active.tolist() == [2] and again.prior_cholesky.tolist() == [[[2.0]]]


def test_half_precision():
    model = network()
    model.set_prior(**mixture())
    model.to(torch.bfloat16)
    output = model(numbers(2, 3, 8, 8).bfloat16(), 3, posterior_noise=numbers(2, 5))
    assert output.structure.dtype == output.mean.dtype == torch.float32
    assert 0.004 <= output.structure.min() and output.structure.max() <= 1
    rows = model.sample_prior(4, generators(4))
    assert model.decode(rows).isfinite().all()


def test_it_learns_four_images():
    model = network(latent_dim=16, block_out_channels=(16, 32), bottleneck_channels=16).train()
    images = numbers(4, 3, 8, 8)
    optimizer, generator = torch.optim.Adam(model.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for _ in range(70):
        output = model(images, 0, posterior_noise=torch.randn((4, 16), generator=generator))
        loss = (output.structure - images).square().sum() / (2 * 0.08**2)
        loss = loss + model.kl(output.mean, output.log_variance).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    error = (model(images).structure - images).square().mean().item()
    assert error < 0.01 < 0.5 * images.var().item()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_channels=0), "image_channels=0: expected a whole number"),
        (dict(layers_per_block=0), "layers_per_block=0: expected a whole number"),
        (dict(bottleneck_channels=0), "bottleneck_channels=0: expected a whole number"),
        (dict(latent_dim=2.5), "latent_dim=2.5: expected a whole number"),
        (dict(patch_size=0), "patch_size=0: expected a whole number"),
        (dict(norm_num_groups=0), "norm_num_groups=0: expected a whole number"),
        (dict(num_train_timesteps=0), "num_train_timesteps=0: expected a whole number"),
        (dict(time_embedding_dim=7), "time_embedding_dim=7: expected an even number"),
        (dict(epsilon=0), "epsilon=0: expected a number between 0 and 1"),
        (dict(epsilon=1.0), "epsilon=1.0: expected a number between 0 and 1"),
        (dict(output="log"), r"output='log': expected one of \('structure', 'scale'\)"),
        (dict(prior="flow"), r"prior='flow': expected one of \('gmm', 'normal'\)"),
        (dict(block_out_channels=()), r"block_out_channels=\(\): expected multiples"),
        (dict(block_out_channels=(8, 10)), r"block_out_channels=\(8, 10\): expected multiples of norm_num_groups=4"),
        (dict(sample_size=10), "sample_size=10: expected .* multiples of 4"),
        (dict(patch_size=2, sample_size=(8, 12)), r"sample_size=\(8, 12\): expected .* multiples of 8"),
        (dict(sample_size=(8, 8, 8)), r"sample_size=\(8, 8, 8\): expected"),
        (dict(sample_size=0), "sample_size=0: expected"),
        (dict(attention_sizes=(8, 3)), r"attention_sizes=\(8, 3\): expected sides of levels, among \(8, 4\)"),
        (dict(prior_components=2), "prior_components=2, active_latents=None: expected both or none"),
        (
            dict(prior_components=2, active_latents=6),
            "active_latents=6: expected 1 or more components on 1 to latent_d",
        ),
        (dict(prior_components=0, active_latents=1), "prior_components=0, active_latents=1: expected 1 or more"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        network(**changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode(numbers(2, 1, 8, 8)), r"sample has shape \(2, 1, 8, 8\): expected \(B, 3, 8, 8\)"),
        (lambda model: model.encode(numbers(3, 8, 8)), r"sample has shape \(3, 8, 8\)"),
        (lambda model: model(numbers(2, 3, 8, 12)), r"sample has shape \(2, 3, 8, 12\)"),
        (lambda model: model.encode(numbers(2, 3, 8, 8), -1), "timestep=-1: expected 0 to num_train_timesteps=200"),
        (lambda model: model.encode(numbers(2, 3, 8, 8), 200.5), "timestep=200.5: expected 0 to"),
        (lambda model: model.encode(numbers(2, 3, 8, 8), float("nan")), "timestep=nan: expected 0 to"),
        (lambda model: model.encode(numbers(2, 3, 8, 8), torch.tensor([1, 2, 3])), r"timestep has shape \(3,\): exp"),
        (lambda model: model.decode(normals(2, 4)), r"latents has shape \(2, 4\): expected \(B, 5\)"),
        (lambda model: model.decode(normals(5)), r"latents has shape \(5,\): expected \(B, 5\)"),
        (lambda model: model.sample_latents(normals(2, 4), normals(2, 4)), r"mean has shape \(2, 4\): expected"),
        (
            lambda model: model.sample_latents(normals(2, 5), normals(1, 5)),
            r"log_variance has shape \(1, 5\): expected",
        ),
        (
            lambda model: model.sample_latents(normals(2, 5), normals(2, 5), generators(3)),
            "generator has length 3: exp",
        ),
        (lambda model: model.sample_prior(2, generators(1), "normal"), "generator has length 1: expected one for each"),
        (lambda model: model.sample_prior(0, prior="normal"), "batch_size=0: expected a whole number"),
        (lambda model: model.sample_prior(2, prior="flow"), "prior='flow': expected one of"),
        (lambda model: model.sample_prior(2), 'prior="gmm", but no mixture was fitted: .* set_prior'),
        (lambda model: network(prior_components=2, active_latents=3).sample_prior(2), "but no mixture was fitted"),
        (lambda model: ScaleAutoencoder.from_preset("huge"), "name='huge': expected one of .*'mini'"),
    ],
)
def test_calls_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call(network())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(active=[3, 3]), r"active=\[3, 3\]: expected different indices"),
        (dict(active=[True, False]), r"active=\[True, False\]: expected different indices"),
        (dict(active=[1.0, 2.0]), "active=.*: expected different indices"),
        (dict(active=[]), r"active=\[\]: expected different indices"),
        (dict(active=[3, 5]), r"active=\[3, 5\]: expected indices from 0 to 4"),
        (dict(active=[-1, 3]), r"active=\[-1, 3\]: expected indices from 0 to 4"),
        (dict(active=[1, 2, 3]), r"means has shape \(3, 2\): expected \(3, 3\)"),
        (dict(weights=[[0.5, 0.5]]), r"weights has shape \(1, 2\): expected \(K,\)"),
        (dict(weights=[0.5, 0.5]), r"means has shape \(3, 2\): expected \(2, 2\)"),
        (dict(weights=[0.5, 0.5, 0.5]), r"weights=\[0.5, 0.5, 0.5\]: expected numbers from 0 up that sum to 1"),
        (dict(weights=[1.5, 0.0, -0.5]), "weights=.*: expected numbers from 0 up"),
        (dict(weights=[math.nan, 0.5, 0.5]), "weights has infinite or undefined values"),
        (dict(means=torch.full((3, 2), math.inf)), "means has infinite or undefined values"),
        (dict(covariances=torch.full((3, 2, 2), math.nan)), "covariances has infinite or undefined values"),
        (dict(covariances=torch.eye(2)), r"covariances has shape \(2, 2\): expected \(3, 2, 2\)"),
        (dict(covariances=torch.tensor([[2.0, 1], [0, 2]]).expand(3, 2, 2)), "covariances are not symmetric"),
        (
            dict(covariances=torch.stack((torch.eye(2), torch.ones(2, 2) - 2 * torch.eye(2), torch.eye(2)))),
            r"covariances\[1\] is not positive definite",
        ),
    ],
)
def test_priors_are_checked(changes, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        model.set_prior(**{**mixture(), **changes})
    assert model.config.prior_components is None
