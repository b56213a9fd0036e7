"""DeepLabV2: four dilated classifiers on c4, summed. Logits have c4's size.

Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
Connected CRFs", arXiv 1606.00915. It is meant to start from weights trained on COCO, whose head is loaded too:
hence the head's learning rate is the backbone's.
"""

from torch import Tensor, nn

from stpp.models.layers import DilatedConv3x3
from stpp.models.resnet import ResNet

DILATIONS = (6, 12, 18, 24)


class DeepLabV2(nn.Module):
    """DeepLabV2 on a ResNet.

    Args:
        backbone: key of `stpp.models.resnet.LAYOUTS`.
        num_classes: channels of the logits.
        output_stride: 8, 16 or 32. The dilations of the head stay as they are.
    """

    head_lr_multiplier = 1.0
    classifier_name = "classifier"

    def __init__(self, backbone: str, num_classes: int, output_stride: int):
        super().__init__()
        self.backbone = ResNet(backbone, output_stride)
        channels = self.backbone.channels[3]
        self.classifier = nn.ModuleList(
            DilatedConv3x3(channels, num_classes, dilation, bias=True) for dilation in DILATIONS
        )
        for convolution in self.classifier:
            nn.init.normal_(convolution.weight, 0.0, 0.01)

    def decode(self, c4_NCHW: Tensor) -> Tensor:
        """Logits from c4: [N, C4, h, w] to [N, num_classes, h, w]."""
        first, *others = self.classifier
        logits_NCHW = first(c4_NCHW)
        for convolution in others:
            logits_NCHW = logits_NCHW + convolution(c4_NCHW)
        return logits_NCHW

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, num_classes, H / output_stride, W / output_stride]."""
        return self.decode(self.backbone(images_NCHW)[3])
