"""The options of the commands: names, ranges and help."""

from typing import Literal

from typer import Argument, Option

from salun_sd.cli.command import read_plan
from salun_sd.methods.names import SUMMARIES
from salun_sd.runtime import tracker
from salun_sd.runtime.ranges import RANGES

# Every command
QUIET = Option("--quiet", help="Print errors and the result alone. May stand anywhere in the line.")
JSON = Option("--json", help="On stderr, print events for a program: one JSON object in a line. May stand anywhere.")

# Every command that takes a model
MODEL = Argument(
    help="Checkpoint: `pocket` or `pocket-ddpm` (bundled), a diffusers folder, a .safetensors or .ckpt file, or a hub "
    "id.",
    show_default=False,
)
CONFIG = Option(
    help="For a single file: pipeline folder or hub id to take the config from. Default: the hub's config for that "
    "kind of model."
)
REVISION = Option(help="Branch, tag or commit of a hub id.")
VARIANT = Option(help="File variant of a folder or hub id, such as fp16.")

Dtype = Literal["float32", "bfloat16", "float16"]

# mask and erase
CONCEPT = Option(
    metavar="<str>",
    help="Prompt to erase, such as 'a photo of a sneaker'; for a class-conditional model, name or number of a class. "
    "May be repeated.",
)
PLAN = Option(
    help="TOML file with concepts, anchors and settings, or a built-in plan: `nudity`, `nudity-paper` or "
    "`imagenette-church`. Command-line options override its settings.",
    callback=read_plan,
    is_eager=True,
)
FORGET = Option(
    help="Images of the concept: a folder, or a data set as org/name:column=value. Default: the model draws --samples "
    "images."
)
SAMPLES = Option(
    min=RANGES["samples"].low, help="Images to draw for each concept, and in `erase` to retain, where none are given."
)
TRAINING_SIZE = Option(
    min=RANGES["size"].low, help="Side of the training images in pixels. Default: the model's own size."
)
SALIENCY_GUIDANCE = Option(
    help="w in the saliency loss, whose prediction is (1 + w) conditional - w unconditional. 0: the paper's loss. "
    "Default, as in the authors' code: 7.5; for a class-conditional model 2, or 0 where it has no null class."
)
SEED = Option(min=RANGES["seed"].low, max=RANGES["seed"].high, help="Random seed of noise, timesteps and image order.")
DTYPE = Option(
    help="Dtype to draw, encode and train in. To draw, float32 takes the place of one that the device does not compute "
    "in; to train, of float16. Default: on a GPU bfloat16 or, where it does not compute in that, float16; on a CPU "
    "float32."
)
CHECKPOINTING = Option(
    "--checkpointing/--no-checkpointing",
    help="Recompute activations instead of keeping them: less memory, more time. Default: on for UNets of 100 million "
    "weights or more.",
    show_default=False,
)
DRY_RUN = Option("--dry-run", help="Print the settings and the memory of each step, and stop.")

# mask
DENSITIES = Option(
    metavar="<float>",
    help=f"Share of weights to keep: {RANGES['density'].words}. Repeat it for several masks. Default: 0.5.",
)
GRADIENT_BATCH = Option(
    min=RANGES["batch_size"].low, help="Images per backward pass. It changes memory use, and the mask only by rounding."
)
MASK_OUT = Option(help="Mask file (.safetensors) to write. With several densities, -DENSITY is added to its name.")

# erase and evaluate
TRACK = Option(
    metavar="<str>",
    help=f"Send the numbers of the run to {' or '.join(tracker.NAMES)}. May be repeated.",
    callback=tracker.check,
)

