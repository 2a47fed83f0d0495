"""XML as a tree whose elements know where they stand in the file, by the parser of the standard
library.

Entities of a document's own are refused, since an element would no longer stand where its text is,
and so is what nests too deep. Nothing outside the file is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.parsers import expat

from jaxdeep.envs.textbook.files import File
from jaxdeep.envs.textbook.schema import Span
from jaxdeep.errors import DataError

DEEPEST = 400  # elements inside elements


class Element:
    """An element: its name without namespace, `math` for those of MathML, its attributes, its texts
    and elements in order, and its bytes from `start` to `end`."""

    __slots__ = ("attributes", "children", "end", "file", "math", "name", "parent", "start")

    def __init__(
        self, name: str, attributes: dict[str, str], parent: Element | None, at: int
    ) -> None:
        namespace, _, self.name = name.rpartition(" ")
        self.math = namespace.endswith("MathML")
        self.attributes, self.parent, self.start, self.end = attributes, parent, at, at
        self.children: list[Element | str] = []

    def get(self, name: str) -> str:
        """The attribute, or ""."""
        return self.attributes.get(name, "")

    def elements(self) -> list[Element]:
        """The elements directly inside."""
        return [child for child in self.children if isinstance(child, Element)]

    def walk(self) -> Iterator[Element]:
        """The element and all inside it, in the order of the document."""
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def find(self, *names: str) -> Element | None:
        """The first element directly inside with one of the names."""
        return next((child for child in self.elements() if child.name in names), None)

    def ancestors(self) -> Iterator[Element]:
        """The elements around it, the nearest first."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def text(self) -> str:
        """All text inside, as it stands."""
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)

    def span(self, file: File) -> Span:
        """Where the element stands, its tags included."""
        return Span(file.name, self.start, self.end)


def parse(file: File) -> Element:
    """The root of an XML file. DataError where it is not well formed, declares entities, or nests
    deeper than `DEEPEST`."""
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    open_elements: list[Element] = []
    roots: list[Element] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(open_elements) >= DEEPEST:
            raise DataError(f"{file.name} nests more than {DEEPEST} elements in each other")
        parent = open_elements[-1] if open_elements else None
        plain = {key.rpartition(" ")[2]: value for key, value in attributes.items()}
        element = Element(name, plain, parent, parser.CurrentByteIndex)
        (parent.children if parent else roots).append(element)
        open_elements.append(element)

    def end(name: str) -> None:
        element = open_elements.pop()
        element.end = file.data.index(b">", parser.CurrentByteIndex) + 1

    def text(data: str) -> None:
        if open_elements:
            open_elements[-1].children.append(data)

    def entity(name: str, *_: object) -> None:
        raise DataError(f"{file.name} declares the entity {name!r}: write its text instead")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.EntityDeclHandler = text, entity
    try:
        parser.Parse(file.data, True)
    except expat.ExpatError as error:
        raise DataError(f"{file.name} is no well-formed XML: {error}") from error
    if not roots:
        raise DataError(f"{file.name} holds no XML element")
    return roots[0]
