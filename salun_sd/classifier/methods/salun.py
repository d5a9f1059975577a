"""SalUn: the losses of RL, on the most salient weights alone (Fan et al., ICLR 2024, arXiv 2310.12508, eq. 4 and 5)."""

import torch.nn.functional as F

from salun_sd.classifier.methods.task import Task
from salun_sd.core.mask import Bits, cut, random_bits
from salun_sd.core.saliency import GradientSum


def salient_bits(task: Task) -> Bits:
    """m_S: the share `density` of all weights with the largest |gradient of minus the cross-entropy|, the mean over the
    forget images, in evaluation mode. The authors' code sums the means of batches, where the last, short one weighs
    more."""
    net = task.original.net.eval()
    with GradientSum(net) as gradients:
        for pixels, labels in task.batches(task.forget):
            (-F.cross_entropy(task.original(pixels), labels, reduction="sum")).backward()
    return cut(gradients.result(examples=len(task.forget)), task.settings["density"])


def control_bits(task: Task) -> Bits:
    """The control: as many weights, chosen at random."""
    shapes = {name: p.shape for name, p in task.original.net.named_parameters()}
    return random_bits(shapes, task.settings["density"], task.seed)
