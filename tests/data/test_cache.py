import threading

import pytest

from spectral_lightning.data.cache import fill_folder


def build(folder):
    (folder / "part").write_text("whole")


def damage(folder):
    return None if (folder / "part").read_text() == "whole" else f"{folder / 'part'} is cut"


def test_folder_is_made_once(tmp_path):
    folder = tmp_path / "cache" / "name"
    fill_folder(folder, build, damage)
    fill_folder(folder, lambda _: pytest.fail("built again"), damage)
    assert (folder / "part").read_text() == "whole"
    assert list(folder.parent.iterdir()) == [folder]


def test_damaged_folder_is_reported_and_built_again(tmp_path):
    folder = tmp_path / "name"
    fill_folder(folder, build, damage)
    (folder / "part").write_text("who")
    with pytest.warns(UserWarning, match="The token cache is built again: .*part is cut"):
        fill_folder(folder, build, damage)
    assert damage(folder) is None
    assert list(tmp_path.iterdir()) == [folder]


def test_failed_build_leaves_nothing_behind(tmp_path):
    def fail(folder):
        build(folder)
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        fill_folder(tmp_path / "name", fail, damage)
    assert list(tmp_path.iterdir()) == []


def test_builds_at_the_same_time_do_not_disturb_each_other(tmp_path):
    barrier = threading.Barrier(4)

    def build_together(folder):
        barrier.wait()
        build(folder)

    threads = [
        threading.Thread(target=fill_folder, args=(tmp_path / "name", build_together, damage))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(tmp_path.iterdir()) == [tmp_path / "name"]
    assert damage(tmp_path / "name") is None


def test_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="`cache_dir` must be a folder that can be written, got"):
        fill_folder(tmp_path / "file" / "name", build, damage)
