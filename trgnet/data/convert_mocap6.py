"""Make the shipped mocap6.npz from the source distribution of bnpy 0.1.7.

    python -m pip download --no-deps --no-binary :all: bnpy==0.1.7
    python -m trgnet.data.convert_mocap6 bnpy-0.1.7.tar.gz mocap6.npz

Members of the archive are read in memory and nothing is unpacked; no pickles are read.
"""

from __future__ import annotations

import argparse
import csv
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import replacing

FOLDER = "bnpy/datasets/mocap6"
LARGEST_MEMBER = 16 * 2**20
COLUMNS = (
    "root.ty", "lowerback.rx", "lowerback.ry", "upperneck.ry", "rhumerus.rz", "rradius.rx", "lhumerus.rz",
    "lradius.rx", "rtibia.rx", "rfoot.rx", "ltibia.rx", "lfoot.rx",
)  # fmt: skip


def read_archive(path: str | Path) -> dict[str, np.ndarray]:
    """Read mocap6 out of a bnpy source distribution (.tar.gz).

    Returns:
        values float32 (2058, 12) in degrees and AMC length units, columns (12,) their names, labels uint8
        (2058,) counting from 0, classes (12,), names (6,) and lengths int64 (6,) of the recordings.

    Raises:
        OSError, tarfile.TarError: the archive cannot be read.
        ValueError: it does not hold mocap6 as bnpy 0.1.7 does.
    """
    with tarfile.open(path, "r:gz") as archive:
        members = {member.name: member for member in archive.getmembers() if member.isfile()}
        data = _read_member(archive, members, f"{FOLDER}/dataset.npz")
        metadata = _read_member(archive, members, f"{FOLDER}/metadata_per_seq.csv")
    names = [row["file_name"] for row in csv.DictReader(io.StringIO(metadata.decode("utf-8")))]
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        values, ends = arrays["X"], arrays["doc_range"]
        labels = arrays["TrueZ"].astype(np.int64) - 1
        columns, classes = arrays["column_names"].astype(str), arrays["true_state_names"].astype(str)
    _check(values, labels, ends, names, columns, classes)
    return {
        "values": values.astype(np.float32),
        "columns": columns,
        "labels": labels.astype(np.uint8),
        "classes": classes,
        "names": np.array(names),
        "lengths": np.diff(ends).astype(np.int64),
    }


def _read_member(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], suffix: str) -> bytes:
    matches = [member for name, member in members.items() if name.endswith("/" + suffix)]
    if len(matches) != 1:
        raise ValueError(
            f"expected one file {suffix} in the archive, found {len(matches)}; give bnpy-0.1.7.tar.gz"
        )
    if matches[0].size > LARGEST_MEMBER:
        raise ValueError(f"{suffix} has {matches[0].size} bytes, expected less than {LARGEST_MEMBER}")
    return archive.extractfile(matches[0]).read()


def _check(
    values: np.ndarray,
    labels: np.ndarray,
    ends: np.ndarray,
    names: list[str],
    columns: np.ndarray,
    classes: np.ndarray,
) -> None:
    if tuple(columns) != COLUMNS:
        raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {', '.join(columns)}")
    if values.shape != (len(labels), len(COLUMNS)) or not np.isfinite(values).all():
        raise ValueError(f"expected finite values ({len(labels)}, {len(COLUMNS)}), got shape {values.shape}")
    if ends[0] != 0 or ends[-1] != len(labels) or (np.diff(ends) < 1).any() or len(ends) != len(names) + 1:
        raise ValueError(
            f"the recordings' ends {ends} do not fit {len(labels)} frames of {len(names)} recordings"
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"expected labels 1..{len(classes)}, got {labels.min() + 1}..{labels.max() + 1}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: PATH_TO_bnpy-0.1.7.tar.gz OUT.npz."""
    parser = argparse.ArgumentParser(
        prog="python -m trgnet.data.convert_mocap6", description="Convert mocap6."
    )
    parser.add_argument("archive", type=Path, help="bnpy-0.1.7.tar.gz, the source distribution on PyPI")
    parser.add_argument("out", type=Path, help="the .npz to write")
    options = parser.parse_args(arguments)
    try:
        arrays = read_archive(options.archive)
        with replacing(options.out) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{options.out}: {len(arrays['names'])} recordings, {len(arrays['labels'])} frames")


if __name__ == "__main__":
    main()
