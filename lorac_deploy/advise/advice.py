"""The advice for a device's data: what was looked at, what was tried, and what is chosen."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from lorac_deploy.advise import DEFAULT_METHODS
from lorac_deploy.advise.candidates import Candidate, candidates, export_candidate, work
from lorac_deploy.advise.sensitivity import block_scores, relative_gradients
from lorac_deploy.advise.trial import Score, Trial, run_trials
from lorac_exporters.graphs import Graphs
from lorac_exporters.memory import peak
from lorac_exporters.memory_plan import read_graphs
from lorac_exporters.plan import LoraConfig
from lorac_exporters.prefix import PREFIX
from lorac_exporters.stages import blocks_of
from lorac_exporters.training_step import TRAIN
from lorac_runtime.data import LocalData, load_data
from lorac_runtime.errors import ConversionError, DataError, DivergenceError, listed
from lorac_runtime.manifest import Manifest, load, verify_files
from lorac_runtime.tasks import require_classifier

NEAR = 0.01  # accuracies that differ by less count as equal; the cheaper method is then chosen
SAMPLES = 1000  # that trials use at most

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Option:
    """A candidate with its costs and what trials gave.

    ``work`` is the multiply-adds of a whole run on the local data, ``seconds`` what such a run would take here,
    ``peak`` the bytes that a step needs on a device.
    """

    candidate: Candidate
    trained: int
    work: int
    peak: int
    seconds: float
    score: Score


@dataclasses.dataclass(frozen=True)
class Advice:
    """What was found for ``samples`` local samples. ``scores`` are relative gradients of the blocks, the largest 1.

    ``no_blocks`` says why blocks could not be told, ``refused`` why a method was left out.
    """

    samples: int
    epochs: int
    scores: dict[str, float]
    options: tuple[Option, ...]
    chosen: Option
    reason: str
    no_blocks: str = ""
    refused: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> str:
        """Everything, as text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def advise(
    artifact: Path,
    data: Path,
    *,
    methods: tuple[str, ...] = DEFAULT_METHODS,
    lora: LoraConfig | None = None,
    trial: Trial | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> Advice:
    """Which method and block suit the drift in ``data``, for the network of an artifact. Nothing is written.

    Relative gradient norms rank the blocks (Auto-RGN, arXiv 2210.11466); then all candidates train for a few epochs
    on a part of the data, and the better half for some more. The one with the best accuracy on held-out samples is
    chosen, or the cheapest of those within a point of it. The type of the drift is told to nobody.

    Raises ArtifactError, DataError; ConversionError if none of ``methods`` fits the network, DivergenceError if all
    trials diverged.
    """
    manifest, graphs, local = _read(artifact, data)
    with tempfile.TemporaryDirectory() as scratch:
        on_progress("gradients of the blocks", 0, 1)
        scores, no_blocks = _scores(graphs, manifest, local, Path(scratch))
        wanted = candidates(methods, scores, lora or LoraConfig())
        tried, folders, refused = _exported(graphs, manifest, wanted, Path(scratch))
        if not tried:
            reasons = [f"{label}: {why}" for label, why in refused]
            raise ConversionError(listed("none of the methods fits this network:", reasons))
        subset = LocalData(local.images[:SAMPLES], None if local.labels is None else local.labels[:SAMPLES])
        found = run_trials(folders, subset, trial or Trial(), on_progress=lambda d, n: on_progress("trials", d, n))
        epochs = manifest.training.epochs
        options = [_option(*one, len(local), epochs, manifest) for one in zip(tried, folders, found, strict=True)]
    chosen, reason = choose(options)
    return Advice(len(local), epochs, scores, tuple(options), chosen, reason, no_blocks, tuple(refused))


def choose(options: list[Option]) -> tuple[Option, str]:
    """The best of those that reached the last round, or the cheapest that is as good; and why.

    Raises DivergenceError where every trial failed.
    """
    sound = [o for o in options if o.score.failed is None]
    if not sound:
        failures = [f"{o.candidate.label}: {o.score.failed}" for o in options]
        raise DivergenceError(listed("no trial came to an end:", failures))
    last = max(len(o.score.after) for o in sound)
    finalists = [o for o in sound if len(o.score.after) == last]
    best = max(finalists, key=lambda o: o.score.accuracy)
    near = [o for o in finalists if o.score.accuracy >= best.score.accuracy - NEAR]
    cheapest = min(near, key=lambda o: o.work)
    if cheapest is best:
        return best, f"the best accuracy on held-out samples, {100 * best.score.accuracy:.1f} %"
    return cheapest, (
        f"{100 * cheapest.score.accuracy:.1f} % on held-out samples, within {100 * NEAR:.0f} point of "
        f"{best.candidate.label} ({100 * best.score.accuracy:.1f} %) at {cheapest.work / best.work:.2f} of its work"
    )


def export_choice(artifact: Path, advice: Advice, out: Path) -> None:
    """Write the artifact of the chosen method into ``out``. Raises OutputError if that is taken."""
    manifest = load(artifact)
    graphs = read_graphs(artifact, manifest)
    export_candidate(graphs, manifest, advice.chosen.candidate, out, tflite="auto")


def _read(artifact: Path, data: Path) -> tuple[Manifest, Graphs, LocalData]:
    manifest = load(artifact)
    why = "trials are compared by how many samples are classified rightly"
    require_classifier(artifact, manifest.task, why, "`lorac-deploy plan` tells what fits into memory")
    verify_files(artifact, manifest)
    local = load_data(data, manifest.input, manifest.output.classes, manifest.class_names)
    if local.labels is None:
        raise DataError(
            f"{data} has no labels, and without them no trial can tell what helps: for unlabelled data export with "
            "--method recalibrate or --method tent"
        )
    return manifest, read_graphs(artifact, manifest), local


def _scores(graphs: Graphs, manifest: Manifest, local: LocalData, scratch: Path) -> tuple[dict[str, float], str]:
    try:
        blocks = blocks_of(graphs.network)
    except ValueError as err:
        return {}, str(err)
    full = scratch / "full"
    export_candidate(graphs, manifest, Candidate("full", None, LoraConfig()), full)
    return block_scores(relative_gradients(full, local), blocks), ""


def _exported(
    graphs: Graphs, manifest: Manifest, wanted: list[Candidate], scratch: Path
) -> tuple[list[Candidate], list[Path], list[tuple[str, str]]]:
    """(candidates, their artifacts, what does not fit the network and why)."""
    tried, folders, refused = [], [], []
    for index, candidate in enumerate(wanted):
        folder = scratch / str(index)
        try:
            export_candidate(graphs, manifest, candidate, folder)
        except ConversionError as err:
            refused.append((candidate.label, str(err).splitlines()[0]))
        else:
            tried.append(candidate)
            folders.append(folder)
    return tried, folders, refused


def _option(candidate: Candidate, folder: Path, score: Score, samples: int, epochs: int, manifest: Manifest) -> Option:
    steps = epochs * -(-samples // manifest.training.batch_size)
    return Option(
        candidate=candidate,
        trained=load(folder).trained_parameters,
        work=work(folder, samples, epochs),
        peak=_peak(folder, manifest.training.batch_size),
        seconds=statistics.median(score.step_seconds or (0.0,)) * steps,
        score=score,
    )


def _peak(folder: Path, batch: int) -> int:
    """Bytes that a step needs on a device, its frozen front part included."""
    front = ir.load(folder / PREFIX) if (folder / PREFIX).is_file() else None
    return peak(ir.load(folder / TRAIN), batch, front=front).total
