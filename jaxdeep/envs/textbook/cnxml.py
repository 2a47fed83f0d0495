"""Books of OpenStax: CNXML modules in the order of their collection.

What an element is follows from where it stands: an `exercise` in an `example` is a worked example,
an `example` without one is split at its first block that is titled Strategy or Solution, any other
`exercise` is one, its role from the nearest ancestor with a known class. Everything else is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from jaxdeep.envs.textbook import mathml
from jaxdeep.envs.textbook.fields import Field, added, unmarked
from jaxdeep.envs.textbook.files import File, Folder
from jaxdeep.envs.textbook.schema import Book, Data, Item, Section, Span
from jaxdeep.envs.textbook.tree import Element, parse
from jaxdeep.errors import DataError

ROLES = {
    **{
        "try": "try",
        "be-prepared": "prepare",
        "practice-perfect": "practice",
        "section-exercises": "practice",
    },
    **{"everyday": "everyday", "writing": "writing", "review-exercises": "review"},
    **{"practice-test": "test", "problems-exercises": "practice", "ap-test-prep": "test"},
    **{"conceptual-questions": "conceptual", "check-understanding": "try", "key-concepts": "text"},
}
_BY = "cnxml.Render"
_SOLUTION = re.compile(
    r"^\s*(?:strategy|solution|concept|discussion|reasoning|answer|significance|approach)\b", re.I
)
_BLOCKS = {
    *(
        "para",
        "list",
        "equation",
        "figure",
        "table",
        "note",
        "section",
        "example",
        "exercise",
        "media",
    ),
    *("problem", "solution", "commentary", "quote", "code", "definition", "glossary", "preformat"),
    *("title", "item", "row", "caption", "subfigure", "proof", "statement", "rule", "meaning"),
}
_LICENCES = (
    (r"/by/4\.0", "CC-BY-4.0"),
    (r"/by/3\.0", "CC-BY-3.0"),
    (r"/by-nc-sa/4\.0", "CC-BY-NC-SA-4.0"),
    (r"/by-sa/4\.0", "CC-BY-SA-4.0"),
    (r"/by-nc/4\.0", "CC-BY-NC-4.0"),
    (r"/by/2\.0", "CC-BY-2.0"),
    (r"/publicdomain/zero", "CC0-1.0"),
)


def found(folder: Folder) -> bool:
    """Whether the folder holds CNXML."""
    return bool(folder.names(".cnxml"))


def read(folder: Folder, collection: str = "") -> Data:
    """The book of a collection file, of which `collection` names one where there are several;
    without such a file all modules, in the order of their names, each a chapter of its own."""
    data = Data(Book("", profile="openstax"))
    modules, chapters = _modules(folder, data, collection)
    reader = _Reader(folder, data)
    for (number, title), names in chapters.items():
        reader.chapter(number, title, [(name, modules[name]) for name in names if name in modules])
    reader.link()
    return data


def _modules(folder: Folder, data: Data, collection: str) -> tuple[dict[str, str], dict]:
    """The file of each module, and the modules of each (number, title) of a chapter."""
    files: dict[str, str] = {}
    for name in folder.names(".cnxml"):
        identity = re.search(r"(m\d{4,})", name.rpartition("/")[2]) or re.search(r"(m\d{4,})", name)
        key = identity[1] if identity else name
        if key in files:
            data.notes.append(f"{name}: a second file of the module {key}, left out")
            continue
        files[key] = name
    collections = folder.names(".collection.xml")
    chosen = [name for name in collections if collection in name] if collection else collections
    if len(chosen) > 1:
        raise DataError(
            f"{folder.root} has several collections: choose one with data.collection, of "
            + ", ".join(chosen)
        )
    if not chosen:
        data.notes.append("no collection file: the modules are in the order of their names")
        data.book = Book(folder.root.name, folder.root.name, profile="openstax")
        return files, {(str(n), name): [name] for n, name in enumerate(files, 1)}
    root = parse(folder.file(chosen[0]))
    data.book = _book(root, chosen[0])
    chapters: dict[tuple[str, str], list[str]] = {}
    listed: set[str] = set()
    count = 0
    content = next(element for element in root.walk() if element.name == "content")
    for element in content.elements():
        if element.name == "subcollection":
            count += 1
            heading = next((e.text() for e in element.walk() if e.name == "title"), "")
            inside = [e.get("document") for e in element.walk() if e.name == "module"]
            chapters[(str(count), heading)] = inside
        elif element.name == "module":
            chapters.setdefault(("", ""), []).append(element.get("document"))
            inside = [element.get("document")]
        else:
            continue
        listed.update(inside)
        data.notes += [
            f"{name} is in the collection, its file is missing"
            for name in inside
            if name not in files
        ]
    unlisted = [files[name] for name in files if name not in listed]
    if unlisted and len(unlisted) < len(files) and len(collections) == 1:
        data.notes += [f"{name} is in no collection" for name in unlisted]
    return files, chapters


def _book(root: Element, name: str) -> Book:
    values = {
        element.name: element
        for element in root.walk()
        if element.name in ("title", "license", "language", "slug")
    }
    title = next((e.text() for e in root.walk() if e.name == "title"), "")
    url = values["license"].get("url") if "license" in values else ""
    licence = next((spdx for pattern, spdx in _LICENCES if re.search(pattern, url)), "")
    identity = values["slug"].text() if "slug" in values else name.partition(".")[0]
    language = values["language"].text() if "language" in values else "en"
    return Book(identity, title.strip(), ("OpenStax",), licence, url, "", "", language, "openstax")


class Render:
    """Elements as text: formulas as LaTeX, images as `[image: alt]`, links by the printed names of
    their targets, marked as added."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def blocks(self, element: Element) -> str:
        """The text of a block and the blocks inside it, empty lines between."""
        text = self.inside(element)
        text = re.sub(r"[ \t\r\f\v]*\n[ \t\r\f\v]*", "\n", text)
        return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()

    def inside(self, element: Element) -> str:
        out: list[str] = []
        for index, child in enumerate(element.children):
            if isinstance(child, str):
                out.append(re.sub(r"\s+", " ", child))
            else:
                out.append(self.one(child, element, index))
        return "".join(out)

    def one(self, element: Element, parent: Element, index: int) -> str:
        name = element.name
        if element.math and name == "math":
            return mathml.inline(element)
        if name == "media":
            return self.image(element)
        if name == "link":
            return self.link(element)
        if name in ("sup", "sub"):
            inner = self.inside(element).strip()
            return f"{'^' if name == 'sup' else '_'}{{{inner}}}" if inner else ""
        if name == "newline":
            return "\n"
        if name == "space":
            return " "
        if name == "footnote":
            return f" ({added('footnote: ')}{self.inside(element)})"
        if name == "item":
            return self.item(element, parent, index)
        if name == "row":
            cells = [self.inside(cell).strip() for cell in element.elements()]
            return "\n" + " | ".join(re.sub(r"\s+", " ", cell) for cell in cells)
        if name == "label":
            return self.inside(element) + " "
        if name in _BLOCKS:
            return f"\n\n{self.inside(element)}\n\n"
        return self.inside(element)

    def item(self, element: Element, parent: Element, index: int) -> str:
        text = self.inside(element).strip()
        style = parent.get("number-style")
        number = 1 + sum(
            1
            for child in parent.children[:index]
            if isinstance(child, Element) and child.name == "item"
        )
        labelled = re.match(r"\s*[ⓐ-ⓩ]|\s*\([a-z]\)", text)
        if parent.get("list-type") == "enumerated" and not labelled and number <= 26:
            label = f"({chr(96 + number)})" if style == "lower-alpha" else f"{number}."
            return f"\n{added(label)} {text}"
        return f"\n{'' if labelled else '- '}{text}"

    def image(self, element: Element) -> str:
        alt = re.sub(r"\s+", " ", element.get("alt")).strip()
        alt = alt.replace("[", "(").replace("]", ")")
        inner = "".join(self.inside(child) for child in element.elements() if child.name == "media")
        return f" [image: {alt}] {inner}" if alt else f" [image: no description] {inner}"

    def link(self, element: Element) -> str:
        text = self.inside(element)
        if text.strip():
            return text
        target = element.get("target-id") or element.get("document") or element.get("url")
        return added(self.names.get(target, "") or element.get("url"))


