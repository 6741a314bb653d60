"""Files and folders appear whole or not at all, and say when they are no longer what was written."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest

from mambakit.errors import ArtefactError
from mambakit.training.artefacts import (
    exclusive,
    read_json,
    remove_folder,
    remove_leftovers,
    verify_folder,
    write_file,
    write_folder,
    write_json,
)


def fill(folder):
    (folder / "weights.bin").write_bytes(b"weights")
    (folder / "nested").mkdir()
    (folder / "nested" / "notes.txt").write_text("notes")


@pytest.fixture
def artefact(tmp_path):
    write_folder(tmp_path / "artefact", fill)
    return tmp_path / "artefact"


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_written_folder_verifies(artefact):
    verify_folder(artefact)
    assert names(artefact) == ["checksums.json", "nested", "weights.bin"]
    assert sorted(read_json(artefact / "checksums.json")) == ["nested/notes.txt", "weights.bin"]


def test_a_changed_byte_is_found_and_its_file_named(artefact):
    (artefact / "nested" / "notes.txt").write_text("nodes")
    with pytest.raises(ArtefactError, match=r"nested/notes\.txt is not what was written"):
        verify_folder(artefact)


def test_a_missing_file_is_named(artefact):
    (artefact / "weights.bin").unlink()
    with pytest.raises(ArtefactError, match=r"is incomplete: weights\.bin is missing"):
        verify_folder(artefact)


def test_an_added_file_is_named(artefact):
    (artefact / "nested" / "more.bin").touch()
    with pytest.raises(ArtefactError, match=r"nested/more\.bin, which checksums\.json does not list"):
        verify_folder(artefact)


def test_looking_at_a_folder_on_a_desktop_does_not_damage_it(artefact):
    (artefact / ".DS_Store").touch()
    verify_folder(artefact)


def test_a_listed_name_never_leads_out_of_the_folder(artefact):
    write_json(artefact / "checksums.json", {"../outside": "0" * 64})
    (artefact.parent / "outside").touch()
    with pytest.raises(ArtefactError, match=r"\.\./outside is missing"):
        verify_folder(artefact)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_checksums_are_an_error_of_one_line(artefact, content):
    (artefact / "checksums.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"^[^\n]*checksums\.json[^\n]*$"):
        verify_folder(artefact)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArtefactError, match="nowhere is not there"):
        verify_folder(tmp_path / "nowhere")


def test_an_existing_folder_is_never_overwritten(artefact):
    with pytest.raises(FileExistsError):
        write_folder(artefact, fill)
    verify_folder(artefact)
    assert names(artefact.parent) == ["artefact"]


def test_of_two_writers_of_one_folder_the_second_fails_and_leaves_nothing(tmp_path):
    def fill_slowly(folder):
        write_folder(tmp_path / "artefact", fill)
        (folder / "late.bin").touch()

    with pytest.raises(FileExistsError, match="another writer was first"):
        write_folder(tmp_path / "artefact", fill_slowly)
    verify_folder(tmp_path / "artefact")
    assert names(tmp_path) == ["artefact"]


def test_a_folder_whose_filling_fails_leaves_nothing(tmp_path):
    def fail(folder):
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "artefact", fail)
    assert names(tmp_path) == []


def test_a_file_is_replaced_whole(tmp_path):
    write_file(tmp_path / "file", b"old")
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_keeps_the_old_file_and_is_an_error_of_one_line(tmp_path, full_disk):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ArtefactError, match=r"^cannot write \S*file: No space left on device$"):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_no_folder_and_is_an_error_of_one_line(tmp_path, full_disk):
    with pytest.raises(ArtefactError, match=r"^cannot write \S*artefact: No space left on device$"):
        write_folder(tmp_path / "artefact", fill)
    assert names(tmp_path) == []


@pytest.mark.parametrize("write", [lambda path: write_file(path, b""), lambda path: write_folder(path, fill)])
def test_a_place_that_cannot_hold_files_is_an_error_of_one_line(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match=r"^cannot write \S*target: [^\n]+$"):
        write(tmp_path / "file" / "target")


def test_json_with_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_json_that_is_missing_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ArtefactError, match=r"cannot read \S*value\.json: No such file or directory"):
        read_json(tmp_path / "value.json")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_killed_writer_leaves_only_what_the_next_one_clears_away(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from mambakit.training.artefacts import write_folder

def fill(folder):
    (folder / "weights.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

write_folder(Path(sys.argv[1]), fill)
"""
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path / "artefact")], check=False)
    assert died.returncode == -signal.SIGKILL
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".artefact.")
    assert leftover.endswith(".part")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="temporaries of living writers are known by locks")
def test_the_temporaries_of_a_living_writer_stay(tmp_path):
    def fill_while_another_cleans_up(folder):
        remove_leftovers(tmp_path)
        fill(folder)

    write_folder(tmp_path / "artefact", fill_while_another_cleans_up)
    verify_folder(tmp_path / "artefact")


def test_hidden_files_of_others_are_no_leftovers(tmp_path):
    (tmp_path / ".download.part").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".download.part"]


def test_a_removed_folder_is_gone(artefact):
    remove_folder(artefact)
    assert names(artefact.parent) == []


def test_a_folder_whose_removal_is_cut_short_is_gone_as_well(artefact, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(artefact)
    assert not artefact.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="folders are locked on POSIX only")
def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    taken = pytest.raises(ArtefactError, match="run is in use by another run")
    with exclusive(tmp_path / "run"), taken, exclusive(tmp_path / "run"):
        pass
    with exclusive(tmp_path / "run"):
        pass


def test_artefacts_load_without_accelerate():
    program = "import sys, mambakit.training.artefacts; sys.exit('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
