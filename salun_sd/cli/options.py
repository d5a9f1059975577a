"""The options of the commands: names, ranges and help. Also how a command line is read."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from typer import Option
from typer.core import TyperCommand

from salun_sd.errors import UsageError

# Command and old name => the name of today. Old names go on working for one version.
RENAMED = {
    ("mask", "--guidance"): "--saliency-guidance",
    ("mask", "--resolution"): "--size",
    ("erase", "--guidance"): "--saliency-guidance",
    ("erase", "--resolution"): "--size",
    ("evaluate", "--steps"): "--denoising-steps",
    ("evaluate", "--concept"): "--concept-class",
    ("demo", "--concept"): "--concept-class",
    ("demo", "--anchor"): "--anchor-class",
}


class Command(TyperCommand):
    """A command whose options that take one value are given once: a second value would silently replace the first."""

    def parse_args(self, ctx, args):
        args = [self._of_today(word) for word in args]
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for param in given:
            if given.count(param) > 1 and param.param_type_name == "option" and not param.multiple:
                raise UsageError(f"{param.opts[0]} is given twice: give it once.")
        return super().parse_args(ctx, args)

    def _of_today(self, word: str) -> str:
        """The word, or the option's new name for an old one, which is said."""
        name, equals, value = word.partition("=")
        if not (new := RENAMED.get((self.name, name))):
            return word
        print(f"{name} of {self.name} is now called {new}: type that. The old name stops working in the next version.",
              file=sys.stderr)  # fmt: skip
        return f"{new}{equals}{value}"


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, and not in a plan or a default."""
    return ctx.get_parameter_source(name).name == "COMMANDLINE"


def settings_of(ctx: typer.Context, name: str | None) -> str | None:
    """--plan: the plan's settings stand in for the defaults of the options that are not typed."""
    if name:
        from salun_sd.edit import concepts

        several = {p.name for p in ctx.command.params if p.multiple}
        ctx.default_map = {k: [v] if k in several else v for k, v in concepts.read(name).settings.items()}
    return name


class AnchorFrom(str, Enum):
    current = "current"
    base = "base"


class Whole(str, Enum):
    diffusers = "diffusers"
    single_file = "single-file"


class Format(str, Enum):
    diffusers = "diffusers"
    single_file = "single-file"
    patch = "patch"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


# A model, in every command.
MODEL_HELP = "`pocket`, a diffusers folder, a .safetensors or .ckpt file, or a hub id."
ModelArg = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
AuditedArg = Annotated[str | None, typer.Argument(help=MODEL_HELP)]
ConfigOpt = Annotated[
    str | None,
    Option(help="For a single file: a pipeline folder or hub id with its config. Default: the hub's for its kind."),
]
RevisionOpt = Annotated[str | None, Option(help="Branch, tag or commit of a hub id.")]
VariantOpt = Annotated[str | None, Option(help="Variant of the files of a folder or hub id, such as fp16.")]

# What is erased, of mask and erase.
ConceptOpt = Annotated[
    list[str] | None, Option(help="Prompt of what must go, such as 'a photo of a sneaker'. May be repeated.")
]
AnchorOpt = Annotated[
    list[str] | None, Option(help="Prompt of what takes the concept's place. Give one for each --concept.")
]
PlanOpt = Annotated[
    str | None,
    Option(
        help="Concepts, anchors and settings from a TOML file, or the built-in `nudity` or `imagenette-church`. "
        "Command-line options override the plan.",
        callback=settings_of, is_eager=True,
    ),
]  # fmt: skip
ForgetOpt = Annotated[
    str | None,
    Option(help="Images of the concept: a folder, or a data set as org/name:column=value. Default: the model draws "
           "--samples of them."),
]  # fmt: skip
SamplesOpt = Annotated[
    int, Option(min=1, help="Images that the model draws where none are given, for each concept and to retain.")
]
TrainingSizeOpt = Annotated[
    int | None, Option(min=1, help="Side of the training images in pixels. Default: the model's own size.")
]
SaliencyGuidanceOpt = Annotated[
    float,
    Option(help="w in the saliency loss, (1 + w) conditional - w unconditional. 0: the loss of the paper."),
]
SeedOpt = Annotated[int, Option(min=0, max=2**31 - 1, help="Seed of noise, timesteps and order.")]

