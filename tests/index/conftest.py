"""Indexes are built without their picture, which takes longer than all else of a small one."""

import pytest

from ebr_lib.index import run

DRAW = run.draw_curve


@pytest.fixture(scope="package", autouse=True)
def no_picture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_curve", lambda path, *_: path.write_bytes(b"picture"))
        yield


@pytest.fixture
def draws(monkeypatch):
    """The picture is drawn."""
    monkeypatch.setattr(run, "draw_curve", DRAW)
