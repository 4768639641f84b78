"""In a worker: maps on the model's layers before they are compiled, buffers before each pass."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu_worker import Worker

from innsteer.backends.menu import MARK, Dish
from innsteer.backends.ragged import Ragged, Seat
from innsteer.backends.vllm_plugin import admission, gate, op, settings
from innsteer.errors import InputError, LayoutError, RefusedError
from innsteer.files import canonical
from innsteer.site import Site


def install() -> None:
    """Wrap the worker; a second time does nothing."""
    if not hasattr(Worker.load_model, MARK):
        Worker.load_model = _attaching(Worker.load_model)
        Worker.innsteer_receipt = lambda self, name: self.innsteer.receipt(name)


def _attaching(load_model: Any) -> Any:
    """``load_model`` that leaves a model whose layers steer: before profiling and compilation."""

    @wraps(load_model)
    def attaching(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        config = settings.of(self.vllm_config)
        if config is not None:
            self.innsteer = Desk(self, config)

    setattr(attaching, MARK, True)
    return attaching


class Desk:
    """The steerings of one worker.

    Attributes:
        ragged: rows and receipts. keys: the operation of each layer that carries one.

    Raises:
        RefusedError, LayoutError, InputError: a configuration, a model or a site in which it would
            not steer right.
    """

    def __init__(self, worker: Any, config: settings.Config) -> None:
        vllm_config, runner = worker.vllm_config, worker.model_runner
        gate.check_config(vllm_config, config["untested"])
        self._blocks = _blocks(runner.get_model(), vllm_config.model_config)
        self._width = vllm_config.model_config.get_hidden_size()
        self._graphs = bool(vllm_config.compilation_config.cudagraph_mode) and (
            worker.device.type == "cuda"
        )
        self._pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1
        scheduler = vllm_config.scheduler_config
        self.ragged = Ragged(
            scheduler.max_num_batched_tokens, scheduler.max_num_seqs, worker.device
        )
        self._v2 = bool(vllm_config.use_v2_model_runner)
        # In the keys, because a compiled graph holds them and may be loaded by another engine.
        whole = hashlib.sha256(canonical(config)).hexdigest()[:12]
        self.keys = {layer: f"{whole}.{layer}" for layer in config["layers"]}
        for layer, key in self.keys.items():
            op.PLACES[key] = self.ragged.places.setdefault(Site(layer), [])
            op.READS[key] = self.ragged.reads.setdefault(Site(layer), [])
            op.attach(self._blocks[layer], key)
        for dish in settings.menu(config).dishes:
            self.add(dish)
        self._wrap(runner)

    def add(self, dish: Dish) -> None:
        """One more steering, on layers that carry the operation."""
        for site, part in dish.interventions.items():
            if site.stream != "residual" or site.layer not in self.keys:
                raise RefusedError(
                    f"steering {dish.name!r} at site {site}",
                    expected="the output of a block: residual sites alone are served by vLLM",
                    remedy="serve it by the hf backend, or fit it at block outputs",
                )
            if part.width != self._width:
                raise InputError(
                    f"steering {dish.name!r} of width {part.width}, where this model has "
                    f"{self._width}",
                    remedy="it was fitted on another model; fit it on this one",
                )
        if missing := [s for s in dish.interventions.read_sites if s.layer not in self.keys]:
            raise RefusedError(
                f"steering {dish.name!r}, which reads the output of block {missing[0].layer}",
                expected="an engine whose configured layers hold that one too",
                remedy="start it by innsteer serve, which names all layers",
            )
        if dish.interventions.across and self._pipeline:
            raise RefusedError(
                f"steering {dish.name!r}, which acts across sites, under pipeline parallelism",
                expected="all blocks in one process: nothing is carried to another",
                remedy="start without --pipeline-parallel-size",
            )
        if dish.interventions.contextual and self._graphs:
            raise RefusedError(
                f"steering {dish.name!r}, which reads prompts, in CUDA graphs",
                remedy="start vLLM with --enforce-eager",
            )
        self.ragged.add(dish.interventions, len(dish.behaviours))

    def receipt(self, name: str) -> list[tuple[int, dict[str, Any]]] | None:
        """See ``Ragged.take``; as plain data."""
        found = self.ragged.take(name)
        return None if found is None else [(n, asdict(tally)) for n, tally in found.items()]

    @contextmanager
    def watching(self, layers: Sequence[int]) -> Iterator[dict[str, dict[int, Tensor]]]:
        """Rows ``[tokens, d]`` of the layers' outputs, by request, once the context is left."""
        parts: dict[str, dict[int, list[Tensor]]] = {}
        found: dict[str, dict[int, Tensor]] = {}

        def see(layer: int, h: Tensor) -> None:
            row = 0
            for seat in self.ragged.batch:
                mine = parts.setdefault(seat.request, {}).setdefault(layer, [])
                mine.append(h[row : row + seat.tokens].float().cpu())
                row += seat.tokens

        op.SEEN.update({self.keys[layer]: partial(see, layer) for layer in layers})
        try:
            yield found
        finally:
            op.SEEN.clear()
        for request, rows in parts.items():
            found[request] = {layer: torch.cat(each) for layer, each in rows.items()}

    # --- around a pass ---------------------------------------------------------------------------

    def _wrap(self, runner: Any) -> None:
        """Wrap one runner's methods; they are attributes of the instance then."""
        if self._v2:
            gate.check_names(gate.V2)
        execute = runner.execute_model
        prepare = runner.prepare_inputs if self._v2 else runner._prepare_inputs

        @wraps(execute)
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._news(scheduler_output)
            try:
                result = execute(scheduler_output, *args, **kwargs)
                # A replayed graph runs no Python; what it did stands in the counters alone.
                if not self._graphs:
                    self.ragged.check()
                return result
            finally:
                self.ragged.idle()

        @wraps(prepare)
        def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            batch = prepare(scheduler_output, *args, **kwargs)
            self.ragged.plan(
                self._seats_v2(batch) if self._v2 else self._seats(runner, scheduler_output)
            )
            return batch

        runner.execute_model = execute_model
        setattr(runner, "prepare_inputs" if self._v2 else "_prepare_inputs", prepare_inputs)

    def _news(self, scheduler_output: Any) -> None:
        """Requests that ended, were put off, or came."""
        for request in scheduler_output.finished_req_ids:
            self.ragged.leave(request)
        for request in scheduler_output.preempted_req_ids or ():
            self.ragged.put_off(request)
        for new in scheduler_output.scheduled_new_reqs:
            order = admission.order_of(new.sampling_params)
            if order is not None:
                self.ragged.admit(new.req_id, order)

    @staticmethod
    def _seats(runner: Any, scheduler_output: Any) -> list[Seat]:
        """The batch in the V1 runner's order."""
        batch = runner.input_batch
        names = batch.req_ids[: batch.num_reqs]
        starts = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        tokens = scheduler_output.num_scheduled_tokens
        return [Seat(name, start, tokens[name]) for name, start in zip(names, starts, strict=True)]

    @staticmethod
    def _seats_v2(batch: Any) -> list[Seat]:
        """The batch in the V2 runner's order."""
        starts = batch.num_computed_tokens_np.tolist()
        tokens = batch.num_scheduled_tokens.tolist()
        return [
            Seat(name, start, count)
            for name, start, count in zip(batch.req_ids, starts, tokens, strict=False)
        ]


def _blocks(model: nn.Module, model_config: Any) -> nn.ModuleList:
    """The decoder layers: the one list of modules as long as the config says."""
    layers = model_config.hf_text_config.num_hidden_layers
    found = [
        part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == layers
    ]
    if len(found) != 1:
        raise LayoutError(
            f"{type(model).__name__} with {len(found)} lists of {layers} modules",
            expected="one, of its decoder layers",
        )
    return found[0]
