"""Trains the small Llama model that vptq-runtime ships as its demo.

The text is what every Python installation has: the sources of the standard library, docstrings included.
Files are split into training and held-out by a hash of their path.

    python tools/train_demo.py OUT --seconds 3600     # the learning rate falls to zero over an hour
    python tools/train_demo.py OUT --steps 3000       # the same on every machine, rounding aside

OUT becomes a Hugging Face model directory (config.json, model.safetensors, tokenizer.json, ...) with
`training.json` (figures) and `state.pt` beside it; the same command run again goes on after an interruption.
"""

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# Tests repeat themselves, encodings are tables, and the rest is not the standard library's own code.
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "encodings", "pydoc_data",
    "turtledemo", "__pycache__", "__phello__",
}  # fmt: skip
MOST_FILE_BYTES = 250_000

# A prompt often ends in a space ("def "), where ordinary text has no token boundary: `def name` is
# `def| name`. So this share of the spaces between words is cut off in training: `def| |name`.
CUT_SPACES = 0.04


def standard_library_files() -> tuple[list[str], list[str]]:
    """The texts of the training files and of the held-out ones (about one in 25), in order of path."""
    root = Path(sysconfig.get_path("stdlib"))
    training, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if not 0 < path.stat().st_size <= MOST_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        (held_out if digest[0] % 25 == 0 else training).append(text)
    return training, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer.

    GPT-2's pre-tokenisation suits code: a line break and the indentation after it may merge into one token, a
    word carries the space before it, and every program that reads GGUF files knows it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream of tokens (n,), each text ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    streams = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([np.array(ids, dtype=np.int64) for ids in streams])


