"""ResNet-18 (He et al. 2015, arXiv 1512.03385) as it is common for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.residual import Residual


class BasicBlock(Residual):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the size changes
    (option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(self.summand(out) + self.summand(self.shortcut(x)))


class ResNet18Cifar(nn.Module):
    """Four stages of two blocks with 64, 128, 256 and 512 channels, on top of a 3x3 convolution
    without pooling: 11,173,962 parameters on CIFAR-10."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.stage1 = _stage(64, 64, stride=1)
        self.stage2 = _stage(64, 128, stride=2)
        self.stage3 = _stage(128, 256, stride=2)
        self.stage4 = _stage(256, 512, stride=2)
        self.classifier = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.classifier(x.mean((2, 3)))


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride),
        BasicBlock(out_channels, out_channels, stride=1),
    )
