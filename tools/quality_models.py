"""The models that tools/compare_quality.py compares: how each is made, measured, and its bits are counted."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vptq_converter import convert
from vptq_converter.facts import read_facts
from vptq_quantizer import QuantizeOptions, quantize

from vptq_runtime import Runtime
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError, VPTQError
from vptq_runtime.evaluate import compare

DENSE = "dense"
LLAMACPP = "llama.cpp"  # in place of a step
OPTIONS = "options"  # likewise: all that a line of options asks for
# What is done to a configuration, each step with all those before it, and what that is in options.
STEPS: dict[str, dict[str, Any]] = {
    "k-means": {"hessian_weights": False, "second_order": False},
    "Hessian-weighted k-means": {"second_order": False},
    "second order": {},
    "fine-tuning": {"finetune": True},
    "end to end": {"finetune": True},  # and end_to_end, as many steps as were asked for
}
MOST_TRIES = 20  # llama-perplexity may end before the thread that prints has come to the last lines
LLAMACPP_TYPES = ("IQ2_XXS", "Q2_K", "Q3_K_M", "Q4_K_M")


@dataclass(frozen=True)
class Measured:
    """A model on the held-out windows; errors are standard errors over tokens, as llama-perplexity's.

    bits: for each weight of the blocks' linear layers, all that is stored for it: codebooks, norms and
    permutations of ours, scales of llama.cpp's, whose types are mixtures.
    kl_divergence: from the dense model, mean in nats a token.
    proxy_error: of the last layer-wise step, mean over the linear layers; None where there is none.
    options: the line of options that made it; None where a step of a configuration did, or llama.cpp.
    """

    name: str
    step: str
    bits: float
    index_bits: float | None
    file_bytes: int
    perplexity: float
    perplexity_error: float
    kl_divergence: float
    kl_divergence_error: float
    top_token_agreement: float
    proxy_error: float | None = None
    options: str | None = None


@dataclass(frozen=True)
class Setting:
    """What all models have in common. Models are made in `models`, what depends on the held-out text in
    `directory`; files that are there are used."""

    dense: Path  # a checkpoint's directory
    directory: Path
    models: Path
    calibration: Path
    held_out: Path
    n_ctx: int
    n_windows: int
    n_threads: int
    samples: int  # windows of calibration text for the Hessians
    end_to_end: int  # steps

    def dense_file(self) -> Path:
        """The dense model as this runtime runs it."""
        path = self.models / "dense.gguf"
        if not path.exists():
            convert(self.dense, path)
        return path

    def plain_file(self) -> Path:
        """The dense model as llama.cpp runs it, in float16."""
        path = self.models / "dense-f16.gguf"
        if not path.exists():
            convert(self.dense, path, dequantize="f16")
        return path

    def runtime(self, path: Path) -> Runtime:
        return Runtime(path, n_ctx=self.n_ctx, n_threads=self.n_threads, device="cpu")


@dataclass(frozen=True)
class Configuration:
    """vV-kK-R, and -oP for P percent of outlier columns (in vectors of 2, 64 centroids), -n for no norm."""

    name: str
    options: QuantizeOptions

    @classmethod
    def parse(cls, name: str) -> Configuration:
        match = re.fullmatch(r"v(\d+)-k(\d+)-(\d+)(?:-o(\d+(?:\.\d+)?))?(-n)?", name, re.ASCII)
        if not match:
            raise OptionError(
                f"--quants: found {name!r}, expected vV-kK-R, vV-kK-R-oPERCENT, or these and -n"
            )
        v, k, r = (int(number) for number in match.groups()[:3])
        options = QuantizeOptions(
            vector_len=v,
            centroids=k,
            res_centroids=r,
            outliers=float(match[4] or 0),
            outlier_vector_len=2,
            outlier_centroids=64,
            normalize=not match[5],
        )
        return cls(name, options)


@dataclass(frozen=True)
class OptionLine:
    """A line `NAME: options of vptq-quantize`, and behind a `|` options of vptq-convert."""

    name: str
    line: str
    quantize: tuple[str, ...]
    convert: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> OptionLine:
        match = re.fullmatch(r"\s*([\w.+-]+):([^|]*)(?:\|([^|]*))?", text)
        if not match or match[1] == DENSE:
            raise OptionError(f"--options: found {text!r}, expected NAME: vptq-quantize's | vptq-convert's")
        quantize, convert = (tuple(shlex.split(part or "")) for part in match.groups()[1:])
        line = " | ".join(" ".join(part) for part in (quantize, convert) if part)
        return cls(match[1], line, quantize, convert)


def measured_line(setting: Setting, line: OptionLine) -> Measured:
    """Runs vptq-quantize, which goes on where it was stopped, and vptq-convert, and measures."""
    checkpoint = setting.models / line.name
    file = checkpoint.with_name(f"{line.name}.gguf")
    if not (checkpoint / "config.json").exists():  # which is written last
        text = ["--calibration", str(setting.calibration)]
        sizes = ["--samples", str(setting.samples), "--seq-len", str(setting.n_ctx)]
        options = [*text, *sizes, *line.quantize]
        _run_module("vptq_quantizer.cli", str(setting.dense), str(checkpoint), *options)
    _run_module("vptq_converter.cli", str(checkpoint), str(file), *line.convert)
    report = json.loads((checkpoint / "report.json").read_text(encoding="utf-8"))
    return replace(
        measured_here(setting, file, line.name, OPTIONS),
        index_bits=report.get("index_bits_per_weight"),
        options=line.line,
    )


def _run_module(module: str, *arguments: str) -> None:
    """One of this project's commands, in a process of its own, which takes its memory with it."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=sys.stderr)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise VPTQError(f"{module} {shlex.join(arguments)}: ended with status {done.returncode}")


