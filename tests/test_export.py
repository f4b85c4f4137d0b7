"""What people do with a trained net: torch.export with a batch of any size, for all four scripts' nets."""
import pytest
import torch

from async_lt import AsyncNet
from candle import Student
from cbd import CBDNet
from common.vit import ViT

NETS = {  # on images of 16 pixels
    "cbd": lambda: CBDNet("resnet14", 5, image_size=16),
    "async_lt": lambda: AsyncNet("resnet14", 5, image_size=16),
    "livt": lambda: ViT(16, 4, 16, 2, 2, num_classes=5, drop_path=0.1),
    "candle": lambda: Student("reactnet_18", 5, 0.25, 24, classifier="cosine"),  # it resizes them
}


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_an_exported_net_takes_a_batch_of_any_size(name):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},)).module()
    for n in (1, 5):
        images = torch.randn(n, 3, 16, 16)
        for ours, theirs in zip(net(images), exported(images)):  # logits and features
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
