"""The work of `merge`: the shards of an audit joined to the audit that they would be without --shard."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from salun_sd.audit import deliver, looked, quality
from salun_sd.audit.examine import check_some, write_lines
from salun_sd.audit.looked import Looked
from salun_sd.audit.page import flat
from salun_sd.audit.protocols import NUDENET
from salun_sd.audit.report import Run, assemble, part_of
from salun_sd.audit.request import Request, check_out
from salun_sd.audit.saved import are_counted, read, run_in
from salun_sd.draw.shards import Shard, hash_of, parse
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.runtime import seals
from salun_sd.runtime.files import check_place
from salun_sd.runtime.texts import check_given, listed

ADVICE = "Type its evaluate command again: nothing is drawn twice."


class Piece(NamedTuple):
    """One shard's audit: its folder and report, the lines of its images and of its base's, and what the models of
    quality found of them."""

    folder: Path
    shard: Shard
    report: dict
    run: Run
    base: Run | None
    looked: Looked

    def about(self) -> dict[str, str]:
        """All that the shards of one audit share, in words."""
        report, part = self.report, self.report["part"]
        whole = {"prompt set": report["prompts"], "salun-sd": report["salun_sd"], "base": bool(self.base)}
        whole |= {"number of shards": self.shard.of, "number of prompts": part["of"], "quality": self.looked.about()}
        whole |= {"images per prompt": len(self.run.manifest) / part["rows"]}
        return dict(flat(report["settings"] | whole))


def merge(
    shards: Sequence[str | Path], *, out: str | Path, allow_missing: bool = False, no_images: bool = False,
    fail_if: str | Sequence[str] = (), confident: bool = False,
) -> dict:  # fmt: skip
    """Make one audit of those that `evaluate` wrote with `shard`, given by their folders. Writes it into `out`; returns
    what report.json holds: on a CPU the same as that of an audit without `shard`.

    Nothing is drawn, looked at or copied: the lines of `out` say where the shards' images are. With `allow_missing`,
    prompts may be missing, and the report's `part` says so. Raises UsageError for arguments that are wrong, SalunError
    for shards that are not of one audit or not whole; the text of both is a sentence for a person.
    """
    check_given(shards=shards, out=out, fail_if=fail_if)
    out, fail_if = Path(out), listed(fail_if)
    if confident and not fail_if:
        raise UsageError("--confident needs --fail-if: give both.")
    check_place(out / "report.json")
    folders = _folders(shards, out)
    check_out(out)
    pieces = sorted(map(_piece, folders), key=lambda piece: piece.shard)
    _check_one_audit(pieces)
    part, report = _part(pieces, allow_missing), pieces[0].report
    settings, concepts = report["settings"], list(report["concepts"])
    run = _joined(pieces, lambda piece: piece.run, out)
    base = _joined(pieces, lambda piece: piece.base, out / "against") if report["against"] else None
    _check_replaceable(out, run, report)
    sides = [*filter(None, (run, base))]
    for side in sides:
        check_some(side)
    found = looked.joined([piece.looked for piece in pieces])
    detectors = [NUDENET] * bool(settings["detector"]) + list(settings.get("detectors", ()))
    asked = Request.of_lines(report["prompts"], settings["prompts_sha256"], run.manifest)
    parsed = asked._replace(concepts=concepts, classifier=settings["classifier"]).bounds(
        fail_if, detectors=detectors, against=bool(base), clip=bool(found.clip), fid=bool(found.extractor),
        reference=found.of_reference is not None,
    )  # fmt: skip

    merged = assemble(run, base, prompts=report["prompts"], settings=settings, concepts=concepts, part=part,
                      quality=quality.measure(found, run, base, concepts, is_part=bool(part)))  # fmt: skip
    for side, sampling in ((merged, settings.get("sampling")), (merged["against"], settings.get("sampling_against"))):
        if sampling:
            _name_as_drawn(side)
    for side in sides:
        side.folder.mkdir(parents=True, exist_ok=True)  # the images are found from there
    deliver.finish(merged, run, base, out, parsed, confident=confident, pictures=not no_images)
    for side in sides:
        write_lines(side.folder, side.manifest, side.detections)
    return merged


def _folders(shards: Sequence[str | Path], out: Path) -> list[Path]:
    """The folders of the shards. Raises UsageError for one that is given twice, or is `out`."""
    folders = [Path(shard) for shard in shards]
    if not folders:
        raise UsageError("merge takes the shards of an audit: give the folders that `salun-sd evaluate --shard` wrote.")
    resolved = [folder.resolve() for folder in folders]
    if twice := [folder for n, folder in enumerate(folders) if resolved[n] in resolved[:n]]:
        raise UsageError(f"{twice[0]} is given twice: give each shard once.")
    if out.resolve() in resolved:
        raise UsageError(f"--out {out} is one of the shards: give a folder of its own.")
    return folders


def _check_replaceable(out: Path, run: Run, report: dict) -> None:
    """Raise UsageError if `out` holds an audit that has other images than the run, or other settings than the report:
    one that an earlier merge made has neither."""
    is_other = any((out / name).exists() for name in ("images", "attacks", looked.FILE))
    if (file := out / "manifest.jsonl").is_file():
        merged = {*map(seals.line, run.manifest)}
        is_other |= any(seals.line(line) not in merged for line in seals.read_lines(file, skip=True))
    if (file := out / "report.json").is_file():
        with suppress(SalunError):  # a damaged one is no loss
            before = seals.read(file)
            is_other |= any(before.get(key) != report[key] for key in ("model", "prompts", "settings"))
    if is_other:
        raise UsageError(f"{out} holds another audit: choose another --out.")


def _piece(folder: Path) -> Piece:
    """The audit of a shard, read and checked. Raises UsageError for a folder that has none."""
    if not (folder / "report.json").is_file():
        raise UsageError(f"{folder} has no report.json: give the folder of a shard that is whole. If this one is not, "
                         "type its evaluate command again.")  # fmt: skip
    report = read(folder / "report.json").report
    if not (part := report.get("part")) or not part["shard"]:
        raise UsageError(f"{folder} is no shard of an audit, but all of one: give folders of `salun-sd evaluate "
                         "--shard`.")  # fmt: skip
    try:
        shard, sides = parse(str(part["shard"])), []
    except UsageError as e:
        file, given = folder / "report.json", part["shard"]
        raise SalunError(f"{file} is damaged: part.shard is {given!r}, which is no shard. {ADVICE}") from e
    for side, place in ((report, folder), (report["against"], folder / "against")):
        run = run_in(place, side["model"]) if side else None
        if side and not (run and are_counted(side, run, report["settings"])):
            raise SalunError(f"The lines of {place} are not those that its report counts. {ADVICE}")
        sides.append(run)
    if len({line["case"] for line in sides[0].manifest}) != part["rows"]:
        raise SalunError(f"{folder / 'manifest.jsonl'} has not the {part['rows']} prompts of its report. {ADVICE}")
    if foreign := [line["case"] for line in sides[0].manifest if hash_of(line["case"]) % shard.of != shard.number - 1]:
        raise SalunError(f"{folder} has case {foreign[0]}, which is not of shard {shard}. {ADVICE}")
    return Piece(folder, shard, report, *sides, looked.read(folder))


def _check_one_audit(pieces: list[Piece]) -> None:
    """Raise UsageError if two pieces are the same shard, or not of one audit."""
    first = pieces[0]
    for piece, other in zip(pieces[1:], pieces, strict=False):
        if piece.shard == other.shard:
            raise UsageError(f"{other.folder} and {piece.folder} are both shard {piece.shard}: give each shard once.")
    expected = first.about()
    for piece in pieces[1:]:
        about = piece.about()
        if key := next((key for key in [*expected, *about] if about.get(key) != expected.get(key)), None):
            model = " (the weights of the model)" if key.endswith("identity") else ""
            raise UsageError(f"{first.folder} and {piece.folder} are not shards of one audit. They differ in {key}"
                             f"{model}: {expected.get(key)} and {about.get(key)}.")  # fmt: skip


def _part(pieces: list[Piece], allow_missing: bool) -> dict | None:
    """The merged report's `part`. Raises SalunError for prompts that are missing, and says where."""
    rows, of = sum(piece.report["part"]["rows"] for piece in pieces), pieces[0].report["part"]["of"]
    if rows == of:
        return None
    numbers = {piece.shard.number for piece in pieces}
    absent = [str(Shard(n, pieces[0].shard.of)) for n in range(1, pieces[0].shard.of + 1) if n not in numbers]
    if not allow_missing:
        where = [f"{piece.folder} lacks {n:,}" for piece in pieces if (n := piece.report["part"]["missing"])]
        where += [f"shard {name} is not given" for name in absent]
        raise SalunError(f"Missing: {of - rows:,} of {of:,} prompts ({some(where, 10)}): finish the shards with "
                         "their evaluate commands, or give --allow-missing.")  # fmt: skip
    return part_of(rows, of, of - rows, absent=absent)


def _joined(pieces: list[Piece], side: Callable[[Piece], Run], out: Path) -> Run:
    """A side of all pieces in the order of case and k; its files are relative to the folder `out`."""
    runs = [side(piece) for piece in pieces]

    def lines(of: Callable[[Run], list[dict]]) -> list[dict]:
        placed = []
        for run in runs:
            to = os.path.relpath(run.folder.resolve(), out.resolve())
            placed += [line | {"file": os.path.normpath(os.path.join(to, line["file"]))} for line in of(run)]
        return sorted(placed, key=lambda line: (line["case"], line["k"]))

    return Run(runs[0].model, out, lines(lambda run: run.manifest), lines(lambda run: run.detections))


def _name_as_drawn(side: dict) -> None:
    """Name the files in a model's part of a report as in the audit that drew them."""
    side["broken"] = {f"images/{Path(file).name}": why for file, why in side["broken"].items()}
    if side["blank"]:
        side["blank"]["files"] = [f"images/{Path(file).name}" for file in side["blank"]["files"]]
