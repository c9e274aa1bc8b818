"""Checkpoints as files: complete or not there, found damaged whatever changed, kept as long as the settings say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipctl.checkpoint import MANIFEST, STATE, Place, damage, new_checkpoint, newest_good, places, remove_leftovers
from clipctl.errors import StoreError
from clipctl.spec import Checkpoint

KEEP_ALL = Checkpoint(keep="all")


def save(folder: Path, place: Place, settings: Checkpoint = KEEP_ALL, content: bytes = b"weights") -> Path:
    with new_checkpoint(folder, place, settings) as beside:
        (beside / STATE).mkdir()
        (beside / "model.safetensors").write_bytes(content)
        (beside / STATE / "state.json").write_bytes(b'{"rollout": 3}')
    return folder / str(place)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_places_are_in_the_order_of_the_run(tmp_path: Path) -> None:
    for place in (Place(9), Place(10, 3), Place(10), Place(0, 7), Place(10, 12)):
        save(tmp_path, place)
    (tmp_path / "08").mkdir()
    (tmp_path / "notes").mkdir()
    # Those of the middle of a rollout went with the next newer one.
    assert places(tmp_path) == [Place(10, 12), Place(10), Place(9)]
    assert (tmp_path / "latest").read_text() == "10+12\n"
    assert newest_good(tmp_path) == (Place(10, 12), [])


def test_what_was_not_finished_is_not_there_and_is_removed(tmp_path: Path) -> None:
    save(tmp_path, Place(1))
    with pytest.raises(KeyboardInterrupt), new_checkpoint(tmp_path, Place(2), KEEP_ALL) as beside:  # noqa: PT012
        (beside / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert names(tmp_path) == {"1", "latest"}
    for left in (".writing-2", ".removing-0", ".replaced-1"):
        (tmp_path / left).mkdir()
    assert newest_good(tmp_path) == (Place(1), [])
    save(tmp_path, Place(2))
    assert names(tmp_path) == {"1", "2", "latest"}


def test_keep_counts_whole_rollouts(tmp_path: Path) -> None:
    two = Checkpoint(keep=2)
    for place in (Place(1), Place(2), Place(2, 5)):
        save(tmp_path, place, two)
    assert names(tmp_path) == {"1", "2", "2+5", "latest"}
    save(tmp_path, Place(3), two)
    assert names(tmp_path) == {"2", "3", "latest"}
    save(tmp_path, Place(3, 1), Checkpoint(keep=1))
    assert names(tmp_path) == {"3", "3+1", "latest"}


def test_models_of_every_nth_rollout_stay_without_their_state(tmp_path: Path) -> None:
    settings = Checkpoint(keep=1, models_every=2)
    for rollouts in range(1, 6):
        save(tmp_path, Place(rollouts), settings)
    assert names(tmp_path) == {"2", "4", "5", "latest"}
    assert names(tmp_path / "2") == names(tmp_path / "4") == {"model.safetensors"}
    assert newest_good(tmp_path) == (Place(5), [])
    (tmp_path / "5" / MANIFEST).unlink()
    with pytest.raises(StoreError, match=r"checkpoint 5 is not usable: it has no manifest\.json; none is left"):
        newest_good(tmp_path)


def test_models_alone_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "40").mkdir()
    (tmp_path / "40" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(StoreError, match=r"checkpoint 40 is not usable: it has no manifest\.json"):
        newest_good(tmp_path)
    assert newest_good(tmp_path / "elsewhere") == (None, [])


def test_every_flipped_bit_and_every_missing_byte_is_found(tmp_path: Path) -> None:
    """Every bit of every file, the manifest included, and every shorter length."""
    folder = save(tmp_path, Place(1))
    assert damage(folder) is None
    for file in (folder / "model.safetensors", folder / STATE / "state.json", folder / MANIFEST):
        content = file.read_bytes()
        for bit in range(8 * len(content)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            assert damage(folder) is not None, (file, bit)
        for length in range(len(content)):
            file.write_bytes(content[:length])
            assert damage(folder) is not None, (file, length)
        file.unlink()
        assert damage(folder) == (
            "it has no manifest.json" if file.name == MANIFEST else f"{file.relative_to(folder)} is missing"
        )
        file.write_bytes(content)
    assert damage(folder) is None


def test_the_last_good_one_is_taken_and_what_is_wrong_with_the_others_is_said(tmp_path: Path) -> None:
    for rollouts in (1, 2, 3):
        save(tmp_path, Place(rollouts))
    (tmp_path / "3" / "model.safetensors").write_bytes(b"weightz")
    (tmp_path / "2" / "model.safetensors").write_bytes(b"weight")
    assert newest_good(tmp_path) == (
        Place(1),
        [
            "checkpoint 3 is not usable: model.safetensors is not what was written",
            "checkpoint 2 is not usable: model.safetensors has 6 bytes, 7 were written",
        ],
    )
    (tmp_path / "1" / MANIFEST).write_text(json.dumps({"format": 2, "files": {}}))
    with pytest.raises(StoreError, match="it has format 2, this clipctl reads 1; none is left to go on from") as error:
        newest_good(tmp_path)
    assert error.value.exit_code == 7


def test_a_damaged_one_is_replaced_when_the_run_comes_there_again(tmp_path: Path) -> None:
    save(tmp_path, Place(1))
    (save(tmp_path, Place(2)) / "model.safetensors").write_bytes(b"weightz")
    save(tmp_path, Place(2), content=b"again")
    assert newest_good(tmp_path) == (Place(2), [])
    assert names(tmp_path) == {"1", "2", "latest"}


REPLACED_AND_KILLED = """
import os, sys
from pathlib import Path
from clipctl.checkpoint import Place, new_checkpoint
from clipctl.spec import Checkpoint

folder, last, seen = Path(sys.argv[1]), int(sys.argv[2]), 0

def hook(event, arguments):
    global seen
    changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (event == "open" and arguments[2] & os.O_CREAT)
    if changes and str(folder) in str(arguments[0]):
        seen += 1
        if seen == last:
            os._exit(9)

with new_checkpoint(folder, Place(2), Checkpoint(keep=1)) as beside:
    (beside / "model.safetensors").write_bytes(b"new")
    sys.addaudithook(hook)
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_while_one_is_replaced_leaves_a_whole_one(tmp_path: Path, damaged: bool) -> None:
    """Killed before each change of a file, with keep = 1: there is the old one or the new one, and with a damaged old one
    the one before it until the new one is complete."""
    found: list[tuple[Place | None, str]] = []
    for last in range(1, 40):
        folder = tmp_path / str(last)
        folder.mkdir()
        if damaged:
            save(folder, Place(1))
        save(folder, Place(2), content=b"old")
        if damaged:
            (folder / "2" / "model.safetensors").write_bytes(b"olt")
        done = subprocess.run([sys.executable, "-c", REPLACED_AND_KILLED, str(folder), str(last)], check=False)
        remove_leftovers(folder)
        place, _ = newest_good(folder)
        found.append((place, (folder / str(place) / "model.safetensors").read_text()))
        assert not list(folder.glob(".*-*"))
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert done.returncode == 0
    before = (Place(1), "weights") if damaged else (Place(2), "old")
    turns = found.index((Place(2), "new"))
    assert found == [before] * turns + [(Place(2), "new")] * (len(found) - turns)
    assert turns > 1
    assert len(found) - turns > 4
