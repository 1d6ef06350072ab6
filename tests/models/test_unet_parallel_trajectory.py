import json

import pytest
import torch

from pyrdiff.models.unet_parallel_trajectory import PRESETS, LiteralHead, ParallelTrajectoryUNet2DModel

T = 10
TOY = dict(
    encoder_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, time_embedding_dim=16, layers_per_block=1,
    num_train_timesteps=T,
)  # fmt: skip


def network(**changes) -> ParallelTrajectoryUNet2DModel:
    """A toy network whose last layer is not 0, so that what enters shows."""
    torch.manual_seed(0)
    model = ParallelTrajectoryUNet2DModel(**{**TOY, **changes}).eval()
    if hasattr(model, "conv_out"):
        torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    return model


def images(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy image and a structure."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions", "steps", "each"), [("paper-cifar10", 41.2, 200, 18.8e3), ("paper-celeba", 84.2, 500, 18.7e3)]
)
def test_the_paper_has_as_many_parameters(name, millions, steps, each):
    with torch.device("meta"):
        model = ParallelTrajectoryUNet2DModel.from_preset(name)
        assert abs(parameters(model) / 1e6 / millions - 1) < 0.01
        few = ParallelTrajectoryUNet2DModel.from_preset(name, num_train_timesteps=1)
    assert model.config.num_train_timesteps == steps and model.config.target == "noise"
    # The design's 19.8k less the norm of 512 features, which all sub-networks share here.
    assert abs((parameters(model) - parameters(few)) / (steps - 1) / each - 1) < 0.01


@pytest.mark.parametrize(("name", "millions"), [("small", 11.1), ("mini", 2.0), ("tiny", 0.7)])
def test_presets_have_the_size_that_is_said(name, millions):
    with torch.device("meta"):
        model = ParallelTrajectoryUNet2DModel.from_preset(name)
    assert round(parameters(model) / 1e6, 1) == millions
    assert len(PRESETS) == 5


def test_a_preset_can_be_changed_and_must_be_known():
    model = ParallelTrajectoryUNet2DModel.from_preset("tiny", image_channels=1, head="literal")
    assert (model.config.image_channels, model.config.head, model.config.patch_size) == (1, "literal", 2)
    with pytest.raises(ValueError, match="name='huge': expected one of .*paper-celeba"):
        ParallelTrajectoryUNet2DModel.from_preset("huge")


@pytest.mark.parametrize(
    ("channels", "patch", "shape"), [(3, 1, (3, 4, 6)), (1, 2, (1, 8, 4)), (2, 4, (5, 8, 24))], ids=str
)
def test_shapes(channels, patch, shape):
    batch, height, width = shape
    model = network(head="literal", image_channels=channels, patch_size=patch, attention_levels=(1,))
    sample, structure = images(batch, channels, height, width)
    output = model(sample, 4, structure, steps=[3, 1])
    assert output.sample.shape == sample.shape and output.noises.shape == (2, *sample.shape)
    assert model(sample, 4, structure, steps="all").noises.shape == (T, *sample.shape)
    clean, noises = model(sample, 4, structure, steps=[3, 1], return_dict=False)
    assert torch.equal(clean, output.sample) and torch.equal(noises, output.noises)
    assert model(sample, 4, structure).noises is None
    assert torch.equal(model(sample, 4, structure).sample, clean)


@pytest.mark.parametrize("decoder", [(24, 8, 16), (8, 32, 8)])
def test_the_decoder_has_widths_of_its_own(decoder):
    model = network(encoder_channels=(8, 16, 24), decoder_channels=decoder, attention_levels=(0, 2), head="literal")
    assert model.noise_head.shortcut.weight.shape[2] == decoder[-1]
    assert [level.blocks[-1].resnet.out_channels for level in model.decoder] == list(decoder)
    assert [len(level.blocks) for level in (*model.encoder, *model.decoder)] == 3 * [1] + 3 * [2]
    sample, structure = images(2, 3, 8, 12)
    assert model(sample, 4, structure, steps=[2]).noises.shape == (1, 2, 3, 8, 12)


def test_attention_is_at_the_levels_said():
    model = network(encoder_channels=(8, 16, 24), attention_levels=(1,), norm_num_groups=8)
    assert [block.attention is not None for level in model.encoder for block in level.blocks] == [False, True, False]
    decoder = [block.attention is not None for level in model.decoder for block in level.blocks]
    assert decoder == 2 * [False] + 2 * [True] + 2 * [False]
    assert model.middle[0].attention is None and network(attention_levels=(1,)).middle[0].attention is not None


