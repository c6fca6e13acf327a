"""``train_sae``: a run that is killed, stopped or out of disk ends in the bytes of one that was not."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import FormatError, InputError, MethodError
from pullback.steering.sae import (
    SparseAutoencoderConfig,
    Trainer,
    TrainingConfig,
    TrainingResult,
    load,
    train_sae,
)
from pullback.steering.sae.checkpoints import Checkpoints
from tests.conformance.fingerprint import assert_untouched
from tests.killing import kill_after, needs_fork, started
from tests.steering.sae.language_model import TOKENS_AT_HEAD, WIDTH, LanguageModel, batches

SHAPE = SparseAutoencoderConfig(WIDTH, 24, 3, "gradient", beta=4.0, dead_after=300, auxiliary_k=2)
CONFIG = TrainingConfig(
    SHAPE,
    tokens=60 * 32,
    batch_tokens=32,
    learning_rate=0.01,
    warmup=0.1,
    beta_warmup=0.2,
    checkpoint_every=3,
    log_every=4,
    tensorboard=False,
)


def train(directory: Path | None, resume: str | Path = "auto", **changed: Any) -> TrainingResult:
    text = None if directory is None else str(directory)
    return train_sae(LanguageModel(), "first", batches(), replace(CONFIG, directory=text, **changed), resume)


def written(directory: Path) -> dict[str, bytes]:
    """What equal runs have in common: the rows and the result."""
    files = [directory / "metrics.csv", *sorted((directory / "sae").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def trained_without_a_word(directory: str) -> None:
    """What a fresh process runs."""
    train(Path(directory))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("run")
    train(directory)
    return written(directory)


@needs_fork
def test_killed_at_ten_random_steps_and_finished_in_a_fresh_process(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    draws, reached = random.Random(0), []

    def dies(life: int, steps: int, within: str) -> None:
        """Train, and be killed after so many steps: between two, inside one, or while a checkpoint is written."""
        done = 0
        step, save = Trainer.step, Checkpoints.save

        def counted(*args: Any) -> Any:
            nonlocal done
            done += 1
            if done == steps and within == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            found = step(*args)
            if done == steps and within == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        def saved(self: Checkpoints, *args: Any) -> Path:
            if done >= steps:
                document: dict[str, Any] = {
                    **args[4],
                    "torn": lambda: 0,
                }  # JSON ends here, with files half written
                try:
                    return save(self, *args[:4], document, *args[5:])
                except TypeError:
                    os.kill(os.getpid(), signal.SIGKILL)
            return save(self, *args)

        Trainer.step = counted  # type: ignore[method-assign]
        Checkpoints.save = saved  # type: ignore[method-assign]
        train(tmp_path)

    for life in range(10):
        steps, within = draws.randrange(1, 8), draws.choice(["before", "after", "saving"])
        pid = started(lambda life=life, steps=steps, within=within: dies(life, steps, within))  # type: ignore[misc]
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        latest = tmp_path / "checkpoints" / "latest"
        reached.append(latest.read_text() if latest.exists() else "")
    # it was somewhere on the way, each time at or beyond where it was before
    assert reached == sorted(reached)
    assert "step_00000006" <= reached[-1] < "step_00000060"
    code = f"from tests.steering.sae.test_training import trained_without_a_word as t; t({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=120)
    assert written(tmp_path) == whole


@needs_fork
def test_killed_at_random_times(whole: dict[str, bytes], tmp_path: Path) -> None:
    draws = random.Random(1)
    for _ in range(10):
        before = sorted((tmp_path / "checkpoints").glob("step_*"))

        def begun(before: list[Path] = before) -> bool:
            return sorted((tmp_path / "checkpoints").glob("step_*")) != before

        if not kill_after(draws.uniform(0, 0.02), lambda: train(tmp_path), begun):
            break
    train(tmp_path)
    assert written(tmp_path) == whole


def test_an_exception_and_a_named_checkpoint_go_on_in_the_same_bits(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer, x: Tensor, gradient: Tensor | None) -> Any:
        if self.step_count == 10:
            raise KeyboardInterrupt
        return step(self, x, gradient)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    kept = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert [path.name for path in kept] == ["step_00000006", "step_00000009"]
    train(tmp_path, resume=kept[0])
    assert written(tmp_path) == whole


@needs_fork
def test_a_full_disk_loses_nothing(whole: dict[str, bytes], tmp_path: Path) -> None:
    import resource

    train(tmp_path, tokens=12 * 32, decay=0.0)  # another run, for the size of its files
    largest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    directory = tmp_path / "full"

    def fills() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails instead
        save, done = Checkpoints.save, 0

        def limited(*args: Any) -> Path:
            nonlocal done
            done += 1
            if done == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
            return save(*args)

        Checkpoints.save = limited  # type: ignore[method-assign]
        message = "(?s)step 9 was not saved.*step_00000006 is whole.*call train_sae again"
        with pytest.raises(OSError, match=message):
            train(directory)
        os._exit(7)

    _, status = os.waitpid(started(fills), 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert not list((directory / "checkpoints").glob(".*"))
    train(directory)
    assert written(directory) == whole


def test_rows_say_what_happened(whole: dict[str, bytes]) -> None:
    rows = list(csv.DictReader(whole["metrics.csv"].decode().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(4, 61, 4))
    assert [int(row["tokens"]) for row in rows] == [32 * step for step in range(4, 61, 4)]
    for row in rows:
        step = int(row["step"])
        # the rate and beta of the step that the row ends with, counted from 0
        assert float(row["learning_rate"]) == pytest.approx(0.01 * min(1, step / 6, (61 - step) / 12))
        warm = step - 1 < 12
        assert float(row["beta"]) == (0.0 if warm else 4.0)
        assert (row["selection_changed"] == "") is warm
        assert (row["gradient_norm"] == "") is (row["beta"] == "0")
        assert float(row["l0"]) <= 3
    assert any(0 < float(row["selection_changed"]) < 1 for row in rows if row["selection_changed"])
    assert float(rows[-1]["fvu"]) < float(rows[0]["fvu"])


def test_the_result_is_the_saved_one_and_reconstructs_raw_activations(tmp_path: Path) -> None:
    result = train(tmp_path, tokens=200 * 32)
    assert result.path is not None
    again = load(result.path)
    model = LanguageModel()
    x = torch.cat([model.below(ids)[:, 1:].flatten(0, 1) for ids in batches()]).detach()
    for name, value in result.sae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    output = again.decode(again.encode(x, selection="topk"))
    plain = float(((output - x).square().sum() / (x - x.mean(0)).square().sum()).detach())
    # from the metrics: the mean of the last steps, with gradient selection
    assert plain < 0.5
    assert result.metrics[-1]["fvu"] < 0.5
    assert not any(parameter.requires_grad for parameter in result.sae.parameters())


def test_nothing_above_the_site_runs_while_beta_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int]] = []
    step = Trainer.step

    def watched(self: Trainer, x: Tensor, gradient: Tensor | None) -> Any:
        seen.append((self.beta, len(TOKENS_AT_HEAD)))
        return step(self, x, gradient)

    monkeypatch.setattr(Trainer, "step", watched)
    TOKENS_AT_HEAD.clear()
    train(None)
    plain = [calls for beta, calls in seen if beta == 0]
    assert len(plain) == 12
    # opening the stream poses the model, which runs it
    assert set(plain) == {plain[0]}
    assert plain[0] <= 2
    assert seen[-1][1] > plain[0] + 10


def test_the_model_and_the_callers_random_state_stay() -> None:
    model, state = LanguageModel(), torch.get_rng_state()
    with assert_untouched(model, batches()[0]):
        train_sae(model, "first", batches(), replace(CONFIG, tokens=20 * 32))
    assert torch.equal(state, torch.get_rng_state())


def test_a_wrong_site_warns() -> None:
    """Where a rate is far too high the batches are reconstructed worse than by their mean, as at a site not meant."""
    with pytest.warns(UserWarning, match=r"FVU is .* over the first .* batches.*Check that the site"):
        train(None, learning_rate=3.0, warmup=0.0, beta_warmup=1.0, tokens=40 * 32)


class Broken(LanguageModel):
    """One whose activations at the site are not all finite."""

    def below(self, input_ids: Tensor) -> Tensor:
        return self.first(self.embeddings(input_ids) / (input_ids.unsqueeze(-1) > 3))


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)not finite|NaN|inf"):
        train_sae(Broken(), "first", batches(), CONFIG)
    with pytest.raises(InputError, match=r"activations of width 8; the config has width 5.*width=8"):
        train(None, autoencoder=SparseAutoencoderConfig(5, 24, 3))
    with pytest.raises(MethodError, match=r"k"):
        SparseAutoencoderConfig(WIDTH, 24, 25)
    with pytest.raises(InputError, match=r"without a directory; set directory"):
        train(None, resume=tmp_path)
    with pytest.raises(InputError, match=r"read only once"):
        train_sae(LanguageModel(), "first", iter(batches()), CONFIG)
    with pytest.raises(InputError, match=r"at least one"):
        train_sae(LanguageModel(), "first", [], CONFIG)


def test_checkpoints_that_are_not_of_this_run(tmp_path: Path) -> None:
    train(tmp_path, tokens=12 * 32)
    folder = tmp_path / "checkpoints"
    *_, newest = sorted(folder.glob("step_*"))
    with pytest.raises(FormatError, match=r"is of a run with learning_rate 0.01 \(now 0.02\)"):
        train(tmp_path, tokens=12 * 32, learning_rate=0.02)
    with pytest.raises(InputError, match=r'exists and resume is "never"'):
        train(tmp_path, resume="never", tokens=12 * 32)
    for name in ("training.safetensors", "stream_0.safetensors"):
        data = (newest / name).read_bytes()
        (newest / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(FormatError, match=rf"{name} is damaged.*resume="):
            train(tmp_path, tokens=12 * 32)
        (newest / name).write_bytes(data)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(FormatError, match=r"expected a checkpoint written by train_sae"):
        train(tmp_path, resume=foreign, tokens=12 * 32)
    (folder / "latest").write_text("step_99999999")
    with pytest.raises(FormatError, match=r"no checkpoint there"):
        train(tmp_path, tokens=12 * 32)


def test_equal_runs_are_equal_and_another_seed_is_not(tmp_path: Path, whole: dict[str, bytes]) -> None:
    train(tmp_path / "a")
    assert written(tmp_path / "a") == whole
    train(tmp_path / "b", seed=1)
    assert written(tmp_path / "b")["sae_weights.safetensors"] != whole["sae_weights.safetensors"]


def test_topk_needs_no_loss() -> None:
    """On any module that takes tokens: nothing asks for logits."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).eval()
    config = TrainingConfig(SparseAutoencoderConfig(4, 8, 2), tokens=400, batch_tokens=10, log_every=10)
    rows = train_sae(model, "0", [torch.arange(9).reshape(1, 9)], config).metrics
    assert [row["beta"] for row in rows] == [0.0] * 4
    assert rows[-1]["fvu"] < rows[0]["fvu"]
