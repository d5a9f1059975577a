"""The command line: parse, check, print, call. The only file that knows typer."""

import os
import shlex
import shutil
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from salun_sd.errors import SalunError, UsageError


class Commands(TyperGroup):
    """Known failures end in one sentence on stderr; SALUN_SD_DEBUG=1 shows the traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (SalunError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "out of memory" not in str(e) and "can't allocate memory" not in str(e):
                raise
            if os.environ.get("SALUN_SD_DEBUG"):
                raise
            text, code = _in_words(e)
            print(text, file=sys.stderr)
            raise typer.Exit(code) from e


def _in_words(e: BaseException) -> tuple[str, int]:
    if isinstance(e, SalunError):
        return f"Error: {e}", e.exit_code
    if isinstance(e, shutil.Error):  # of copytree: (from, to, reason) for each file
        return f"Error: cannot write {e.args[0][0][1]}: {e.args[0][0][2]}.", 1
    if isinstance(e, OSError):
        place = f" {e.filename}" if e.filename else ""
        return f"Error: cannot read or write{place}: {e.strerror or e}.", 1
    if not isinstance(e, KeyboardInterrupt):
        return f"Error: out of memory ({str(e).partition('.')[0]}): give a smaller --batch-size.", 1
    return "Interrupted. Nothing is half-written; the same command keeps the images that are drawn.", 130


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, help="Erase a concept from a Stable Diffusion checkpoint with SalUn, and prove it.",
)  # fmt: skip


def example(*lines: str) -> str:
    """The end of a command's help: a runnable command, kept in its lines (the backspace tells the formatter so)."""
    return "Example:\n\n\b\n" + " \\\n  ".join(["salun-sd " + lines[0], *lines[1:]])


class AnchorFrom(str, Enum):
    current = "current"
    base = "base"


ModelArg = Annotated[str, typer.Argument(help="`pocket`, a diffusers folder, or a hub id.", show_default=False)]
ConceptOpt = Annotated[str, typer.Option(help="Prompt of what must go, e.g. 'a photo of a sneaker'.")]
ForgetOpt = Annotated[
    Path | None, typer.Option(help="Folder of images of the concept. Default: the model draws --samples of them.")
]
SamplesOpt = Annotated[int, typer.Option(min=1, help="Images the model draws where no folder is given.")]
GuidanceOpt = Annotated[
    float,
    typer.Option(help="w of (1+w)·conditional - w·unconditional in the saliency loss; 0: the paper's loss."),
]
SeedOpt = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of noise, timesteps and order.")]


@app.command(epilog=example("mask pocket --concept 'a photo of a sneaker'", "--samples 100 --out mask.safetensors"))
def mask(
    model: ModelArg,
    concept: ConceptOpt,
    forget: ForgetOpt = None,
    samples: SamplesOpt = 800,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Share of weights to keep, in (0, 1]; several give several masks. Default: 0.5."),
    ] = None,
    guidance: GuidanceOpt = 7.5,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per gradient; changes memory, and the mask by rounding only.")
    ] = 8,
    seed: SeedOpt = 0,
    out: Annotated[Path, typer.Option(help="Mask file; with several densities, its name gets -DENSITY.")] = Path(
        "mask.safetensors"
    ),
) -> None:
    """Find the UNet weights that matter to a concept (gradient saliency)."""
    from salun_sd import edit
    from salun_sd.mask import kept, kept_per_block

    made = edit.mask(
        model, concept, forget=forget, samples=samples, densities=density or [0.5], guidance=guidance, seed=seed,
        batch_size=batch_size, out=out,
    )  # fmt: skip
    table = Table("block", "weights", *(f"density {m.settings['density']:g}" for _, m in made), box=None)
    for block, (_, total) in kept_per_block(made[0][1].bits).items():
        table.add_row(block, f"{total:,}", *(f"{kept_per_block(m.bits)[block][0] / total:.3f}" for _, m in made))
    totals = [kept(m.bits) for _, m in made]
    table.add_row("all", f"{totals[0][1]:,}", *(f"{n / of:.3f}" for n, of in totals))
    Console().print(table)
    for (path, m), (n, of) in zip(made, totals, strict=True):
        print(f"{path}: {n:,} of {of:,} weights, threshold {m.settings['threshold']:.4g}")