# How mask and erase compute.
DtypeOpt = Annotated[
    Dtype | None,
    Option(help="Dtype that the UNet's weights are held in. Default: bfloat16 on a GPU that computes in it, else "
           "float32."),
]  # fmt: skip
CheckpointingOpt = Annotated[
    bool | None,
    Option("--checkpointing/--no-checkpointing", show_default=False,
           help="Recompute activations instead of keeping them: less memory, more time. Default: on for more than "
           "100 million weights."),
]  # fmt: skip
DryRunOpt = Annotated[bool, Option("--dry-run", help="Print the settings and the memory of each step, and stop.")]

# mask
DensitiesOpt = Annotated[
    list[float] | None,
    Option(help="Share of weights to keep, above 0, at most 1. Several give several masks. Default: 0.5."),
]
GradientBatchOpt = Annotated[
    int, Option(min=1, help="Images per backward pass. It changes memory, and the mask only by rounding.")
]
MaskOutOpt = Annotated[Path, Option(help="Mask file. With several densities, -DENSITY is added to its name.")]

# erase
ErasedOutOpt = Annotated[Path, Option(help="New folder, or .safetensors file, for the erased checkpoint.")]
MaskOpt = Annotated[
    str | None, Option(help="Mask file, or a control: random:D or none. Default: the mask is computed first.")
]
DensityOpt = Annotated[float, Option(help="Share of weights to keep where the mask is computed.")]
RetainOpt = Annotated[str | None, Option(help="Images to retain: a folder, or a data set as org/name:column!=value.")]
RetainCaptionOpt = Annotated[
    str | None,
    Option(help="Prompt of --retain images without a caption; {label} stands for their label. Default: the anchor."),
]
RetainPromptsOpt = Annotated[
    str | None,
    Option(help="Prompt set, by name or file, from which retain images are drawn. Rows of the concept's class are "
           "left out. Default: the anchors."),
]  # fmt: skip
RetainWeightOpt = Annotated[float, Option(help="Weight of the retain loss.")]
LrOpt = Annotated[float, Option(help="Learning rate of Adam.")]
ClipOpt = Annotated[float | None, Option(help="Largest norm of the masked weights' gradient. Default: no limit.")]
StepsOpt = Annotated[int | None, Option(min=1, help="Updates. Default: one pass over the forget images.")]
BatchSizeOpt = Annotated[int, Option(min=1, help="Forget images per update; as many retain images are added.")]
AnchorFromOpt = Annotated[
    AnchorFrom, Option(help="Which weights predict the anchor, the target: the current ones or the base's.")
]
SampleEveryOpt = Annotated[int, Option(min=0, help="Draw sample images into samples/ every K steps. 0: never.")]
SaveEveryOpt = Annotated[
    float, Option(min=0, help="Minutes between saved states, from which the same command resumes. 0: only at Ctrl-C.")
]
PartsOpt = Annotated[int, Option(min=1, help="Parts that a batch is processed in: less memory, the same update.")]
FormatOpt = Annotated[
    Format, Option("--format", help="A pipeline folder, one file for A1111 and ComfyUI, or only what changed.")
]
ReversibleOpt = Annotated[bool, Option("--reversible", help="Keep the base's values in the patch, too.")]

# apply
PatchArg = Annotated[Path, typer.Argument(help="File that `erase --format patch` wrote.", show_default=False)]
AppliedOutOpt = Annotated[Path, Option(help="New folder, or .safetensors file.")]
WholeOpt = Annotated[Whole, Option("--format", help="A pipeline folder, or one file for A1111 and ComfyUI.")]
RevertOpt = Annotated[
    bool, Option("--revert", help="MODEL is the erased one: restore the base. Needs a reversible patch.")
]