# erase
ERASE_OUT = Option(help="New folder for the erased checkpoint, or a .safetensors file for the other --format values.")
ANCHOR = Option(metavar="<str>", help="Prompt, or class, that takes the concept's place. Give one for each --concept.")
METHOD = Option(
    metavar="<str>",
    help="What is trained. " + ". ".join(f"{name}: {does}" for name, does in SUMMARIES.items()) + ".",
)
RECIPE = Option(help="paper: the published settings alone. Default: ours, where they were measured to be better.")
SETTING = Option(metavar="<str>", help="A setting of the method's own, such as scale=3 for esd. May be repeated.")
SAMPLES_OF_METHOD = Option(
    min=RANGES["samples"].low,
    help="Images to draw for each concept, and to retain, where none are given. Default: the method's, mostly 800.",
)
MASK = Option(
    metavar="<str>",
    help="Weights that may change: salient:0.5 (the share that matters most to the concept), random:0.5, "
    "cross-attention, cross-attention-kv, not-cross-attention, none (every weight), or a file of `salun-sd mask`. "
    "Default: as the method was published.",
)
DENSITY = Option(help="Share of weights in a salient mask: --density 0.5 is --mask salient:0.5.")
RETAIN = Option(
    help="Images to retain: a folder, or a data set as org/name:column!=value. Default: the model draws --samples "
    "images for --retain-prompts."
)
RETAIN_CAPTION = Option(
    help="Prompt of --retain images without a caption; {label} stands for their label. Default: the anchor."
)
RETAIN_PROMPTS = Option(
    help="Prompt set, by name or file, to draw retain images from; rows of the concept's class are left out. anchor: "
    "the anchors alone, as published. Default, our choice: a third anchors, a third neighbours of the concept, a third "
    "everyday prompts; for a class-conditional model all other classes."
)
RETAIN_WEIGHT = Option(
    help="Weight of the retain loss; the method's own loss has weight 1. 0: nothing is retained. Default: 10 for "
    "salun, as we measured to be better; with --recipe paper and for other methods the published value."
)
LR = Option(help=f"Learning rate of Adam: {RANGES['lr'].words}. Default: the method's published value.")
CLIP_NORM = Option(
    help=f"Largest norm of the masked weights' gradient: {RANGES['clip_norm'].words}. Default: no limit."
)
STEPS = Option(
    min=RANGES["steps"].low,
    help="Number of updates. Default: the method's published number, or one pass over the forget images.",
)
BATCH_SIZE = Option(
    min=RANGES["batch_size"].low,
    help="Forget images per update; as many retain images are added. Default: the method's published value.",
)
ANCHOR_FROM = Option(
    help="Whose prediction for the anchor is the target. current: that of the weights in training, the default: as "
    "published, and as we measured to be better under attack. base: the base's."
)
RETAIN_TARGET = Option(
    help="What retain images hold: the base's prediction, or the noise, as published. Default: base, as we measured to "
    "be better; noise for ascent, erasediff and finetune, and with --recipe paper."
)
PROBE_EVERY = Option(
    min=RANGES["probe_every"].low,
    help="Measure `moved` and `drift` every N updates. 0: never. Default: as often as takes 5 % of the time.",
)
UNTIL = Option(help=f"Stop at the first measure where each concept has `moved` this far: {RANGES['until'].words}.")
SAMPLE_EVERY = Option(
    min=RANGES["sample_every"].low, help="Draw sample images into samples/ every N updates. 0: never."
)
SAVE_EVERY = Option(
    min=RANGES["save_every"].low,
    help="Minutes between saved states, from which the same command resumes. 0: save only at Ctrl-C.",
)
PARTS = Option(min=RANGES["parts"].low, help="Parts to split each batch into: less memory, the same update.")
FORMAT = Option(help="A pipeline folder, one file for A1111 and ComfyUI, or a patch: only what changed.")
REVERSIBLE = Option("--reversible", help="With --format patch: keep the base's values, too, for `apply --revert`.")

# apply
PATCH = Argument(help="File that `erase --format patch` wrote.", show_default=False)
APPLY_OUT = Option(help="New folder, or a .safetensors file for --format single-file.")
APPLY_FORMAT = Option(help="A pipeline folder, or one file for A1111 and ComfyUI.")
REVERT = Option("--revert", help="MODEL is the erased one: restore the base. Needs a patch made with --reversible.")

# push
PUSHED = Argument(help="What `erase` or `apply` wrote: a folder, a single file or a patch.", show_default=False)
REPO = Argument(help="Repository of the hub, as org/name. It is made where there is none.", show_default=False)
PUBLIC = Option("--public", help="Make a repository that everybody may read. Default: a private one.")
LIST = Option("--dry-run", help="Print the files and their sizes, and send nothing.")