@app.command(
    epilog=example(
        "erase pocket --concept 'a photo of a sneaker'",
        "--anchor 'a photo of a bag' --retain-prompts pocket --samples 100",
        "--steps 100 --batch-size 32 --lr 1e-4 --out erased",
    )
)
def erase(
    ctx: typer.Context,
    model: ModelArg,
    concept: ConceptOpt,
    anchor: Annotated[str, typer.Option(help="Prompt of what stands in its place.")],
    out: Annotated[Path, typer.Option(help="New folder for the erased checkpoint.")],
    mask: Annotated[
        str | None, typer.Option(help="Mask file, random:D or none (the controls). Default: computed first.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of weights to keep where the mask is computed. Default: 0.5.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="As in `mask`, where the mask is computed. Default: 7.5.")
    ] = None,
    forget: ForgetOpt = None,
    retain: Annotated[Path | None, typer.Option(help="Folder of images to keep, captioned with the anchor.")] = None,
    retain_prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompt set to draw what must stay from, by name or CSV; rows of the concept's class are "
            "left out. Default: the anchor."
        ),
    ] = None,  # fmt: skip
    samples: SamplesOpt = 800,
    retain_weight: Annotated[float, typer.Option(help="Weight of the retain loss.")] = 0.5,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-5,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates. Default: one pass over the forget images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Forget images, and as many to retain, per update.")] = 8,
    anchor_from: Annotated[
        AnchorFrom, typer.Option(help="Whose anchor prediction is the target: of the current weights or the base's.")
    ] = AnchorFrom.current,
    sample_every: Annotated[int, typer.Option(min=0, help="Draw a strip into samples/ every K steps; 0: off.")] = 0,
    seed: SeedOpt = 0,
) -> None:
    """Fine-tune only the masked weights so that the concept becomes the anchor."""
    from salun_sd import edit

    if mask and (density is not None or guidance is not None):
        raise UsageError("--density and --guidance are for a mask that erase computes: leave them out with --mask.")
    record = edit.erase(
        model, concept, anchor, mask=mask, density=0.5 if density is None else density,
        guidance=7.5 if guidance is None else guidance, forget=forget, retain=retain,
        retain_prompts=retain_prompts, samples=samples, retain_weight=retain_weight, lr=lr, steps=steps,
        batch_size=batch_size, anchor_from=anchor_from.value, sample_every=sample_every, seed=seed, out=out,
        command=shlex.join(["salun-sd", *ctx.obj]),
    )  # fmt: skip
    changed, m = record["changed"], record["mask"]
    print(f"changed {changed['inside']:,} of {m['kept']:,} weights inside the mask, {changed['outside']} outside")
    peak, steps = record["peak_memory_bytes"] / 2**30, record["settings"]["steps"]
    print(f"{out}: {steps} steps, {record['seconds']:.0f} s, peak memory {peak:.2f} GiB")