def test_an_untrained_network_predicts_zero():
    sample, structure = images(2, 3, 8, 8)
    model = ParallelTrajectoryUNet2DModel(**TOY)
    assert torch.equal(model(sample, 3.5, structure).sample, torch.zeros_like(sample))
    model(sample, 3.5, structure).sample.sub(1).square().mean().backward()
    assert model.conv_out.weight.grad.abs().sum() > 0


def test_target_noise_has_no_clean_output():
    model = network(head="literal", target="noise")
    sample, structure = images(2, 3, 8, 8)
    output = model(sample, 5, structure, steps=[2])
    assert output.sample is None and output.noises.shape == (1, 2, 3, 8, 8)
    assert not hasattr(model, "conv_out")
    model.train()(sample, 5, structure, steps="all").noises.square().mean().backward()
    untrained = [name for name, part in model.named_parameters() if part.grad is None]
    assert not untrained


@pytest.mark.parametrize("part", ["time", "structure"])
def test_every_level_reacts_to_time_and_structure(part):
    model = network(encoder_channels=(8, 16, 24), head="literal", num_train_timesteps=4)
    sample, structure = images(2, 3, 8, 8)
    before = model(sample, 3, structure, steps="all")
    fusions = [level.fusion for level in (*model.encoder, *model.decoder)]
    assert len(fusions) == 6
    for fusion in (*fusions, model.noise_fusion):
        weight = getattr(fusion, part)[-1].weight
        kept = weight.detach().clone()
        weight.data.add_(torch.randn_like(weight))
        after = model(sample, 3, structure, steps="all")
        weight.data.copy_(kept)
        assert (after.noises - before.noises).abs().max() > 1e-3
        # What is added for the heads does not reach the clean image.
        assert ((after.sample - before.sample).abs().max() > 1e-3) == (fusion is not model.noise_fusion)


def test_what_a_fusion_adds():
    """P_k is a function of the time alone, the same at all pixels; H_k of the structure alone and where it is."""
    fusion = network().encoder[1].fusion
    embedding, structure, hidden = torch.randn(2, 16), torch.rand(2, 3, 5, 7), torch.randn(2, 8, 5, 7)
    of_time = fusion(hidden, embedding, None) - hidden
    torch.testing.assert_close(of_time, of_time[:, :, :1, :1].expand_as(of_time))
    assert (of_time[0] - of_time[1]).abs().max() > 1e-3
    moved = structure.clone()
    moved[0, :, 2, 3] += 1
    change = fusion(hidden, embedding, moved) - fusion(hidden, embedding, structure)
    assert change[1].abs().max() == 0 and change[0, :, 1:4, 2:5].abs().max() > 1e-3
    change[0, :, 1:4, 2:5] = 0
    assert change.abs().max() < 1e-6
    # Neither is affine in what it maps.
    at_0, at_1, at_2 = (fusion(hidden, embedding, scale * structure) for scale in (0, 1, 2))
    assert (at_2 + at_0 - 2 * at_1).abs().max() > 1e-3
    at_0, at_1, at_2 = (fusion(hidden, scale * embedding, None) for scale in (0, 1, 2))
    assert (at_2 + at_0 - 2 * at_1).abs().max() > 1e-3


def test_structure_matters_and_can_be_left_out():
    sample, structure = images(2, 3, 8, 8)
    model = network()
    assert (model(sample, 3, structure).sample - model(sample, 3, 1 - structure).sample).abs().max() > 1e-3
    bare = network(use_structure=False)
    assert bare.conv_in.in_channels == 3 and model.conv_in.in_channels == 6
    assert not any("structure" in name for name, _ in bare.named_parameters())
    assert bare(sample, 3).sample.shape == sample.shape


def test_rows_with_times_of_their_own():
    model = network(head="literal")
    sample, structure = images(3, 3, 8, 8)
    times = [2.0, 7.25, 10.0]
    together = model(sample, torch.tensor(times), structure, steps=[1, 2, 9])
    for row, time in enumerate(times):
        one = slice(row, row + 1)
        alone = model(sample[one], time, structure[one], steps=[1, 2, 9])
        torch.testing.assert_close(together.sample[one], alone.sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.noises[:, one], alone.noises, rtol=1e-4, atol=1e-5)
    other = model(sample, torch.tensor(times[::-1]), structure).sample
    assert (other[0] - together.sample[0]).abs().max() > 1e-3