def checkpoint_directory(setting: Setting, configuration: Configuration, step: str) -> Path:
    return setting.models / f"{configuration.name}, {step}"


def measured_vptq(setting: Setting, configuration: Configuration, step: str) -> Measured:
    """Quantises, unless an earlier run has done it, converts and measures."""
    options = replace(
        configuration.options,
        **STEPS[step],
        end_to_end=setting.end_to_end if step == "end to end" else 0,
        samples=setting.samples,
        seq_len=setting.n_ctx,
    )
    checkpoint = checkpoint_directory(setting, configuration, step)
    if (checkpoint / "config.json").exists():  # which is written last
        report = json.loads((checkpoint / "report.json").read_text(encoding="utf-8"))
    else:
        report = quantize(
            setting.dense,
            checkpoint,
            options,
            calibration=[setting.calibration],
            hessians=setting.models / "hessians",
        )
    file = checkpoint.with_name(f"{checkpoint.name}.gguf")
    convert(checkpoint, file)
    proxy_error = report["proxy_error"][list(report["proxy_error"])[-1]]
    return replace(
        measured_here(setting, file, configuration.name, step),
        bits=report["bits_per_weight"],  # the file is padded
        index_bits=report["index_bits_per_weight"],
        proxy_error=proxy_error,
    )


def measured_here(setting: Setting, file: Path, name: str, step: str) -> Measured:
    """A GGUF file of vptq-convert, by this runtime."""
    with setting.runtime(file) as runtime, setting.runtime(setting.dense_file()) as dense:
        tokens = runtime.tokenize(command.read_text(str(setting.held_out)))
        if len(tokens) < setting.n_windows * setting.n_ctx:
            windows = f"{setting.n_windows} windows of {setting.n_ctx}"
            raise OptionError(f"--held-out: found {len(tokens)} tokens, expected enough for {windows}")
        found = compare(
            runtime,
            dense,
            tokens,
            method="llama.cpp",
            n_ctx=setting.n_ctx,
            max_windows=setting.n_windows,
        )
    perplexity, kl = found.model.perplexity, found.mean_kl_divergence
    return Measured(
        name=name,
        step=step,
        bits=bits_of_blocks(file),
        index_bits=None,
        file_bytes=file.stat().st_size,
        perplexity=perplexity.value,
        perplexity_error=perplexity.standard_error or 0.0,
        kl_divergence=kl.value,
        kl_divergence_error=kl.standard_error or 0.0,
        top_token_agreement=found.top_token_agreement.value,
    )


def bits_of_blocks(file: Path) -> float:
    """Bits per weight of the blocks' linear layers in a GGUF file."""
    linears = [linear for linear in read_facts(file).linears if linear.name.startswith("blk.")]
    return 8 * sum(linear.nbytes for linear in linears) / sum(linear.n_weights for linear in linears)


