import gzip
import struct
import zlib

import pytest

from model.corpus.errors import BuildError
from model.corpus.extract import extract, html_text, r_strings

PAGE = """<!DOCTYPE html><html><head><title>Title</title><style>p {}</style></head><body>
<nav>Menu</nav><div class="sphinxsidebar">Contents of the book</div>
<main>
<h1>A heading<a class="headerlink" href="#a">¶</a></h1>
<p>Words of a <code>paragraph</code> that
goes   on.</p>
<pre>
def f():
    return  1
</pre>
<ul><li>first <b>item</b></li><li><p>second</p><p>more of it</p></li></ul>
<table><tr><th>name</th><th>size</th></tr><tr><td>a</td><td>1</td></tr></table>
<!-- a comment --><script>alert(1)</script>
</main><footer>Copyright</footer></body></html>"""


def test_html_keeps_what_is_read_and_drops_what_leads_elsewhere():
    assert html_text(PAGE.encode()) == (
        "A heading\n\n"
        "Words of a paragraph that goes on.\n\n"
        "def f():\n    return  1\n\n"
        "- first item\n\n"
        "- second\n\n  more of it\n\n"
        "name size\n\n"
        "a 1\n"
    )


@pytest.mark.parametrize("name", ["toc", "navheader", "sphinxsidebar", "related", "implementors-list", "changelog"])
def test_html_drops_parts_by_class_and_by_id(name):
    for attribute in ("class", "id"):
        page = f"<body><p>Kept.</p><div {attribute}='first {name}'><p>Dropped.</p></div>Kept too.</body>"
        assert html_text(page.encode()) == "Kept.\n\nKept too.\n"
    assert html_text(f"<p class='my-{name}-s'>Kept.</p>".encode()) == "Kept.\n"


def test_html_wraps_prose_and_nothing_else():
    words = "word " * 60
    text = html_text(f"<p>{words}</p><pre>{words}</pre><li>{words}</li>".encode())
    prose, code, item = text.split("\n\n")
    assert max(map(len, prose.splitlines())) <= 79
    assert code == words.rstrip()
    assert item.splitlines()[0].startswith("- word")
    assert all(line.startswith("  word") for line in item.splitlines()[1:])


def test_html_that_is_empty_or_has_no_body():
    assert html_text(b"") == ""
    assert html_text(b"<html><body><nav>Menu</nav></body></html>") == ""


def test_html_needs_lxml(monkeypatch):
    import sys

    from model.corpus.extract import require_lxml

    require_lxml()
    monkeypatch.setitem(sys.modules, "lxml.html", None)
    with pytest.raises(BuildError, match=r"rheostat\[data\]"):
        require_lxml()


def test_text_as_it_is_and_compressed():
    assert extract("text", "a", b"text\r\n") == [("a", b"text\r\n")]
    assert extract("text", "a.gz", gzip.compress(b"text")) == [("a.gz", b"text")]
    with pytest.raises(BuildError, match=r"cannot read a\.gz as text"):
        extract("text", "a.gz", gzip.compress(b"text" * 100)[:-12])


def r_record(body, version=2):
    header = b"X\n" + struct.pack(">iii", version, 0x030500, 0x020300)
    if version == 3:
        header += struct.pack(">i", 5) + b"UTF-8"
    packed = header + body
    return struct.pack(">i", len(packed)) + zlib.compress(packed)


def r_vector(*strings):
    items = b"".join(struct.pack(">ii", 0x40009, len(string)) + string for string in strings)
    return struct.pack(">ii", 16, len(strings)) + items


def test_strings_of_r_data_are_lines_and_other_objects_are_passed_over():
    missing = struct.pack(">ii", 16, 2) + struct.pack(">ii", 9, -1) + struct.pack(">ii", 9, 1) + b"c"
    integers = struct.pack(">iii", 13, 1, 42)
    database = r_record(r_vector(b"a", b"", b"b")) + r_record(integers) + r_record(missing, version=3)
    assert r_strings(database) == [b"a\n\nb\n", b"\nc\n"]
    assert extract("r-strings", "x.rdb", database) == [("x.rdb#0", b"a\n\nb\n"), ("x.rdb#1", b"\nc\n")]


@pytest.mark.parametrize("database", [r_record(r_vector(b"abc"))[:-3], b"\0\0\0\1nonsense"])
def test_damaged_r_data(database):
    with pytest.raises(BuildError, match=r"cannot read x\.rdb as r-strings"):
        extract("r-strings", "x.rdb", database)