class _Reader:
    def __init__(self, folder: Folder, data: Data) -> None:
        self.folder, self.data = folder, data
        self.printed: dict[str, str] = {}  # an element's id -> "Example 2.3"
        self.render = Render(self.printed)
        self.items: dict[str, str] = {}  # an element's id -> the item's

    def chapter(self, number: str, title: str, modules: list[tuple[str, str]]) -> None:
        """The modules of a chapter: read all, so that links to later ones have names, then
        extract."""
        trees = []
        for name, path in modules:
            file = self.folder.file(path)
            try:
                trees.append((name, file, parse(file)))
            except DataError as error:
                self.data.notes.append(f"{path}: left out: {error}")
        counts = {"example": 0, "figure": 0, "table": 0, "equation": 0}
        for _, _, root in trees:
            for element in root.walk():
                kind = element.name
                plain = kind in counts and "unnumbered" not in element.get("class").split()
                if plain and not (kind == "figure" and element.parent.name == "figure"):
                    counts[kind] += 1
                    label = (
                        f"{kind.capitalize()} {number}.{counts[kind]}"
                        if number
                        else f"{kind.capitalize()} {counts[kind]}"
                    )
                    self.printed[element.get("id")] = label
        self.tries = 0
        for place, (name, file, root) in enumerate(trees):
            self.module(number, title, place, name, file, root)

    def module(
        self, chapter: str, heading: str, place: int, name: str, file: File, root: Element
    ) -> None:
        title = root.find("title") or next((e for e in root.walk() if e.name == "title"), None)
        section = Section(
            id=name,
            chapter=heading or chapter,
            number=f"{chapter}.{place}" if chapter and place else chapter,
            title=title.text().strip() if title else name,
            order=len(self.data.sections),
        )
        self.data.sections.append(section)
        self.section, self.file, self.chapter_number = section, file, chapter
        self.field = Field(_BY)
        self.counts: dict[str, int] = {}  # exercises by role
        if title is not None and title.parent is root:
            self.text_of(title)
        for part in root.elements():
            if part.name in ("content", "glossary"):
                self.data.content.append(part.span(file))
                self.walk(part)
        section.text = self.field.text
        if section.text:
            section.spans["text"] = self.field.origin("rendered")
        else:
            self.data.notes.append(f"{file.name}: no text")

    # text

    def text_of(self, element: Element) -> None:
        self.field.add(self.rendered(element), element.span(self.file))

    def rendered(self, element: Element) -> str:
        if element.math and element.name == "math":
            return mathml.inline(element)
        if element.name in ("media", "link", "item", "row", "sup", "sub"):
            parent = element.parent
            index = next(n for n, child in enumerate(parent.children) if child is element)
            return self.render.one(element, parent, index).strip()
        return self.render.blocks(element)

    def walk(self, element: Element) -> None:
        """What is in an element: items where there are some, else text."""
        instruction: list[Element] = []
        run: list[Element] = []
        for child in self.pieces(element):
            if isinstance(child, Element) and child.name == "exercise":
                self.exercise(child, run or instruction)
                if not run:
                    run, instruction = instruction, []
                continue
            run = []
            if not isinstance(child, Element):
                self.loose(child)
                instruction = []
            elif child.name == "example":
                self.example(child)
                instruction = []
            elif _holds_items(child):
                self.walk(child)
                instruction = []
            else:
                self.text_of(child)
                instructs = child.name in ("para", "list", "media", "figure", "table", "equation")
                instruction = [*instruction, child] if instructs else []
                if child.name == "para":
                    instruction = [child]

    def pieces(self, element: Element) -> Iterator[Element | tuple[int, int, str]]:
        """The children; a text that is not only white space as (start, end, text) in bytes."""
        before = self.file.data.index(b">", element.start) + 1
        for child in element.children:
            if isinstance(child, Element):
                yield child
                before = child.end
            elif child.strip():
                after = self.file.data.find(b"<", before)
                yield before, after, child
                before = after

    def loose(self, piece: tuple[int, int, str]) -> None:
        start, end, text = piece
        self.field.add(re.sub(r"\s+", " ", text).strip(), Span(self.file.name, start, end))

    # items

    def new(self, kind: str, element: Element, number: str, role: str) -> Item:
        identity = element.get("id") or f"{kind}-{len(self.data.items)}"
        item = Item(f"{self.section.id}-{identity}", kind, self.section.id, number, role)
        self.items[element.get("id")] = item.id
        around = next((e for e in element.ancestors() if e.name == "example"), None)
        if around is not None:  # links name the example, not the exercise in it
            self.items.setdefault(around.get("id"), item.id)
        self.data.items.append(item)
        return item

    def fill(
        self, item: Item, name: str, blocks: Sequence[Element], shared: Sequence[Element] = ()
    ) -> None:
        field = Field(_BY)
        for block in (*shared, *blocks):
            field.add(self.rendered(block), block.span(self.file))
            self.targets(item, block)
        if shared:
            item.instruction = unmarked("\n\n".join(map(self.rendered, shared)))
        if field.text:
            setattr(item, name, field.text)
            item.spans[name] = field.origin("joined" if shared else "rendered")

    def targets(self, item: Item, block: Element) -> None:
        for element in block.walk():
            target = element.get("target-id") if element.name == "link" else ""
            if target and target not in item.depends_on:
                item.depends_on.append(target)
            if element.name == "media" and item.question == "":
                item.needs_image = True

    def exercise(self, element: Element, shared: Sequence[Element]) -> None:
        role, in_example = _role(element)
        kind = "example" if in_example else "exercise"
        item = self.new(kind, element, self.number(element, kind, role), role)
        problem = element.find("problem")
        solutions = [child for child in element.elements() if child.name == "solution"]
        more = [child for child in element.elements() if child.name == "commentary"]
        self.fill(
            item, "question", _contents(problem) if problem else (), () if in_example else shared
        )
        name = "reasoning" if in_example else "answer"
        inside = [child for one in solutions for child in _contents(one)]
        untitled = [child for child in inside if child.name != "title"]
        self.data.dropped += [child.span(self.file) for child in inside if child.name == "title"]
        self.fill(item, name, [*untitled, *(c for one in more for c in _contents(one))])
        if len(solutions) > 1:
            item.flags.append("several solutions")
        if problem is None:
            item.flags.append("no question")
        for child in element.elements():
            if (
                child.name not in ("problem", "solution", "commentary", "label", "title")
                or child.name == "title"
            ):
                self.text_of(child)

    def number(self, element: Element, kind: str, role: str) -> str:
        if kind == "example":
            around = next(e for e in element.ancestors() if e.name == "example")
            return self.printed.get(around.get("id"), "").rpartition(" ")[2]
        if role == "try":
            self.tries += 1
            return f"{self.chapter_number}.{self.tries}"
        self.counts[role] = self.counts.get(role, 0) + 1
        return str(self.counts[role])

    def example(self, element: Element) -> None:
        """An `example`: the exercises in it, or its blocks split where the solution begins."""
        if any(child.name == "exercise" for child in element.walk()):
            self.walk(element)
            return
        number = self.printed.get(element.get("id"), "").rpartition(" ")[2]
        item = self.new("example", element, number, "example")
        blocks = [child for child in element.elements()]
        split = next((n for n, block in enumerate(blocks) if n and _begins_solution(block)), None)
        if split is None:
            split = 1 if blocks and blocks[0].name == "title" else 0
            split = min(len(blocks), split + 1)
            item.flags.append("no solution heading")
        self.fill(item, "question", blocks[:split])
        self.fill(item, "reasoning", blocks[split:])

    def link(self) -> None:
        """Targets of links as the ids of items; others are no dependence."""
        for item in self.data.items:
            ids = [self.items[target] for target in item.depends_on if target in self.items]
            item.depends_on = [one for one in ids if one != item.id]


