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

from slmjax.config import Experiment, Runtime
from slmjax.data.loader import Loader, open_stores, validation_batches
from slmjax.data.token_store import TOKENIZER_FILES, TokenStore
from slmjax.errors import UserError
from slmjax.models.assembly import Assembly
from slmjax.models.flops import flops_per_token, parameter_count
from slmjax.nn.compute import Compute, for_backend
from slmjax.runs import folder as runs
from slmjax.runs.loading import generative
from slmjax.runs.peak import peak_flops, probe_bf16
from slmjax.track import environment
from slmjax.track.progress import si
from slmjax.track.trackers import open_trackers
from slmjax.train.checkpoint_folder import extra, latest_step
from slmjax.train.hooks import Evaluate, Hook, Profile, Sample, Silent, Tracker, silent
from slmjax.train.lock import lock
from slmjax.train.loop import Speed
from slmjax.train.loop import train as loop
from slmjax.train.processes import barrier, of_the_first, together
from slmjax.train.step import Program, program
from slmjax.types import Batch, Model, Objective, Params


class Built(NamedTuple):
    """An experiment turned into functions."""

    model: Model
    objective: Objective
    program: Program
    compute: Compute


def build(experiment: Experiment, runtime: Runtime) -> Built:
    """The model and the jitted step of an experiment, on the devices of this process group."""
    compute = runtime.compute or for_backend(jax.default_backend())
    if runtime.dtype != "auto":
        compute = replace(compute, dtype=runtime.dtype)
    model = experiment.model.build(compute)
    objective = experiment.objective.build(model)
    schedule = experiment.schedule.build(experiment.steps)
    compiled = program(
        model.init,
        model.axes,
        objective,
        experiment.optimizer.build(schedule, model.axes),
        experiment.view.build(),
        seed=experiment.seed,
        mesh=runtime.mesh.build(),
        accumulate=experiment.accumulate,
        micro_tokens=compute.micro_tokens(experiment.model.width),
        guard=experiment.guard,
        schedule=schedule,
    )
    return Built(model, objective, compiled, compute)


def open_data(experiment: Experiment, runtime: Runtime, progress: Any) -> tuple[tuple[TokenStore, ...], ...]:
    """The token stores of training and of validation; recipes are built by the first process, the others wait.

    Raises:
        DataError: a store is missing or damaged.
        UserError: the model's vocabulary is smaller than the tokenizer's.
    """
    parts = experiment.data
    if jax.process_index() == 0:
        open_stores(parts.train, cache=runtime.data_dir, progress=progress)
    barrier("data")
    train = open_stores(parts.train, cache=runtime.data_dir, progress=progress)
    validation = open_stores(parts.validation, cache=runtime.data_dir, progress=progress) or train
    for store in (*train, *validation):
        if store.vocab > experiment.model.vocab:
            raise UserError(
                f"model.vocab is {experiment.model.vocab}, but the tokenizer of {store.name} has {store.vocab} tokens; "
                f"set model.vocab to at least {store.vocab}"
            )
    return train, validation


def train(experiment: Experiment, runtime: Runtime, source: Path | None) -> int:
    """Trains, or goes on, or says that the work is done; together with the other processes of `runtime.distributed`.

    Raises:
        UserError, DataError, StorageError, Diverged, Preempted: see `errors`.
    """
    with together(runtime.distributed):
        _train(experiment, runtime, source)
    return 0


def _train(experiment: Experiment, runtime: Runtime, source: Path | None) -> None:
    """In one process, of one or several."""
    from slmjax.data.build_progress import show_progress

    folder = Path(runtime.workdir or f"runs/{experiment.name}")
    with show_progress() as progress:
        stores, held_out = open_data(experiment, runtime, progress)
    config = runs.describe(experiment, runtime, [*stores, *held_out])
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
        _run(experiment, runtime, folder, config, changed, stores, held_out, source.parent if source else Path())
    if first:
        print(f"done: {folder}")
        print(_next_steps(folder, experiment.model))


