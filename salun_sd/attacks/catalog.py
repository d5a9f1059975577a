"""The attacks by name."""

from salun_sd.attacks.attack import Attack
from salun_sd.attacks.conditioning import Conditioning
from salun_sd.attacks.genetic import Genetic
from salun_sd.attacks.paraphrase import Paraphrase
from salun_sd.attacks.prefix import Prefix
from salun_sd.attacks.prompts import Prompts
from salun_sd.attacks.tokens import Tokens

ATTACKS: dict[str, type[Attack]] = {
    "paraphrase": Paraphrase,
    "prompts": Prompts,
    "prefix": Prefix,
    "tokens": Tokens,
    "genetic": Genetic,
    "conditioning": Conditioning,
}
