"""What people do with a trained net: torch.export with a batch of any size, for all four scripts' nets."""
import pytest
import torch

from async_lt import AsyncNet
from candle import Student
from cbd import CBDNet
from common.vit import ViT


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize("kind, settings", [
    (CBDNet, dict(arch="resnet14", num_classes=5, image_size=16)),
    (AsyncNet, dict(arch="resnet14", num_classes=5, image_size=16)),
    (ViT, dict(image_size=16, patch_size=4, width=16, depth=2, heads=2, num_classes=5, drop_path=0.1)),
    (Student, dict(arch="reactnet_18", num_classes=5, width=0.25, resolution=24, classifier="cosine"))])
@torch.no_grad()
def test_an_exported_net_takes_a_batch_of_any_size(kind, settings):
    torch.manual_seed(0)
    net = kind(**settings).eval()
    sizes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes=sizes).module()
    for n in (1, 5):
        images = torch.randn(n, 3, 16, 16)  # the student resizes them
        for ours, theirs in zip(net(images), exported(images)):  # logits and features
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
