"""Puts a run together: folder, data, model, program, trackers, hooks; then the loop."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from slmjax.compress.quant.view import quantizes
from slmjax.config import Experiment, Runtime
from slmjax.data.spec import Opened
from slmjax.data.tokenizer import FILES as TOKENIZER_FILES
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.models.flops import flops_per_token, parameter_count
from slmjax.runs import beginning
from slmjax.runs import folder as runs
from slmjax.runs.build import Built, build
from slmjax.runs.estimate_time import about_time
from slmjax.runs.loading import generative
from slmjax.runs.peak import peak_flops
from slmjax.runs.same_compute import settle
from slmjax.track import environment
from slmjax.track.progress import si
from slmjax.track.trackers import open_trackers
from slmjax.train import stored
from slmjax.train.checkpoint_folder import extra, latest_step
from slmjax.train.hooks import Evaluate, Hook, Profile, Sample, Silent, Tracker, silent
from slmjax.train.lock import lock
from slmjax.train.loop import Speed
from slmjax.train.loop import train as loop
from slmjax.train.processes import barrier, of_the_first, together
from slmjax.types import Batch, Params


def open_data(experiment: Experiment, runtime: Runtime, progress: Any) -> Opened:
    """The data, made ready by the first process while the others wait.

    Raises:
        DataError: something that is read is missing or damaged.
        UserError: the model has fewer rows than the tokenizer ids, or other labels than the data.
    """
    if jax.process_index() == 0:
        experiment.data.open(cache=runtime.data_dir, progress=progress)
    barrier("data")
    opened = experiment.data.open(cache=runtime.data_dir, progress=progress)
    model = experiment.model
    if opened.vocab > model.vocab:
        raise UserError(
            f"model.vocab is {model.vocab}, but the tokenizer of {opened.name} has {opened.vocab} tokens; "
            f"set model.vocab to at least {opened.vocab}"
        )
    if model.labels and opened.labels and model.labels != opened.labels:
        raise UserError(
            f"model.head.labels is {', '.join(model.labels)}, but the labels of {opened.name} are "
            f"{', '.join(opened.labels)}, in this order; set one of them, or data.labels, to the other"
        )
    return opened


def folder_of(experiment: Experiment, runtime: Runtime) -> Path:
    """The run folder."""
    return Path(runtime.workdir or f"runs/{experiment.name}")


def train(experiment: Experiment, runtime: Runtime, source: Path | None = None, hooks: Sequence[Hook] = ()) -> int:
    """Trains, resumes, or reports that the run is complete; together with the other processes of `runtime.distributed`.

    Raises:
        UserError, DataError, StorageError, Diverged, Preempted: see `errors`.
    """
    with together(runtime.distributed):
        _train(experiment, runtime, source, hooks)
    return 0


def _train(experiment: Experiment, runtime: Runtime, source: Path | None, hooks: Sequence[Hook]) -> None:
    """What each process does, once the processes have met."""
    from slmjax.data.build_progress import show_progress

    folder = folder_of(experiment, runtime)
    if quantizes(experiment.view):
        from slmjax.runs import carriers  # with the packages of the formats, which other runs need not wait for

        carriers.check(experiment)
    with show_progress() as progress:
        opened = open_data(experiment, runtime, progress)
    start = beginning.read(experiment, folder)
    config = runs.describe(experiment, runtime, opened.stores, None if start is None else start.hash)
    _check_agreement(config["fingerprint"])
    first = jax.process_index() == 0
    changed = []
    if first:
        changed = runs.open_folder(folder, config, source, accept_changes=runtime.overwrite_changed)
    done = latest_step(folder / "checkpoints") or 0
    if of_the_first(done >= experiment.steps and not changed):
        if first:
            print(f"{folder}: complete, {done} steps; nothing to do")
            print(_next_steps(folder, experiment.model))
        return
    with lock(folder) if first else contextlib.nullcontext():
        code = source.parent if source else Path()
        _run(experiment, runtime, folder, config, changed, opened, code, start, hooks)
    if first:
        print(f"done: {folder}")
        print(_next_steps(folder, experiment.model))


def _run(
    experiment: Experiment,
    runtime: Runtime,
    folder: Path,
    config: dict[str, Any],
    changed: Sequence[str],
    opened: Opened,
    code: Path,
    start: beginning.Beginning | None,
    hooks: Sequence[Hook],
) -> None:
    """The training itself, in a locked run folder. `code`: the folder of the experiment's file."""
    first = jax.process_index() == 0
    if first:
        _copy_tokenizer(opened.tokenizer_path, folder)

    compute, why = settle(runtime, folder)
    built = build(
        replace(experiment, objective=experiment.objective.with_special(opened.tokenizer().special)),
        replace(runtime, compute=compute, dtype="auto"),
    )
    beginning.check(experiment, built, start)
    frozen = jax.device_put(built.objective.frozen, NamedSharding(built.program.mesh, PartitionSpec()))
    peak, peak_source = peak_flops(built.compute.dtype)
    flops = flops_per_token(experiment.model, experiment.data.length, experiment.objective.predicted)
    tracker, log = _open_trackers(experiment, runtime, folder, config, changed, code) if first else (Silent(), silent)
    log(f"{experiment.name} in {folder}, fingerprint {config['fingerprint'][:12]}")
    for line in (_summary(experiment, built, opened, peak, peak_source), *_replicated(built, runtime), *opened.notes):
        log(line)
    log(f"{compute.dtype} {why}{about_time(experiment, compute, flops.attention) if first else ''}")
    loop(
        built.program._replace(init=beginning.starting(experiment, built, start)),
        data=opened.training(host=jax.process_index(), hosts=jax.process_count(), reader=runtime.reader),
        steps=experiment.steps,
        workdir=folder,
        tracker=tracker,
        guard=experiment.guard,
        checkpoints=runtime.checkpoints,
        hooks=[*_hooks(experiment, runtime, opened, built, done=latest_step(folder / "checkpoints") or 0), *hooks],
        frozen=frozen,
        speed=Speed(flops_per_token=flops.attention, peak_flops=peak),
        log_every=runtime.log_every,
        say=log,
    )


