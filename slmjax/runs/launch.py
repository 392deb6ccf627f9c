"""Puts a run together: folder, data, model, program, trackers, hooks; then the loop."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from slmjax.compress.quant.view import quantizes
from slmjax.config import Experiment, Runtime
from slmjax.data.generation_config import GenerationConfig
from slmjax.data.spec import Opened
from slmjax.data.tokenizer import FILES as TOKENIZER_FILES
from slmjax.errors import UserError
from slmjax.files import at
from slmjax.models.assembly import Assembly
from slmjax.models.flops import parameter_count
from slmjax.nn.compute import Compute
from slmjax.runs import beginning, cost, teaching
from slmjax.runs import folder as runs
from slmjax.runs.build import Built, build
from slmjax.runs.estimate_time import about_time
from slmjax.runs.loading import generative
from slmjax.runs.peak import peak_flops
from slmjax.runs.rates import fall, rates
from slmjax.runs.same_compute import Choice, record, settle
from slmjax.track import environment
from slmjax.track.progress import si
from slmjax.track.trackers import open_trackers
from slmjax.track.wandb_run import Server
from slmjax.train import loop, stored
from slmjax.train.checkpoint import Checkpoints
from slmjax.train.checkpoint_folder import extra, latest_step
from slmjax.train.hooks import Evaluate, Hook, Profile, Sample, Silent, Tracker, silent
from slmjax.train.lock import OPEN, Fence
from slmjax.train.loop import Job, Speed
from slmjax.train.processes import barrier, of_the_first, together
from slmjax.types import Batch, Frozen, Objective, Params


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
    return at(runtime.workdir or f"runs/{experiment.name}")


def train(experiment: Experiment, runtime: Runtime, source: Path | None = None, hooks: Sequence[Hook] = ()) -> int:
    """Trains, resumes, or reports that the run is complete; together with the other processes of `runtime.distributed`.

    Raises:
        UserError, DataError, StorageError, Diverged, Preempted: see `errors`.
    """
    with together(runtime.distributed):
        _train(experiment, runtime, source, hooks)
    return 0


class Ready(NamedTuple):
    """A run whose folder is open, before anything of it is built."""

    experiment: Experiment
    runtime: Runtime
    folder: Path
    config: dict[str, Any]
    """The content of config.json"""
    changed: Sequence[str]
    """In what the experiment differs from the one that the run began with, where that was allowed"""
    opened: Opened
    source: Path | None
    """The experiment's file"""
    start: beginning.Beginning | None
    generation: GenerationConfig
    """What is known of text that its model generates"""
    models: teaching.Models
    hooks: Sequence[Hook]

    @property
    def code(self) -> Path:
        """The folder of the experiment's file"""
        return self.source.parent if self.source else Path()

    def with_models(self, compute: Compute) -> Experiment:
        """The experiment with the models that its objective reads in memory, and the special tokens of its texts."""
        return teaching.with_models(self.experiment, self.models, self.opened.tokenizer(), compute, self.generation)


def prepare(experiment: Experiment, runtime: Runtime, source: Path | None, hooks: Sequence[Hook] = ()) -> Ready | None:
    """Opens what a run reads, and its folder; None if the run is complete."""
    from slmjax.data.build_progress import show_progress

    folder = folder_of(experiment, runtime)
    if quantizes(experiment.view):
        from slmjax.runs import carriers  # with the packages of the formats, which other runs need not wait for

        carriers.check(experiment)
    with show_progress() as progress:
        opened = open_data(experiment, runtime, progress)
    start = beginning.read(experiment, folder)
    generation = beginning.told(start, opened.tokenizer(), folder)
    models = teaching.read(experiment, opened.tokenizer(), folder)
    config = runs.describe(experiment, runtime, opened.stores, None if start is None else start.hash, models.hashes)
    _check_agreement(config["fingerprint"])
    first = jax.process_index() == 0
    changed = []
    if first:
        changed = runs.check(folder, config, accept_changes=runtime.overwrite_changed)
    done = latest_step(folder / "checkpoints") or 0
    if of_the_first(done >= experiment.steps and not changed):
        if first:
            print(f"{folder}: complete, {done} steps; nothing to do")
            print(next_steps(folder, experiment.model))
        return None
    return Ready(experiment, runtime, folder, config, changed, opened, source, start, generation, models, hooks)