def _run(
    experiment: Experiment,
    runtime: Runtime,
    folder: Path,
    config: dict[str, Any],
    changed: Sequence[str],
    stores: Sequence[TokenStore],
    held_out: Sequence[TokenStore],
    code: Path,
) -> None:
    """The training itself, in a folder that is held. `code`: the folder of the experiment's file."""
    first = jax.process_index() == 0
    if first:
        _copy_tokenizer(stores[0], folder)

    built = build(replace(experiment, objective=experiment.objective.bound(stores[0].tokenizer().roles)), runtime)
    frozen = jax.device_put(built.objective.frozen, NamedSharding(built.program.mesh, PartitionSpec()))
    loader = Loader(
        experiment.data,
        stores,
        host=jax.process_index(),
        hosts=jax.process_count(),
        prefetch=runtime.reader,
        cache=runtime.data_dir,
    )
    peak, peak_source = peak_flops(built.compute.dtype)
    slow = probe_bf16() if built.compute.dtype == "bfloat16" and jax.default_backend() == "cpu" else None
    flops = flops_per_token(experiment.model, experiment.data.length, experiment.objective.predicted)
    tracker, say = _open_trackers(experiment, runtime, folder, config, changed, code) if first else (Silent(), silent)
    say(f"{experiment.name} in {folder}, fingerprint {config['fingerprint'][:12]}")
    say(_summary(experiment, built, stores, peak, peak_source))
    if slow:
        say(f"warning: {slow}")
    loop(
        built.program,
        data=loader,
        steps=experiment.steps,
        workdir=folder,
        tracker=tracker,
        guard=experiment.guard,
        checkpoints=runtime.checkpoints,
        hooks=_hooks(experiment, runtime, held_out, built, done=latest_step(folder / "checkpoints") or 0),
        frozen=frozen,
        speed=Speed(flops_per_token=flops.attention, peak_flops=peak),
        log_every=runtime.log_every,
        say=say,
    )


def _open_trackers(
    experiment: Experiment, runtime: Runtime, folder: Path, config: dict[str, Any], changed: Sequence[str], code: Path
) -> tuple[Tracker, Callable[[str], None]]:
    """Everything that records the run, with the run's identities of the checkpoint it goes on from."""
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


def _hooks(
    experiment: Experiment, runtime: Runtime, held_out: Sequence[TokenStore], built: Built, done: int
) -> list[Hook]:
    """Evaluation, samples and profiling, those that are asked for."""
    hooks: list[Hook] = []
    evaluation = experiment.evaluation
    if evaluation.every and all(store.count("validation", "tokens") for store in held_out):

        def batches() -> Iterator[Batch]:
            return validation_batches(
                experiment.data,
                held_out,
                evaluation.batches,
                host=jax.process_index(),
                hosts=jax.process_count(),
                cache=runtime.data_dir,
            )

        hooks.append(Evaluate(every=evaluation.every, batches=batches))
    if runtime.samples.every:
        hooks.append(Sample(every=runtime.samples.every, generate=_sampler(experiment, runtime, held_out[0], built)))
    if runtime.profile:
        hooks.append(Profile.of(done, experiment.steps))
    return hooks


def _sampler(experiment: Experiment, runtime: Runtime, store: TokenStore, built: Built) -> Callable[[Params], str]:
    """Parameters -> the continuation of each prompt, compiled once."""
    from slmjax.evals.generate import Generator
    from slmjax.evals.sampling import sampler

    samples = runtime.samples
    rule = sampler(temperature=samples.temperature)
    generator = Generator(generative(experiment.model), None, store.tokenizer(), built.compute)

    def write(params: Params) -> str:
        made = generator.with_params(params)(
            samples.prompts, sampler=rule, max_tokens=samples.tokens, seed=experiment.seed
        )
        return "\n\n".join(prompt + new.text for prompt, new in zip(samples.prompts, made, strict=True))

    return write


def _summary(experiment: Experiment, built: Built, stores: Sequence[TokenStore], peak: float, source: str) -> str:
    """Two lines on what is about to happen."""
    mesh = ", ".join(f"{name}={n}" for name, n in built.program.mesh.shape.items())
    tokens = experiment.steps * experiment.data.batch * experiment.data.length
    known = sum(store.count("train", "tokens") for store in stores)
    parameters, seen, ceiling = (si(x).strip() for x in (parameter_count(experiment.model), tokens, peak))
    return (
        f"{parameters} parameters; {experiment.steps} steps of {experiment.data.batch} x {experiment.data.length}: "
        f"{seen} tokens, {tokens / known:.2f} epochs of {', '.join(store.name for store in stores)}; "
        f"{jax.device_count()} {jax.devices()[0].platform} ({mesh}), {built.compute.dtype}, "
        f"matmul ceiling {ceiling}FLOP/s ({source})"
    )


def _copy_tokenizer(store: TokenStore, folder: Path) -> None:
    """The run can be evaluated, sampled and exported without its data."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(store.tokenizer_path / name, folder / name)


def _check_agreement(fingerprint: str) -> None:
    """
    Raises:
        UserError: this process was given another experiment than the first.
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
