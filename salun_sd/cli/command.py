"""How the line of a command is read, and how a command begins and ends."""

import logging
import re
import time

import typer
from typer.core import TyperCommand

from salun_sd.cli.streams import mute
from salun_sd.errors import UsageError
from salun_sd.runtime import ranks
from salun_sd.runtime.texts import check_given

logger = logging.getLogger(__name__)

# (command, old name) => new name. Old names work for one more version.
RENAMED = {
    ("mask", "--guidance"): "--saliency-guidance",
    ("mask", "--resolution"): "--size",
    ("erase", "--guidance"): "--saliency-guidance",
    ("erase", "--resolution"): "--size",
    ("erase", "--clip"): "--clip-norm",
    ("evaluate", "--steps"): "--denoising-steps",
    ("evaluate", "--concept"): "--concept-class",
    ("demo", "--concept"): "--concept-class",
    ("demo", "--anchor"): "--anchor-class",
}
ADVICE = {  # what typer says of a value => what to give
    r".* is not one of '(.+)'\.": r"give one of \1",
    r".* valid integer.*": "give a whole number",
    r".* valid number.*": "give a number",
    r".* greater than or equal to (\S+)": r"give \1 or more",
    r".* less than or equal to (\S+)": r"give \1 or less",
}


class Command(TyperCommand):
    """A command that takes old option names, and rejects an option of one value that is given twice, where typer would
    let the second value replace the first without a word, and a text that is empty or no valid Unicode."""

    def parse_args(self, ctx, args):
        args = [self._with_new_name(word) for word in args]
        values, _, given = self.make_parser(ctx).parse_args(list(args))
        for param in given:
            if given.count(param) > 1 and param.param_type_name == "option" and not param.multiple:
                raise UsageError(f"{param.opts[0]} is given twice: give it once.")
        check_given(**values)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as e:
            raise UsageError(self._in_words(e, values.get(e.param.name, ctx.lookup_default(e.param.name)))) from e

    def invoke(self, ctx):
        """Run it. With --json, programs are told that it begins and that it is done, with the numbers that it gives."""
        begun, out = time.monotonic(), ctx.params.get("out")
        fields = {"command": self.name, "out": out and str(out)}
        logger.info("", extra={"fields": {"event": "start", **fields}})
        numbers = super().invoke(ctx) or {}
        seconds = round(time.monotonic() - begun, 1)
        logger.info("", extra={"fields": {"event": "result", **fields, "seconds": seconds, "numbers": numbers}})

    def _with_new_name(self, word: str) -> str:
        """A word of the command line; an old option name becomes the new one, and stderr says so."""
        old, equals, value = word.partition("=")
        new = RENAMED.get((self.name, old))
        if new is None:
            return word
        logger.warning(f"{old} of {self.name} is now called {new}. The old name stops working in the next version.")
        return f"{new}{equals}{value}"

    def _in_words(self, e: typer.BadParameter, value: object) -> str:
        """The sentence on a parameter that is missing, or whose value typer does not take."""
        name = e.param.opts[0] if e.param.param_type_name == "option" else e.param.name.upper()
        if not e.message:
            return f"{name} is missing: see salun-sd {self.name} --help."
        given = ", ".join(map(repr, value if isinstance(value, list) else [value]))
        fits = (re.sub(typers, ours, e.message) for typers, ours in ADVICE.items() if re.fullmatch(typers, e.message))
        advice = next(fits, e.message.rstrip(".")).replace("', '", ", ")
        return f"{name} is {given}: {advice}."


class SharedCommand(Command):
    """A command whose work several processes share: of these, only the main one prints."""

    def invoke(self, ctx):
        if ranks.launched()[0]:
            mute()
        super().invoke(ctx)


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line; not where its value is a plan's or the default."""
    return ctx.get_parameter_source(name).name == "COMMANDLINE"


def read_plan(ctx: typer.Context, name: str | None):
    """The plan that --plan names, read. Its settings replace the defaults of the options that are not typed."""
    if not name:
        return None
    from salun_sd.edit import concepts

    plan = concepts.read(name)
    repeatable = {p.name for p in ctx.command.params if p.multiple}

    def texts(value: object) -> list:
        return [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [value]

    ctx.default_map = {k: texts(v) if k in repeatable else v for k, v in plan.settings.items()}
    return plan


def concepts_from(plan, concepts: list[str] | None, anchors: list[str] | None = None) -> list:
    """The plan's concepts, or those of --concept. Raises UsageError where both are given."""
    if plan and (concepts or anchors):
        raise UsageError("--plan and --concept cannot go together: write the concepts into the plan.")
    return list(plan.concepts) if plan else concepts or []
