"""The ResNet for small images: a first convolution of 3 x 3 with stride 1, and no pooling after it.

Every saved model carries a copy of this file, so that transformers opens it elsewhere with trust_remote_code=True. It
imports nothing of this package.
"""

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


class SmallResNetConfig(ResNetConfig):
    """The config of a ResNet whose stages see the image at its full size (He et al., arXiv 1512.03385, section 4.2)."""

    model_type = "small-resnet"


class SmallResNetForImageClassification(ResNetForImageClassification):
    """transformers' ResNet with the stem for images of some 32 pixels, in place of the 7 x 7 convolution and pooling
    that make an image 4 times smaller."""

    config_class = SmallResNetConfig

    def __init__(self, config: SmallResNetConfig):
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder = ResNetConvLayer(config.num_channels, config.embedding_size, activation=config.hidden_act)
        stem.pooler = nn.Identity()
        self.post_init()


SmallResNetConfig.register_for_auto_class()
SmallResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