@dataclass(frozen=True)
class LlamaCpp:
    """The programs llama-imatrix, llama-quantize and llama-perplexity of a build of llama.cpp."""

    programs: Path
    setting: Setting
    own_embedding: bool = False  # what llama-quantize makes of embedding and output; False: float16
    imatrix_windows: int | None = None  # of the calibration text, the first ones; None: all

    def measured(self, type_name: str) -> Measured:
        """The dense model in one of llama.cpp's types (`dense`: in float16)."""
        file = self.setting.plain_file()
        if type_name != DENSE:
            file = self._quantized(type_name)
        base = self._base()
        for _ in range(MOST_TRIES):
            output = self._perplexity(file, "--kl-divergence-base", str(base), "--kl-divergence")
            lines = ("Mean PPL(Q)", "Mean    KLD", "Same top p")
            figures = [figure for line in lines if (figure := _figure(output, line))]
            if len(figures) == len(lines):
                break
        else:
            raise VPTQError(f"llama-perplexity: found no lines {lines} in what it prints, {MOST_TRIES} times")
        (perplexity, perplexity_error), (kl, kl_error), (agreement, _) = figures
        return Measured(
            name=type_name,
            step=LLAMACPP,
            bits=bits_of_blocks(file),
            index_bits=None,
            file_bytes=file.stat().st_size,
            perplexity=perplexity,
            perplexity_error=perplexity_error,
            kl_divergence=kl,
            kl_divergence_error=kl_error,
            top_token_agreement=agreement / 100,
        )

    def _quantized(self, type_name: str) -> Path:
        models, plain = self.setting.models, str(self.setting.plain_file())
        n_ctx, n_threads = str(self.setting.n_ctx), str(self.setting.n_threads)

        def importance(file: Path) -> None:
            text = str(self.setting.calibration)
            sizes = ["-c", n_ctx, "-t", n_threads, "--no-ppl"]
            if self.imatrix_windows is not None:
                sizes += ["--chunks", str(self.imatrix_windows)]
            self._run("llama-imatrix", "-m", plain, "-f", text, "-o", str(file), *sizes)

        def quantized(file: Path) -> None:
            matrix = ["--imatrix", str(self._made(models / "imatrix.gguf", importance))]
            kept = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
            if self.own_embedding:
                kept = []
            self._run("llama-quantize", *matrix, *kept, plain, str(file), type_name, n_threads)

        own = "-own-embedding" if self.own_embedding else ""
        return self._made(models / f"{type_name}{own}.gguf", quantized)

    def _base(self) -> Path:
        """The dense model's predictions, in 16 bits."""
        plain = self.setting.plain_file()
        return self._made(
            self.setting.directory / "predictions.bin",
            lambda file: self._perplexity(plain, "--kl-divergence-base", str(file)),
        )

    def _made(self, file: Path, make: Callable[[Path], object]) -> Path:
        """A file that is there, or is made: under another name until it is whole."""
        if not file.exists():
            unfinished = file.with_name(f"unfinished-{file.name}")
            make(unfinished)
            unfinished.replace(file)
        return file

    def _perplexity(self, file: Path, *more: str) -> str:
        setting = self.setting
        sizes = ["-c", str(setting.n_ctx), "--chunks", str(setting.n_windows), "-t", str(setting.n_threads)]
        return self._run("llama-perplexity", "-m", str(file), "-f", str(setting.held_out), *sizes, *more)

    def _run(self, program: str, *arguments: str) -> str:
        """What it prints. Raises VPTQError where it cannot be run, or fails."""
        called = [str(self.programs / program), *arguments]
        try:
            done = subprocess.run(called, capture_output=True, encoding="utf-8", errors="replace")
        except OSError as error:
            raise VPTQError(f"--llamacpp: {called[0]}: cannot be run: {error.strerror}") from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            raise VPTQError(f"{shlex.join(called)}: ended with status {done.returncode}: {last}")
        return done.stdout + done.stderr


def _figure(output: str, name: str) -> tuple[float, float] | None:
    """A value and its standard error from what llama-perplexity prints."""
    match = re.search(rf"^{re.escape(name)} *: *(-?[\d.]+) *± *([\d.]+)", output, re.MULTILINE)
    return (float(match[1]), float(match[2])) if match else None