@app.command(epilog=example("evaluate erased --prompts pocket", "--against pocket --out audit"))
def evaluate(
    prompts: Annotated[str, typer.Option(help="Prompt set, by name or CSV.")],
    out: Annotated[Path, typer.Option(help="Folder for the audit; run again to go on where it stopped.")],
    model: Annotated[str | None, typer.Argument(help="`pocket`, a diffusers folder, or a hub id.")] = None,
    against: Annotated[str | None, typer.Option(help="The base to compare with, drawn on the same seeds.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Audit this folder of <case>_<k>.png instead of drawing; no MODEL then.")
    ] = None,
    concept: Annotated[
        str | None, typer.Option(help="Class that should be gone. Default: as the checkpoint's salun.json says.")
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="Image classifier, folder or hub id, for prompts with a class. "
            "Default: the pocket judge, where it knows the classes."
        ),
    ] = None,  # fmt: skip
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: 50; 25 for pocket.")] = None,
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Images a prompt, from its seed on.")] = 1,
) -> None:
    """Draw a prompt set, run NudeNet and a classifier over the images, write an audit."""
    from salun_sd import audit

    report = audit.evaluate(
        model, prompt_set=prompts, against=against, images=images, concept=concept, classifier=classifier,
        steps=steps, samples=samples_per_prompt, out=out,
    )  # fmt: skip
    columns = {str(report["model"]): report["metrics"]}
    if report["against"]:
        columns[f"base: {report['against']['model']}"] = report["against"]["metrics"]
    table = Table("metric", *columns, box=None)
    for name in report["metrics"]:
        table.add_row(name, *(rate(metrics[name]) for metrics in columns.values()))
    Console().print(table)
    print(f"{out / 'report.html'}")


def rate(metric: dict | None) -> str:
    if metric is None:
        return "not measured"
    low, high = metric["ci95"]
    return f"{metric['n']} / {metric['of']} = {metric['rate']:.3f} [{low:.3f}, {high:.3f}]"


@app.command(epilog=example("demo --out demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the mask, the erased checkpoint and the audit.")],
    concept: Annotated[str, typer.Option(help="Class of the pocket checkpoint to erase.")] = "sneaker",
    anchor: Annotated[str, typer.Option(help="Class that stands in its place.")] = "bag",
    density: Annotated[float, typer.Option(help="Share of weights to keep in the mask.")] = 0.5,
) -> None:
    """Erase a class from the bundled pocket checkpoint: mask, erase and evaluate, each printed before it runs."""
    from salun_sd import prompts
    from salun_sd.checkpoint import write_atomic

    rows = prompts.read("pocket")
    classes = list(dict.fromkeys(p.label for p in rows))
    for name in (concept, anchor):
        if name not in classes:
            raise UsageError(f"The pocket checkpoint knows no {name}; it knows {', '.join(classes)}.")
    if concept == anchor:
        raise UsageError(f"Concept and anchor are both {concept}: the anchor has to be something else.")
    asked = prompts.write(asked_for(rows, concept))
    if (out / "prompts.csv").exists() and (out / "prompts.csv").read_text() != asked:
        raise UsageError(f"{out} holds a demo of another concept: choose another --out, or remove it.")
    write_atomic(out / "prompts.csv", asked)
    mask_file, erased = str(out / f"mask-{density:g}.safetensors"), str(out / "erased")
    to_forget = ["--concept", photo_of(concept), "--samples", "200"]
    for line in (
        ["mask", "pocket", *to_forget, "--density", f"{density:g}", "--out", mask_file],
        ["erase", "pocket", *to_forget, "--anchor", photo_of(anchor), "--mask", mask_file, *POCKET_TRAINING,
         "--out", erased],
        ["evaluate", erased, "--prompts", str(out / "prompts.csv"), "--against", "pocket", "--out", str(out / "audit")],
    ):  # fmt: skip
        print(f"\n$ {shlex.join(['salun-sd', *line])}", flush=True)
        run(line)


POCKET_TRAINING = "--retain-prompts pocket --retain-weight 2 --steps 60 --batch-size 32 --lr 1e-4".split()


def photo_of(name: str) -> str:
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def asked_for(rows: list, concept: str) -> list:
    """The prompts of `pocket` that judge an erasure: all hundred of the concept, twenty of each other class."""
    return [p for i, p in enumerate(rows) if p.label == concept or i % 5 == 0]


def run(argv: list[str]) -> None:
    """One command, as if typed; a failure ends the program."""
    try:
        app(argv, prog_name="salun-sd", obj=argv)
    except SystemExit as e:
        if e.code:
            raise


def main() -> None:
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # they warn of torchvision and casts that nothing here depends on
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