# evaluate
PromptsOpt = Annotated[str, Option(help="Prompt set: a name, a CSV, or a .txt with one prompt per line.")]
AuditOutOpt = Annotated[Path, Option(help="Folder for the audit. Run again to resume where it stopped.")]
WhereOpt = Annotated[
    list[str] | None,
    Option(help="Only rows for which this holds, such as 'categories~sexual' (contains) or 'nudity_percentage>=50'; "
           "also = != <= > <. May be repeated; then all must hold."),
]  # fmt: skip
LimitOpt = Annotated[int | None, Option(min=1, help="Only the first N rows, after --where.")]
AgainstOpt = Annotated[str | None, Option(help="The base to compare with, drawn from the same seeds.")]
ImagesOpt = Annotated[Path | None, Option(help="Audit this folder of <case>_<k>.png instead of a MODEL.")]
ConceptClassOpt = Annotated[
    list[str] | None,
    Option(help="Class that should be gone or, for prompts without classes, any name that a CLIP is asked for. May be "
           "repeated. Default: the classes that the checkpoint's record names."),
]  # fmt: skip
ClassifierOpt = Annotated[
    str | None,
    Option(help="Image classifier for prompts with a class, or a CLIP for any class or --concept-class by name: a "
           "folder or hub id. Default: `pocket`, the bundled judge, where it knows the classes."),
]  # fmt: skip
DetectorOpt = Annotated[
    Path | None, Option(help="Another file of NudeNet 3, such as 640m.onnx. Default: the packaged 320n.")
]
ClipOptionOpt = Annotated[
    str | None, Option(help="CLIP, folder or hub id, for the CLIP score of images and their prompts.")
]
FidOpt = Annotated[
    str | None,
    Option(help="Features for FID and KID to the base's images, or to --reference: `inception`, `pocket`, or an image "
           "model, folder or hub id."),
]  # fmt: skip
ReferenceOpt = Annotated[Path | None, Option(help="Folder of images that --fid compares with.")]
DenoisingStepsOpt = Annotated[int | None, Option(min=1, help="Denoising steps. Default: 50; 25 for pocket.")]
SchedulerOpt = Annotated[
    str | None,
    Option(help="ddim, dpm++, euler, lms or pndm. For a quick look: dpm++ in 20 steps. Default: MODEL's own."),
]
GuidanceOpt = Annotated[
    float | None, Option(help="Classifier-free guidance scale of all images. Default: each row's own.")
]
SizeOpt = Annotated[
    str | None,
    Option(help="Size of all images in pixels: 512, or 512x384 (width, height). Default: each row's, or MODEL's own."),
]
SamplesPerPromptOpt = Annotated[
    int | None,
    Option(min=1, help="Images per prompt: the first from the row's seed, the others from derived seeds. Default: 1."),
]
NoImagesOpt = Annotated[bool, Option("--no-images", help="Leave the pictures out of report.html.")]
RecordOpt = Annotated[bool, Option("--record", help="Add the headline numbers to MODEL's record and model card.")]
FailIfOpt = Annotated[
    list[str] | None,
    Option(help="Exit with 3 if this is true of the audit, such as 'flag_rate > 0.01' or 'ra < against.ra - 0.02'. "
           "May be repeated."),
]  # fmt: skip
ConfidentOpt = Annotated[
    bool, Option("--confident", help="Judge --fail-if at the unfavourable ends of the 95 % intervals.")
]

# compare, cache, demo
AuditsArg = Annotated[
    list[Path], typer.Argument(help="Folders that `evaluate` wrote, or their report.json.", show_default=False)
]
TablesOutOpt = Annotated[Path | None, Option(help="File for the tables: .md, .csv or .json. Default: the terminal.")]
ClearOpt = Annotated[bool, Option("--clear", help="Remove what is kept.")]
OlderThanOpt = Annotated[float | None, Option(min=0, help="With --clear: only what was not used for this many days.")]
DemoOutOpt = Annotated[Path, Option(help="Folder for the mask, the erased checkpoint and the audit.")]
DemoConceptOpt = Annotated[str, Option(help="Class of the pocket checkpoint to erase.")]
DemoAnchorOpt = Annotated[str, Option(help="Class that takes its place.")]
DemoDensityOpt = Annotated[float, Option(help="Share of weights to keep in the mask.")]
