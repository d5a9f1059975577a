"""The options that commands share: their names, ranges and help. With cli.py, what knows typer."""

from enum import Enum
from typing import Annotated

import typer
from typer.core import TyperCommand

from salun_sd.errors import UsageError


class OneOfEach(TyperCommand):
    """An option that takes one value is given once: a second would silently stand in for the first."""

    def parse_args(self, ctx, args):
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for param in given:
            if given.count(param) > 1 and param.param_type_name == "option" and not param.multiple:
                raise UsageError(f"{param.opts[0]} is given twice: give it once.")
        return super().parse_args(ctx, args)


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, and not in a plan or a default."""
    return ctx.get_parameter_source(name).name == "COMMANDLINE"


class AnchorFrom(str, Enum):
    current = "current"
    base = "base"


class Whole(str, Enum):
    diffusers = "diffusers"
    single_file = "single-file"


class Form(str, Enum):
    diffusers = "diffusers"
    single_file = "single-file"
    patch = "patch"


def settings_of(ctx: typer.Context, name: str | None) -> str | None:
    """--plan: the plan's settings stand in for the defaults of the options that are not typed."""
    if name:
        from salun_sd import plan

        several = {p.name for p in ctx.command.params if p.multiple}
        ctx.default_map = {k: [v] if k in several else v for k, v in plan.read(name).settings.items()}
    return name


MODEL_HELP = "`pocket`, a diffusers folder, a .safetensors or .ckpt file, or a hub id."
ModelArg = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
ConfigOpt = Annotated[
    str | None,
    typer.Option(help="For a single file: pipeline folder or hub id with its config. Default: the hub's for its kind."),
]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
VariantOpt = Annotated[str | None, typer.Option(help="Variant of a folder's or hub id's files, such as fp16.")]
ConceptOpt = Annotated[
    list[str] | None, typer.Option(help="Prompt of what must go, e.g. 'a photo of a sneaker'; may be repeated.")
]
PlanOpt = Annotated[
    str | None,
    typer.Option(
        help="Concepts, anchors and settings from a TOML file, or `nudity` or `imagenette-church`; "
        "settings that are typed come first.",
        callback=settings_of, is_eager=True,
    ),
]  # fmt: skip
ForgetOpt = Annotated[
    str | None,
    typer.Option(help="Images of the concept: a folder, or a data set as org/name:column=value. Default: the model "
                 "draws --samples of them."),
]  # fmt: skip
SamplesOpt = Annotated[
    int, typer.Option(min=1, help="Images the model draws, for each concept and to retain, where none are given.")
]
ResolutionOpt = Annotated[
    int | None, typer.Option(min=1, help="Pixels of a side to train at. Default: the model's own size.")
]


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


DtypeOpt = Annotated[
    Dtype | None,
    typer.Option(help="What the UNet's weights are held in. Default: bfloat16 on a GPU that computes in it, else "
                 "float32."),
]  # fmt: skip
CheckpointingOpt = Annotated[
    bool | None,
    typer.Option("--checkpointing/--no-checkpointing", show_default=False,
                 help="Make activations anew instead of keeping them: less memory, more time. "
                 "Default: with more than 100 million weights."),
]  # fmt: skip
DryRunOpt = Annotated[
    bool, typer.Option("--dry-run", help="Print the settings and the memory that it will take, and stop.")
]
GuidanceOpt = Annotated[
    float,
    typer.Option(help="w of (1+w)·conditional - w·unconditional in the saliency loss; 0: the paper's loss."),
]
SeedOpt = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of noise, timesteps and order.")]
FormOpt = Annotated[
    Form, typer.Option("--format", help="A pipeline folder, one file for A1111 and ComfyUI, or the change alone.")
]
