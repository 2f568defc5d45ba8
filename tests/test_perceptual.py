"""The perceptual term with the real `lpips` (extra `perceptual`), on random weights; `make test-extras` runs this."""

import pytest
import torch
from safetensors.torch import save_file
from tokenizer_training import pixel_items, tokenizer_trainer

from transformers_dualtoken.training import load_lpips


pytestmark = pytest.mark.extras
lpips = pytest.importorskip("lpips", reason="needs the extra perceptual: make test-extras", exc_type=ImportError)


@pytest.fixture(scope="module")
def random_network():
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.vgg16(weights=None, num_classes=2)


@pytest.fixture(scope="module")
def weights(random_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(random_network.features.state_dict(prefix="features."), path)
    return path


def test_weights_from_a_file(random_network, weights, tmp_path):
    module = load_lpips("vgg", weights)
    images = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    # LPIPS written out: normalised features of five layers, squared differences, weighted by the package's layers.
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    distance = 0.0
    features = (images.flatten(0, 1) - shift[:, None, None]) / scale[:, None, None]
    linear = iter(module.lins)
    with torch.no_grad():
        for index, layer in enumerate(random_network.features[:30]):
            features = layer(features)
            if index in (3, 8, 15, 22, 29):
                unit = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
                first, second = unit.unflatten(0, (2, 2))
                distance = distance + next(linear)((first - second).square()).mean((2, 3), keepdim=True)
    torch.testing.assert_close(module(*images), distance, rtol=1e-4, atol=1e-6)
    assert (distance > 0).all() and not any(p.requires_grad for p in module.parameters()) and not module.training
    save_file(random_network.features.state_dict(prefix="features."), tmp_path / "vgg16.safetensors")
    again = load_lpips("vgg", tmp_path / "vgg16.safetensors")
    assert torch.equal(again(*images), module(*images))


def test_unusable_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of LPIPS network weights at 'no-such.pth'"):
        load_lpips("vgg", "no-such.pth")
    with pytest.raises(ValueError, match="one of vgg, alex, got 'resnet'"):
        load_lpips("resnet")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="of torchvision's vgg weights cannot be read .*features.0.bias"):
        load_lpips("vgg", tmp_path / "other.pth")


def test_the_term_is_trained(siglip_folder, tmp_path, weights):
    only = dict.fromkeys(("generator", "reconstruction_mse", "pixel_commitment", "semantic_commitment"), 0)
    only |= dict.fromkeys(("semantic_mse", "semantic_cosine", "pooler_mse", "pooler_cosine"), 0)
    trainer = tokenizer_trainer(
        siglip_folder,
        tmp_path,
        {**only, "perceptual": 100.0},
        pixel_items(),
        recipe={"perceptual_weights": str(weights)},
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
    )
    trainer.train()
    logs = [log["perceptual"] for log in trainer.state.log_history if "perceptual" in log]
    assert logs[0] > 0 and logs[-1] < 0.9 * logs[0]
