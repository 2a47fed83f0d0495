"""Which sequence has which page of keys and values: a pool of pages and a prefix tree over them.

A node of the tree is one page and the tokens in it; the path from a root to a node spells a prefix.
There is a root for each policy, because keys and values computed with one adapter are wrong for
another. Pages in the tree that no sequence uses stay there until their room is needed, the least
recently used going first. There are no arrays here: a page is its number.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """One page in the tree. `children` continue a full page, by their tokens. `partial` are last
    pages that are not full; the sequence that takes one goes on writing to it, so it leaves the
    tree. A root has no page."""

    parent: Node | None = None
    tokens: tuple[int, ...] = ()
    page: int = -1
    users: int = 0
    children: dict[tuple[int, ...], Node] = dataclasses.field(default_factory=dict)
    partial: list[Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, slots=True)
class Lease:
    """The pages of one sequence in order: those in the tree, which others may share (`path`), then
    those that are only its own (`own`)."""

    root: Node
    path: list[Node]
    own: list[int]

    @property
    def pages(self) -> list[int]:
        """All pages of the sequence."""
        return [node.page for node in self.path] + self.own


class Pool:
    """`count` pages of `size` tokens each, all free at first. With `partial` the last page of a
    sequence is kept for others even if it is not full."""

    def __init__(self, count: int, size: int, *, partial: bool = True) -> None:
        self.count, self.size, self.partial = count, size, partial
        self._free = list(range(count))[::-1]
        self._roots: dict[Hashable, Node] = {}
        # Pages in the tree without users, least recently used first. A sequence that is released
        # adds its last page first, so the first node here never has children.
        self._idle: collections.OrderedDict[Node, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Pages that a sequence can get: free ones, and those in the tree without users."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages of the sequences in progress."""
        return self.count - self.available

    def lease(self, policy: Hashable, tokens: Sequence[int]) -> tuple[Lease, int]:
        """Begin a sequence with the pages of its longest prefix that the pool holds. Returns the
        lease and the length of that prefix in tokens."""
        root, path, size = self._roots.setdefault(policy, Node()), [], self.size
        node = root
        while child := node.children.get(tuple(tokens[len(path) * size : (len(path) + 1) * size])):
            path.append(child)
            node = child
        for used in path:
            used.users += 1
            self._idle.pop(used, None)
        lease, matched = Lease(root, path, []), len(path) * size
        rest = tokens[matched : matched + size]
        best = max(node.partial, key=lambda last: common_prefix(last.tokens, rest), default=None)
        if best is not None and (more := common_prefix(best.tokens, rest)):
            node.partial.remove(best)
            del self._idle[best]
            lease.own.append(best.page)
            matched += more
        return lease, matched

    def match(self, policy: Hashable, tokens: Sequence[int]) -> tuple[int, int]:
        """How many tokens a lease would find in full pages, and how many of these pages are in use
        by others. Changes nothing."""
        node, size, matched, used = self._roots.get(policy, Node()), self.size, 0, 0
        while child := node.children.get(tuple(tokens[matched : matched + size])):
            node, matched, used = child, matched + size, used + bool(child.users)
        return matched, used

    def grow(self, lease: Lease, tokens: int) -> bool:
        """Give a sequence pages for `tokens` tokens in all. False, and nothing changed, if pages
        are lacking."""
        need = -(-tokens // self.size) - len(lease.path) - len(lease.own)
        if need > self.available:
            return False
        while need > len(self._free):
            self._unlink(next(iter(self._idle)))
        lease.own += [self._free.pop() for _ in range(need)]
        return True

    def publish(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Put the full pages of a sequence that holds `tokens` into the tree, for others to find.

        If another sequence computed the same page at the same time and was first, this page and
        those after it stay the sequence's own.
        """
        size = self.size
        if self._forgotten(lease.root):
            return
        node = lease.path[-1] if lease.path else lease.root
        first = len(lease.path)
        full = min(len(tokens) // size, first + len(lease.own))
        for at in range(first, full):
            page_tokens = tuple(tokens[at * size : (at + 1) * size])
            if page_tokens in node.children:
                break
            child = Node(node, page_tokens, lease.own[at - first], users=1)
            node.children[page_tokens] = child
            lease.path.append(child)
            node = child
        del lease.own[: len(lease.path) - first]

    def release(self, lease: Lease, tokens: Sequence[int]) -> None:
        """End a sequence that holds `tokens`. Others find them while their room is not needed."""
        self.publish(lease, tokens)
        forgotten = self._forgotten(lease.root)
        node = lease.path[-1] if lease.path else lease.root
        rest = tuple(tokens[len(lease.path) * self.size :])
        if self.partial and lease.own and 0 < len(rest) < self.size and not forgotten:
            last = Node(node, rest, lease.own.pop(0))
            node.partial.append(last)
            self._idle[last] = None
        self._free += lease.own
        for node in reversed(lease.path):
            node.users -= 1
            if not node.users:
                self._idle[node] = None
                if forgotten:
                    self._unlink(node)
        lease.path, lease.own = [], []

    def withdraw(self, lease: Lease, computed: int) -> bool:
        """Take back the pages that a sequence published beyond its first `computed` tokens: they
        will never be computed. False, and nothing changed, if another sequence shares one."""
        first = computed // self.size
        if any(node.users > 1 for node in lease.path[first:]):
            return False
        for node in reversed(lease.path[first:]):
            del node.parent.children[node.tokens]
            lease.own.insert(0, node.page)
        del lease.path[first:]
        return True

    def forget(self, policy: Hashable) -> None:
        """Drop what was computed with this policy: its pages are free, those in use once they are
        released."""
        ahead = [self._roots.pop(policy, Node())]
        while ahead:  # from the root down, so that each page is visited once
            node = ahead.pop()
            below = [*node.children.values(), *node.partial]
            ahead += below
            for child in below:
                if not child.users:
                    del self._idle[child]
                    self._free.append(child.page)
            node.children = {key: child for key, child in node.children.items() if child.users}
            node.partial = []

    def _forgotten(self, root: Node) -> bool:
        return root not in self._roots.values()

    def _unlink(self, node: Node) -> None:
        """Free a page in the tree that has no users."""
        del self._idle[node]
        if node.parent.children.get(node.tokens) is node:
            del node.parent.children[node.tokens]
        else:
            node.parent.partial.remove(node)
        self._free.append(node.page)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    n = min(len(one), len(other))
    return next((i for i in range(n) if one[i] != other[i]), n)