def test_time_is_seen_as_its_share_of_the_steps():
    sample, structure = images(2, 3, 8, 8)
    model, finer = network(), network(num_train_timesteps=8 * T)
    finer.load_state_dict(model.state_dict())
    seen = []
    model.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    result = model(sample, 2.5, structure).sample
    torch.testing.assert_close(result, finer(sample, 20, structure).sample)
    assert torch.equal(seen[0], torch.full((2,), 1000 * 2.5 / T))


def test_noises_of_later_steps_are_exactly_zero():
    model = network(head="literal")
    sample, structure = images(4, 3, 8, 8)
    times = torch.tensor([1.0, 4.5, 7.0, 10.0])
    noises = model(sample, times, structure, steps="all").noises
    for row, last in enumerate((1, 4, 7, 10)):
        assert (noises[last:, row] == 0).all()
        assert (noises[:last, row].flatten(1).abs().amax(1) > 1e-4).all()
    # 7 as a share of the steps, in float32, is a little less or more than 7.
    share = torch.tensor([0.7, 0.7, 0.3, 0.1]) * T * (1 - 1e-7)
    rounded = model(sample, share, structure, steps=[7, 3, 1]).noises.flatten(2).abs().amax(2) > 0
    assert rounded.tolist() == [[True, True, False, False], [True, True, True, False], [True] * 4]


@pytest.mark.parametrize("training", [False, True])
def test_few_steps_and_chunks_give_what_all_at_once_gives(training):
    model = network(head="literal", chunk_size=3).train(training)
    whole = network(head="literal").train(training)
    sample, structure = images(2, 3, 8, 12)
    every = whole(sample, 10, structure, steps="all").noises
    (loss := every.square().sum()).backward()
    chunked = model(sample, 10, structure, steps="all").noises
    torch.testing.assert_close(chunked, every, rtol=1e-4, atol=1e-5)
    chunked.square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5 * loss.item(), msg=name)
    few = [9, 2, 5, 1]
    for one in (model, whole):
        some = one(sample, 10, structure, steps=few).noises
        torch.testing.assert_close(some, every[[step - 1 for step in few]], rtol=1e-4, atol=1e-5)
    assert (every[1] - every[8]).abs().max() > 1e-4