def _open_trackers(
    experiment: Experiment, runtime: Runtime, folder: Path, config: dict[str, Any], changed: Sequence[str], code: Path
) -> tuple[Tracker, Callable[[str], None]]:
    """Everything that records the run, in the state of the checkpoint that it resumes from; and what prints a line."""
    about = environment.collect(devices=jax.devices(), folder=code)
    runs.write_json(folder / "environment.json", about)
    (folder / "git.diff").write_text(environment.git_diff(code))
    tracking = runtime.tracking
    trackers, progress = open_trackers(
        folder,
        config=config,
        environment=about,
        steps=experiment.steps,
        wandb=tracking.wandb,
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        tags=tracking.tags,
        artifacts=tracking.artifacts,
        pue=tracking.pue,
        country=tracking.country,
    )
    trackers.restore(extra(folder / "checkpoints").get("tracker", {}))
    for change in changed:
        progress.say(f"continues although the experiment has changed: {change}")
    return trackers, progress.say


def _hooks(experiment: Experiment, runtime: Runtime, opened: Opened, built: Built, done: int) -> list[Hook]:
    """Evaluation, samples and profiling, where they are switched on."""
    hooks: list[Hook] = []
    evaluation = experiment.evaluation
    if evaluation.every and opened.has_validation:

        def batches() -> Iterator[Batch]:
            return opened.validation(evaluation.batches, host=jax.process_index(), hosts=jax.process_count())

        hooks.append(Evaluate(every=evaluation.every, batches=batches))
    if runtime.samples.every:
        hooks.append(Sample(every=runtime.samples.every, generate=_sampler(experiment, runtime, opened, built)))
    if runtime.profile:
        hooks.append(Profile.of(done, experiment.steps))
    return hooks


def _sampler(experiment: Experiment, runtime: Runtime, opened: Opened, built: Built) -> Callable[[Params], str]:
    """Parameters -> the continuation of each prompt, compiled once."""
    from slmjax.evals.generate import Generator
    from slmjax.evals.sampling import sampler

    samples = runtime.samples
    rule = sampler(temperature=samples.temperature)
    model, numerics = generative(experiment.model), experiment.numerics
    generator = Generator(model, None, opened.tokenizer(), built.compute, numerics=numerics)

    def write(params: Params) -> str:
        results = generator.with_params(params)(
            samples.prompts, sampler=rule, max_tokens=samples.tokens, seed=experiment.seed
        )
        return "\n\n".join(prompt + result.text for prompt, result in zip(samples.prompts, results, strict=True))

    return write


def _replicated(built: Built, runtime: Runtime) -> list[str]:
    """A line on parameters that the layout would split, but which the mesh does not divide."""
    axes = stored.join(built.model.axes, built.view.axes)
    whole = runtime.layout.replicated(built.program.abstract.params, axes, built.program.mesh.shape)
    return (
        [f"replicated on every device: {', '.join(f'{path} ({why})' for path, why in whole.items())}"] if whole else []
    )


def _summary(experiment: Experiment, built: Built, opened: Opened, peak: float, source: str) -> str:
    """Sizes of model, data and machine, for the log."""
    mesh = ", ".join(f"{name}={n}" for name, n in built.program.mesh.shape.items())
    tokens = experiment.steps * experiment.data.batch * experiment.data.length
    epochs = opened.epochs(experiment.steps * experiment.data.batch)
    parameters, total, ceiling = (si(x).strip() for x in (parameter_count(experiment.model), tokens, peak))
    return (
        f"{parameters} parameters; {experiment.steps} steps of {experiment.data.batch} x {experiment.data.length}: "
        f"{total} tokens, {epochs:.2f} epochs of {opened.name}; "
        f"{jax.device_count()} {jax.devices()[0].platform} ({mesh}), {built.compute.dtype}, "
        f"matmul ceiling {ceiling}FLOP/s ({source})"
    )


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """The run can be evaluated, sampled and exported without its data. `tokenizer`: the folder of its files."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)


def _check_agreement(fingerprint: str) -> None:
    """
    Raises:
        UserError: this process has another experiment or other data than process 0.
    """
    if of_the_first(fingerprint) != fingerprint:
        raise UserError(
            f"process {jax.process_index()} has another experiment, or other data, than process 0 (fingerprint "
            f"{fingerprint[:12]}); give all of them the same command but for --runtime.distributed.index"
        )


def _next_steps(folder: Path, model: Assembly) -> str:
    run = shlex.quote(str(folder))
    return f"""next:
  slmjax eval {run}
  slmjax {model.example.format(run)}
  slmjax export {run} --format hf --out {run}/hf
curves: {folder}/report.html"""