def encode_with_cut_spaces(tokenizer: Tokenizer, texts: list[str], rng: np.random.Generator) -> np.ndarray:
    """Like encode, but in CUT_SPACES of the places a single space before a word is a token of its own."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces: list[str] = []
    ends_text: list[bool] = []
    for text in texts:
        start = 0
        for position in np.flatnonzero(rng.random(len(text)) < CUT_SPACES) + 1:
            if (
                position < len(text)
                and text[position - 1] == " "
                and text[position - 2 : position - 1].isalnum()
            ):
                pieces.append(text[start:position])
                ends_text.append(False)
                start = int(position)
        pieces.append(text[start:])
        ends_text.append(True)
    encodings = tokenizer.encode_batch(pieces)
    streams = [[*e.ids, end] if last else e.ids for e, last in zip(encodings, ends_text, strict=True)]
    return np.concatenate([np.array(ids, dtype=np.int64) for ids in streams])


class Batches:
    """Batches (n_batch, n_ctx + 1) of a token stream: each epoch all windows, in a new order."""

    def __init__(self, stream: np.ndarray, n_batch: int, n_ctx: int, seed: int) -> None:
        self.stream, self.n_batch, self.n_ctx, self.seed = stream, n_batch, n_ctx, seed
        self.per_epoch = (len(stream) - 1 - n_ctx) // n_ctx // n_batch

    def batch(self, step: int) -> torch.Tensor:
        epoch, index = divmod(step, self.per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.n_ctx))
        order = rng.permutation(self.per_epoch * self.n_batch)
        starts = offset + order[index * self.n_batch : (index + 1) * self.n_batch] * self.n_ctx
        return torch.from_numpy(np.stack([self.stream[s : s + self.n_ctx + 1] for s in starts]))


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, stream: np.ndarray, n_ctx: int, most_windows: int | None = None
) -> float:
    """Mean cross-entropy in nats per token over windows of n_ctx tokens that stand side by side."""
    n_windows = (len(stream) - 1) // n_ctx
    starts = np.arange(n_windows) * n_ctx
    if most_windows is not None and most_windows < n_windows:
        starts = starts[np.linspace(0, n_windows - 1, most_windows).astype(int)]
    device = next(model.parameters()).device
    total = 0.0
    for at in range(0, len(starts), 8):
        windows = np.stack([stream[s : s + n_ctx + 1] for s in starts[at : at + 8]])
        tokens = torch.from_numpy(windows).to(device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        total += functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (len(starts) * n_ctx)


def build_model(args: argparse.Namespace, end_of_text: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.n_embd,
        num_hidden_layers=args.n_layer,
        num_attention_heads=args.n_head,
        num_key_value_heads=args.n_head_kv,
        intermediate_size=args.n_ff,
        max_position_embeddings=args.n_ctx,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=None,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end_of_text)
    # Each block starts as the identity: its last matrices, which write to the residual stream, start at zero.
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def build_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.lr_muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr_adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class Run:
    """A training run: model, optimizers and how far it is; saved to survive an interruption."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer, device: torch.device) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.model = build_model(args, tokenizer.token_to_id(END_OF_TEXT)).to(device)
        self.optimizers = build_optimizers(self.model, args)
        self.step, self.loss = 0, math.nan  # loss: smoothed over about 20 steps
        self.start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock, whichever is further."""
        args = self.args
        by_steps = self.step / args.steps if args.steps else 0.0
        return max(by_steps, self.elapsed / args.seconds if args.seconds else 0.0)

    def train_on(self, tokens: torch.Tensor) -> None:
        """One step on tokens (n_batch, n_ctx + 1)."""
        # The learning rate goes up in the first steps, stays, then falls linearly to zero.
        args = self.args
        scale = max(0.0, min(1.0, (self.step + 1) / args.warmup_steps, (1 - self.progress) / args.decay))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=args.bf16):
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        value = loss.item()
        self.loss = value if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * value

    def save_state(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "loss": self.loss,
            "elapsed": self.elapsed,
        }
        partial = self.args.out / "state.pt.part"
        torch.save(state, partial)
        partial.replace(self.args.out / "state.pt")

    def load_state(self, device: torch.device) -> None:
        path = self.args.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.loss = state["step"], state["loss"]
        self.start = time.monotonic() - state["elapsed"]
        print(f"going on from step {self.step}")

    def save_model(self, figures: dict[str, object]) -> None:
        out = self.args.out
        self.model.save_pretrained(out)
        PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
        ).save_pretrained(out)
        (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.out.mkdir(parents=True, exist_ok=True)

    training, held_out = standard_library_files()
    # For whoever quantises the model, and measures what that costs.
    for name, texts in (("training.txt", training), ("held_out.txt", held_out)):
        (args.out / name).write_text("".join(text + END_OF_TEXT for text in texts), encoding="utf-8")
    tokenizer = train_tokenizer(training, args.vocab_size)
    stream = encode_with_cut_spaces(tokenizer, training, np.random.default_rng(args.seed))
    held_out_stream = encode(tokenizer, held_out)
    bytes_per_token = sum(len(text.encode()) for text in held_out) / len(held_out_stream)
    print(
        f"{len(training)} files, {len(stream):,} tokens to train on; {len(held_out)} files, "
        f"{len(held_out_stream):,} tokens held out ({bytes_per_token:.2f} bytes per token)"
    )
    run = Run(args, tokenizer, device)
    batches = Batches(stream, args.n_batch, args.n_ctx, args.seed)
    tokens_per_step = args.n_batch * args.n_ctx
    n_params = sum(p.numel() for p in run.model.parameters())
    print(
        f"{n_params:,} parameters on {device}; {batches.per_epoch} steps of {tokens_per_step} tokens an epoch"
    )
    run.load_state(device)

    last_save = time.monotonic()
    while run.progress < 1:
        run.train_on(batches.batch(run.step).to(device))
        if run.step % 20 == 0:
            rate = run.step * tokens_per_step / run.elapsed
            print(f"step {run.step}  {run.progress:.1%}  loss {run.loss:.4f}  {rate:.0f} tok/s", flush=True)
        if time.monotonic() - last_save > args.save_seconds:
            partial = mean_loss(run.model, held_out_stream, args.n_ctx, 40)
            print(f"step {run.step}  held-out loss {partial:.4f} (40 windows)", flush=True)
            run.save_state()
            last_save = time.monotonic()

    held_out_loss = mean_loss(run.model, held_out_stream, args.n_ctx)
    figures: dict[str, object] = {
        "parameters": n_params,
        "steps": run.step,
        "tokens_trained": run.step * tokens_per_step,
        "epochs": run.step / batches.per_epoch,
        "seconds": run.elapsed,
        "training_tokens": len(stream),
        "held_out_tokens": len(held_out_stream),
        "held_out_bytes_per_token": bytes_per_token,
        "training_loss": run.loss,
        "held_out_loss": held_out_loss,
        "held_out_perplexity": math.exp(held_out_loss),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    run.save_model(figures)
    print(json.dumps(figures, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the demo model on the standard library's sources.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="directory to write; a run found there is continued")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--n-embd", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-head", type=int, default=8)
    parser.add_argument("--n-head-kv", type=int, default=4)
    parser.add_argument("--n-ff", type=int, default=768)
    parser.add_argument("--n-ctx", type=int, default=512, help="tokens of one training window")
    parser.add_argument("--n-batch", type=int, default=8, help="windows per step")
    parser.add_argument("--lr-muon", type=float, default=0.006, help="for the matrices of the blocks")
    parser.add_argument("--lr-adam", type=float, default=0.003, help="for the embedding and the norms")
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument(
        "--decay", type=float, default=0.6, help="share of the run over which the rate falls to zero"
    )
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 autocast"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", help="default: an accelerator where there is one")
    parser.add_argument("--save-seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.steps and not args.seconds:
        parser.error("say how long to train: --steps or --seconds")
    return args


if __name__ == "__main__":
    train(parse_arguments())
