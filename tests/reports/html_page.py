"""A page as an HTML parser sees it, and the rules that every page of this package follows."""

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

_VOID = {"img", "meta", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Text and elements of a page; parsing checks that it is complete, self-contained and accessible."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        assert len(data) < 8e6
        self.source = data.decode()
        self.feed(self.source)
        assert self._open == []
        self._check()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def _check(self):
        # No address of another machine, not even as a name.
        assert not re.search(r"https?:|//[a-z]|@import", re.sub(r"data:image/[^\"]*", "", self.source))
        assert not re.search(r"\b(nan|Undefined)\b", self.text)
        for tag, attrs in self.elements:
            assert not any(name.startswith("on") and name != "onsubmit" for name in attrs), "hostile text became code"
            if tag == "img":
                assert attrs["alt"]
                assert attrs["src"].startswith("data:image/")
            if tag == "th":
                assert attrs["scope"] in ("col", "row")
            if "role" in attrs and attrs["role"] == "region":
                assert attrs["aria-label"]
                assert attrs["tabindex"] == "0"
        ids = Counter(attrs["id"] for _, attrs in self.elements if "id" in attrs)
        assert [name for name, count in ids.items() if count > 1] == []
        for _, attrs in self.elements:
            if attrs.get("href", "").startswith("#"):
                assert attrs["href"][1:] in ids
        assert self.all("html")[0]["lang"] == "en"
        assert "width=device-width" in self.source
        levels = [int(tag[1]) for tag, _ in self.elements if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        assert len(self.all("main")) == 1
