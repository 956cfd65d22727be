from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import TinyViT, attention_teacher, batchnorm_teacher, toy_images

from raydfkd.errors import RecipeError
from raydfkd.networks.observed import Need, ObservedNetwork

ATTENTION = frozenset({Need.ATTENTION})
SHAPE = (3, 32, 32)


def images_of(count, shape=SHAPE, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


# Libraries are imported where they are used: each takes seconds of every process that collects the tests.


def huggingface(implementation):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    config._attn_implementation = implementation
    return ViTForImageClassification(config)


def unfused(network):
    for layer in network.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False
    return network


def small_vit(**options):
    import timm

    return timm.create_model("test_vit", **{"num_classes": 4, "img_size": 32, "patch_size": 8, **options})


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)


def torchvision_swin():
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], num_classes=4)


NETWORKS = {
    "timm": (small_vit, 1, 1),
    "timm without its switch for fused attention": (lambda: unfused(small_vit()), 1, 1),
    "timm with registers": (lambda: small_vit(reg_tokens=2), 3, 1),
    "timm without a class token": (lambda: small_vit(class_token=False, global_pool="avg"), 0, 1),
    "torchvision": (torchvision_vit, 1, 1),
    "torchvision, in windows": (torchvision_swin, 0, 16),
    "transformers, sdpa": (lambda: huggingface("sdpa"), 1, 1),
    "transformers, eager": (lambda: huggingface("eager"), 1, 1),
}
"""Network, tokens of it that are no patches, and rows of an image in its first block."""


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_attention_is_seen_in_networks_of_any_library(name, with_gradient):
    make, extra, rows = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    observed = ObservedNetwork(network, taps=ATTENTION, frozen=True, image_shape=SHAPE)
    images = images_of(3).requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        seen = observed(images)
        plain = network(images)
    torch.testing.assert_close(seen.logits, plain if isinstance(plain, torch.Tensor) else plain.logits)
    first = seen.attention[0]
    assert len(seen.attention) >= 2
    assert (first.patches.start, first.patches.stop - first.patches.start) == (extra, 16)
    assert first.output.shape[:2] == (3 * rows, 16 + extra)
    assert first.maps.shape == (3 * rows, 2, 16 + extra, 16 + extra)
    torch.testing.assert_close(first.maps.sum(3), torch.ones(first.maps.shape[:3]))
    if with_gradient:
        for block in seen.attention:
            (gradient,) = torch.autograd.grad(
                block.maps.square().sum() + block.output.square().sum(), images, retain_graph=True
            )
            assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_maps_and_output_are_those_of_a_direct_computation():
    network = attention_teacher()
    images = toy_images(3)
    seen = ObservedNetwork(network, taps=ATTENTION, frozen=True)(images)
    block = network.blocks[0]
    patches = network.patch(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([network.class_token.expand(3, -1, -1), patches], 1) + network.position
    queries, keys, values = (
        part.unflatten(2, (2, 4)).transpose(1, 2)
        for part in F.linear(block.norm1(tokens), block.self_attn.in_proj_weight, block.self_attn.in_proj_bias).chunk(
            3, 2
        )
    )
    maps = (queries @ keys.transpose(2, 3) / 2).softmax(3)
    torch.testing.assert_close(seen.attention[0].maps, maps)
    torch.testing.assert_close(seen.attention[0].output, (maps @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen.attention[0].patch_maps, maps[..., 1:, 1:])


class Single(nn.Module):
    """One call of attention as a network has it, before a head."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        tokens = images.unflatten(3, (2, 4)).permute(0, 3, 2, 1, 4).flatten(2, 3)[:, :, :, :]  # [N, 2, 8, 4]
        return self.head(self.attend(tokens).transpose(1, 2).flatten(2).mean(1))


BIAS = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) > 0.3
FORMS = {
    "scale": ({"scale": 0.7}, lambda x: (x @ x.mT * 0.7).softmax(-1)),
    "bias": ({"attn_mask": BIAS}, lambda x: (x @ x.mT / 2 + BIAS).softmax(-1)),
    "mask": ({"attn_mask": MASK}, lambda x: (x @ x.mT / 2).masked_fill(~MASK, -math.inf).softmax(-1)),
    "causal": (
        {"is_causal": True},
        lambda x: (x @ x.mT / 2).masked_fill(~torch.ones(8, 8).bool().tril(), -math.inf).softmax(-1),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_maps_heed_scale_bias_and_mask(form):
    options, maps = FORMS[form]
    given = []

    def attend(x):
        given.append(x)
        return F.scaled_dot_product_attention(x, x, x, **options)

    (seen,) = ObservedNetwork(Single(attend), taps=ATTENTION, frozen=True)(toy_images(3)).attention
    expected = maps(given[-1])
    torch.testing.assert_close(seen.maps, expected)
    torch.testing.assert_close(seen.output, (expected @ given[-1]).transpose(1, 2).flatten(2))


def test_attention_whose_heads_share_keys_is_read_with_them_repeated():
    def attend(x):
        return F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)

    (seen,) = ObservedNetwork(Single(attend), taps=ATTENTION, frozen=True)(toy_images(3)).attention
    assert seen.maps.shape == (3, 2, 8, 8)


def test_heads_that_lie_among_the_rows_are_told_apart():
    def attend(x):
        rows = x.flatten(0, 1)
        return torch.bmm(F.softmax(input=rows @ rows.mT / 2, dim=-1), rows).unflatten(0, (-1, 2))

    def fused(x):
        return F.scaled_dot_product_attention(x, x, x)

    images = toy_images(3)
    networks = [ObservedNetwork(Single(form), taps=ATTENTION, frozen=True) for form in (attend, fused)]
    pair = [network(images).attention[0] for network in networks]
    for network in networks:
        network(toy_images(5))  # maps are computed when they are asked for, and those are of three images
    torch.testing.assert_close(pair[0].maps, pair[1].maps)
    torch.testing.assert_close(pair[0].output, pair[1].output)


def test_weights_that_a_layer_hands_out_change_nothing_of_what_is_seen():
    class Telling(TinyViT):
        def forward(self, images):
            tokens = self.patch(images).flatten(2).transpose(1, 2)
            attended, _ = self.blocks[0].self_attn(tokens, tokens, tokens, need_weights=self.telling)
            return self.head(attended.mean(1))

    torch.manual_seed(0)
    network = Telling().eval()
    seen = []
    for network.telling in (True, False):
        seen.append(ObservedNetwork(network, taps=ATTENTION, frozen=True)(toy_images(3)).attention[0])
    torch.testing.assert_close(seen[0].maps, seen[1].maps)
    torch.testing.assert_close(seen[0].output, seen[1].output)


def test_bfloat16_gives_float32_maps_close_to_those_of_float32():
    exact, rough = (
        ObservedNetwork(attention_teacher(), taps=ATTENTION, frozen=True, precision=precision)(toy_images(4))
        for precision in (torch.float32, torch.bfloat16)
    )
    for one, other in zip(exact.attention, rough.attention, strict=True):
        assert other.maps.dtype == other.output.dtype == torch.float32
        torch.testing.assert_close(other.maps, one.maps, rtol=0.1, atol=0.05)


def script():
    return torch.jit.trace(attention_teacher(), toy_images(2), check_trace=False)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [batchnorm_teacher, script])
def test_network_without_attention_that_can_be_seen_is_refused_in_one_line(make):
    with pytest.raises(RecipeError) as error:
        ObservedNetwork(make(), taps={Need.ATTENTION: "the term"}, frozen=True, image_shape=(1, 8, 8))
    assert str(error.value) == (
        "the term needs self-attention over patches, but the teacher has none that can be seen (torch's "
        "scaled_dot_product_attention, or a softmax before a matmul); drop it"
    )


def test_attention_under_no_grad_is_refused():
    def attend(x):
        with torch.no_grad():
            return F.scaled_dot_product_attention(x, x, x)

    with pytest.raises(RecipeError, match="needs the gradient of what"):
        ObservedNetwork(Single(attend), taps=ATTENTION, frozen=True, image_shape=(1, 8, 8))


def test_attention_is_seen_where_torch_s_encoder_would_take_its_fast_path():
    observed = ObservedNetwork(attention_teacher(), taps=ATTENTION, frozen=True)
    with torch.no_grad():
        assert len(observed(toy_images(3)).attention) == 2


def test_blocks_of_fewer_than_three_patches_are_none():
    with pytest.raises(RecipeError, match="needs self-attention over patches"):
        ObservedNetwork(small_vit(patch_size=32), taps=ATTENTION, frozen=True, image_shape=SHAPE)


def test_no_attention_is_kept_where_nobody_asks():
    assert ObservedNetwork(attention_teacher(), frozen=True)(toy_images(3)).attention == ()


def test_network_whose_attention_is_read_goes_on_uncompiled_and_says_so(caplog):
    observed = ObservedNetwork(attention_teacher(), taps={Need.ATTENTION: "the term"}, frozen=True, compiled=True)
    assert len(observed(toy_images(3)).attention) == 2
    assert [record.message for record in caplog.records] == ["the term reads attention, so the teacher is not compiled"]
