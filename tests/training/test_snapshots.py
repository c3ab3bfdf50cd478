"""Snapshots: resumed = uninterrupted bit for bit, damaged ones passed over, signals obeyed."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException
from transformers import Trainer

from cogvlm_sft import CheckpointError, Recipe, RecipeError, train
from cogvlm_sft.checkpoint.load import build_model
from cogvlm_sft.data import mixture
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.stopping import StopOnSignal, TrainingStopped
from cogvlm_sft.training.telemetry import MetricsFile, read_metrics
from cogvlm_sft.training.trainer import CogVLMTrainer

MakeRecipe = Callable[..., Recipe]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Sends this process the signal while it trains the given step."""
    original = StopOnSignal.on_step_end

    def send(self: StopOnSignal, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == step:
            os.kill(os.getpid(), number)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", send)


@pytest.fixture
def stopped(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run of 9 steps, with snapshots of steps 4 and 7, that was stopped in its 7th.

    A pass over the 22 conversations ends in the middle of the 6th step.
    """
    recipe = make_recipe(train__iterations=9, train__save_every=4, tune__language={"rate": 0.1})
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 7)
        train(recipe)
    return recipe


@pytest.fixture
def unbroken(make_recipe: MakeRecipe, tmp_path: Path) -> dict[str, torch.Tensor]:
    recipe = make_recipe(
        train__iterations=9,
        train__save_every=4,
        train__output=tmp_path / "unbroken",
        tune__language={"rate": 0.1},
    )
    return load_file(train(recipe).output / "model.safetensors")


def final(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(train(recipe).output / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_status(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    recipe = make_recipe(train__iterations=9)
    before = signal.getsignal(number)
    stop_after(monkeypatch, 3, number)
    with pytest.raises(TrainingStopped) as caught:
        train(recipe)
    assert caught.value.code == 128 + number
    assert caught.value.step == 3
    output = recipe.train.output
    assert caught.value.snapshot == snapshots.snapshot_folder(output, 3)
    assert snapshots.damage(caught.value.snapshot) is None
    assert not (output / "config.json").exists(), "no final checkpoint from an unfinished run"
    assert signal.getsignal(number) is before


def test_resumed_equals_unbroken_without_decoding_what_it_skips(
    stopped: Recipe, unbroken: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    original = mixture.read_picture

    def watch(path: Path, *rest: Any) -> Image.Image:
        decoded.append(path)
        return original(path, *rest)

    monkeypatch.setattr(mixture, "read_picture", watch)
    assert_same(final(stopped), unbroken)
    assert len(decoded) == 2 * 4, "two steps of four remained"
    rows = read_metrics(stopped.train.output / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    straight = read_metrics(stopped.train.output.parent / "unbroken" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for row in straight]


def damage_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\0" * 32
    file.write_bytes(data)


def shorten_tokenizer(path: Path) -> None:
    file = path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-1])


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def of_another_step(path: Path) -> None:
    state = json.loads((path / "trainer_state.json").read_text())
    text = json.dumps({**state, "global_step": 5})
    (path / "trainer_state.json").write_text(text)
    manifest = json.loads((path / "snapshot.json").read_text())
    manifest["files"]["trainer_state.json"] = len(text)
    (path / "snapshot.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "harm",
    [
        damage_weights,
        damage_header,
        shorten_tokenizer,
        remove("optimizer.pt"),
        remove("scheduler.pt"),
        remove("rng_state.pth"),
        remove("trainer_state.json"),
        remove("snapshot.json"),
        empty,
        of_another_step,
    ],
    ids=[
        "weights",
        "header",
        "tokenizer",
        "optimizer",
        "scheduler",
        "rng",
        "state",
        "manifest",
        "empty",
        "step",
    ],
)
def test_a_damaged_snapshot_is_seen(
    saved: Path, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert snapshots.newest_complete(saved) == snapshots.snapshot_folder(saved, 2)
    harm(snapshots.snapshot_folder(saved, 2))
    assert snapshots.newest_complete(saved) == snapshots.snapshot_folder(saved, 1)
    assert "step-00000002 is passed over" in capsys.readouterr().err


@pytest.fixture
def saved(make_recipe: MakeRecipe) -> Path:
    """The output folder of a run with snapshots of steps 1 and 2."""
    return train(
        make_recipe(train__iterations=2, train__save_every=1, train__micro_batch_size=4)
    ).output


def test_training_goes_on_from_the_snapshot_before_a_damaged_one(
    stopped: Recipe, unbroken: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    remove("optimizer.pt")(snapshots.snapshot_folder(stopped.train.output, 7))
    assert_same(final(stopped), unbroken)
    assert "going on from step-00000004" in capsys.readouterr().out


def test_a_half_written_snapshot_is_never_found(
    stopped: Recipe, unbroken: dict[str, torch.Tensor]
) -> None:
    """What SIGKILL leaves: the hidden folder, whatever is in it."""
    output = stopped.train.output
    whole = snapshots.snapshot_folder(output, 7)
    whole.rename(snapshots.staging_folder(output))
    assert snapshots.newest_complete(output) == snapshots.snapshot_folder(output, 4)
    assert_same(final(stopped), unbroken)
    assert not snapshots.staging_folder(output).exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 10 MiB; mounting one takes rights that not everybody has."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_last_snapshot(make_recipe: MakeRecipe, small_disk: Path) -> None:
    """A snapshot takes 3 MiB, so the fourth does not fit; with more room the run goes on."""
    output = small_disk / "run"
    recipe = make_recipe(
        train__output=output, train__save_every=1, train__keep_snapshots=6, train__iterations=6
    )
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        train(recipe)
    kept = snapshots.snapshots(output)
    assert kept and kept[-1].name in str(caught.value)
    assert all(snapshots.damage(path) is None for path in kept)
    assert len(kept) < 6
    assert not snapshots.staging_folder(output).exists()
    assert not (output / "config.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert train(recipe).steps == 6


def test_a_disk_full_of_other_things_is_one_line(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures are written between snapshots, too."""
    original = MetricsFile.on_log

    def fail(self: MetricsFile, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, args, state, control, **kwargs)

    recipe = make_recipe(train__save_every=4)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(MetricsFile, "on_log", fail)
        train(recipe)
    message = str(caught.value)
    assert "No space left" in message and "goes on from" in message and "step-00000004" in message
    assert train(recipe).steps == 6


def test_a_full_disk_under_a_sharded_snapshot_is_one_line(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch tells every process of another one's full disk by what is no `Exception`."""
    recipe = make_recipe(train__save_every=2)
    save = Trainer._save_checkpoint

    def fail(self: Any, model: Any, trial: Any) -> None:
        if self.state.global_step == 4:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise CheckpointException("write", {1: (full, StackSummary())})
        save(self, model, trial)

    monkeypatch.setattr(Trainer, "_save_checkpoint", fail)
    with pytest.raises(CheckpointError, match=r"step 4 cannot .* No space left .*step-00000002$"):
        train(recipe)
    assert not snapshots.staging_folder(recipe.train.output).exists()


def test_a_gradient_that_is_no_number_is_never_saved(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step's loss is one still, so the weights would go into a snapshot."""
    step = CogVLMTrainer.training_step

    def spoil(self: CogVLMTrainer, model: Any, *rest: Any) -> torch.Tensor:
        loss = step(self, model, *rest)
        if self.state.global_step == 3:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(torch.inf)
        return loss

    monkeypatch.setattr(CogVLMTrainer, "training_step", spoil)
    recipe = make_recipe(train__save_every=2, train__log_every=6)
    with pytest.raises(RecipeError, match=r"gradient's norm (nan|inf), at step 4.*step-00000002"):
        train(recipe)
    assert len(snapshots.snapshots(recipe.train.output)) == 1


def test_a_file_that_cannot_grow_leaves_the_last_snapshot(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, torch.Tensor]
) -> None:
    """The kernel refuses to write past 100 kB from the seventh step on (as a quota would)."""
    recipe = make_recipe(train__iterations=9, train__save_every=4, tune__language={"rate": 0.1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = StopOnSignal.on_step_end

    def limit(self: StopOnSignal, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        return original(self, args, state, control, **kwargs)

    try:
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
            patch.setattr(StopOnSignal, "on_step_end", limit)
            train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "too large" in str(caught.value) and "step-00000004" in str(caught.value)
    assert [path.name for path in snapshots.snapshots(recipe.train.output)] == ["step-00000004"]
    assert_same(final(recipe), unbroken)


def test_only_the_newest_snapshots_are_kept(make_recipe: MakeRecipe) -> None:
    output = train(make_recipe(train__save_every=1, train__keep_snapshots=3)).output
    assert [snapshots.snapshot_step(path) for path in snapshots.snapshots(output)] == [4, 5, 6]


def test_rotation_goes_by_step_and_not_by_time(saved: Path) -> None:
    """Hazard: by the time of writing, a copied or touched old snapshot would outlive the newest."""
    os.utime(snapshots.snapshot_folder(saved, 1), (2e9, 2e9))
    snapshots.rotate(saved, 1, step=2)
    assert snapshots.snapshots(saved) == [snapshots.snapshot_folder(saved, 2)]


def test_a_damaged_snapshot_is_not_one_that_is_kept(saved: Path) -> None:
    """One of a later step was passed over at the resume; the new one alone can be gone on from."""
    damage_weights(snapshots.snapshot_folder(saved, 2))
    snapshots.rotate(saved, 1, step=1)
    assert snapshots.snapshots(saved) == [snapshots.snapshot_folder(saved, 1)]


def test_two_damaged_ones_are_passed_over_and_all_damaged_start_again(
    stopped: Recipe, unbroken: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    output = stopped.train.output
    damage_weights(snapshots.snapshot_folder(output, 7))
    remove("rng_state.pth")(snapshots.snapshot_folder(output, 4))
    assert_same(final(stopped), unbroken)
    said = capsys.readouterr().err
    assert "step-00000007 is passed over" in said and "step-00000004 is passed over" in said
    assert "no snapshot in" in said and "starting at step 0" in said


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "nf4"], ids=["lora", "qlora"])
def test_adapters_resume_bit_for_bit(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str | None
) -> None:
    """Factors, a part that learns whole, and the optimizer; dropout draws the same numbers."""
    base = train(make_recipe(train__output=tmp_path / "base", train__iterations=2)).output

    def recipe(name: str) -> Recipe:
        factors = {"mode": "lora", "rank": 4, "dropout": 0.1}
        return make_recipe(
            model__config=None,
            model__tokenizer=None,
            model__checkpoint=base,
            model__quantize=quantize,
            train__output=tmp_path / name,
            train__iterations=9,
            train__save_every=4,
            tune__language=factors,
            tune__visual_expert=factors,
            tune__vision_tower={"mode": "frozen"},
            tune__embeddings={"mode": "frozen"},
        )

    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 7)
        train(recipe("broken"))
    one, other = (
        load_file(train(recipe(name)).output / "adapter_model.safetensors")
        for name in ("broken", "whole")
    )
    assert_same(one, other)


def test_loading_weights_is_strict(tiny: dict[str, object], tmp_path: Path) -> None:
    """Hazard: transformers' resume keeps fresh weights where a key is missing."""
    model = build_model(tiny)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folder = tmp_path / "weights"
    folder.mkdir()

    def write(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    write({k: v for k, v in state.items() if k != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"missing.*model\.norm\.weight"):
        snapshots.load_weights(model, folder)
    write({**state, "model.norm.bias": torch.zeros(64)})
    with pytest.raises(CheckpointError, match=r"unexpected weight 'model\.norm\.bias'"):
        snapshots.load_weights(model, folder)
    write({**state, "model.norm.weight": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\(32,\).*\(64,\)"):
        snapshots.load_weights(model, folder)


def test_a_resume_is_strict(stopped: Recipe) -> None:
    """Hazard: transformers' own would go on with a fresh norm."""
    folder = snapshots.snapshot_folder(stopped.train.output, 7)
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["model.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    manifest = json.loads((folder / snapshots.MANIFEST).read_text())
    manifest["files"]["model.safetensors"] = file.stat().st_size
    (folder / snapshots.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"missing.*model\.norm\.weight"):
        train(stopped)


def test_figures_of_a_resumed_run_are_those_of_an_unbroken_one(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard: transformers' final loss is another one, and a killed run leaves rows behind.

    Logged every four steps, saved every three, stopped after the eighth; the last one is damaged.
    """

    def recipe(name: str) -> Recipe:
        return make_recipe(
            train__output=tmp_path / name,
            train__iterations=9,
            train__save_every=3,
            train__log_every=4,
        )

    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 8)
        train(recipe("broken"))
    remove("optimizer.pt")(snapshots.snapshot_folder(tmp_path / "broken", 8))
    results = [train(recipe(name)) for name in ("broken", "whole")]
    one, other = (
        [(row["step"], row["loss"]) for row in read_metrics(result.output / "metrics.jsonl")]
        for result in results
    )
    assert one == other
    assert results[0].final_loss == results[1].final_loss


def test_other_settings_do_not_resume(stopped: Recipe, make_recipe: MakeRecipe) -> None:
    changed = make_recipe(
        train__iterations=9,
        train__save_every=4,
        train__learning_rate=2e-3,
        tune__language={"rate": 0.1},
    )
    with pytest.raises(RecipeError, match=r"train\.learning_rate: 0\.001 there, 0\.002 here"):
        train(changed)
    never = make_recipe(train__iterations=9, train__resume="never", tune__language={"rate": 0.1})
    with pytest.raises(RecipeError, match=r"train\.resume is never"):
        train(never)


def test_another_micro_batch_may_resume(
    stopped: Recipe, make_recipe: MakeRecipe, unbroken: dict[str, torch.Tensor]
) -> None:
    recipe = make_recipe(
        train__iterations=9,
        train__save_every=4,
        train__micro_batch_size=4,
        tune__language={"rate": 0.1},
    )
    for name, value in final(recipe).items():
        torch.testing.assert_close(value, unbroken[name], atol=1e-5, rtol=1e-4)


def test_a_finished_or_foreign_folder_is_not_touched(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train__iterations=2)
    output = train(recipe).output
    with pytest.raises(RecipeError, match="finished run"):
        train(recipe)
    shutil.rmtree(output)
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not of a training run"):
        train(recipe)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
