"""Convolutions that take in the batch norms after them compute what the separate layers do."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from trainables.network.fused_convolutions import fuse_convolutions

SIZE = 64
IMAGES = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def trained(arch: str) -> nn.Module:
    """A network whose batch norms have statistics, as after a training."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.to(memory_format=torch.channels_last)


def with_bias() -> nn.Module:
    """A convolution with a bias, without padding, and a batch norm of no parameters of its own, which stays."""
    layers = (
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 1),
        nn.BatchNorm2d(6, affine=False),
    )
    model = nn.Sequential(*layers)
    model[1].running_mean.normal_(0, 0.3)
    return model


def fused(model: nn.Module) -> nn.Module:
    """A copy with fused convolutions."""
    model = copy.deepcopy(model)
    fuse_convolutions(model, SIZE)
    return model


def num_fused(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) and "forward" in vars(module) for module in model.modules())


def gradients(model: nn.Module) -> torch.Tensor:
    """Of all parameters, in a training step."""
    F.cross_entropy(model(IMAGES), torch.arange(4)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("arch", "num_pairs"),
    [
        ("mobilenetv2_050", 52),  # ReLU6
        ("tf_efficientnet_lite0", 49),  # pads as TensorFlow does
        ("tf_efficientnetv2_b0", 59),  # SiLU, squeeze and excitation
        ("resnet18d", 22),  # activations of their own
        ("resnetv2_50", 32),  # batch norms that sums come before
        ("vit_tiny_patch16_224", 0),
    ],
)
def test_fused_networks_compute_what_they_did(arch, num_pairs):
    model = trained(arch) if num_pairs else timm.create_model(arch, num_classes=5, img_size=SIZE)
    other = fused(model)
    assert num_fused(other) == num_pairs
    assert other.training and all(module.training for module in other.modules())
    model.eval(), other.eval()
    with torch.inference_mode():
        expected = model(IMAGES)
        assert torch.allclose(other(IMAGES), expected, atol=1e-4 * expected.abs().max())
    expected = gradients(model)
    # ReLUs pass the gradient of a rounded zero on, or do not.
    assert (gradients(other) - expected).norm() < 0.02 * expected.norm()


def test_batch_norms_that_train_stay_as_they_are():
    model = trained("mobilenetv2_050")
    other = fused(model)
    assert torch.equal(gradients(other.train()), gradients(model.train()))
    assert torch.equal(other.bn1.running_mean, model.bn1.running_mean)
    model.bn1.eval(), other.bn1.eval()  # one of them alone
    assert torch.allclose(other(IMAGES), model(IMAGES), atol=1e-3)


def test_mixed_precision_computes_the_same_within_its_rounding():
    model = trained("resnet18d").eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, found = model(IMAGES).float(), fused(model)(IMAGES).float()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_parameters_keep_their_names_and_copies_their_own():
    model = trained("mobilenetv2_050")
    other = fused(model)
    assert other.state_dict().keys() == model.state_dict().keys()
    again = copy.deepcopy(other).eval()
    with torch.no_grad():
        again.bn1.bias.add_(1)
        assert torch.equal(other.eval()(IMAGES), fused(model).eval()(IMAGES))
        assert not torch.allclose(again(IMAGES), other(IMAGES))


def test_the_bias_of_a_convolution_counts():
    model = with_bias().eval()
    other = fused(model)
    assert num_fused(other) == 1
    assert torch.allclose(other(IMAGES), model(IMAGES), atol=1e-5)


class Branches(nn.Module):
    """Its convolutions cannot take in the norms: the first one's result is read twice, the second one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.norms[0](x)
        return self.norms[2](self.second(self.norms[1](self.second(x))))


def test_results_that_others_read_and_layers_that_run_twice_are_left_alone():
    model = Branches().eval()
    assert num_fused(fused(model)) == 0
    assert torch.equal(fused(model)(IMAGES), model(IMAGES))