def _train(experiment: Experiment, runtime: Runtime, source: Path | None, hooks: Sequence[Hook]) -> None:
    """What each process does, once the processes have met."""
    ready = prepare(experiment, runtime, source, hooks)
    if ready is None:
        return
    nobody = contextlib.nullcontext(OPEN)  # process 0 alone writes
    with runs.held(ready.folder, ready.config) if jax.process_index() == 0 else nobody as fence:
        _run(ready, fence)
    if jax.process_index() == 0:
        print(f"done: {ready.folder}")
        print(next_steps(ready.folder, experiment.model))


def _run(ready: Ready, fence: Fence) -> None:
    """The training itself, in a locked run folder."""
    choice = settle(ready.runtime, ready.folder)
    experiment = ready.with_models(choice.compute)
    built = build(experiment, replace(ready.runtime, compute=choice.compute, dtype="auto"))
    frozen = placed(built.objective, ready.runtime, built.program.mesh)
    ready = ready._replace(experiment=experiment)
    loop.train(replace(job(ready, built, choice, _replicated(built, ready.runtime)), frozen=frozen, fence=fence))


def job(
    ready: Ready, built: Built, choice: Choice, more: Sequence[str] = (), *, among: int = 1,
    server: Server | None = None,
) -> Job:  # fmt: skip
    """Makes the folder that of the run, opens what records it, and tells it what it is going to do: the run's job, but
    for `frozen` and `fence`.

    Args:
        ready: its experiment has the models that its objective reads in memory.
        built: what computes it.
        choice: how it computes.
        more: lines for the log.
        among: runs that train together, this one included.
        server: of W&B, shared by the runs of a process.
    """
    experiment, runtime, folder, opened = ready.experiment, ready.runtime, ready.folder, ready.opened
    first = jax.process_index() == 0
    beginning.check(experiment, built, ready.start)
    peak, peak_source = peak_flops(built.compute.dtype, einsum=built.compute.einsum)
    spent = cost.of(experiment)
    own = _hooks(ready, built, done=latest_step(folder / "checkpoints") or 0)
    data = opened.training(host=jax.process_index(), hosts=jax.process_count(), reader=runtime.reader)
    if first:  # from here on the folder is this run's
        _claim(ready, choice, spent)
    total = experiment.steps * experiment.data.batch * experiment.data.length
    sizes = {"params": parameter_count(experiment.model), "tokens": total, "flops": spent.total * total}
    tracker, log = _open_trackers(ready, sizes, among, server) if first else (Silent(), silent)
    log(f"{experiment.name} in {folder}, fingerprint {ready.config['fingerprint'][:12]}")
    notes = (*more, *_unvalidated(experiment, runtime, opened), *opened.notes)
    for line in (_summary(experiment, built, opened, peak, peak_source), *notes):
        log(line)
    log(f"{built.compute.dtype} {choice.reason}{about_time(experiment, built.compute, spent.model) if first else ''}")
    return Job(
        program=built.program._replace(init=beginning.starting(experiment, built, ready.start)),
        data=data,
        steps=experiment.steps,
        workdir=folder,
        tracker=tracker,
        guard=experiment.guard,
        checkpoints=_checkpoints(experiment, runtime),
        hooks=[*own, *ready.hooks],
        speed=Speed(flops_per_token=spent.total, peak_flops=peak),
        log_every=runtime.log_every,
        say=log,
    )


def _claim(ready: Ready, choice: Choice, spent: cost.Cost) -> None:
    """Writes what is known of the run before its first step."""
    runs.claim(ready.folder, ready.config, ready.source)
    record(choice, ready.folder)
    cost.write(ready.folder, spent)
    _copy_tokenizer(ready.opened.tokenizer_path, ready.folder)
    ready.generation.save(ready.folder)


def placed(objective: Objective, runtime: Runtime, mesh: jax.sharding.Mesh) -> Frozen:
    """The objective's frozen arrays on the devices: split like parameters if it names their axes, else copied."""
    whole = NamedSharding(mesh, PartitionSpec())
    if objective.axes is None:
        return jax.device_put(objective.frozen, whole)
    return jax.device_put(objective.frozen, runtime.layout.shardings(objective.frozen, objective.axes, mesh))


