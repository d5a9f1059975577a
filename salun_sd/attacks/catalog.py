"""The attacks by name."""

from salun_sd.attacks.attack import Attack
from salun_sd.attacks.conditioning import Conditioning
from salun_sd.attacks.continued import Continue
from salun_sd.attacks.genetic import Genetic
from salun_sd.attacks.inversion import Inversion
from salun_sd.attacks.latent import Latent
from salun_sd.attacks.paraphrase import Paraphrase
from salun_sd.attacks.positions import Positions
from salun_sd.attacks.prefix import Prefix
from salun_sd.attacks.prompts import Prompts
from salun_sd.attacks.relearn import Benign, Relearn, RelearnLora
from salun_sd.attacks.round_trip import RoundTrip
from salun_sd.attacks.tokens import Tokens

ATTACKS: dict[str, type[Attack]] = {
    "paraphrase": Paraphrase,
    "prompts": Prompts,
    "prefix": Prefix,
    "tokens": Tokens,
    "genetic": Genetic,
    "inversion": Inversion,
    "conditioning": Conditioning,
    "latent": Latent,
    "continue": Continue,
    "relearn": Relearn,
    "relearn-lora": RelearnLora,
    "benign": Benign,
    "round-trip": RoundTrip,
    "positions": Positions,
}
