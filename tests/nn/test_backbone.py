"""The stack of blocks: hybrids, the MLP in between, its initial scale."""

import pytest
import torch

from mambakit.nn import Attention, Backbone, GatedMLP, Mamba, Mamba2


def test_a_hybrid_takes_a_mixer_and_its_options_for_each_layer() -> None:
    options = {"mamba2": {"headdim": 8, "d_state": 4}, "attention": {"n_heads": 2}}
    backbone = Backbone(8, 4, ["mamba2", "attention", "mamba2", "mamba"], options)
    assert [type(layer.mixer) for layer in backbone.layers] == [Mamba2, Attention, Mamba2, Mamba]
    assert backbone.layers[2].mixer.d_state == 4
    assert backbone.layers[1].mixer.n_heads == 2
    assert backbone.layers[3].mixer.d_state == 16  # its default


def test_options_go_straight_to_the_only_mixer() -> None:
    assert Backbone(8, 2, ["mamba", "mamba"], {"d_state": 3}).layers[1].mixer.d_state == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, ["mamba"]), "one for each of 2 layers, got 1 names"),
        ((2, ["mamba", "lstm"]), "mixer must be one of mamba, .* got 'lstm'"),
        ((2, ["mamba", "s4d"], {"d_state": 4}), "go by the name of the mixer, mamba or s4d: got 'd_state'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(8, *arguments)


def test_parameters_of_the_mlp_are_named_as_in_public_checkpoints() -> None:
    names = {name: tuple(p.shape) for name, p in Backbone(8, 1, d_intermediate=12).named_parameters()}
    assert names["layers.0.mlp.fc1.weight"] == (24, 8)
    assert names["layers.0.mlp.fc2.weight"] == (8, 12)
    assert names["layers.0.norm2.weight"] == (8,)


def test_gated_mlp_is_its_formula() -> None:
    mlp = GatedMLP(4, 6)
    x = torch.randn(2, 3, 4)
    y, gate = (x @ mlp.fc1.weight.t()).split(6, dim=-1)
    torch.testing.assert_close(mlp(x), (y * gate * torch.sigmoid(gate)) @ mlp.fc2.weight.t())


def test_additions_to_the_residual_are_scaled_by_their_number() -> None:
    torch.manual_seed(0)
    one = Backbone(32, 1).layers[0].mixer.out_proj.weight
    torch.manual_seed(0)
    four = Backbone(32, 2, d_intermediate=8).layers[0]
    torch.testing.assert_close(one, four.mixer.out_proj.weight * 2)
    assert four.mlp.fc2.weight.abs().max() <= 8**-0.5 / 2


def test_a_stack_of_no_blocks_is_the_norm() -> None:
    x = torch.randn(2, 3, 8)
    y, state = Backbone(8, 0)(x)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-5))
    assert state == ()
