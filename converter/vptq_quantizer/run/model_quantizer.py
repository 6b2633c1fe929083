"""From a dense checkpoint to a VPTQ one, decoder layer by decoder layer, each kept once it is done."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vptq_converter.architectures import LINEARS
from vptq_converter.checkpoint import Checkpoint
from vptq_converter.config import Section
from vptq_converter.dense_gguf.checkpoint import open_checkpoint
from vptq_converter.layer import LayerConfig

from vptq_quantizer.calibration.hessians import HESSIAN_OF, HessianStore, collect, model_key
from vptq_quantizer.calibration.sequential import GROUPS, Streams, target
from vptq_quantizer.calibration.text import Calibration, check_context, read_calibration
from vptq_quantizer.dense_model import DenseModel, linears
from vptq_quantizer.layers.finetune import finetune_linear
from vptq_quantizer.layers.layer_quantizer import Problem, quantize_linear
from vptq_quantizer.layers.quantized_linear import QuantizedLinear, decoded
from vptq_quantizer.options import QuantizeOptions, option_error
from vptq_quantizer.planning.file_size import FileSizes
from vptq_quantizer.planning.plan import VECTOR_LENS, Plan, uniform_plan
from vptq_quantizer.planning.target import measure_costs
from vptq_quantizer.run.checkpoint_writer import CheckpointWriter, Part, copied_files, earlier_plan, stored
from vptq_quantizer.run.matrices import quantize_matrices
from vptq_quantizer.run.report import dry_report, layer_bits, run_report, source_of
from vptq_quantizer.run.side_by_side import MOST_IN_FEATURES, Result, side_by_side
from vptq_quantizer.run.verdict import NORM, measure_verdict
from vptq_quantizer.training.end_to_end import MEASURED_TOKENS, tune
from vptq_runtime.commands.progress import RunProgress
from vptq_runtime.errors import OptionError, OutOfMemoryError, UnsupportedError
from vptq_runtime.evaluate.dense_model import is_out_of_memory

EXPECTED = "expected_kl_divergence"  # of a plan, where it is written down
FULL_BITS = 16  # a source of fewer bits a weight has been quantised already


@contextmanager
def _memory_errors() -> Iterator[None]:
    """PyTorch's out of memory as ours."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"out of memory: {error}") from error
        raise


