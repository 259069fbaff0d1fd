"""What ``ipt-fast restore`` is to do: which image becomes which file, checked before the work begins."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from .._files import check_name, is_stream, make_folder
from ..data.files import list_images, match_images, partner_of
from ..data.formats import IMAGE_SUFFIXES, WRITTEN_SUFFIXES
from ..data.io import check_suffix
from ._journal import NAME, digest_of_file
from ._outputs import Outputs, model_files


@dataclasses.dataclass(frozen=True)
class Job:
    """One image to restore.

    Attributes:
        source, destination: the files.
        comparison: where the versions side by side go, or None.
        target: the file of the clean original, or None.
        reason: why this image has no target, or "".
    """

    source: Path
    destination: Path
    comparison: Path | None
    target: Path | None
    reason: str

    @property
    def results(self) -> list[Path]:
        return [self.destination] if self.comparison is None else [self.destination, self.comparison]

    def made_from(self, result: Path, made_with: dict[str, Any]) -> dict[str, Any]:
        """All that decides what one of the results is; ``made_with`` is the model and the options."""
        made_from = {"source": digest_of_file(self.source), **made_with}
        if result == self.comparison:
            made_from["compared_with"] = None if self.target is None else digest_of_file(self.target)
        return made_from


def plan(args: argparse.Namespace) -> list[Job]:
    """The jobs that the arguments say.

    Raises:
        ValueError: nothing to restore, an output that is an input, two outputs in one place, or a wrong OUT or target.
    """
    sources = [path for name in args.input for path in match_images(name)]
    sources = list(dict.fromkeys(sources))
    single_file = len(args.input) == 1 and Path(args.input[0]).is_file()
    output = Path(args.output)
    folder_meant = output.is_dir() or args.output.endswith("/")  # which Path drops
    suffixed = output.suffix != "" if single_file else output.suffix.lower() in IMAGE_SUFFIXES
    to_file = suffixed and not folder_meant
    if not single_file and not output.is_dir() and (to_file or os.path.lexists(output)):
        raise ValueError(f"OUT must be a folder for several images; got {output}")
    if to_file:
        check_suffix(output)  # a typo is not the name of a new folder
    elif not output.is_dir() and os.path.lexists(output):
        raise ValueError(f"OUT must be a folder, or a file with a suffix that says its format; got {args.output}")
    if args.target is not None and not (args.target.is_file() or args.target.is_dir()):
        raise ValueError(f"--target must be an image or a folder of images; got {args.target}, which is none")
    if args.target is not None and args.target.is_file() and not single_file:
        raise ValueError(f"--target must be a folder for several images; got {args.target}")
    targets = [] if args.target is None else list_images(args.target) if args.target.is_dir() else [args.target]
    jobs = []
    for source in sources:
        destination = output if to_file else output / result_name(source)
        comparison = destination.with_name(f"{destination.stem}_compare.png") if args.compare else None
        target, reason = None, ""
        if args.target is not None:
            try:
                target = targets[0] if args.target.is_file() else partner_of(source, sources, targets)
            except ValueError as error:
                reason = f"--{error} in {args.target}"
        jobs.append(Job(source, destination, comparison, target, reason))
    outputs = Outputs([*sources, *targets, *model_files(args.model), *([args.checkpoint] if args.checkpoint else [])])
    if not to_file:
        outputs.claim("OUT", output / NAME)
    for job in jobs:
        for path in job.results:
            check_name(path)
            outputs.claim("OUT", path, of=str(job.source))
    return jobs


def result_name(source: Path) -> str:
    """The name of an image's result in a folder: PNG where the image's own format is only read."""
    return source.name if source.suffix.lower() in WRITTEN_SUFFIXES else f"{source.stem}.png"


def make_writable(path: Path) -> None:
    """Make the folder for an output, and raise ValueError unless files can be written there."""
    if not is_stream(path):
        make_folder("OUT", path.parent)
