"""The folder of a run: damage is found and named, other people's files are spared, and one run holds it at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import EXACT, exact, losses, tiny_trainer

from gptcore.config import GPTConfig
from gptcore.files import lock, unlock
from gptcore.model import GPT
from gptcore.training import checkpoint
from gptcore.training.callbacks import TrainerCallback, read_log
from gptcore.training.checkpoint import CheckpointError, list_checkpoints, newest_checkpoint, verify_checkpoint
from gptcore.training.trainer import Trainer

# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoint-2 and checkpoint-4."""
    folder = tmp_path_factory.mktemp("two")
    tiny_trainer(folder, max_steps=4).train()
    return folder


@contextlib.contextmanager
def changed(file: Path, content: bytes | None) -> Iterator[None]:
    before = file.read_bytes()
    file.unlink() if content is None else file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def test_files(two: Path) -> None:
    files = {"config.json", "trainer_state.json", "manifest.json", *EXACT}
    assert set(os.listdir(two / "checkpoint-4")) == files
    for name in files - {"manifest.json"}:
        head = (two / "checkpoint-4" / name).read_bytes()[:16]
        assert head[:1] == b"{" or head[8:9] == b"{", "JSON or safetensors, never a pickle"


@pytest.mark.parametrize("name", ["config.json", "trainer_state.json", "manifest.json", *EXACT])
def test_damage_is_found_and_named(two: Path, name: str) -> None:
    file = two / "checkpoint-4" / name
    whole = file.read_bytes()
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in (0, 9, len(whole) // 2, len(whole) - 1)
    ]
    for content in [None, b"", whole[:-2], whole[: len(whole) // 2], whole + b"\0", *flipped]:
        with changed(file, content):
            with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged.*\." + name.split(".")[1]):
                verify_checkpoint(file.parent)
            with pytest.raises(CheckpointError, match="damaged"):
                tiny_trainer(two, max_steps=4).train(resume_from_checkpoint=file.parent)
            with pytest.warns(UserWarning, match="checkpoint-4 is damaged.*passed over for .*checkpoint-2"):
                assert newest_checkpoint(two).name == "checkpoint-2"
    verify_checkpoint(file.parent)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_passes(two: Path, data: st.DataObject) -> None:
    file = two / "checkpoint-4" / data.draw(st.sampled_from(["manifest.json", "trainer_state.json", *EXACT]))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with changed(file, bytes(content)), pytest.raises(CheckpointError):
        verify_checkpoint(file.parent)


def test_resume_passes_over_a_damaged_checkpoint_and_replaces_it(two: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two, tmp_path / "run")
    file = folder / "checkpoint-4" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged: optimizer.safetensors"):
        tiny_trainer(folder, max_steps=4).train(resume_from_checkpoint=True)
    assert exact(folder / "checkpoint-4") == exact(two / "checkpoint-4")
    assert losses(folder) == losses(two)
    for path in list_checkpoints(folder):
        (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged.*checkpoint-2 is damaged"):
        tiny_trainer(folder, max_steps=4).train(resume_from_checkpoint=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no folder checkpoint-<step>"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-7")


def test_older_checkpoint_of_the_same_folder_is_refused(two: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is not the newest.*checkpoint-4 is whole"):
        tiny_trainer(two, max_steps=4).train(resume_from_checkpoint=two / "checkpoint-2")
    tiny_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=two / "checkpoint-2")  # elsewhere it is fine
    assert exact(tmp_path / "checkpoint-4") == exact(two / "checkpoint-4")


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, two: Path) -> None:
    tiny_trainer(tmp_path, max_steps=2, lr_scheduler_type="constant").train()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file beyond this: what a full disk looks like
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written.*bytes are free"):
            tiny_trainer(tmp_path, max_steps=4, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
            tiny_trainer(tmp_path).save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "log.jsonl", "run.json"]
    tiny_trainer(tmp_path, max_steps=4, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_other_model_is_refused(two: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=4)
    trainer.model = GPT(GPTConfig(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.warns(UserWarning, match="n_embd 16 -> 8"), pytest.raises(CheckpointError, match="another model"):
        trainer.train(resume_from_checkpoint=two / "checkpoint-4")


# ---- which checkpoints stay ------------------------------------------------------------------------------------------


def test_total_limit_keeps_newest_and_best(tmp_path: Path) -> None:
    eval_loss = iter([3.0, 1.0, 2.0, 4.0, 5.0])

    class Scripted(Trainer):
        def evaluate(self) -> dict[str, float]:
            return {"eval_loss": next(eval_loss)}

    trainer = tiny_trainer(tmp_path, max_steps=10, eval_steps=2, save_total_limit=2)
    trainer.__class__ = Scripted
    (tmp_path / "checkpoint-best").mkdir()
    trainer.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-4", "checkpoint-best", "log.jsonl", "run.json"]
    assert (trainer.state.best_metric, trainer.state.best_step) == (1.0, 4)


def test_total_limit_goes_by_step_and_spares_what_is_not_ours(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_steps=10, eval_steps=None).train()
    os.utime(tmp_path / "checkpoint-2")  # the youngest by its time stamp
    (tmp_path / "checkpoint-3").mkdir()  # not ours: no manifest
    checkpoint.rotate_checkpoints(tmp_path, limit=2, newest=10, best=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-8", "checkpoint-10"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with checkpoint.exclusive(tmp_path):
        with pytest.raises(CheckpointError, match="another process is training into"):
            tiny_trainer(tmp_path).train()
        with pytest.raises(OSError, match=r"^passes$"), checkpoint.exclusive(tmp_path, nested=True):
            raise OSError("passes")  # what a run writes beside its checkpoints
        assert lock(tmp_path) is None
    descriptor = lock(tmp_path)
    assert descriptor is not None
    unlock(descriptor)


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(path: Path) -> int:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoint, "lock", no_locks)
    monkeypatch.setattr("gptcore.files.lock", no_locks)
    with pytest.warns(UserWarning, match="has no locks"):
        tiny_trainer(tmp_path, max_steps=2).train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "log.jsonl", "run.json"]


def test_a_folder_that_cannot_hold_a_run_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, reason in (("file", "regular file, not a folder"), ("link", "symbolic link to nowhere, which does not")):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be written to: .*{reason}"):
            tiny_trainer(tmp_path / name).train()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="may not write there, or the disk is read-only"):
        tiny_trainer(tmp_path / "out").train()


@pytest.mark.filterwarnings("ignore:.*takes another course")
@pytest.mark.parametrize(
    ("code", "advice"),
    [("ENOSPC", "bytes are free there.*make room"), ("EROFS", "Make .* writable"), ("EACCES", "Make .* writable"),
     ("EIO", "untouched$")],
)  # fmt: skip
def test_a_failed_save_advises_what_helps(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, advice: str
) -> None:
    def fail(path: Path, *_: object, **options: Any) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(path))

    folder = shutil.copytree(two, tmp_path / "run")
    monkeypatch.setattr(checkpoint, "save_tensors", fail)
    with pytest.raises(
        CheckpointError, match=rf"(?s)checkpoint-6 could not be written: .*optimizer.*{advice}"
    ) as error:
        tiny_trainer(folder, max_steps=6).train(resume_from_checkpoint=True)
    assert ("make room" in str(error.value)) == (code == "ENOSPC")
    assert sorted(os.listdir(folder)) == ["checkpoint-2", "checkpoint-4", "log.jsonl", "run.json"]


# ---- what is not ours


def foreign(path: Path, kind: str, elsewhere: Path) -> None:
    """Put something under the name of a checkpoint that gptcore did not write there."""
    if kind == "folder":
        path.mkdir()
        (path / "trainer_state.json").write_text("{}")
    elif kind == "file":
        path.write_text("kept")
    elif kind == "link":
        shutil.copytree(elsewhere, path.parent / "elsewhere")
        path.symlink_to("elsewhere")
    else:
        path.symlink_to("nowhere")


FOREIGN = {"folder": "has no manifest.json", "file": "is a regular file", "link": "is a symbolic link",
           "dangling": "is a symbolic link"}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*passed over for", "ignore:.*takes another course")
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_is_never_deleted(two: Path, tmp_path: Path, kind: str, resume: bool) -> None:
    folder = shutil.copytree(two, tmp_path / "run")
    foreign(folder / "checkpoint-6", kind, two / "checkpoint-4")
    before = sorted(os.listdir(folder))
    trainer = tiny_trainer(folder, max_steps=8, overwrite_output_dir=not resume)
    with pytest.raises((FileExistsError, CheckpointError), match=rf"checkpoint-6 ({FOREIGN[kind]}|.* of step 4)"):
        trainer.train(resume_from_checkpoint=resume)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_that_appears_during_training_is_spared(two: Path, tmp_path: Path, kind: str) -> None:
    class Appear(TrainerCallback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.state.global_step == 3:
                foreign(tmp_path / "checkpoint-4", kind, two / "checkpoint-4")

    with pytest.raises(CheckpointError, match=f"checkpoint-4 could not be written: .*{FOREIGN[kind]}"):
        tiny_trainer(tmp_path, (Appear(),), max_steps=4).train()
    assert os.path.lexists(tmp_path / "checkpoint-4")
    assert checkpoint.is_ours(tmp_path / "checkpoint-2")


@pytest.mark.filterwarnings("ignore:.*takes another course")
def test_total_limit_meets_a_link(two: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(two / "checkpoint-2", tmp_path / "other disk")
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(two / "log.jsonl", folder)
    (folder / "checkpoint-2").symlink_to(moved)
    tiny_trainer(folder, max_steps=6, save_total_limit=1, eval_steps=None).train(resume_from_checkpoint=True)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]
    assert exact(moved) == exact(two / "checkpoint-2")


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "remove_checkpoint", fail)
    with pytest.warns(UserWarning, match=r"checkpoint-2 is beyond save_total_limit, but cannot be deleted"):
        tiny_trainer(tmp_path, max_steps=4, save_total_limit=1, eval_steps=None).train()
    assert len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize(
    "name", ["checkpoint-٣", "checkpoint-２", "checkpoint-02", "checkpoint-", "checkpoint--1", "x"]
)
def test_only_plain_digits_name_a_checkpoint(tmp_path: Path, name: str) -> None:
    assert checkpoint.checkpoint_step(name) == -1
    (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []
    assert checkpoint.checkpoint_step("checkpoint-0") == 0
    assert checkpoint.checkpoint_step("a/checkpoint-120") == 120


# ---- hostile files


REPLACED: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a sparse file": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.parametrize("name", ["config.json", "trainer_state.json", "manifest.json", *EXACT])
def test_special_files_are_damage(two: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = shutil.copytree(two, tmp_path / "run")
    path = folder / "checkpoint-4" / name
    path.unlink()
    REPLACED[kind](path)
    with pytest.raises(CheckpointError, match=rf"checkpoint-4 is damaged: .*{name}"):
        verify_checkpoint(path.parent)
    with pytest.warns(UserWarning, match=r"checkpoint-4 is damaged.*passed over for .*checkpoint-2"):
        assert newest_checkpoint(folder).name == "checkpoint-2"


MANIFESTS = {
    "nested deeply": "[" * 100_000, "nested object": '{"a":' * 100_000, "null": "null", "list": "[]",
    "NUL in a name": '{"a\\u0000b": {"bytes": 1, "sha256": ""}}', "a name above": '{"../log.jsonl": {}}',
    "an absolute name": '{"/dev/zero": {"bytes": 1, "sha256": ""}}', "no digest": '{"config.json": {"bytes": 1}}',
    "a number": '{"config.json": 3}', "size as text": '{"config.json": {"bytes": "1", "sha256": ""}}',
    "long name": json.dumps({"x" * 5000: {"bytes": 1, "sha256": ""}}), "a surrogate": '{"\\ud800": {}}',
    "huge number": '{"config.json": {"bytes": ' + "9" * 5000 + ', "sha256": ""}}', "not UTF-8": "\xff",
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_damage_of_the_manifest_leads_to_the_checkpoint_before(two: Path, kind: str) -> None:
    with changed(two / "checkpoint-4" / "manifest.json", MANIFESTS[kind].encode("latin-1")):
        with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged: .*manifest\.json"):
            verify_checkpoint(two / "checkpoint-4")
        with pytest.warns(UserWarning, match=r"checkpoint-4 is damaged.*passed over for .*checkpoint-2"):
            assert newest_checkpoint(two).name == "checkpoint-2"


def test_a_manifest_is_replaced_when_training_gets_there(two: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two, tmp_path / "run")
    (folder / "checkpoint-4" / "manifest.json").write_text("")
    with pytest.warns(UserWarning, match=r"passed over for .*checkpoint-2"):
        tiny_trainer(folder, max_steps=4).train(resume_from_checkpoint=True)
    assert exact(folder / "checkpoint-4") == exact(two / "checkpoint-4")


STATES: list[Callable[[dict[str, Any]], object]] = [
    lambda state: state.pop("state"),
    lambda state: state.pop("args"),
    lambda state: state.pop("data"),
    lambda state: state.pop("environment"),
    lambda state: state.update(state=None),
    lambda state: state.update(args=[]),
    lambda state: state.update(model=3),
    lambda state: state["state"].pop("global_step"),
    lambda state: state["state"].update(global_step="4"),
    lambda state: state["state"].update(global_step=-4),
    lambda state: state["state"].update(global_step=10**30),
    lambda state: state["state"].update(total=None),
    lambda state: state["state"]["window"].update(loss="x"),
    lambda state: state["state"]["window"].update(loss=10**400),
    lambda state: state["state"]["total"].pop("labels"),
    lambda state: state["state"].update(best_step=1.5),
    lambda state: state["state"].update(unknown=0),
    lambda state: state.update(format=2),
    lambda state: state.update(format=None),
]


def with_manifest(path: Path, name: str, content: bytes) -> None:
    """Change a file of a checkpoint, and its manifest so that it matches."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[name] = checkpoint._fingerprint(path / name)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("change", range(len(STATES)))
def test_a_state_edited_under_a_matching_manifest_is_named(two: Path, tmp_path: Path, change: int) -> None:
    path = shutil.copytree(two / "checkpoint-4", tmp_path / "checkpoint-4")
    state = json.loads((path / "trainer_state.json").read_text())
    STATES[change](state)
    with_manifest(path, "trainer_state.json", json.dumps(state).encode())
    verify_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        tiny_trainer(tmp_path / "out", max_steps=4).train(resume_from_checkpoint=path)


# ---- log.jsonl


@pytest.mark.parametrize(
    "line", ["{}", "null", "\0" * 20, "[" * 100_000, '{"step": null}', '{"step": "3"}', "\xff", "{"]
)
def test_a_damaged_line_of_the_log_does_not_block_resuming(two: Path, tmp_path: Path, line: str) -> None:
    folder = shutil.copytree(two, tmp_path / "run")
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    lines.insert(1, line.encode("latin-1") + b"\n")
    (folder / "log.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2"):
        read_log(folder / "log.jsonl")
    with pytest.warns(UserWarning, match=r"log\.jsonl, line 2.*the line is left out"):
        tiny_trainer(folder, max_steps=4).train(resume_from_checkpoint=True)
    assert losses(folder) == losses(two)


@pytest.mark.parametrize("size", [1 << 21, 1 << 40])
def test_a_log_with_a_hole_is_read_up_to_it(tmp_path: Path, size: int) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    os.truncate(tmp_path / "log.jsonl", size)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2 has 1,048,576 bytes or more"):
        read_log(tmp_path / "log.jsonl")
    with pytest.warns(UserWarning, match="line 2 has 1,048,576 bytes or more; nothing behind it is read"):
        assert read_log(tmp_path / "log.jsonl", skip_damage=True) == [{"step": 1}]


@pytest.mark.parametrize("end", ["null", "\0" * 20, "[", '{"step": 5}x\n', "{\n"])
def test_a_damaged_end_of_the_log_is_not_taken_for_a_torn_line(tmp_path: Path, end: str) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1]
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + end)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2"):
        read_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize("kind", [kind for kind in REPLACED if kind != "a sparse file"])
def test_a_log_that_is_not_a_file_is_refused_before_anything_changes(two: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(two, tmp_path / "run")
    (folder / "log.jsonl").unlink()
    REPLACED[kind](folder / "log.jsonl")
    for resume in (True, False):
        with pytest.raises(FileExistsError, match=r"log\.jsonl is a .* and is not replaced"):
            tiny_trainer(folder, max_steps=4, overwrite_output_dir=True).train(resume_from_checkpoint=resume)
    assert sorted(os.listdir(folder)) == ["checkpoint-2", "checkpoint-4", "log.jsonl", "run.json"]


# ---- permissions


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        trainer = tiny_trainer(tmp_path, max_steps=2)
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_a_model_is_not_saved_into_the_folder_of_a_run_of_another_process(tmp_path: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        descriptor = lock(tmp_path)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(descriptor is None)
    os.read(ready[0], 1)
    try:
        with pytest.raises(CheckpointError, match="another process is training into"):
            tiny_trainer(tmp_path).save_model()
    finally:
        os.write(done[1], b"x")
        assert os.waitpid(pid, 0)[1] == 0
    assert os.listdir(tmp_path) == []
    tiny_trainer(tmp_path).save_model()
    assert "model.safetensors" in os.listdir(tmp_path)
