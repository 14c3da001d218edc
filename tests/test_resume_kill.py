"""Nothing lost: real training processes are killed, interrupted and starved, then resumed; what comes out is compared bit by bit.

`DRIVER` runs a script and strikes at the Nth call of a function of ours: at a place, not at a time. The kills at random moments need no
driver. Mosaic and EMA are on, and the best epoch is not the last one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from engine.options import TrainOptions
from engine.session import resume, train
from models.checkpoint import load_model
from tests.helpers import ROOT, SMALL_YAML, write_dataset
from utils.errors import InputError

EPOCHS = 4
DRIVER = """
import importlib, io, os, resource, runpy, signal, sys, time
where, name, number, strike, script = sys.argv[1:6]
sys.argv[:] = sys.argv[5:]
sys.path.insert(0, os.getcwd())
owner = importlib.import_module(where)
*inner, name = name.split(".")
for part in inner:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def struck(*args, **kwargs):
    global calls
    calls += 1
    if calls != int(number):
        return original(*args, **kwargs)
    if strike == "kill":
        die()
    if strike == "half":  # of the bytes reach the file
        content = io.BytesIO()
        original(args[0], content)
        args[1].write(content.getvalue()[: len(content.getvalue()) // 2])
        args[1].flush()
        die()
    if strike == "full":  # from here on no file can grow beyond 20 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    if strike in ("INT", "TERM"):
        os.kill(0, getattr(signal, "SIG" + strike))  # the whole group, as a terminal and as batch systems do
        time.sleep(60)
    if strike == "worker":
        import multiprocessing
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    if strike.startswith("gone:"):
        folder = strike.removeprefix("gone:")
        os.rename(folder, folder + ".gone")
    return original(*args, **kwargs)

setattr(owner, name, struck)
runpy.run_path(script, run_name="__main__")
"""


class Place:
    """A folder with a data set, a model and a hyp file, and what to train there."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, write_dataset(root / "data", images=24)
        (root / "small.yaml").write_text(yaml.safe_dump(SMALL_YAML))
        hyp = yaml.safe_load((ROOT / "data/hyps/hyp.scratch-low.yaml").read_text())
        assert hyp["mosaic"] == 1.0
        # A rate that grows ruins the last epochs on any machine, so that best.pt is an earlier one.
        (root / "hyp.yaml").write_text(yaml.safe_dump(hyp | {"lr0": 0.01, "lrf": 10.0, "warmup_epochs": 0, "nbs": 4}))
        (root / "driver.py").write_text(DRIVER)

    def options(self, name: str, **changes: object) -> TrainOptions:
        common = TrainOptions(
            str(self.data), cfg=f"{self.root}/small.yaml", hyp=f"{self.root}/hyp.yaml", epochs=EPOCHS, batch_size=4, imgsz=64, workers=0,
            device="cpu", optimizer="AdamW", seed=1, project=str(self.root), name=name,
        )  # fmt: skip
        return replace(common, **changes)

    def struck(self, options: TrainOptions, strike: str) -> subprocess.CompletedProcess:
        """Train in a process that "module function number what" strikes."""
        _, *words = shlex.split(options.command())
        return run([str(self.root / "driver.py"), *strike.split(), *words])


def run(words: list[str], seconds: float = 300) -> subprocess.CompletedProcess:
    """Run Python with one thread in a process group of its own; SIGKILL it after `seconds`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """The run that nothing happens to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = train(place.options("whole"))
    torch.set_num_threads(threads)
    rows = [[float(cell) for cell in row.split(",")] for row in (folder / "results.csv").read_text().splitlines()[1:]]
    fitness = [0.1 * row[6] + 0.9 * row[7] for row in rows]
    assert len(fitness) == EPOCHS and 0 < fitness.index(max(fitness)) < EPOCHS - 1, "best.pt must not be last.pt"
    return folder


def events(folder: Path) -> dict[tuple[str, int], bytes]:
    """(tag, step) -> value of every summary in the run's events files as they are on the disk; none may stand there twice."""
    found: dict[tuple[str, int], bytes] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                assert (value.tag, event.step) not in found, f"{value.tag} of step {event.step} stands twice"
                found[value.tag, event.step] = value.SerializeToString()
    return found


def assert_equal(a: Path, b: Path) -> None:
    """Two finished runs are the same: tensors, csv, TensorBoard, figures; and nothing half-written is left."""
    for name in ("last.pt", "best.pt"):
        one, two = (torch.load(folder / "weights" / name, weights_only=True) for folder in (a, b))
        assert one["epoch"] == two["epoch"] == -1 and one["training"] is two["training"] is None
        assert one["best_fitness"] == two["best_fitness"] and one["state"].keys() == two["state"].keys()
        different = [k for k in one["state"] if not torch.equal(one["state"][k], two["state"][k])]
        assert not different, f"{name}: {different}"
    assert (a / "results.csv").read_bytes() == (b / "results.csv").read_bytes()
    assert events(a) == events(b)
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (a, b))
    assert {**one, "speed_ms": 0} == {**two, "speed_ms": 0}
    assert sorted(p.name for p in (b / "weights").iterdir()) == sorted(p.name for p in (a / "weights").iterdir())
    assert not list(b.rglob(".*.tmp"))


def assert_sound(folder: Path) -> None:
    """What a killed run leaves: whole files, and best.pt no newer than last.pt."""
    last, best = folder / "weights/last.pt", folder / "weights/best.pt"
    if best.exists():
        assert load_model(best).epoch <= load_model(last).epoch
        assert best.stat().st_mtime_ns <= last.stat().st_mtime_ns


# Where a run is killed, by the function that is being called: at first the places that differ most.
AT = {
    "half of last.pt written": "torch save 3 half",
    "last.pt written, best.pt not": "engine.observers copy_file 2 kill",
}
ELSEWHERE = {
    "folder made": "engine.session write_text 1 kill",
    "first batch": "engine.loop Loop._batch 2 kill",
    "half of the first last.pt": "torch save 1 half",
    "validation": "engine.session evaluate 3 kill",
    "csv not written": "engine.observers CsvLog.epoch_end 3 kill",
    "scalars not written": "engine.observers TensorBoard.epoch_end 3 kill",
    "last.pt not written": "engine.observers save_model 4 kill",
    "training just over": "engine.observers TensorBoard.train_end 1 kill",
    "final evaluation": f"engine.session evaluate {EPOCHS + 1} kill",
    "final pictures": "engine.session plot_evaluation 1 kill",
    "half of the stripped best.pt": f"torch save {EPOCHS + 1} half",
    "best.pt stripped, last.pt not": f"engine.observers save_model {EPOCHS + 2} kill",
    "half of the stripped last.pt": f"torch save {EPOCHS + 2} half",
}


def killed_and_resumed(place: Place, options: TrainOptions, strike: str) -> Path:
    """Strike, check what is left, resume (or start again, with the command that is printed) with one worker; return the finished run."""
    folder = Path(options.project, options.name)
    done = place.struck(options, strike)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert_sound(folder)
    if (folder / "weights/last.pt").exists():
        return resume(folder, workers=1)
    with pytest.raises(InputError, match="saved no checkpoint, as its first epoch was not finished; start it again") as error:
        resume(folder)
    if not (folder / "opt.yaml").exists():
        return train(replace(options, exist_ok=True))
    _, script, *words = shlex.split(str(error.value).partition("with: ")[2])
    done = run([script, *words, "--exist-ok", "--workers", "1"])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("where", AT)
def test_a_killed_run_resumes_to_the_same_files(where: str, place: Place, whole: Path) -> None:
    options = place.options(where.replace(" ", "_"))
    assert_equal(whole, killed_and_resumed(place, options, AT[where]))


@pytest.mark.slow
@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_run_killed_elsewhere_resumes_to_the_same_files(where: str, place: Place, whole: Path) -> None:
    options = place.options(where.replace(" ", "_"))
    assert_equal(whole, killed_and_resumed(place, options, ELSEWHERE[where]))
    with pytest.raises(InputError, match="is finished"):
        resume(place.root / options.name)


@pytest.mark.slow
def test_five_kills_at_random_moments(place: Place, whole: Path) -> None:
    """A resumed run is killed as well, until there were five; with no workers and two by turns. Then, and whenever a run came to its end
    before it could be killed, it must equal the whole one."""
    started = time.monotonic()
    _, *words = shlex.split(place.options("timed", workers=2).command())
    assert run(words).returncode == 0
    took = time.monotonic() - started
    assert_equal(whole, place.root / "timed")
    moments, kills, runs, starts = random.Random(0), 0, 1, 0
    while True:
        folder = place.root / f"random{runs}"
        _, script, *flags = shlex.split(place.options(folder.name, exist_ok=True).command())
        words = ["--resume", str(folder)] if (folder / "weights/last.pt").exists() else flags
        starts += 1
        done = run([script, *words, "--workers", str(2 * (starts % 2))], moments.uniform(0.2, 1.0) * took if kills < 5 else 300)
        last, killed = folder / "weights/last.pt", done.returncode == -signal.SIGKILL
        assert killed or done.returncode == 0, done.stderr
        kills += killed
        assert_sound(folder)
        if not killed or (last.exists() and load_model(last).training is None):  # a kill may come when all is written
            assert_equal(whole, folder)
            if kills == 5:
                break
            runs += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "strike", ["engine.loop Loop._batch 15 kill", "engine.sparsity_seams GammaLog.train_end 1 kill", "engine.session evaluate 3 kill"]
)
def test_a_killed_sparsity_training_resumes_with_its_histograms(place: Place, strike: str) -> None:
    options = place.options("sparse_" + re.sub(r"\W", "_", strike), sr=0.01, sr_decay=True, strict=True)
    options = replace(options, weights=str(train(place.options(options.name + "_base", epochs=1)) / "weights/last.pt"), cfg="")
    reference = train(replace(options, name=options.name + "_whole"))
    tags = {tag for tag, _ in events(reference)}
    assert {"bn_weights/hist", "before_train_perlayer_bn_weights/hist", "sparsity/sr"} <= tags
    assert_equal(reference, killed_and_resumed(place, options, strike))


