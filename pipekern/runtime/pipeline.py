"""The pipeline that users hold."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipekern.errors import CheckpointError, ConfigError, ScheduleError, TransportError
from pipekern.optim import clip
from pipekern.optim.scale import LossScale
from pipekern.parallel.mesh import Mesh
from pipekern.parallel.plan import Plan
from pipekern.plan.offload import Offload
from pipekern.runtime import microbatch, optimizer, pretrained, saving
from pipekern.runtime import move as moving
from pipekern.runtime.assembly import Assembly
from pipekern.runtime.batch import Batch, divide
from pipekern.runtime.executor import Executor
from pipekern.runtime.measure import gathered
from pipekern.runtime.move import Move
from pipekern.runtime.options import Options, Split
from pipekern.runtime.parameters import StageParameters, load
from pipekern.runtime.prompts import Ids, join, prepare
from pipekern.runtime.rebalance import EVERY, Rebalancer
from pipekern.runtime.sampling import Sampling
from pipekern.runtime.skips import Hop
from pipekern.runtime.start import start
from pipekern.runtime.stats import Stats
from pipekern.runtime.training import Training
from pipekern.schedule.ir import Schedule
from pipekern.stage.random import step_key
from pipekern.stage.spec import LayerSpec
from pipekern.trace.timeline import Timeline


class Pipeline:
    """A model cut into stages, trained with micro-batches flowing through them, synchronous and exact.

    ``module`` is an ``nn.Sequential`` (a ``pk.Skip`` where values skip layers), an ``nn.Module`` whose forward runs a
    layer list, or a list of ``LayerSpec``.
    Under a launcher such as torchrun each process is a rank; without one, all ``ranks`` run in this process. The
    gradients after a step are those of the mean loss of the batch, as the unsplit module gives them micro-batch by
    micro-batch.

    * ``loss_fn(output, y)`` returns a scalar, which counts by its samples, or a pair (sum, count).
    * ``devices``: one a rank, in any mix (``["cuda:0", "cuda:1", "cpu"]``), or one for all; by default the GPUs, else
      the CPU, where the process keeps the memory that it frees, see ``runtime/heap.py``, and torch's threads. Under a
      launcher this process's entry counts. ``chunks``: stages a rank; by default the schedule's own.
    * ``schedule``: a name, a ``Schedule``, or ``"auto"``: what has the shortest simulated step.
    * ``split``: units a stage, or ``LayerCosts`` from ``pk.profile``; by default estimated.
    * ``recompute``: ``"full"`` keeps the input of each unit and runs it again in the backward, ``"selective"`` also
      keeps the results of its products; the same random numbers, the same gradients, less memory, more time.
      ``"auto"`` chooses for each unit, by the costs in ``split``, what adds the least time within ``memory``.
    * ``memory``: bytes that a rank may take, one number or one a rank, for weights, gradients, two moments of Adam,
      activations and messages; by default what is free on its device, or on its machine for each rank there.
    * ``on_nonfinite``: a step with a loss or gradient that is not finite raises ``NumericsError`` on all ranks, and
      leaves ``.grad`` for a look (``"raise"``); or its own gradients are dropped on all of them, ``.grad`` is what it
      was before the step, and the log has a warning (``"skip"``); or nobody looks (``"ignore"``). Stage, rank and
      micro-batch where it arose are named, for which such a step runs once more.
    * ``inputs``: parameters of the module's forward that ``x`` gives, by a dict or by a tuple in this order; if None,
      those without a default, else the first.
    * ``fuse_loss``: a last layer that is an ``nn.Linear``, and an ``nn.CrossEntropyLoss`` or ``pk.nn.CrossEntropyLoss``
      without class weights, run as one: the logits of all tokens are never there. If None, where the last stage is on a
      GPU: on a CPU it saves memory and costs time. ``loss_path`` says what is done.
    * ``codec``: how floats travel between CUDA devices: as they are, float32 as ``"bf16"``, or all as ``"fp8"`` with a
      scale each 128 values; link by link, ``{"0>1": "bf16"}`` from stage 0 to 1; or ``"auto"``, with the least loss
      that the costs in ``split`` hide at each link's measured bandwidth. ``codecs`` says what is done.
    * ``mesh``: a ``DeviceMesh`` with dimensions out of "pp", "dp" and "tp", or their sizes, ``{"pp": 2, "dp": 2}``.
      Each data-parallel replica passes a batch of its own, and gradients are those of the mean over all. They are
      summed once a step, as soon as a stage's last weight work is done.
    * ``precision``: ``"bf16"`` or ``"fp16"``: stages compute in it, gradients are summed in float32, and
      ``parameters()`` are float32 masters, which any optimizer can change. fp16 has a ``loss_scale``, by default a
      ``pk.optim.LossScale``: a step that overflows is left out on all ranks, its ``.grad`` is None, the scale lowered.
    * ``zero``: what replicas share out: 1 optimizer state and masters, 2 gradients too, 3 the weights between a step's
      last use and the next step. ``parameters()`` are then one-dimensional shards, ``state_dict()`` is whole.
    * ``offload``: the share, 0 to 1, by which the most activations that a rank holds shall fall: they are put away in
      host memory between forward and backward, as far as the schedule leaves time (see ``offloads``). ``"auto"``: what
      is more than ``memory``, by the bytes in ``split``. On a CPU ``offload_folder`` is where, in unnamed files.
    * ``tensor_parallel``: where ``mesh`` has "tp", which modules are in parts, and how: styles of
      ``torch.distributed.tensor.parallel`` by patterns of module names, such as ``{"blocks.*.up": ColwiseParallel()}``,
      or ``"auto"`` for the ``tp_plan`` of a Hugging Face model. Their parameters are DTensors, or with ``zero`` shards
      of a part; all parts are given the same batches. A module between must take its width from its input, as
      ``view(..., -1, head_dim)`` does. Each part draws random numbers of its own between a module whose output is in
      parts and one whose output is whole.
    * ``rebalance``: with ``"auto"`` every fifth step begins with :meth:`rebalance`: a rank that becomes slow gets fewer
      layers, and has them back when it is as before.
    * ``timeout``: seconds that a silent peer, or all ranks waiting at once, are waited for. A process that is stopped,
      but not by a debugger, gets an eighth of it, and at least one second.

    Raises ``ConfigError`` or ``ScheduleError`` before anything starts. Tensors of a batch have samples as first
    dimension. After an exception a pipeline in one process can be used again (clear the gradients); one among processes
    is closed.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[LayerSpec],
        *,
        loss_fn: Callable[[Any, Any], Any],
        microbatches: int,
        ranks: int | None = None,
        devices: Sequence[str | torch.device] | None = None,
        chunks: int | None = None,
        schedule: str | Schedule = "1f1b",
        split: Split = None,
        recompute: str = "none",
        on_nonfinite: str = "raise",
        seed: int = 0,
        transport: str = "auto",
        timeout: float = 60.0,
        inputs: Sequence[str] | None = None,
        memory: float | Sequence[float] | None = None,
        fuse_loss: bool | None = None,
        codec: str | Mapping[str, str] = "none",
        mesh: Mesh = None,
        precision: str | None = None,
        zero: int = 0,
        loss_scale: LossScale | None = None,
        offload: float | str | None = None,
        offload_folder: str | None = None,
        tensor_parallel: Plan = None,
        rebalance: str | None = None,
    ):
        self._options = Options(
            module, loss_fn, microbatches, ranks, devices, chunks, schedule, split, recompute, on_nonfinite, seed,
            transport, timeout, inputs, memory, fuse_loss, codec, mesh, precision, zero, loss_scale, offload,
            offload_folder, tensor_parallel, rebalance,
        )  # fmt: skip
        self.loss_scale = (loss_scale or LossScale()) if precision == "fp16" else None
        self._step = 0
        self._closed = ""
        self._rebalancer = Rebalancer()
        self._optimizer: torch.optim.Optimizer | None = None
        self._take(start(self._options), None)
        with self._running():
            self._parts.equalise()
            self._parts.lay_out()

    def _take(self, parts: Assembly, loss_is_pair: bool | None) -> None:
        """Go on with ``parts``."""
        self._parts = parts
        self.loss_path, self.codecs = parts.loss_path, parts.codecs
        self._training = Training(parts, self._options.on_nonfinite, self.loss_scale, loss_is_pair)
        self._executor: Executor = parts.train
        self._finalizer = weakref.finalize(self, parts.transport.close)

    # -- steps

    def train_step(self, x: Any = None, y: Any = None) -> torch.Tensor:
        """Forward and backward of one batch; adds to ``.grad``. Returns its mean loss, the same 0-d tensor on every
        rank.

        ``x`` is needed where the first stage is, ``y`` where the last is; elsewhere they may be None.
        """
        if self._options.rebalance and self._step % EVERY == 0:
            self.rebalance()
        with self._running():
            loss, trouble = self._training.step(self._batch(x, y, training=True), self._run)
            self._step += 1
        if trouble:
            self._training.guard.report(trouble)
        return loss

    def eval_step(self, x: Any = None, y: Any = None) -> Any:
        """Forward of one batch in evaluation mode, without gradients and without changing a buffer or a random number.

        With ``y`` returns the mean loss, on every rank; without, the outputs where the last stage is and None
        elsewhere.
        """
        parts = self._parts
        with self._running(), parts.evaluating():
            batch = self._batch(x, y, training=False)
            self._run(parts.evaluate, batch)
            loss = parts.verdict(batch).loss
            parts.refuse_held()
        if loss is not None or not batch.outputs:
            return loss
        return microbatch.join(batch.outputs)

    def generate(
        self,
        ids: Ids,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_token_id: int | None = None,
    ) -> Ids:
        """The prompts ``ids`` with at most ``max_new_tokens`` more, on every rank; collective, the same call on all.

        ``ids``: int64 (prompts, length), or a list of 1-d tensors of any lengths; the result is alike, on the CPU.
        After ``eos_token_id`` a prompt ends, and a tensor's row is filled up with it. ``temperature`` 0 takes the most
        likely token, as the unsplit model does; above it draws one, of the ``top_k`` most likely and of those that sum
        to ``top_p``, by ``seed``, prompt and token alone, whatever the ranks are (up to rounding of logits).

        The model takes tokens to logits (prompts, length, vocabulary), or to what has such ``logits``, in evaluation
        mode. All tokens run again for each new one, unless a layer's forward has a parameter ``cache`` (see
        ``pk.Cache``): then the new one runs alone, and every module that looks at positions must take one. Nothing that
        training owns changes. Raises ``ConfigError``, and ``NumericsError`` for logits that are not finite.
        """
        parts = self._parts
        with self._running(parts.generator.where), parts.evaluating():
            sampling = Sampling(temperature, top_k, top_p, seed)
            groups = prepare(ids, max_new_tokens, sampling, eos_token_id, parts.blueprint.schedule.ranks)
            parts.generator.run(groups, sampling, self._step)
            parts.refuse_held()
        return join(groups, ids, eos_token_id)

    def _batch(self, x: Any, y: Any, training: bool) -> Batch:
        self._executor.times = []
        parts = self._parts
        batch = divide(x, y, parts.blueprint.schedule, parts.stages, training, not parts.star.alone)
        batch.step, batch.step_key = self._step, step_key(self._options.seed, self._step)
        scale = self.loss_scale.value if training and self.loss_scale is not None else 1.0
        parts.loss.start(batch.targets or [], batch.sizes, scale, parts.over_replicas)
        return batch

    def _run(self, executor: Executor, batch: Batch) -> None:
        self._executor = executor
        executor.run(batch)

    @contextmanager
    def _running(
        self, where: Callable[[], str] | None = None, harmless: tuple[type[Exception], ...] = (CheckpointError,)
    ) -> Iterator[None]:
        if self._closed:
            raise TransportError(f"this pipeline is closed: {self._closed}; make a new one")
        try:
            yield
        except harmless:
            raise  # on all ranks alike, and nothing has changed
        except BaseException as error:
            self._fail(error, (where or self._executor.where)())
            raise

    def _fail(self, error: BaseException, where: str) -> None:
        self._parts.clear()
        if isinstance(error, TransportError) and error.rank >= 0:
            error.args = (f"{error}\n  seen by {where}",)
        elif hasattr(error, "add_note"):
            error.add_note(f"pipekern: {where}")
        else:  # Python 3.10
            logging.getLogger("pipekern").error("%s: %s", where, error)
        self._parts.transport.abort(error, where)
        if not self._parts.star.alone:
            self._closed = f"{type(error).__name__} at {where}"
            self._finalizer()

    # -- another split

    @property
    def split(self) -> tuple[int, ...]:
        """Units a stage."""
        return tuple(map(len, self._parts.blueprint.stages))

    def replan(
        self,
        *,
        split: Split = None,
        schedule: str | Schedule | None = None,
        microbatches: int | None = None,
        chunks: int | None = None,
    ) -> Move:
        """Go on with another split, schedule, number of micro-batches or chunks: what is None stays as it was asked
        for. Collective, between two steps.

        Layers go to their new ranks with parameters, gradients, optimizer state and buffers; training goes on bit for
        bit as if they had been there. ``parameters()`` are then others, also those of the optimizer, which must be of
        :meth:`optimizer` (in one process without ``precision`` they stay, and so may the optimizer be any). Raises
        ``ConfigError`` or ``ScheduleError`` on all ranks, where nothing has changed and training can go on.
        """
        now = self._options
        asked = replace(
            now,
            split=now.split if split is None else split,
            schedule=now.schedule if schedule is None else schedule,
            microbatches=now.microbatches if microbatches is None else microbatches,
            chunks=now.chunks if chunks is None else chunks,
        )
        done = self._replan(asked)
        self._options = asked
        return done

    def _replan(self, options: Options) -> Move:
        began, before = time.perf_counter(), self._parts
        with self._running(harmless=(ConfigError, ScheduleError)):
            proposal = moving.propose(before, options, self._optimizer)
        with self._running():
            parts, done = moving.move(before, proposal, self._optimizer, began)
            self._finalizer()
            self._take(parts, self._training.loss_is_pair)
        if self._optimizer is not None:
            optimizer.attach(self._optimizer, parts, self._running)
        if parts.star.number == 0:
            text = "step %d: split %s in place of %s; %d bytes moved in %.3g s"
            logging.getLogger("pipekern").info(text, self._step, done.after, done.before, done.bytes, done.seconds)
        self._rebalancer.learn(done)
        return done

    def rebalance(self) -> Move | None:
        """Go on with the split that is best for the speeds measured in recent steps, where it pays: by 5 % of a step
        at least, and for the move within 200 steps. Collective, between two steps.

        Returns None where nothing moves, or less than 8 steps have been seen. Else as :meth:`replan`; but a split that
        cannot be had (for ``memory``, or a module that it would divide) is told in the log, and training goes on. Costs
        of layers, relative to each other, are those in ``split``, or estimated.
        """
        moving.refuse(self._parts, self._optimizer)
        with self._running():
            self._training.watch.exchange()
        counts = self._rebalancer.better(self._parts, self._training.watch, self._options)
        if counts is None:
            return None
        try:
            return self._replan(replace(self._options, schedule=self._parts.blueprint.schedule, counts=counts))
        except (ConfigError, ScheduleError) as error:  # on all ranks alike, and nothing has changed
            self._rebalancer.refused(counts, error)
            return None

    # -- parameters

    def parameters(self) -> StageParameters:
        """This process's parameters, each once."""
        return StageParameters(self._parts.distinct(), whole=self._parts.star.alone)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This process's parameters under their names in the original module, a tied one under each name it has
        here.
        """
        yield from self._parts.parameters.items()

    def optimizer(self, cls: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        """``cls`` over this process's parameters, also where its stages have none. ``options`` are those of ``cls``.

        A ``pk.optim.AdamW`` clips by one norm over all ranks, so that its steps are collective. ``save`` and ``load``
        take the state of the last one made with that of the model. Raises ``ConfigError`` for a class that looks at
        whole matrices where parameters are in shards.
        """
        self._optimizer = optimizer.bound(lambda: self._parts, self._running, cls, options)
        return self._optimizer

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This process's parameters and buffers under their names in the original module; over all ranks, every name.
        Under ``precision`` the masters; collective where ``zero`` is at least 1.
        """
        return self._parts.state()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy this process's entries out of ``state``, which may be the whole model's. Raises ``ConfigError`` for
        missing ones.
        """
        load(self.state_dict(), state, self._parts.put)

    def save(self, folder: str | os.PathLike[str], data: Any = None) -> None:
        """Write a checkpoint into ``folder``, in the place of the one there; collective, between two steps.

        It holds parameters, buffers, the optimizer's state, steps taken, random states, and ``data``, any JSON of this
        process: where it is in its data. Gradients are not in it. All ranks see one file system. If the save fails at
        any point, the last one is as it was, and so is the pipeline; all ranks raise ``CheckpointError``.
        """
        with self._running():
            saving.save(self._parts, self._optimizer, self.loss_scale, self._step, self._options.seed, folder, data)

    def load(self, folder: str | os.PathLike[str]) -> Any:
        """Go on from the checkpoint in ``folder``, saved with any ranks, split and schedule; collective.

        Returns this rank's ``data`` (rank 0's, where fewer ranks had saved). Bytes are compared with their digests.
        Where anything is damaged or does not fit the model, the optimizer or the seed, all ranks raise
        ``CheckpointError`` with every difference, and nothing has changed.
        """
        with self._running():
            self._step, data = saving.load(self._parts, self._optimizer, self.loss_scale, self._options.seed, folder)
        return data

    def load_weights(self, folder: str | os.PathLike[str]) -> Any:
        """Take parameters and buffers alone out of the checkpoint in ``folder``: to evaluate, or to begin anew from
        them, with any optimizer and seed; collective. All else of this pipeline stays as it is.

        Returns ``data``, and raises ``CheckpointError``, as :meth:`load` does.
        """
        with self._running():
            return saving.load_weights(self._parts, folder)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model into ``folder`` as its own ``save_pretrained`` does, for ``from_pretrained`` of transformers;
        collective. All ranks see one file system, which for a while holds the weights twice.

        Raises ``ConfigError`` for a model that is not of transformers, ``CheckpointError`` where writing fails.
        """
        pretrained.refuse_foreign(self._parts.blueprint.root)
        with self._running():
            pretrained.save_pretrained(self._parts, folder)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients so that their norm over all stages is at most ``max_norm``; collective.

        Returns the norm before, 0-d float64, the same bits on every rank and for every split; a tied weight counts
        once. Where it is not finite (a sum of steps that overflows) ``on_nonfinite`` decides; ``"skip"`` then drops all
        of ``.grad``.
        """
        with self._running():
            total, bad = optimizer.gradient_norm(self._parts, norm_type)
        if bad:
            for parameter in self.parameters() if self._training.guard.drops else ():
                parameter.grad = None
            self._training.guard.report(f"the norm of the gradient of {bad} is not finite")
        clip.scale(self.parameters(), max_norm, total)
        return total

    # -- what happened

    @property
    def skips(self) -> tuple[Hop, ...]:
        """How what is saved by ``pk.Skip`` goes from stage to stage: relayed or directly, see ``Hop``."""
        return self._parts.blueprint.skips

    @property
    def offloads(self) -> Offload:
        """Which activations are put away, from when to when, and what a rank holds at its peak."""
        return self._parts.blueprint.offload

    def timeline(self) -> Timeline:
        """What every rank did in the last step, in microseconds from the first rank's start; collective.

        Ranks on one machine share a clock; between machines rows are shifted by the difference of theirs.
        """
        with self._running():
            return gathered(self._parts, self._executor)

    def stats(self) -> Stats:
        """Where the time of recent training steps went on every rank, and which stage has become slow; collective.

        The log has a line when a stage becomes so; with ``on_nonfinite="ignore"``, where ranks exchange nothing at the
        end of a step, only here.
        """
        with self._running():
            return self._training.watch.stats()

    def close(self) -> None:
        """Leave the job and free links. Parameters and ``.grad`` stay."""
        self._closed = self._closed or "close() was called"
        self._finalizer()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
