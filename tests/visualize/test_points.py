"""The points as a Parquet file, in the form that embedding-atlas reads."""

import shutil
import subprocess
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from ebr_lib.visualize.explorer import Neighbourhood
from ebr_lib.visualize.groups import Panel
from ebr_lib.visualize.points import write_points

ATLAS_COLUMNS = ["--text", "text", "--x", "x", "--y", "y", "--neighbors", "neighbours"]


def test_a_row_per_point_with_its_neighbours_by_row_number(tmp_path):
    near = np.array([[1, 2], [0, -1], [1, 0]])
    space = Neighbourhood(near, np.array([[0.75, 0.5], [0.75, 0.0], [0.5, 0.25]], np.float32))
    places = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_points(
        tmp_path / "points.parquet", ids=["007", 8, "x"], texts=["热水器", None, "b"], labels=["家电", None, "x"],
        panels=[Panel("t-SNE", places), Panel("UMAP", -places)], space=space,
        columns={"title": ["a", "b", None], "x": ["1", "2", "3"]},
    )  # fmt: skip
    table = pq.read_table(tmp_path / "points.parquet")
    assert table.column_names == ["id", "text", "label", "x", "y", "x2", "y2", "neighbours", "title", "x_"]
    assert table["id"].to_pylist() == ["007", "8", "x"] and table["text"].to_pylist() == ["热水器", None, "b"]
    assert table["y"].to_pylist() == [1, 3, 5] and table["x2"].to_pylist() == [0, -2, -4]
    assert table["neighbours"].to_pylist() == [
        {"ids": [1, 2], "distances": [0.25, 0.5]},
        {"ids": [0], "distances": [0.25]},  # the other one is not drawn
        {"ids": [1, 0], "distances": [0.5, 0.75]},
    ]


@pytest.mark.skipif(not shutil.which("embedding-atlas"), reason="needs the embedding-atlas program")
def test_embedding_atlas_opens_it(tmp_path):
    """With the command of the docs; instead of serving, it writes what it would serve."""
    near = (np.arange(30)[:, None] + [1, 2, 3]) % 30
    write_points(
        tmp_path / "points.parquet", ids=range(30), texts=[f"热水器 {i}" for i in range(30)], labels=["家电"] * 30,
        panels=[Panel("t-SNE", np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32))],
        space=Neighbourhood(near, np.full(near.shape, 0.5, np.float32)), columns={"price": ["1"] * 30},
    )  # fmt: skip
    command = ["embedding-atlas", "points.parquet", *ATLAS_COLUMNS, "--export-application", "app.zip"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert any("parquet" in name for name in zipfile.ZipFile(tmp_path / "app.zip").namelist())