def _contents(element: Element) -> list[Element]:
    return element.elements() if _only_blocks(element) else [element]


def _only_blocks(element: Element) -> bool:
    return not any(isinstance(child, str) and child.strip() for child in element.children)


def _holds_items(element: Element) -> bool:
    return any(child.name in ("exercise", "example") for child in element.walk())


def _role(element: Element) -> tuple[str, bool]:
    """(role, whether it is a worked example) from the nearest ancestor that tells."""
    for around in element.ancestors():
        if around.name == "example":
            return "example", True
        for word in around.get("class").split():
            if word in ROLES:
                return ROLES[word], False
    for around in element.ancestors():
        if around.get("class") and around.name in ("section", "note"):
            return around.get("class").split()[0], False
    return "practice", False


def _begins_solution(block: Element) -> bool:
    """Whether a block is titled, or begins in bold, by a word such as Strategy or Solution."""
    title = block.find("title")
    lead = title.text() if title is not None else ""
    if not lead and block.name == "title":
        lead = block.text()
    if not lead:
        first = next(
            (child for child in block.children if not isinstance(child, str) or child.strip()), None
        )
        if (
            isinstance(first, Element)
            and first.name == "emphasis"
            and first.get("effect") != "italics"
        ):
            lead = first.text()
    return bool(_SOLUTION.match(lead))
