"""Measures llama.cpp on a GGUF file as vptq-bench measures this runtime, and prints the seconds as JSON.

    python tools/llamacpp_speed.py FILE -p 512 -n 32 -t 2 -r 1

Needs llama-cpp-python and nothing else. Each test starts from an empty context, after a batch of it for
warming up. pp: a prompt, no logits computed. tg: tokens one by one, with logits. layers: as tg, without.
Where it computes no logits, llama.cpp leaves out the last layer's feed-forward matrices, too.
"""

import argparse
import ctypes
import json
import random
import time
from collections.abc import Sequence

import llama_cpp

N_BATCH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=32)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repetitions", type=int, default=1)
    args = parser.parse_args()
    tests = {"pp": (args.n_prompt, N_BATCH), "tg": (args.n_gen, 1), "layers": (args.n_gen, 1)}

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(args.file.encode(), model_parameters)
    if not model:
        raise SystemExit(f"{args.file}: llama.cpp cannot load it")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = max(args.n_prompt, args.n_gen)
    parameters.n_batch = parameters.n_ubatch = N_BATCH
    parameters.n_threads = parameters.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"{args.file}: llama.cpp cannot make a context of {parameters.n_ctx} tokens")

    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens = [random.Random(0).randrange(n_vocab) for _ in range(parameters.n_ctx)]
    seconds: dict[str, list[float]] = {}
    for test, (n_tokens, n_batch) in tests.items():
        if n_tokens:
            feed(context, tokens[: min(n_tokens, n_batch)], n_batch, logits=test == "tg")
            seconds[test] = [
                feed(context, tokens[:n_tokens], n_batch, logits=test == "tg")
                for _ in range(args.repetitions)
            ]
    system = llama_cpp.llama_print_system_info().decode().strip(" |")
    print(json.dumps({"version": llama_cpp.__version__, "system": system, "seconds": seconds}))


def feed(context: llama_cpp.llama_context_p, tokens: Sequence[int], n_batch: int, *, logits: bool) -> float:
    """Seconds that it takes to feed tokens to an empty context; logits: of each batch's last token."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
    begin = time.perf_counter()
    for start in range(0, len(tokens), n_batch):
        batch.n_tokens = min(n_batch, len(tokens) - start)
        for i in range(batch.n_tokens):
            batch.token[i], batch.pos[i] = tokens[start + i], start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = logits and i == batch.n_tokens - 1
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama.cpp cannot decode the batch")
    llama_cpp.llama_synchronize(context)
    seconds = time.perf_counter() - begin
    llama_cpp.llama_batch_free(batch)
    return seconds


if __name__ == "__main__":
    main()
