"""Who holds which page of keys and values: a pool of pages, and a tree of the beginnings they hold.

A node of the tree is one page and the tokens in it; the way from a root to a node spells a beginning.
There is a root for each policy: what one adapter computed is of no use to another. Pages that nobody
uses stay until room is needed; the one unused for longest goes first.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """One page in the tree: `children` go on from a full page, `partial` are last pages that are not
    full, which one sequence at a time can use. A root has no page."""

    parent: Node | None = None
    tokens: tuple[int, ...] = ()
    page: int = -1
    users: int = 0
    children: dict[tuple[int, ...], Node] = dataclasses.field(default_factory=dict)
    partial: list[Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, slots=True)
class Lease:
    """The pages of one sequence in order: those of the tree on `path`, then its `own`."""

    root: Node
    path: list[Node]
    own: list[int]

    @property
    def pages(self) -> list[int]:
        """All of them."""
        return [node.page for node in self.path] + self.own


class Pool:
    """`count` pages of `size` tokens each. Without `partial`, last pages that are not full are not kept."""

    def __init__(self, count: int, size: int, *, partial: bool = True) -> None:
        self.count, self.size, self.partial = count, size, partial
        self._free = list(range(count))[::-1]
        self._roots: dict[Hashable, Node] = {}
        # pages in the tree that nobody uses, oldest first. Who gives a path back gives its end first,
        # so that the oldest never has children
        self._idle: collections.OrderedDict[Node, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be had."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages of sequences in progress."""
        return self.count - self.available

    def lease(self, policy: Hashable, tokens: Sequence[int]) -> tuple[Lease, int]:
        """The pages with the longest held beginning of `tokens`, and how many tokens that is."""
        root, path, size = self._roots.setdefault(policy, Node()), [], self.size
        node = root
        while child := node.children.get(tuple(tokens[len(path) * size : (len(path) + 1) * size])):
            path.append(child)
            node = child
        for used in path:
            used.users += 1
            self._idle.pop(used, None)
        lease, held = Lease(root, path, []), len(path) * size
        rest = tokens[held : held + size]
        best = max(node.partial, key=lambda last: shared(last.tokens, rest), default=None)
        if best is not None and (more := shared(best.tokens, rest)):
            node.partial.remove(best)
            del self._idle[best]
            lease.own.append(best.page)
            held += more
        return lease, held

    def match(self, policy: Hashable, tokens: Sequence[int]) -> int:
        """How many tokens of full pages a lease would find."""
        node, size, held = self._roots.get(policy, Node()), self.size, 0
        while child := node.children.get(tuple(tokens[held : held + size])):
            node, held = child, held + size
        return held

    def grow(self, lease: Lease, tokens: int, *, spare: int = 0) -> bool:
        """Make room for so many tokens in all; False, and nothing changed, where that would not leave
        `spare` pages."""
        need = -(-tokens // self.size) - len(lease.path) - len(lease.own)
        if need > 0 and need + spare > self.available:
            return False
        while need > len(self._free):
            self._unlink(next(iter(self._idle)))
        lease.own += [self._free.pop() for _ in range(need)]
        return True

    def publish(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Let others find the full pages of a sequence that holds `tokens`. What the tree has already,
        and what comes after it, stays the sequence's own."""
        size = self.size
        if self._dead(lease.root):
            return
        while lease.own and (len(lease.path) + 1) * size <= len(tokens):
            at = len(lease.path) * size
            node = lease.path[-1] if lease.path else lease.root
            held = tuple(tokens[at : at + size])
            if held in node.children:
                return
            node.children[held] = Node(node, held, lease.own.pop(0), users=1)
            lease.path.append(node.children[held])

    def release(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Give back a sequence that holds `tokens`; they stay findable while there is room."""
        self.publish(lease, tokens)
        node, dead = lease.path[-1] if lease.path else lease.root, self._dead(lease.root)
        rest = tuple(tokens[len(lease.path) * self.size :])
        if self.partial and lease.own and 0 < len(rest) < self.size and not dead:
            last = Node(node, rest, lease.own.pop(0))
            node.partial.append(last)
            self._idle[last] = None
        self._free += lease.own
        for node in reversed(lease.path):
            node.users -= 1
            if not node.users:
                self._idle[node] = None
                if dead:
                    self._unlink(node)
        lease.path, lease.own = [], []

    def withdraw(self, lease: Lease, held: int) -> bool:
        """Take back what was published beyond the first `held` tokens, which will not be computed;
        False, and nothing changed, where others count on it."""
        first = held // self.size
        if any(node.users > 1 for node in lease.path[first:]):
            return False
        for node in reversed(lease.path[first:]):
            del node.parent.children[node.tokens]
            lease.own.insert(0, node.page)
        del lease.path[first:]
        return True

    def forget(self, policy: Hashable) -> None:
        """Nobody will ask for what this policy computed: its pages are free, those in use later."""
        root = self._roots.pop(policy, Node())
        for node in [node for node in self._idle if _root(node) is root]:
            self._unlink(node)

    def _dead(self, root: Node) -> bool:
        return root not in self._roots.values()

    def _unlink(self, node: Node) -> None:
        del self._idle[node]
        if node.parent.children.get(node.tokens) is node:
            del node.parent.children[node.tokens]
        else:
            node.parent.partial.remove(node)
        self._free.append(node.page)


def _root(node: Node) -> Node:
    while node.parent is not None:
        node = node.parent
    return node


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    n = min(len(one), len(other))
    return next((i for i in range(n) if one[i] != other[i]), n)