@pytest.mark.slow
def test_a_killed_distillation_resumes(place: Place, whole: Path) -> None:
    options = place.options("student", strict=True, cfg="", weights=str(whole / "weights/last.pt"), teacher=str(whole / "weights/best.pt"))
    reference = train(replace(options, name="student_whole"))
    assert_equal(reference, killed_and_resumed(place, options, "engine.loop Loop._batch 15 kill"))


@pytest.mark.slow
def test_a_run_that_stopped_early_and_was_killed_trains_no_further(place: Place) -> None:
    options = place.options("patient", patience=1, epochs=8)
    reference = train(replace(options, name="patient_whole"))
    rows = len((reference / "results.csv").read_text().splitlines()) - 1
    assert rows < 8, "it must stop early"
    assert_equal(reference, killed_and_resumed(place, options, "engine.session plot_evaluation 1 kill"))


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["INT", "TERM"])
def test_ctrl_c_keeps_the_last_epoch_and_says_how_to_go_on(place: Place, whole: Path, sent: str) -> None:
    options = place.options(f"sent_{sent}", workers=2)
    done = place.struck(options, f"engine.loop Loop._batch 15 {sent}")
    assert done.returncode == 130, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    folder = place.root / options.name
    command = f"python train.py --resume {folder}/weights/last.pt"
    assert f"stopped; 2 of {EPOCHS} epochs are kept. Continue with: {command}" in done.stdout
    assert run(shlex.split(command)[1:]).returncode == 0
    assert_equal(whole, folder)


