"""The methods by name."""

from salun_sd.methods.ablation import Ablation
from salun_sd.methods.ascent import Ascent
from salun_sd.methods.erasediff import EraseDiff
from salun_sd.methods.esd import ESD
from salun_sd.methods.finetune import Finetune
from salun_sd.methods.forget_me_not import ForgetMeNot
from salun_sd.methods.loop import Method
from salun_sd.methods.salun import SalUn
from salun_sd.methods.uce import UCE

METHODS: dict[str, type[Method] | type[UCE]] = {
    "salun": SalUn, "esd": ESD, "ablation": Ablation, "forget-me-not": ForgetMeNot, "ascent": Ascent,
    "erasediff": EraseDiff, "finetune": Finetune, "uce": UCE,
}  # fmt: skip