def test_chunks_keep_less_for_the_way_back():
    sizes, calls = {}, []
    for chunk_size in (None, 2):
        model = network(head="literal", chunk_size=chunk_size).train()
        model.noise_head.register_forward_hook(lambda *_: calls.append(len(_[1][2])))
        total = [0]

        def pack(tensor, total=total):
            total[0] += tensor.numel()
            return tensor

        sample, structure = images(2, 3, 16, 16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(sample, 10, structure, steps="all").noises.sum()
        sizes[chunk_size] = total[0]
    assert calls == [T] + 5 * [2]
    assert sizes[2] < sizes[None]


def test_a_step_s_own_parameters_are_trained_by_its_own_loss_alone():
    model = network(head="literal", target="noise")
    sample, structure = images(2, 3, 8, 8)
    model(sample, 6, structure, steps=[3, 5]).noises.square().sum().backward()
    own = [name for name, _ in model.noise_head.named_parameters() if not name.startswith("norm.")]
    assert len(own) == 2 + 8 + 6 + 4 + 20
    for name in own:
        moved = model.noise_head.get_parameter(name).grad.flatten(1).abs().amax(1) > 0
        # Attention does not see a bias that is added to all keys.
        if not name.endswith("key.bias"):
            assert moved.nonzero().flatten().tolist() == [2, 4], name
    assert model.conv_in.weight.grad.abs().sum() > 0
    # A step later than i has no loss (eq. 15: fixed to 0).
    model.zero_grad()
    model(sample, 6, structure, steps=[3, 8]).noises.sub(1).square().sum().backward()
    assert model.noise_head.get_parameter(own[0]).grad[7].abs().max() == 0


def literal_by_itself(head: LiteralHead, features, embedding, row: int):
    """G_j as the paper has it: one sub-network at a time, with layers of torch."""
    conv = torch.nn.functional.conv2d
    silu = torch.nn.functional.silu

    def norm(layer, hidden):
        return torch.nn.functional.group_norm(hidden, 1, layer.weight[row], layer.bias[row], 1e-6)

    def apply(layer, hidden):
        return conv(hidden, layer.weight[row], layer.bias[row], padding=layer.weight.shape[-1] // 2)

    def attend(layer, hidden):
        normed = norm(layer.norm, hidden)
        query, key, value = (apply(one, normed).flatten(2).mT for one in (layer.query, layer.key, layer.value))
        weights = torch.softmax(query @ key.mT / head.channels**0.5, dim=-1)
        return hidden + apply(layer.out, (weights @ value).mT.reshape(hidden.shape))

    time = silu(embedding)
    first, second = (time @ layer.weight[row].flatten(1).T + layer.bias[row] for layer in head.times)
    hidden = apply(head.convs[0], silu(head.norm(features))) + first[:, :, None, None]
    hidden = apply(head.shortcut, features) + apply(head.convs[1], silu(norm(head.norms[0], hidden)))
    hidden = attend(head.attentions[0], hidden)
    inner = apply(head.convs[2], silu(norm(head.norms[1], hidden))) + second[:, :, None, None]
    hidden = hidden + apply(head.convs[3], silu(norm(head.norms[2], inner)))
    return attend(head.attentions[1], hidden)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_the_literal_head_is_one_sub_network_for_each_step(channels):
    head = network(head="literal", image_channels=channels).noise_head
    for part in head.parameters():
        torch.nn.init.normal_(part, std=0.5)
    features, embedding = torch.randn(2, 8, 6, 4), torch.randn(2, 16)
    together = head(head.prepare(features), embedding, torch.tensor([7, 0, 2]))
    for noises, row in zip(together, (7, 0, 2), strict=True):
        torch.testing.assert_close(noises, literal_by_itself(head, features, embedding, row), rtol=1e-3, atol=1e-4)


def test_attention_of_the_literal_head_ends_at_32x32():
    head = network(head="literal").noise_head
    bare = network(head="literal", head_attention=False).noise_head
    bare.load_state_dict(head.state_dict(), strict=False)
    rows, embedding = torch.tensor([1, 4]), torch.randn(1, 16)
    for side, same in ((32, False), (34, True)):
        features = torch.randn(1, 8, side, side)
        one, other = (part(part.prepare(features), embedding, rows) for part in (head, bare))
        assert torch.allclose(one, other, atol=1e-5) == same


@pytest.mark.parametrize("head", ["tied", "literal"])
def test_it_survives_saving(tmp_path, head):
    model = network(head=head, decoder_channels=(16, 24), attention_levels=(1,), sample_size=8)
    model.save_pretrained(tmp_path)
    loaded = ParallelTrajectoryUNet2DModel.from_pretrained(tmp_path)
    sample, structure = images(2, 3, 8, 8)
    steps = None if head == "tied" else [4, 2]
    one, other = (part(sample, 5, structure, steps=steps) for part in (model, loaded))
    assert torch.equal(one.sample, other.sample)
    assert steps is None or torch.equal(one.noises, other.noises)
    before, after = (
        {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in part.config.items()
            if name[0] != "_"
        }
        for part in (model, loaded)
    )
    assert before == after
    ParallelTrajectoryUNet2DModel.from_config(model.config).load_state_dict(model.state_dict())


def test_folders_of_0_1_0_load(tmp_path, caplog):
    """They say the rank of a head that is gone."""
    model = network(sample_size=8)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"rank": 8, "head": "tied"}
    path.write_text(json.dumps(config))
    sample, structure = images(2, 3, 8, 8)
    loaded = ParallelTrajectoryUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample, 5, structure).sample, model(sample, 5, structure).sample)
    assert not caplog.records
    path.write_text(json.dumps(config | {"head": "grouped"}))
    with pytest.raises(ValueError, match="head='grouped': expected one of"):
        ParallelTrajectoryUNet2DModel.from_pretrained(tmp_path)


