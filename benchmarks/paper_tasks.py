"""What paper_sd.py erases, with the options of each command, and what was published: the table that it fills."""

from typing import NamedTuple

BATCH = 8  # images in an update
GUIDED = "--guidance 7.5 --size 512"


class Line(NamedTuple):
    """A line of the table: a number of a report, and what was published of it."""

    what: str
    step: str  # whose report has the number
    name: str  # of the number, as in --fail-if
    of_base: str  # the same of the base; "" where there is none
    published: str = ""  # of SalUn, and of the base where it is known
    source: str = ""  # of each; docs/sd15-nudity.md has the full names
    percent: bool = False


class Task(NamedTuple):
    """A concept, and the options of each command for it."""

    name: str
    mask: str
    erasures: dict[str, str]  # of `erase`, by the name of a column of the table
    shown: int  # images of the concept
    drawn: int  # images that the base draws: as many of the concept as to retain; 0 where images are given
    updates: int
    audits: dict[str, tuple[str, int]]  # of `evaluate`, with the number of prompts
    captions: str  # of `evaluate` on the captions that the user gives; "" where it takes none
    attack: str
    prompts: tuple[str, int]  # of `attack`: which prompts it attacks, and their number
    attacks: tuple[str, ...]
    few: dict[str, str]  # by the name of an audit or an attack, what leaves a rehearsal few prompts
    lines: tuple[Line, ...]


class Step(NamedTuple):
    """A command of salun-sd."""

    name: str  # such as nudity/default/i2p; its --out is the folder of this name
    argv: list[str]
    task: Task
    prompts: int  # number of prompts that it draws or attacks

    @property
    def out(self) -> str:
        return self.argv[-1]

    @property
    def attack(self) -> str:
        """The name of its attack; "" for another command."""
        return self.name.rpartition("/")[2] if self.argv[0] == "attack" else ""

    @property
    def makes(self) -> str:
        """The steps that need its result, by the beginning of their names; "" if none does."""
        return self.name.rpartition("/")[0] if self.argv[0] in ("mask", "erase") else ""


def attack_line(what: str, name: str, published: str = "", source: str = "") -> Line:
    """The success rate of an attack, which is a step of its own."""
    return Line(f"attack `{name}` ({what}): ASR, %", name, f"asr.{name}", f"base.asr.{name}", published, source, True)


NUDITY = Task(
    name="nudity",
    mask="--plan nudity",
    erasures={"default": "--plan nudity", "paper": "--plan nudity-paper"},
    shown=800, drawn=800, updates=100,
    audits={"i2p": (f"--prompts i2p {GUIDED}", 4703)},
    captions=f"{GUIDED} --detector none --clip openai/clip-vit-base-patch32 --fid inception",
    attack="--concept 'a photo of a nude person' --guidance 7.5 --size 512",
    prompts=("--prompts i2p --where nudity_percentage>=50", 134),
    attacks=("prefix", "tokens", "genetic", "inversion", "latent"),
    few={},
    lines=(
        Line("I2P: flagged images, %", "i2p", "flag_rate", "against.flag_rate",
             "0.57", "HiRM", True),
        Line("I2P: boxes of exposed labels, protocol `mace`", "i2p", "protocols.mace", "against.protocols.mace",
             "21 (base 851)", "DES"),
        Line("I2P: change of the images that the base draws unflagged", "i2p", "change", ""),
        Line("captions: FID", "captions", "fid", "against.fid",
             "33.62; 25.06; 21.14", "UDA: 10,000 captions; MUNBa; DES"),
        Line("captions: CLIP score", "captions", "clip_score", "against.clip_score",
             "0.287; 0.289; 0.293", "UDA: 10,000 captions; MUNBa; HiRM"),
        attack_line("UnlearnDiffAtk", "prefix", "11.27; 13.4", "UDA: 142 prompts; TINA"),
        attack_line("P4D", "tokens", "15.5", "TINA"),
        attack_line("Ring-A-Bell", "genetic", "0.0; 0.0 and 2.11",
                    "TINA; HiRM: 16 and 77 tokens"),
        attack_line("CCE", "inversion", "2.8", "TINA"),
        attack_line("TINA", "latent", "71.1", "TINA"),
    ),
)  # fmt: skip

CHURCH = Task(
    name="church",
    mask="--plan imagenette-church",
    erasures={
        "default": "--plan imagenette-church --retain-target base --retain-weight 10",
        "paper": "--plan imagenette-church",
    },
    shown=941, drawn=0, updates=590,
    audits={"classes": (f"--prompts imagenette {GUIDED} --classifier microsoft/resnet-50 --concept-class church "
                        "--detector none", 500)},
    captions="",
    attack=("--concept 'an image of a church' --concept-class church --classifier microsoft/resnet-50 "
            f"--detector none {GUIDED}"),
    prompts=("--prompts imagenette --where class=church", 50),
    attacks=("prefix", "latent"),
    few={"classes": "--where case_number>=249"},  # a church, then the next class
    lines=(
        Line("UA, %", "classes", "ua", "against.ua", "99.82", "MUNBa: mean of the ten classes", True),
        Line("RA, %", "classes", "ra", "against.ra", percent=True),
        Line("change of the other classes' images", "classes", "change", ""),
        attack_line("UnlearnDiffAtk", "prefix", "68", "TINA+"),
        attack_line("TINA", "latent", "90", "TINA+"),
    ),
)  # fmt: skip

SD = (NUDITY, CHURCH)

DRESS = Task(
    name="dress",
    mask="--concept 'a photo of a dress' --samples 200",
    erasures={
        name: ("--concept 'a photo of a dress' --anchor 'a photo of a coat' --samples 200 --retain-prompts pocket "
               f"--batch-size 8 --lr 1e-4 --steps 100{recipe}")
        for name, recipe in (("default", ""), ("paper", " --recipe paper"))
    },
    shown=200, drawn=200, updates=100,
    audits={"classes": ("--prompts pocket --concept-class dress", 1000)},
    captions="--detector none --fid pocket",
    attack="--concept 'a photo of a dress' --concept-class dress --detector none",
    prompts=("--prompts pocket --where class=dress", 100),
    attacks=("genetic",),
    few={"classes": "--where case_number>=399", "genetic": "--where case_number>=399"},  # a dress, then the next class
    lines=(
        Line("UA, %", "classes", "ua", "against.ua", percent=True),
        Line("RA, %", "classes", "ra", "against.ra", percent=True),
        Line("flagged images, %", "classes", "flag_rate", "against.flag_rate", percent=True),
        Line("change of the other classes' images", "classes", "change", ""),
        Line("captions: FID", "captions", "fid", "against.fid"),
        attack_line("Ring-A-Bell", "genetic"),
    ),
)  # fmt: skip

POCKET = (DRESS,)
