"""What a page is made of, as a browser would see it."""

import html.parser

HOSTILE = "<script>alert(1)</script> \"double\" 'single' & </style></svg> \x1b[31m\u202eback"
VOID = {"meta", "input", "line", "rect", "circle", "path"}  # circle and the like close themselves


class Page(html.parser.HTMLParser):
    """A page: (tag, attributes), texts by tag, and whether all tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self):
        return " ".join(data for tag, data in self.texts if tag not in ("style", "script"))