@pytest.mark.slow
def test_ctrl_c_in_the_first_epoch_gives_the_command_to_start_again(place: Place, whole: Path) -> None:
    options = place.options("early")
    done = place.struck(options, "engine.loop Loop._batch 2 INT")
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert f"stopped; no epoch was saved. Start again with: {options.command()}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("what", ["torch save", "engine.observers CsvLog.epoch_end", "engine.observers TensorBoard.epoch_end"])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(place: Place, whole: Path, what: str) -> None:
    options = place.options("full_" + re.sub(r"\W", "_", what))
    done = place.struck(options, f"{what} 3 full")
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search("File too large", errors[0]) and "Traceback" not in done.stderr, done.stderr
    folder = place.root / options.name
    assert str(folder) in errors[0] and f"2 of {EPOCHS} epochs are kept" in done.stdout
    assert not list(folder.rglob(".*.tmp"))
    assert_equal(whole, resume(folder))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_data_that_vanish_in_an_epoch_are_named(place: Place, whole: Path, split: str, workers: int) -> None:
    options = place.options(f"gone_{split}_{workers}", workers=workers)
    images = place.root / "data/images" / split
    try:
        done = place.struck(options, f"engine.loop Loop._batch 14 gone:{images}")
    finally:
        shutil.move(f"{images}.gone", images)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(rf"^error: image {images}/\d+\.png: No such file or directory; was it moved or deleted\?$", done.stderr, re.M)
    assert re.search(rf"[23] of {EPOCHS} epochs are kept", done.stdout), "workers may have read the rest of the epoch before"
    assert_equal(whole, resume(place.root / options.name))


@pytest.mark.slow
def test_a_loader_process_that_is_killed_is_one_line(place: Place, whole: Path) -> None:
    options = place.options("worker", workers=2)
    done = place.struck(options, "engine.loop Loop._batch 14 worker")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^error: a loader process was killed, .* use fewer --workers", done.stderr, re.M), done.stderr
    assert_equal(whole, resume(place.root / options.name))


# ---- in this process -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"sr": 0.01, "strict": True, "sr_decay": True, "prune": 0, "freeze": (1, 2)}, {"strict": True, "weights": "a b.pt", "teacher": "t.pt"},
    {"sr": 1.0, "strict": True, "sparsity_method": "proximal"},
    {"amp": False, "cache": "ram", "exist_ok": True, "weights": "w.pt"} , {"rect": True, "nosave": True, "label_smoothing": 0.1},
])  # fmt: skip
def test_the_printed_command_starts_the_same_run(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.session

    options = TrainOptions("d.yaml", **changes)
    started = []
    monkeypatch.setattr(engine.session, "train", started.append)
    _, script, *words = shlex.split(options.command())
    __import__(script.removesuffix(".py")).main(words)
    assert started == [options]


def test_only_a_runs_own_last_pt_is_resumed(tmp_path: Path) -> None:
    for path in ("best.pt", "weights/best.pt", "last.pt"):
        with pytest.raises(InputError, match="a run goes on from its RUN/weights/last.pt"):
            resume(tmp_path / path)
    with pytest.raises(InputError, match=r"--resume: no file .*weights/last\.pt"):
        resume(tmp_path / "none/weights/last.pt")


def test_a_run_folder_that_cannot_be_made_is_refused_before_training(place: Place) -> None:
    (place.root / "file").write_text("")
    with pytest.raises(InputError, match="file/exp/weights: the run folder cannot be made"):
        train(place.options("exp", project=str(place.root / "file")))
