"""HTML -> text in blocks, headings as Markdown, and the lines at which elements with an id begin."""

import codecs
import re
from dataclasses import dataclass, field

from nsa_cli.documents.document import Extract, NotText, Part

LEFT_OUT = frozenset("script style template noscript svg iframe nav head object canvas audio video map".split())  # noqa: SIM905
BLOCKS = frozenset(
    "address article aside blockquote body dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 "  # noqa: SIM905
    "h6 header hr html li main ol p pre section summary table tbody tfoot thead tr ul".split()
)
CELLS = frozenset(("td", "th"))
HEADINGS = {f"h{level}": level for level in range(1, 7)}
SNIFF = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.{0,500}?-->\s*)?<(!doctype\s+html|html)[\s>]", re.I | re.S)
CHARSET = re.compile(rb"""<meta[^>]{1,200}charset=["']?([\w-]+)""", re.I)
TAG = re.compile(r"<(/?)([a-z][a-z0-9]*)", re.I)
MAX_DEPTH = 2_000
MAX_HTML = 16_000_000  # characters
# XHTML's <a id="x"/> ends there; to HTML it is a beginning. <br/> is the same to both.
SELF_CLOSED = re.compile(r"<(?!(?:br|hr|img|input|link|meta|col|area|base|wbr)\b)([A-Za-z][\w:-]*)(\s[^<>]*?)?/>")
# Without an end, or ended by what follows.
CLOSED_BY_OTHERS = frozenset(
    "area base br col embed hr img input link meta param source track wbr p li td th tr dt dd option optgroup thead "  # noqa: SIM905
    "tbody tfoot colgroup html head body path rect circle line use polygon polyline ellipse stop".split()
)


@dataclass
class Page:
    """Lines of text; `headings` (line, level, text) and `ids` say where they begin, lines counted from 1."""

    title: str = ""
    lines: list[str] = field(default_factory=list)
    headings: list[tuple[int, int, str]] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)


def read_html(text: str) -> Extract:
    page = parse(text)
    parts = tuple(Part(line, f'§ "{title}"', level) for line, level, title in page.headings if level <= 3)
    lines = page.lines
    if page.title and not page.headings:
        lines = [page.title, "", *lines]
    return Extract("\n".join(lines) + "\n", parts, converted=True)


def declared_encoding(data: bytes) -> str | None:
    """What a <meta> says, if Python knows it and the bytes are not UTF-8."""
    match = CHARSET.search(data, 0, 2000)
    try:
        data.decode("utf-8")
        return None
    except UnicodeDecodeError:
        pass
    try:
        return codecs.lookup(match[1].decode()).name if match else None
    except LookupError:
        return None


def check_size(text: str) -> None:
    """Refuse what nests deeper than any page, since the parser's time grows with the square of the depth; and what is
    longer, since its tree takes 60 times the page.
    """
    if len(text) > MAX_HTML:
        raise NotText(f"HTML of {len(text):,} characters, over the limit of {MAX_HTML:,}")
    depth = 0
    for match in TAG.finditer(text):
        if match[2].lower() not in CLOSED_BY_OTHERS:
            depth = max(depth + (-1 if match[1] else 1), 0)
            if depth > MAX_DEPTH:
                raise NotText(f"HTML nested over {MAX_DEPTH:,} deep")


def parse(text: str) -> Page:
    """The page's main text. Raises NotText where the parser gives up."""
    from selectolax.lexbor import LexborHTMLParser

    if text.lstrip().startswith("<?xml"):
        text = SELF_CLOSED.sub(r"<\1\2></\1>", text)
    check_size(text)
    try:
        tree = LexborHTMLParser(text)
        body = tree.css_first("main") or tree.body or tree.root
        title = tree.css_first("head title")
    except Exception as error:
        raise NotText(f"damaged HTML ({error})") from None
    writer = Writer()
    if title:
        writer.page.title = " ".join((title.text() or "").split())
    if body is not None:
        walk(body, writer)
    return writer.end()


def walk(top, writer: "Writer") -> None:
    """Every node in document order. A stack of its own: a page may nest deeper than Python's."""
    stack = [(top, False)]
    while stack:
        node, leaving = stack.pop()
        tag = node.tag
        if leaving:
            writer.leave(tag)
        elif tag == "-text":
            writer.text(node.text_content or "")
        elif tag not in LEFT_OUT and not tag.startswith(("-", "!")):
            writer.enter(tag, node.attributes)
            stack.append((node, True))
            child = node.last_child
            while child is not None:
                stack.append((child, False))
                child = child.prev


class Writer:
    """Collects text into lines; white space collapses except in <pre>."""

    def __init__(self) -> None:
        self.page = Page()
        self.line: list[str] = []  # pieces of the line that is being written
        self.prefix = ""  # "- " of a list's item
        self.pre = 0
        self.heading: int | None = None
        self.waiting: list[str] = []  # ids whose element has not begun a line yet

    def enter(self, tag: str, attributes: dict) -> None:
        if tag in BLOCKS:
            self.end_line()
        if name := attributes.get("id") or (attributes.get("name") if tag == "a" else None):
            self.waiting.append(name)
        if tag == "br":
            self.end_line()
        elif tag in HEADINGS:
            self.blank()
            self.heading = HEADINGS[tag]
        elif tag == "pre":
            self.blank()
            self.pre += 1
        elif tag == "li":
            self.prefix = "- "
        elif tag in ("p", "table", "blockquote"):
            self.blank()
        elif tag in CELLS and "".join(self.line).strip():
            self.line.append(" | ")

    def leave(self, tag: str) -> None:
        if tag in BLOCKS:
            self.end_line()
        if tag == "pre":
            self.pre -= 1
        if tag in HEADINGS:
            self.heading = None
        if tag in ("p", "pre", "table", "blockquote") or tag in HEADINGS:
            self.blank()

    def text(self, text: str) -> None:
        if not self.pre:
            self.line.append(re.sub(r"\s+", " ", text))
            return
        first, *others = text.split("\n")
        self.line.append(first)
        for piece in others:
            self.end_line()
            self.line.append(piece)

    def end_line(self) -> None:
        line = "".join(self.line)
        line = line.rstrip() if self.pre else re.sub(r"\s+", " ", line).strip()
        self.line.clear()
        if not line.strip():
            if self.pre and self.page.lines:
                self.page.lines.append("")
            return
        number = len(self.page.lines) + 1
        if self.heading:
            line = line.rstrip(" ¶#")  # the link to itself that documentation tools put there
            self.page.headings.append((number, self.heading, line))
            line = "#" * self.heading + " " + line
        self.page.lines.append(self.prefix + line)
        self.prefix = ""
        for name in self.waiting:
            self.page.ids.setdefault(name, number)
        self.waiting.clear()

    def blank(self) -> None:
        """One empty line, unless there is one."""
        self.end_line()
        if self.page.lines and self.page.lines[-1]:
            self.page.lines.append("")

    def end(self) -> Page:
        self.end_line()
        while self.page.lines and not self.page.lines[-1]:
            self.page.lines.pop()
        for name in self.waiting:
            self.page.ids.setdefault(name, len(self.page.lines) + 1)
        return self.page
