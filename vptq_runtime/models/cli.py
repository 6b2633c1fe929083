"""vptq-models: what is in the cache of converted models, and what could be."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vptq_runtime.commands import command
from vptq_runtime.errors import FileError
from vptq_runtime.models import cache, disk
from vptq_runtime.models.cache import Entry, Part

LEAST_COMMIT = 7  # digits of a commit that name it
DESCRIPTION = "What is in the cache of models that -m owner/model and -m DIRECTORY fill."
EPILOG = """\
  vptq-models                                what is there, with its size and when it was used last
  vptq-models rm owner/model                 all commits of it; owner/model@COMMIT or @BRANCH: that one
  vptq-models suggest                        models of the community, and whether they fit this machine

The cache is ~/.cache/vptq-runtime, or vptq-runtime in XDG_CACHE_HOME, or the directory that VPTQ_CACHE names.

Exit status: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "vptq-models",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--version", action="version", version=f"%(prog)s {command.version()}")
    commands = p.add_subparsers(dest="command", metavar="COMMAND")
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
    commands.add_parser("list", parents=[both], help="what is in the cache (the default)")
    rm = commands.add_parser("rm", parents=[both], help="remove models from it")
    rm.add_argument(
        "names",
        metavar="NAME",
        nargs="+",
        help="as `vptq-models list` has it; owner/model is all its commits",
    )
    commands.add_parser("suggest", parents=[both], help="models to run: which fit this machine")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = parser().parse_args(argv)
    what = {"rm": _remove, "suggest": _suggest}.get(arguments.command, _list)
    return command.run("vptq-models", lambda: what(arguments))


def _list(arguments: argparse.Namespace) -> None:
    contents = cache.contents()
    if arguments.json:
        root = cache.root()
        report = {
            "cache": str(root),
            "free_bytes": disk.free_bytes(root),
            "models": [_as_json(item) for item in contents],
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    rows = [("size", "last used", "model")]
    for item in contents:
        size = disk.size(disk.used_bytes(item.directory))
        if isinstance(item, Part):
            rows.append((size, "-", f"{item.name} ({item.state})"))
        else:
            refs = f" ({', '.join(sorted(item.refs))})" if item.refs else ""
            rows.append((size, item.used[:10], f"{item.name}{refs}"))
    if contents:
        _print_rows(rows)
        print()
    total = sum(disk.used_bytes(item.directory) for item in contents)
    n_models = sum(isinstance(item, Entry) for item in contents)
    print(
        f"{cache.root()}: {n_models} model{'' if n_models == 1 else 's'}, {disk.size(total)}; "
        f"{disk.size(disk.free_bytes(cache.root()))} free"
    )


def _as_json(item: Entry | Part) -> dict[str, Any]:
    entry = item if isinstance(item, Entry) else None
    return {
        "name": item.name,
        "source": item.source,
        "state": "ready" if isinstance(item, Entry) else item.state,
        "commit": entry and entry.commit,
        "revisions": sorted(entry.refs) if entry else [],
        "file": entry and str(entry.file),
        "bytes": disk.used_bytes(item.directory),
        "made": entry and entry.made,
        "last_used": entry and entry.used,
    }


def _remove(arguments: argparse.Namespace) -> None:
    contents = cache.contents()
    chosen: dict[Path, Entry | Part] = {}
    for name in arguments.names:  # all of them are found before the first goes
        found = [item for item in contents if _is_named(item, name)]
        if not found:
            raise FileError(
                f"{name}: found no such model in {cache.root()}, expected one that vptq-models lists"
            )
        chosen |= {item.directory: item for item in found}
    removed = []
    for item in chosen.values():
        n_bytes = disk.used_bytes(item.directory)
        cache.remove(item)
        removed.append({"name": item.name, "bytes": n_bytes})
        if not arguments.json:
            print(f"{item.name}: removed, {disk.size(n_bytes)}")
    if arguments.json:
        print(json.dumps({"removed": removed}, indent=2, ensure_ascii=False))


def _is_named(item: Entry | Part, name: str) -> bool:
    """Whether a name means it: its source, its source at a revision or commit, or its directory."""
    if name in (item.source, item.name, item.directory.name):
        return True
    if isinstance(item, Part):
        return False
    if item.commit is None:
        return str(Path(name).resolve()) == item.source
    source, _, revision = name.partition("@")
    if source == item.source and revision in item.refs:
        return True
    return len(revision) >= LEAST_COMMIT and item.is_of(source, revision)


def _suggest(arguments: argparse.Namespace) -> None:
    from vptq_runtime import _native
    from vptq_runtime.bench.fits import N_CTX
    from vptq_runtime.bench.speed import REST_BYTES
    from vptq_runtime.models.community import KV_TYPE, community_models

    available, free = _native.available_memory(), disk.free_bytes(cache.root())
    models = [(model, model.memory_bytes <= available) for model in community_models()]
    models.sort(key=lambda row: (not row[1], -row[0].memory_bytes if row[1] else row[0].memory_bytes))
    if arguments.json:
        report = {
            "n_ctx": N_CTX,
            "kv_type": KV_TYPE,
            "computed": True,  # from shapes and configurations: nobody has measured them
            "available_bytes": available,
            "free_disk_bytes": free,
            "models": [asdict(model) | {"fits": fits} for model, fits in models],
        }
        print(json.dumps(report, indent=2))
        return
    rows = [("fits", "bits", "file", "memory", "model")]
    for model, fits in models:
        sizes = (disk.size(model.file_bytes), disk.size(model.memory_bytes))
        rows.append(("yes" if fits else "no", f"{model.bits:.2f}", *sizes, model.repo))
    _print_rows(rows)
    print(
        f"\nMemory: the file, a KV cache of {N_CTX} tokens in {KV_TYPE}, and {disk.size(REST_BYTES)} for the "
        f"process; {disk.size(available)} are available.\n"
        f"Disk: the download and the file for a while, then the file; {disk.size(free)} are free in "
        f"{cache.root()}.\n"
        "Sizes are computed from shapes and configurations, not measured. One runs by vptq-run -m MODEL."
    )


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """In columns, the last of any length: where it is longer than the terminal is wide, it can be copied
    still."""
    *columns, _ = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    for *cells, last in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join((*aligned, last)))


if __name__ == "__main__":
    sys.exit(main())