def _open_trackers(
    ready: Ready, sizes: dict[str, float], among: int, server: Server | None
) -> tuple[Tracker, Callable[[str], None]]:
    """Everything that records the run, in the state of the checkpoint that it resumes from; and what prints a line."""
    folder, runtime = ready.folder, ready.runtime
    about = environment.collect(devices=jax.devices(), folder=ready.code)
    runs.write_json(folder / "environment.json", about)
    (folder / "git.diff").write_text(environment.git_diff(ready.code))
    tracking = runtime.tracking
    trackers, progress = open_trackers(
        folder,
        config=ready.config,
        environment=about,
        steps=ready.experiment.steps,
        wandb=tracking.wandb,
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        tags=tracking.tags,
        artifacts=tracking.artifacts,
        pue=tracking.pue,
        country=tracking.country,
        sizes=sizes,
        among=among,
        server=server,
    )
    trackers.restore(extra(folder / "checkpoints").get("tracker", {}))
    for change in ready.changed:
        progress.say(f"continues although the experiment has changed: {change}")
    return trackers, progress.say


def _hooks(ready: Ready, built: Built, done: int) -> list[Hook]:
    """Evaluation, samples and profiling, where they are switched on."""
    experiment, runtime, opened = ready.experiment, ready.runtime, ready.opened
    hooks: list[Hook] = []
    evaluation = experiment.evaluation
    if evaluation.every and opened.has_validation:

        def batches() -> Iterator[Batch]:
            return opened.validation(evaluation.batches, host=jax.process_index(), hosts=jax.process_count())

        hooks.append(Evaluate(every=evaluation.every, batches=batches))
    if runtime.samples.every:
        hooks.append(Sample(every=runtime.samples.every, generate=_sampler(ready, built)))
    if runtime.profile:
        hooks.append(Profile.of(done, experiment.steps))
    return hooks


def _sampler(ready: Ready, built: Built) -> Callable[[Params], str]:
    """Parameters -> the continuation of each prompt, compiled once."""
    from slmjax.evals.generate import Generator
    from slmjax.evals.sampling import sampler

    experiment, samples = ready.experiment, ready.runtime.samples
    rule = sampler(temperature=samples.temperature)
    model, numerics = generative(experiment.model), experiment.numerics
    tokenizer, ends = ready.opened.tokenizer(), ready.generation.ends
    generator = Generator(model, None, tokenizer, built.compute, ends, numerics=numerics)

    def write(params: Params) -> str:
        results = generator.with_params(params)(
            samples.prompts, sampler=rule, max_tokens=samples.tokens, seed=experiment.seed
        )
        return "\n\n".join(prompt + result.text for prompt, result in zip(samples.prompts, results, strict=True))

    return write


def _checkpoints(experiment: Experiment, runtime: Runtime) -> Checkpoints:
    """Those of `runtime`, and the one before the learning rate falls from a plateau."""
    before, policy = fall(rates(experiment)), runtime.checkpoints
    return policy if before is None else replace(policy, keep_steps=(*policy.keep_steps, before))


def _unvalidated(experiment: Experiment, runtime: Runtime, opened: Opened) -> list[str]:
    """A line if validation is asked for and there is none: no data for it, or no evaluation."""
    every, best = experiment.evaluation.every, runtime.checkpoints.best
    asked = f"evaluation.every is {every}" if every else f"checkpoints.best is {best!r}"
    if not (every or best.startswith("validation/")) or (every and opened.has_validation):
        return []
    lacking = [store.name for store in opened.stores if store.split == "validation" and not store.tokens]
    why = (
        "evaluation.every is 0; set it to a number of steps"
        if opened.has_validation
        else f"{', '.join(lacking) or opened.name} holds no validation data; give the recipe validation=0.01, name "
        "data.validation, or set evaluation.every to 0"
    )
    return [f"no validation: {asked}, but {why}"]


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


def next_steps(folder: Path, model: Assembly) -> str:
    run = shlex.quote(str(folder))
    return f"""next:
  slmjax eval {run}
  slmjax {model.example.format(run)}
  slmjax export {run} --format hf --out {run}/hf
curves: {folder}/report.html"""
