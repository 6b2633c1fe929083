"""Blocks of the KV cache whose tokens a text begins with, kept for the next text that begins so.

What a block holds depends on its tokens, on all tokens before it, and on which of them were fed as generated
(precision "auto" rounds the others): on the path from the beginning of a text. So blocks are a tree, and a
block is found by going down it, all its ids compared. The tree has full blocks only: what is behind the last
of them a sequence computes for itself, and no block is ever copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, Protocol

CacheMode = Literal["shared", "exact", "off"]
Ids = tuple[int | str, ...]  # of a block; those of a text's first one begin with the salt


class Holder(Protocol):
    """What a PrefixCache needs of a native Context."""

    @property
    def block_tokens(self) -> int: ...
    def hold(self, blocks: Sequence[int]) -> None: ...
    def release(self, blocks: Sequence[int]) -> None: ...


class Block:
    """The tokens of one block, behind those of its parents."""

    __slots__ = ("children", "generated", "ids", "n_users", "number", "parent")

    def __init__(self, parent: Block | None, ids: Ids, generated: bytes) -> None:
        self.parent = parent  # None of the root, and of a block that is no longer in the tree
        self.ids = ids
        self.generated = generated  # 1 for each token that was fed as generated
        self.number: int | None = None  # in the context; None while somebody computes it
        self.n_users = 0  # requests that have it on their path
        self.children: dict[Ids, list[Block]] = {}  # by ids; more than one differ in `generated`

    @property
    def computing(self) -> bool:
        """Whether somebody is at it; not after that request has gone."""
        return self.number is None and self.parent is not None


class PrefixCache:
    """The tree, and which of its blocks can go.

    mode: "shared": blocks of generated tokens serve whatever prompt goes on so. "exact": they serve only a
        request that goes on with what it has generated itself, so that no result depends on the cache. "off":
        nothing is kept.

    A path is a request's list of blocks from the root on. While it stands on a path, a block stays; when the
    last path has left it, it is kept until `evict` needs its place, least recently used first.
    """

    def __init__(self, context: Holder, mode: CacheMode = "shared") -> None:
        self._context = context
        self._n = context.block_tokens
        self._mode = mode
        self._root = Block(None, (), b"")
        # Blocks on nobody's path, in the order in which they go: of each path the last block first.
        self._unused: OrderedDict[Block, None] = OrderedDict()

    @property
    def n_unused(self) -> int:
        """Blocks that `evict` could give back."""
        return len(self._unused)

    def find(
        self, ids: Sequence[int], generated: bytes | bytearray, salt: str, most: int
    ) -> tuple[list[Block], Block | None]:
        """The longest path of at most `most` blocks that a text begins with.

        And the block behind it that somebody computes right now, which is worth waiting for; None for none.
        Nothing changes: `enter` is what takes the path.
        """
        path: list[Block] = []
        at = self._root
        for i in range(most):
            block = self._child(at, *self._key(ids, generated, salt, i))
            if block is None:
                break
            if block.number is None:
                return path, block
            path.append(block)
            at = block
        return path, None

    def enter(self, path: Sequence[Block]) -> None:
        """Puts a request on a path that `find` has found."""
        for block in path:
            block.n_users += 1
            self._unused.pop(block, None)

    def announce(
        self, path: list[Block], ids: Sequence[int], generated: bytes | bytearray, salt: str, n_blocks: int
    ) -> None:
        """Lengthens a request's path to its first n_blocks blocks: those that are new it will compute.

        It goes less far where somebody else computes a block right now.
        """
        if self._mode == "off":
            return
        at = path[-1] if path else self._root
        for i in range(len(path), n_blocks):
            key = self._key(ids, generated, salt, i)
            variants = at.children.setdefault(key[0], [])
            block = next((b for b in variants if b.generated == key[1]), None)
            if block is None:
                block = Block(at, *key)
                variants.append(block)
            elif block.number is None:
                return
            self.enter([block])
            path.append(block)
            at = block

    def publish(self, path: Sequence[Block], numbers: Sequence[int], n_blocks: int) -> None:
        """Says that a request has computed its first n_blocks blocks, which the context has as `numbers`."""
        for block, number in zip(path[:n_blocks], numbers, strict=False):
            if block.number is None:
                block.number = number
                self._context.hold([number])

    def leave(self, path: list[Block]) -> None:
        """Takes a request off its path; what it has announced and not computed is forgotten."""
        for block in reversed(path):  # the last one goes first
            block.n_users -= 1
            if block.n_users:
                continue
            if block.number is None:
                self._remove(block)
            else:
                self._unused[block] = None
        path.clear()

    def evict(self, n_blocks: int) -> None:
        """Gives back so many blocks, or as many as are on nobody's path."""
        for _ in range(min(n_blocks, len(self._unused))):
            block, _ = self._unused.popitem(last=False)
            assert block.number is not None and not block.children
            self._context.release([block.number])
            self._remove(block)

    def _key(self, ids: Sequence[int], generated: bytes | bytearray, salt: str, i: int) -> tuple[Ids, bytes]:
        at = slice(i * self._n, (i + 1) * self._n)
        return (tuple(ids[at]) if i else (salt, *ids[at])), bytes(generated[at])

    def _child(self, at: Block, ids: Ids, generated: bytes) -> Block | None:
        variants = at.children.get(ids, ())
        for block in variants:
            if block.generated == generated:
                return block
        if self._mode == "shared" and not any(generated):
            return next((block for block in variants if block.number is not None), None)
        return None

    def _remove(self, block: Block) -> None:
        parent = block.parent
        assert parent is not None
        variants = parent.children[block.ids]
        variants.remove(block)
        if not variants:
            del parent.children[block.ids]
        block.parent = None
