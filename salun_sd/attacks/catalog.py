"""The attacks by name."""

from salun_sd.attacks.attack import Attack
from salun_sd.attacks.conditioning import Conditioning
from salun_sd.attacks.prefix import Prefix

ATTACKS: dict[str, type[Attack]] = {"prefix": Prefix, "conditioning": Conditioning}
