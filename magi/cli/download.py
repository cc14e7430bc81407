"""`python -m magi download`: the official files: sizes first, then a question, then a resumable download with checksums."""

import argparse
from pathlib import PurePosixPath
from typing import Any

from ..model_files.download import HUB, ITEMS, DownloadProgress, plan_download, run_download, verify_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m magi download`."""
    parser.add_argument("items", nargs="*", metavar="ITEM", help=f"what to fetch: {', '.join(ITEMS)}")
    parser.add_argument("--folder", default="models", help="where the files go (default: %(default)s)")
    parser.add_argument(
        "--only", action="store_true", help="a model without the VAE, text encoder and special tokens it needs"
    )
    parser.add_argument("--list", action="store_true", help="show sizes, places and what is there, and fetch nothing")
    parser.add_argument(
        "--verify", action="store_true", help="hash the files that are there too, and fetch damaged ones again"
    )
    parser.add_argument("--yes", action="store_true", help="fetch more than 1 GB without asking")
    parser.add_argument("--endpoint", metavar="URL", help=f"a mirror of {HUB} (default: HF_ENDPOINT, else {HUB})")


def main(args: argparse.Namespace) -> int:
    """Runs `python -m magi download` and returns its exit status. Without items it lists them all.

    Raises:
        MagiError: see `plan_download` and `run_download`.
    """
    listing = args.list or not args.items
    plan = plan_download(args.items or ITEMS, args.folder, only=args.only, endpoint=args.endpoint)
    with _Bar() as bar:
        if args.verify:
            plan = verify_files(plan, bar)
        print(plan)
        if not listing:
            run_download(plan, bar, yes=args.yes, ask=_ask)
    if listing:
        print("Fetch them with: python -m magi download ITEM ...")
    else:
        print(f"All {len(plan.files)} files are in place below {plan.folder}.")
    return 0


def _ask(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # nobody is there to answer
        return False


class _Bar:
    """Shows a tqdm bar for each file and phase."""

    def __init__(self) -> None:
        self.key: tuple[str, str] | None = None
        self.bar: Any = None

    def __call__(self, event: DownloadProgress) -> None:
        from tqdm import tqdm

        if self.key != (event.path, event.phase):
            self.close()
            self.key = (event.path, event.phase)
            name = f"{event.phase} {event.index}/{event.count} {PurePosixPath(event.path).name}"
            self.bar = tqdm(total=event.total, initial=event.done, desc=name, unit="B", unit_scale=True)
        self.bar.update(event.done - self.bar.n)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the current bar, which stays on the terminal as it stands."""
        if self.bar is not None:
            self.bar.close()
