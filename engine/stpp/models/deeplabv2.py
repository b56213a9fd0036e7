"""DeepLabV2: four dilated classifiers on c4, summed. Logits have c4's size.

Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution,
and Fully Connected CRFs", arXiv 1606.00915. The usual initial weights, trained on COCO, include the head, so
the head has the backbone's learning rate.
"""

from torch import Tensor, nn

from stpp.models.layers import DilatedConv3x3
from stpp.models.network import Backbone, Network

DILATIONS = (6, 12, 18, 24)


class DeepLabV2(Network):
    """DeepLabV2 on the last map of a backbone.

    Args:
        backbone: any; the dilations of the head do not depend on its output stride.
        num_classes: channels of the logits.
    """

    head_lr_multiplier = 1.0
    classifier_name = "classifier"

    def __init__(self, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.ModuleList(
            DilatedConv3x3(backbone.channels[3], num_classes, dilation, bias=True) for dilation in DILATIONS
        )
        for convolution in self.classifier:
            nn.init.normal_(convolution.weight, 0.0, 0.01)

    def features(self, images_NCHW: Tensor) -> tuple[Tensor]:
        """Normalised images [N, 3, H, W] to c4 [N, C4, H / output_stride, W / output_stride], rounded up."""
        return (self.backbone(images_NCHW)[3],)

    def decode(self, c4_NCHW: Tensor) -> Tensor:
        """Logits from c4: [N, C4, h, w] to [N, num_classes, h, w]."""
        first, *others = self.classifier
        logits_NCHW = first(c4_NCHW)
        for convolution in others:
            logits_NCHW = logits_NCHW + convolution(c4_NCHW)
        return logits_NCHW
