"""ResNet-20 for small images (He et al. 2015, section 4.2, arXiv 1512.03385)."""

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.residual import Residual


class BasicBlock(Residual):
    """Two 3x3 convolutions around a shortcut without parameters (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # Quantized before channels of zeros come to it, which stay 0.
        return F.relu(self.summand(out) + self.shortcut(self.summand(x)))

    def shortcut(self, x: Tensor) -> Tensor:
        """Every `stride`-th pixel, with channels of zeros on both sides."""
        if self.new_channels == 0:
            return x
        before = self.new_channels // 2
        after = self.new_channels - before
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))


class ResNet20(nn.Module):
    """Three stages of three blocks with 16, 32 and 64 channels: 269,722 parameters on CIFAR-10."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = self._stage(16, 16, stride=1)
        self.stage2 = self._stage(16, 32, stride=2)
        self.stage3 = self._stage(32, 64, stride=2)
        self.classifier = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, out_channels, stride),
            BasicBlock(out_channels, out_channels, stride=1),
            BasicBlock(out_channels, out_channels, stride=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(x.mean((2, 3)))
