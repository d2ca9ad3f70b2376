"""The command line of `benchmarks.compare`, read and checked."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.beside import Asked
from benchmarks.peers import PEERS, Eft
from benchmarks.scenarios import SCENARIOS
from benchmarks.work import Measurement
from runtime.checkpoints.demo import cache_directory
from settings.fields import by_name

Results = dict[str, list[Measurement]]
"""What was measured in each scenario."""


def parse(argv: Sequence[str] | None, about: str) -> argparse.Namespace:
    """Ends the process with a message where an argument makes no sense."""
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=about)
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--model", default="demo", help="a model of the Llama family (default: demo)")
    parser.add_argument("--repeats", type=positive, default=3, help="times to measure each peer (default: 3)")
    parser.add_argument("--threads", type=positive, help="CPU threads, for all peers (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of Eft's")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the tables on stderr")
    _beside_generate(parser.add_argument_group("beside generate"))
    _beside_peers(parser.add_argument_group("beside peers in environments of their own, instead of generate"))
    given = parser.parse_args(argv)
    for name in given.scenarios:
        if name not in SCENARIOS:
            parser.error(f"there is no scenario {name!r}, but {', '.join(SCENARIOS)}")
    for item in given.set:
        if item.partition("=")[0] not in by_name():
            parser.error(f"--set {item}: no such setting (eft config show lists them)")
    return given


def _beside_generate(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--at-once", type=positive, default=32, help="requests at once, and batch size of generate")
    group.add_argument(
        "--peer-sample", type=positive, default=6, help="requests that generate does one at a time (default: 6)"
    )
    group.add_argument("--http", action="store_true", help="also measure `eft serve`, in `batch`")


def _beside_peers(group: argparse._ArgumentGroup) -> None:
    known = "; ".join(f"{name} with {', '.join(kind.variants)}" for name, kind in PEERS.items())
    group.add_argument(
        "--peer",
        action="append",
        type=asked,
        default=[],
        metavar="NAME[:VARIANT,…]=ENV",
        help=f"a peer and where it is installed: {known}",
    )
    group.add_argument(
        "--eft",
        type=quantizations,
        metavar="VARIANT,…",
        help=f"values of Eft's setting quantization (default: {','.join(Eft.variants)}; '' for none of them)",
    )
    group.add_argument(
        "--with",
        dest="earlier",
        action="append",
        type=earlier,
        default=[],
        metavar="FILE",
        help="measurements of an earlier run, as --json printed them, to show and compare with",
    )
    group.add_argument(
        "--peer-models",
        type=Path,
        default=cache_directory() / "peers",
        metavar="DIR",
        help="keeps the model in the peers' formats (default: %(default)s)",
    )


def settings_of(given: argparse.Namespace) -> dict[str, str]:
    """Settings of Eft, by name."""
    return dict(item.split("=", 1) for item in given.set)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def asked(text: str) -> Asked:
    try:
        return Asked.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def quantizations(text: str) -> tuple[str, ...]:
    known = by_name()["quantization"].choices
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no quantization {name!r}, but {', '.join(known)}")
    return names


def earlier(text: str) -> Results:
    """Scenarios of this name that this module does not measure are kept: nobody asks for them."""
    try:
        return msgspec.json.decode(Path(text).read_bytes(), type=Earlier).scenarios
    except (OSError, msgspec.DecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no output of --json: {error}") from error


class Earlier(msgspec.Struct):
    """What `--json` printed, the part that is read again."""

    scenarios: Results