# evaluate
PROMPTS = Option(
    help="Prompt set: a built-in one by name, a .csv file, or a .txt file with one prompt per line; `classes`: all "
    "that a class-conditional MODEL draws. Without it, --images of any names are audited."
)
AUDIT_OUT = Option(help="Folder for the audit. The same command resumes an interrupted audit.")
WHERE = Option(
    metavar="<str>",
    help="Only rows for which this holds, such as 'categories~sexual' (contains) or 'nudity_percentage>=50'; also = != "
    "<= > <. May be repeated: all must hold.",
)
LIMIT = Option(min=1, help="Only the first N rows, after --where.")
AGAINST = Option(
    help="Base checkpoint to compare with, drawn from the same seeds. The change of the images that should stay is "
    "measured, too. For --images without --prompts: a folder with images of the same paths."
)
IMAGES = Option(
    help="Audit the images of this folder instead of a MODEL: with --prompts those named <case>_<k>.png, else all."
)
RECURSIVE = Option(
    "--recursive",
    help="With --images and without --prompts: also those in sub-folders. If --concept-class is the name of one, or "
    "there is only a --classifier, a sub-folder is the class that its images ask for.",
)
CONCEPT_CLASS = Option(
    metavar="<str>",
    help="Class that should be gone. For prompts without classes: any name; --classifier must then be a CLIP. May be "
    "repeated. Default: the classes that the checkpoint's record names.",
)
CLASSIFIER = Option(
    help="Image classifier for the prompts' classes, or a CLIP for any class or --concept-class: a folder or hub id. "
    "Default: `pocket`, the bundled judge, where it knows the classes."
)
DETECTOR = Option(
    metavar="<str>",
    help="What flags images: `nudenet`, an image classifier with labels such as nsfw or porn (a folder or hub id), or "
    "`none`. May be repeated: each has its own rate, and their agreement is measured. Default: nudenet.",
)
DETECTOR_MODEL = Option(help="Another model file of NudeNet 3, such as 640m.onnx. Default: the packaged 320n.onnx.")
CLIP = Option(help="CLIP for the CLIP score of images and their prompts: a folder or hub id.")
FID = Option(
    help="Features for FID and KID, to the base's images or --reference, and for the change from the base: "
    "`inception`, `pocket`, or an image model as folder or hub id."
)
REFERENCE = Option(help="Folder of images that --fid compares with.")
DENOISING_STEPS = Option(
    min=1, help="Denoising steps per image. Default: 50; 100 for a DDPM; 10 for pocket; 25 for pocket-ddpm."
)
SCHEDULER = Option(
    help="ddim, dpm++, euler, lms or pndm. For a quick look: dpm++ in 20 denoising steps. Default: MODEL's own."
)
GUIDANCE = Option(help="Classifier-free guidance scale of all images. Default: each row's own.")
IMAGE_SIZE = Option(
    help="Size of all images in pixels: 512, or 512x384 (width, height). Default: each row's, or MODEL's own."
)
DRAWING_DTYPE = Option(
    help="Dtype to draw in; float32 takes the place of one that the device does not compute in. Default: on a GPU "
    "bfloat16 or, where it does not compute in that, float16; on a CPU float32."
)
SAMPLES_PER_PROMPT = Option(
    min=1, help="Images per prompt: the first from the row's seed, the others from derived seeds. Default: 1."
)
SHARD = Option(
    metavar="<str>",
    help="Only the prompts of one shard, as in 3/8: the third of eight. They are divided by a hash of their cases. "
    "Give each shard an --out of its own, on any machine, and the folders to `merge`.",
)
LIMIT_TIME = Option(
    metavar="<str>",
    help="Stop drawing after this time, as in 2h, 90m or 1800s, and audit what is drawn: a random sample of the "
    "prompts. Exit code 4: the same command goes on.",
)
NO_IMAGES = Option("--no-images", help="Leave the images out of report.html.")
RECORD = Option("--record", help="Add the headline numbers to MODEL's record and model card.")
FAIL_IF = Option(
    metavar="<str>",
    help="Exit with code 3 if this is true of the audit, such as 'flag_rate > 0.01' or 'ra < against.ra - 0.02'. May "
    "be repeated.",
)
CONFIDENT = Option("--confident", help="Judge --fail-if at the unfavourable ends of the 95 % intervals.")

# merge
SHARDS = Argument(help="Folders that `evaluate --shard` wrote, in any order.", show_default=False)
MERGED_OUT = Option(help="Folder for the audit. The images stay in the folders of the shards.")
ALLOW_MISSING = Option(
    "--allow-missing", help="Merge what is there, and say in the report which shards and how many prompts are missing."
)

# compare, cache, demo
AUDITS = Argument(help="Folders that `evaluate` wrote, or their report.json files.", show_default=False)
TABLES_OUT = Option(help="File for the tables: .md, .csv or .json. Default: the terminal.")
CLEAR = Option("--clear", help="Remove what is in the cache.")
OLDER_THAN = Option(min=0, help="With --clear: remove only what was not used for this many days.")
DEMO_OUT = Option(help="Folder for the mask, the erased checkpoint and the audit.")
DEMO_CONCEPT = Option(help="Class of the pocket checkpoint to erase.")
DEMO_ANCHOR = Option(help="Class that takes its place.")
