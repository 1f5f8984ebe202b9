"""The commands ``trgnet text embed`` and ``trgnet text show``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, did_you_mean

# torch takes seconds to import: every command imports what it needs itself, so that --help answers at once.
if TYPE_CHECKING:
    import numpy as np

    from .text import Embeddings

__all__ = ["add_commands"]

_PAIRS = 5
_PNG = b"\x89PNG\r\n\x1a\n"
_ZIP = b"PK"


def add_commands(
    commands: argparse._SubParsersAction, command: Callable[..., argparse.ArgumentParser]
) -> None:
    """Add ``text`` to the command line.

    Args:
        commands: the subparsers of the program.
        command: makes the parser of one command of (subparsers, name, function, help).
    """
    summary = "embed descriptions of joints and actions, and show how they relate"
    text = commands.add_parser(
        "text", help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    parts = text.add_subparsers(required=True, metavar="COMMAND")

    embed = command(parts, "embed", _embed, "embed the descriptions of joints and actions")
    embed.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="JSON or YAML file with joints: {name: text} and actions: {name: text}, or a data folder",
    )
    embed.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".npz to write; embeddings that are there are replaced (default: in a data folder "
        "where it expects them, else SOURCE with the ending .npz)",
    )
    embed.add_argument(
        "--encoder",
        metavar="NAME",
        help="model of Hugging Face, or a folder with one (default: all-MiniLM-L6-v2, without network)",
    )

    show = command(parts, "show", _show, "draw the graphs of joints and actions, and list the nearest pairs")
    show.add_argument(
        "source",
        metavar="SOURCE",
        help=".npz of trgnet text embed, a run folder, a data folder, or a data set with descriptions in "
        "the package, such as PKU-subject",
    )
    show.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=".png to write; a picture that is there is replaced (default: text.png in a folder, else "
        "SOURCE-text.png)",
    )


def _embed(options: argparse.Namespace) -> None:
    texts, default = _descriptions(options.source)
    out = options.out or default
    _check_out(out, ".npz", _ZIP)
    from .text import write_embeddings

    try:
        prior = write_embeddings(out, texts, options.encoder)
    except ImportError as error:
        raise UserError(str(error)) from error
    print(f"{out}: {len(prior.joints)} joints and {len(prior.actions)} actions, {prior.dim} wide")


def _descriptions(source: Path) -> tuple[dict[str, dict[str, str]], Path]:
    """The texts that SOURCE holds, and where their embeddings go."""
    if source.is_dir():
        from .data.description import read_description, texts_of

        description = read_description(source)
        return texts_of(description), _embeddings_of(source, description.text)
    from .text import read_descriptions

    return read_descriptions(source), source.with_suffix(".npz")


def _embeddings_of(folder: Path, text: str | tuple[str, str]) -> Path:
    """The file that a data folder's description says to hold its embeddings; text.npz where it says none."""
    return folder / (text if isinstance(text, str) and text != "none" else "text.npz")


def _show(options: argparse.Namespace) -> None:
    known, default = _known(options.source)
    out = options.out or default
    _check_out(out, ".png", _PNG)
    from .plots import plot_graphs

    graphs = {
        "joints": (known.prior.joint_graph().numpy(), known.joints),
        "actions": (known.prior.action_graph().numpy(), known.actions),
    }
    plot_graphs(out, graphs)
    for title, (graph, names) in graphs.items():
        _list_pairs(title, graph, names)
    print(out)


def _known(source: str) -> tuple[Embeddings, Path]:
    """The embeddings that SOURCE stands for, and where its picture goes."""
    from .text import SHIPPED, read_embeddings, shipped_embeddings

    path = Path(source)
    if (path / "run.json").is_file():
        return _known_of_run(path), path / "text.png"
    if path.is_dir():
        from .data.description import read_description

        file = _embeddings_of(path, read_description(path).text)
        if not file.is_file():
            raise UserError(f"folder {path} has no {file.name}; write it with: trgnet text embed {path}")
        return read_embeddings(file), path / "text.png"
    if path.is_file():
        return read_embeddings(path), path.with_name(f"{path.stem}-text.png")
    if source in SHIPPED:
        return shipped_embeddings(source), Path(f"{source}-text.png")
    raise UserError(
        f"{source!r} is no file, folder or data set of the package{did_you_mean(source, SHIPPED)}; expected "
        f"an .npz of trgnet text embed, a run or data folder, or one of {', '.join(SHIPPED)}"
    )


def _known_of_run(path: Path) -> Embeddings:
    from .runs import Run
    from .text import Embeddings

    run = Run.open(path)
    info, prior = run.info(), run.text()
    sizes, expected = (len(prior.joints), len(prior.actions)), (len(info.skeleton), len(info.classes))
    if sizes != expected:
        raise UserError(
            f"{run / 'prior.npz'} has {sizes[0]} joints and {sizes[1]} actions, run.json {expected[0]} and "
            f"{expected[1]}; the run is damaged"
        )
    return Embeddings(prior, info.skeleton.joints, info.classes)


def _list_pairs(title: str, graph: np.ndarray, names: tuple[str, ...]) -> None:
    import numpy as np

    first, second = np.triu_indices(len(graph), k=1)
    order = np.argsort(-graph[first, second], kind="stable")
    picks = {"closest": order[:_PAIRS], "farthest": order[::-1][:_PAIRS]}
    for which, pairs in picks.items():
        if len(pairs):
            print(f"{which} {title} (1: equal, 0: the farthest pair)")
        for pair in pairs:
            i, j = first[pair], second[pair]
            print(f"  {graph[i, j]:.2f}  {names[i]} | {names[j]}")


def _check_out(path: Path, ending: str, magic: bytes) -> None:
    """Refuse to replace what is of another kind than what is to be written."""
    if path.suffix.lower() != ending:
        raise UserError(f"--out {path}: expected a file name that ends in {ending}")
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"--out {path} is a folder; choose another name")
    with path.open("rb") as file:
        if file.read(len(magic)) != magic:
            raise UserError(f"--out {path} exists and is no {ending} file; choose another name")
    if ending == ".npz":
        from .text import read_embeddings

        read_embeddings(path)