def test_half_precision():
    model = network(head="literal").to(torch.bfloat16)
    sample, structure = (image.bfloat16() for image in images(2, 3, 8, 8))
    output = model(sample, 7, structure, steps=[7, 8])
    assert output.sample.dtype == output.noises.dtype == torch.bfloat16
    assert output.noises[0].abs().min() >= 0 and output.noises[1].abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(head="lowrank"), "head='lowrank': expected one of .*'literal'"),
        (dict(target="image"), "target='image': expected one of .*'noise'"),
        (dict(target="noise"), "head='tied': expected 'literal' with target='noise'"),
        (dict(image_channels=0), "image_channels=0: expected a whole number from 1 up$"),
        (dict(patch_size=0), "patch_size=0: expected a whole"),
        (dict(layers_per_block=0), "layers_per_block=0: expected"),
        (dict(num_train_timesteps=2.5), "num_train_timesteps=2.5: expected"),
        (dict(chunk_size=0), "chunk_size=0: expected a whole number from 1 up or None"),
        (dict(encoder_channels=()), r"encoder_channels=\(\): expected a level or more"),
        (dict(encoder_channels=(8, 18)), r"encoder_channels=\(8, 18\): expected multiples of norm_num_groups=4"),
        (dict(decoder_channels=(8, 18)), r"decoder_channels=\(8, 18\): expected multiples of norm_num_groups=4"),
        (dict(decoder_channels=(8,)), r"decoder_channels=\(8,\): expected 2 levels"),
        (dict(attention_levels=(2,)), r"attention_levels=\(2,\): expected levels from 0 to 1"),
        (dict(attention_levels=(1,), attention_head_dim=12), "attention_head_dim=12: expected a divisor of 16"),
        (
            dict(attention_levels=(0,), decoder_channels=(16, 12)),
            "attention_head_dim=8: expected a divisor of 12 channels, or None",
        ),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sample=(2, 1, 8, 8)), r"sample has shape \(2, 1, 8, 8\): expected 3 channels"),
        (dict(sample=(3, 8, 8)), r"sample has shape \(3, 8, 8\): expected 3 channels"),
        (dict(sample=(2, 3, 8, 10)), r"sample has shape \(2, 3, 8, 10\): expected sides that are multiples of 4"),
        (dict(sample=(2, 3, 6, 8)), r"sample has shape \(2, 3, 6, 8\): expected sides that are multiples of 4"),
        (dict(structure=None), r"structure=None: expected an image of shape \(2, 3, 8, 8\)"),
        (dict(structure=(1, 3, 8, 8)), r"structure has shape \(1, 3, 8, 8\): expected the sample's \(2, 3, 8, 8\)"),
        (dict(timestep=[3.0, 4.0, 5.0]), r"timestep has shape \(3,\): expected a number or \(2,\)"),
        (dict(timestep=[[3.0, 4.0]]), r"timestep has shape \(1, 2\): expected a number or \(2,\)"),
        (dict(timestep=0), "timestep=0: expected more than 0 and at most num_train_timesteps=10"),
        (dict(timestep=[3.0, 10.5]), "timestep=.*10.5.*: expected more than 0"),
        (dict(steps=[0, 1]), r"steps=\[0, 1\]: expected different whole numbers from 1 to 10, or 'all'"),
        (dict(steps=[11]), r"steps=\[11\]: expected"),
        (dict(steps=[2, 2]), r"steps=\[2, 2\]: expected different"),
        (dict(steps=[1.5]), r"steps=\[1.5\]: expected"),
        (dict(steps=[]), r"steps=\[\]: expected"),
        (dict(steps=3), "steps=3: expected"),
        (dict(steps="most"), r"steps='most': expected"),
    ],
    ids=str,
)
def test_calls_that_do_not_fit(arguments, message):
    call = {"sample": (2, 3, 8, 8), "structure": arguments.get("sample", (2, 3, 8, 8)), "timestep": 5.0, **arguments}
    sample, structure = (None if call[name] is None else torch.zeros(call[name]) for name in ("sample", "structure"))
    time = torch.tensor(call["timestep"]) if isinstance(call["timestep"], list) else call["timestep"]
    with pytest.raises(ValueError, match=message):
        network(patch_size=2, head="literal")(sample, time, structure, steps=call.get("steps"))


def test_what_some_networks_do_not_take():
    sample, structure = images(2, 3, 8, 8)
    for steps in ([1], "all"):
        with pytest.raises(
            ValueError, match="steps=.*: expected None with head='tied'; PixelAwareScheduler.tied_noise"
        ):
            network()(sample, 5, structure, steps=steps)
    with pytest.raises(ValueError, match="structure is given: expected None, as use_structure=False"):
        network(use_structure=False)(sample, 5, structure)
    with pytest.raises(ValueError, match="steps=None: expected a list of steps or 'all', as target='noise'"):
        network(head="literal", target="noise")(sample, 5, structure)