@_memory_errors()
def quantize(
    dense_model: str | Path,
    out_dir: str | Path,
    options: QuantizeOptions,
    *,
    calibration: Sequence[str | Path] = (),
    hessians: str | Path | None = None,
    layers: tuple[int, int] | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    warn: Callable[[str], None] = lambda message: None,
    tell: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Quantises dense_model (a directory, a repo id of the hub, a dense GGUF file) into out_dir.

    calibration: text files; may be empty where `hessians`, a directory, has them all. layers: the first and
    the last decoder layer to do; the checkpoint is put together by whoever finds all parts in out_dir/.parts.
    What an earlier call has finished there is taken over. warn is told, in a line each, what is poorer than
    it could be; tell now and then what is done, how much of all that is, and how long the rest may take.

    Without options.vector_len and centroids, each matrix gets its own configuration (planning/): part of what
    this run is, and a later attempt takes it over. dry_run: only that plan is made, nothing is
    written; "plan" in what is returned says it.

    Returns what report.json says: "layers" (report.py), the summary, "plan" with the size of the file to
    come, "finished", and then "verdict" (verdict.py) where there is text. Raises VPTQError for
    whatever is wrong with the model, the text, the options or the disk; what is finished stays.
    """
    checkpoint = open_checkpoint(dense_model)
    copied_files(checkpoint)  # what is wrong with them is better said before the work
    dense = DenseModel(checkpoint, _device(device))
    stored_as = source_of(dense.model)
    if stored_as["bits_per_weight"] < FULL_BITS:
        types = ", ".join(stored_as["types"])
        warn(
            f"{checkpoint.name}: found weights of {stored_as['bits_per_weight']:.3g} bits ({types}) as the "
            "source: what they have lost stays lost, and errors are measured from them"
        )
    options = options.for_model(dense.model.hyperparameters.n_ctx_train)
    plan = uniform_plan(options, dense.n_layers, dense.linear_shapes()) if options.by_hand else None
    name = os.fsencode(Path(out_dir).absolute().name).decode(errors="replace")
    sizes = FileSizes.of(checkpoint, dense.model, name)
    by_hand = (plan or Plan({})).with_matrices(options, sizes.shapes())
    _warn_of_vector_lens(by_hand, warn)
    wanted = _range(layers, dense.n_layers)
    text = _text(dense, options, by_hand.matrices, calibration, warn)
    if options.sequential and hessians is not None:
        raise OptionError(
            "--hessians: found --sequential, too, expected one of them: those that are kept are of the dense "
            "model's inputs"
        )
    model = model_key(checkpoint)
    store = None
    source = text.key if text else None
    if hessians is not None:
        source = source or HessianStore(Path(hessians), model, None).text()
        store = HessianStore(Path(hessians), model, source)
    what = {**asdict(options), "model": model, "calibration": source}
    expected = None
    if plan is None:
        plan, expected = _plan(dense, options, text, sizes, earlier_plan(Path(out_dir), what), tell)
        what["plan"] = {**plan.quantization_config(_biases(dense)), EXPECTED: expected}
    plan = plan.with_matrices(options, sizes.shapes())
    written = {**plan.quantization_config(_biases(dense)), EXPECTED: expected}
    planned = {"bits_per_weight": plan.bits_per_weight, "file_bytes": sizes.file(plan), **written}
    if dry_run:
        return dry_report(checkpoint.name, asdict(options), planned, dense.n_layers)
    run = _Run(dense, options, plan, planned, _stored_dtype(checkpoint), text, store, tell)
    with CheckpointWriter(Path(out_dir), what) as writer:
        return run.into(writer, wanted)


def _text(
    dense: DenseModel,
    options: QuantizeOptions,
    matrices: Mapping[str, LayerConfig],
    files: Sequence[str | Path],
    warn: Callable[[str], None],
) -> Calibration | None:
    """The calibration text; None without files, where nothing needs any. matrices: the plan's."""
    if files:
        assert options.seq_len is not None
        check_context(options.seq_len, dense.model.hyperparameters.n_ctx_train)
        text = read_calibration(
            dense.checkpoint, dense.n_vocab, files, options.samples, options.seq_len, options.seed
        )
        _warn_of_text(text, options, dense.linear_shapes(), warn)
        return text
    if options.end_to_end:
        raise OptionError("--end-to-end: found no --calibration, expected text to train on")
    if options.sequential:
        raise OptionError("--sequential: found no --calibration, expected text to run through the model")
    if matrices:
        raise OptionError(
            f"--calibration: found no text, expected some: {' and '.join(matrices)} are quantised by how "
            "often tokens come"
        )
    return None


def _plan(
    dense: DenseModel,
    options: QuantizeOptions,
    text: Calibration | None,
    sizes: FileSizes,
    earlier: Section | None,
    tell: Callable[[str], None],
) -> tuple[Plan, float | None]:
    """The plan that an earlier attempt has made, or a new one, and the KL divergence to expect."""
    if earlier is not None:
        shapes = dense.linear_shapes()
        modules = {f"model.layers.{n}.{name}": shapes[name] for n in range(dense.n_layers) for name in shapes}
        expected = earlier.values.get(EXPECTED)
        if expected is not None and not (isinstance(expected, float) and expected >= 0):
            raise earlier.error(EXPECTED, expected, "nats a token, or null")
        return Plan.parse(earlier, modules, _biases(dense)), expected
    with RunProgress(1, 0, tell) as progress:
        costs = measure_costs(
            dense, options, text, sizes if options.fit else None, lambda what: progress.show(f"plan: {what}")
        )
    return costs.plan(options)


@dataclass(frozen=True)
class _Run:
    dense: DenseModel
    options: QuantizeOptions
    plan: Plan
    planned: dict[str, Any]  # what the report says of the plan
    dtype: torch.dtype  # of the new checkpoint
    text: Calibration | None
    store: HessianStore | None
    tell: Callable[[str], None]

    def into(self, writer: CheckpointWriter, wanted: Sequence[int]) -> dict[str, Any]:
        """Does the decoder layers `wanted` that are not there; with all there, makes the checkpoint."""
        n_layers = self.dense.n_layers
        # All are looked at: a wrong one is better found before the work.
        done = {n for n in range(n_layers) if writer.has(n)}
        pending = [n for n in wanted if n not in done]
        layer_size = self.plan.n_weights // n_layers
        all_wanted, before = len(wanted) * layer_size, (len(wanted) - len(pending)) * layer_size
        with RunProgress(all_wanted, before, self.tell) as progress:
            parts = self.sequential_parts if self.options.sequential else self.parts
            for n, part in parts(pending, progress, writer):
                writer.write(n, part)
        reports = [writer.read(n, with_tensors=False).report for n in sorted(done.union(pending))]
        options = asdict(self.options)
        if self.text is None:  # what Hessians from disk are of is not known
            options |= {"samples": None, "seq_len": None}
        source = source_of(self.dense.model)
        report = run_report(self.dense.checkpoint.name, source, options, n_layers, reports)
        report["plan"] = self.planned
        if report["finished"]:
            if self.plan.matrices and self.text is not None:
                report["matrices"] = self.matrices(writer, self.text)
            if self.options.end_to_end and self.text is not None:
                report["end_to_end"] = self.tune(writer, self.text)
            verdict = self.verdict(writer)
            if verdict is not None:
                report["verdict"] = verdict
            writer.finish(self.dense, self.dtype, self.quantization_config(), report)
        return report

    def parts(
        self, pending: Sequence[int], progress: RunProgress, _: CheckpointWriter
    ) -> Iterator[tuple[int, Part]]:
        """Quantises the decoder layers `pending` (numbers that rise), one in memory at a time."""
        begin = time.monotonic()
        for n, layer, hessians in self._layers(pending, progress):
            wanted = {name: (m.weight, hessians[HESSIAN_OF[name]]) for name, m in linears(layer).items()}
            yield n, self._part(n, layer, [wanted], lambda _: None, begin, progress)
            begin = time.monotonic()

    def sequential_parts(
        self, pending: Sequence[int], progress: RunProgress, writer: CheckpointWriter
    ) -> Iterator[tuple[int, Part]]:
        """The same with the inputs that the quantised layers before give: calibration/sequential.py.

        Layers that are finished are read, so that those after see what a whole run would show them.
        """
        if not pending:
            return
        lacking = [n for n in range(pending[-1]) if n not in pending and not writer.has(n)]
        if lacking:
            raise OptionError(
                f"--layers: found layer {lacking[0]} not finished, expected all before layer {pending[-1]}: "
                "--sequential does them in turn"
            )
        assert self.text is not None
        dense = self.dense.embed(self.text.windows)
        quantised = dense.clone()
        for n in range(pending[-1] + 1):
            begin = time.monotonic()
            progress.show(f"layer {n}: calibration")
            layer = self.dense.load_layer(n)
            streams = Streams(self.dense, dense, quantised, n, layer, copy.deepcopy(layer))
            if n in pending:
                groups = self._sequential_groups(streams)
                yield n, self._part(n, layer, groups, streams.replace, begin, progress)
            else:
                streams.replace(self._finished(n, writer))
            if n != pending[-1]:
                streams.advance()

    def _sequential_groups(self, streams: Streams) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        modules = linears(streams.dense_layer)
        for of, names in GROUPS.items():
            hessian, cross = streams.statistics(of)
            yield {
                name: (target(modules[name].weight, hessian, cross, self.options.damping), hessian)
                for name in names
            }

    def _finished(self, n: int, writer: CheckpointWriter) -> dict[str, Tensor]:
        """The weights that a finished decoder layer's linear layers stand for, by their path in it."""
        prefix = f"model.layers.{n}."
        own = {name.removeprefix(prefix): tensor for name, tensor in writer.read(n).tensors.items()}
        return {
            path: weight.to(self.dense.device) for path, weight in decoded(self.plan.layer(n), own).items()
        }

    def _layers(
        self, pending: Sequence[int], progress: RunProgress
    ) -> Iterator[tuple[int, nn.Module, dict[str, Tensor]]]:
        """The decoder layers `pending`, dense, with their Hessians.

        The text goes through the dense model up to the last layer whose Hessians are not on disk. Inputs are
        the dense model's, not those that the quantised layers before would give: so Hessians serve every set
        of options, and layers can be done in any order, by several machines.
        """
        missing = [n for n in pending if not (self.store and self.store.has(n))]
        if missing and self.text is None:
            raise OptionError(
                f"--calibration: found no text, and no Hessians of layer {missing[0]}, expected either"
            )
        hidden = self.dense.embed(self.text.windows) if self.text and missing else torch.empty(0)
        for n in range(max(pending, default=-1) + 1):
            runs = n <= max(missing, default=-1)
            if not runs and n not in pending:
                continue
            layer = self.dense.load_layer(n)
            hessians = {}
            progress.show(f"layer {n}: calibration")
            if n in missing:
                hessians = collect(self.dense, n, layer, hidden)
                if self.store:
                    self.store.save(n, hessians)
            elif runs:
                self.dense.advance(n, layer, hidden)
            if n in pending and self.store and n not in missing:
                sizes = {name: self.dense.linear_shapes()[name][1] for name in HESSIAN_OF.values()}
                hessians = self.store.load(n, sizes)
            if n in pending:
                yield n, layer, hessians

    def _part(
        self,
        n: int,
        layer: nn.Module,
        groups: Iterable[Mapping[str, tuple[Tensor, Tensor]]],
        use: Callable[[dict[str, Tensor]], None],
        begin: float,
        progress: RunProgress,
    ) -> Part:
        """Decoder layer n, quantised; begin: when work on it began.

        groups: one after the other, linear layers by name, the weight that each is to stand for and its
        Hessian. use is given a group's quantised weights before the next group is asked for.
        """
        modules = linears(layer)
        tensors = {
            name: stored(self.dense.checkpoint.tensor(name), self.dtype)
            for name in self.dense.layer_tensors(n)
            if name.removeprefix(f"model.layers.{n}.").removesuffix(".weight") not in modules
        }
        configs = self.plan.layer(n)
        reports = {}
        for group in groups:
            tasks = [partial(self._linear, n, name, *wanted, progress) for name, wanted in group.items()]
            weights = {}
            for name, (quantised, report) in zip(group, self._done(tasks), strict=True):
                weights[name] = quantised.weight()
                fields = quantised.tensors(self.dtype)
                reports[name] = report | layer_bits(fields, configs[name])
                tensors |= {f"model.layers.{n}.{name}.{field}": tensor for field, tensor in fields.items()}
                error = list(report["proxy_error"].values())[-1]
                progress.advance(f"layer {n}: {name}: proxy error {error:.4f}", modules[name].weight.numel())
            use(weights)
        return Part(tensors, {"layer": n, "seconds": time.monotonic() - begin, "linears": reports})

    def _done(self, tasks: Sequence[Callable[[], Result]]) -> Iterable[Result]:
        """What the tasks return, in their order: side by side where the matrices are small."""
        largest = max(config.in_features for config in self.plan.linears.values())
        if self.dense.device.type == "cpu" and largest <= MOST_IN_FEATURES:
            return side_by_side(tasks)
        return (task() for task in tasks)

    def _linear(
        self, n: int, name: str, weight: Tensor, hessian: Tensor, progress: RunProgress
    ) -> tuple[QuantizedLinear, dict[str, Any]]:
        """A linear layer of decoder layer n, and what to report: the proxy error and the seconds of each
        step."""
        errors: dict[str, float] = {}
        seconds: dict[str, float] = {}
        begin = time.monotonic()
        problem = Problem.of(
            weight, hessian.to(weight.device), self.options.damping, f"tensor model.layers.{n}.{name}.weight"
        )

        def step(done: str, layer: QuantizedLinear) -> None:
            errors[done] = problem.relative_error(layer.weight())
            seconds[done] = time.monotonic() - begin - sum(seconds.values())

        def show(what: str) -> None:
            progress.show(f"layer {n}: {name}, {what}")

        # Seeded one by one: in which order they are done, and in how many runs, does not matter.
        seed = int(
            np.random.SeedSequence([self.options.seed, n, [*LINEARS].index(name)]).generate_state(1)[0]
        )
        generator = torch.Generator().manual_seed(seed)
        config = self.plan.linears[f"model.layers.{n}.{name}"]
        layer = quantize_linear(problem, config, self.options, self.dtype, generator, step, show)
        if self.options.finetune:
            layer = finetune_linear(problem, layer, self.dtype, step, show)
        return layer, {"proxy_error": errors, "seconds": seconds}

    def quantization_config(self) -> dict[str, Any]:
        """Of the new checkpoint, without the method's name."""
        return self.plan.quantization_config(_biases(self.dense))

    def matrices(self, writer: CheckpointWriter, text: Calibration) -> dict[str, Any]:
        """Quantises the plan's matrices, unless they are there: a part with the number n_layers."""
        n_layers = self.dense.n_layers
        if not writer.has(n_layers):
            with RunProgress(1, 0, self.tell) as progress:
                part = quantize_matrices(
                    self.dense, self.plan, self.options, self.dtype, text.windows, progress.show
                )
            writer.write(n_layers, part)
        return writer.read(n_layers, with_tensors=False).report

    def tune(self, writer: CheckpointWriter, text: Calibration) -> dict[str, Any]:
        """Trains the whole model, once all layers are there; what that gives stands beside the parts.

        Under the number n_layers that is the rest of the model's. What is there already is not trained again.
        """
        if writer.has_tuned(self.dense.n_layers):
            return writer.read(self.dense.n_layers, tuned=True, with_tensors=False).report
        parts = {n: writer.read(n) for n in range(self.dense.n_layers)}
        with RunProgress(self.options.end_to_end, 0, self.tell) as progress:
            tuned, report = tune(
                self.dense, self.plan, parts, self.options, self.dtype, text, writer, progress
            )
        for n, tensors in tuned.items():
            writer.write(n, Part(tensors, report), tuned=True)
        return report

    def verdict(self, writer: CheckpointWriter) -> dict[str, float | int] | None:
        """Of the whole model, once all layers are there, and trained if they are to be; None without text."""
        if self.text is None:
            return None
        windows = self.text.held_out(max(1, MEASURED_TOKENS // self.text.windows.shape[1]))
        if windows.shape[1] < 2:
            return None
        n_layers = self.dense.n_layers
        tuned = writer.has_tuned(n_layers)

        def tensors(n: int) -> Mapping[str, Tensor]:
            if n < n_layers:
                return writer.read(n, tuned).tensors
            norm = {NORM: stored(self.dense.checkpoint.tensor(NORM), self.dtype)}
            matrices = writer.read(n).tensors if self.plan.matrices else {}
            return norm | matrices | (writer.read(n, tuned=True).tensors if tuned else {})

        with RunProgress(1, 0, self.tell) as progress:
            return measure_verdict(
                self.dense, self.plan, tensors, self.dtype, windows,
                lambda at: progress.show(f"verdict: {at}"),
            )  # fmt: skip


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise option_error("device", name, "cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise option_error("device", name, "cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(f"--device {name}: PyTorch finds {torch.cuda.device_count()} GPUs here")
    return device


def _range(layers: tuple[int, int] | None, n_layers: int) -> range:
    first, last = layers or (0, n_layers - 1)
    if not 0 <= first <= last < n_layers:
        raise option_error("layers", f"{first}-{last}", f"layers from 0 to {n_layers - 1}")
    return range(first, last + 1)


def _biases(dense: DenseModel) -> set[str]:
    """The modules that have a bias."""
    return {name.removesuffix(".bias") for name in dense.checkpoint.tensors if name.endswith(".bias")}


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 where the dense model has that, else float16: the model's config names one for all."""
    return torch.bfloat16 if checkpoint.tensor("model.embed_tokens.weight").dtype == "BF16" else torch.float16


def _warn_of_vector_lens(plan: Plan, warn: Callable[[str], None]) -> None:
    slow = sorted(plan.vector_lens.difference(VECTOR_LENS))
    if slow:
        warn(
            f"vector length: found {', '.join(map(str, slow))}, expected one of "
            f"{', '.join(map(str, sorted(VECTOR_LENS)))}: the runtime has no kernel for others, and takes "
            "7 to 9 times as long"
        )


def _warn_of_text(
    text: Calibration,
    options: QuantizeOptions,
    shapes: Mapping[str, tuple[int, int]],
    warn: Callable[[str], None],
) -> None:
    n_windows, seq_len = text.windows.shape
    if n_windows < options.samples:
        warn(
            f"--calibration: found text for {n_windows} window{'s' * (n_windows > 1)} of {seq_len} tokens, "
            f"expected --samples {options.samples}"
        )
    largest = max(in_features for _, in_features in shapes.values())
    if text.windows.size < largest:
        warn(
            f"--calibration: found {text.windows.size} tokens, expected at least {largest}, the inputs of "
            "the largest layer: its Hessian lacks directions, which --damping alone stands for"
        )
