"""Texts of files and folders: what is read, what a page's text is, what a copy is."""

import pytest

from models.downscale.texts import Copies, files_of, paragraphs, read_text
from models.errors import CorpusError

PAGE = """<!doctype html><html><head><meta charset="iso-8859-1"><title>T</title>
<style>p {color: red}</style></head><body><nav><a href="/">Home</a></nav>
<main><h1>Caf\xe9</h1><p>One paragraph<br>of two lines.</p><pre>def f():
    return 1</pre><script>alert(1)</script></main><footer>Imprint</footer></body></html>"""


def words(first, count):
    """So many distinct words."""
    return " ".join(f"w{i}" for i in range(first, first + count))


def test_a_folder_is_all_readable_files_below_it(tmp_path):
    """In order, hidden ones aside; what is not read is counted by its suffix."""
    for name in ("b/two.md", "a.txt", "b/c/three.HTML", "x.jsonl", "b/image.png", "LICENSE",
                 "._a.txt", ".git/config.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    files, others = files_of(tmp_path)
    names = [str(file.relative_to(tmp_path)) for file in files]
    assert names == ["a.txt", "b/c/three.HTML", "b/two.md", "x.jsonl"]
    assert others == {".png": 1, "": 1}


def test_links_in_a_folder_are_followed(tmp_path):
    """To files and folders, a circle once; one that leads nowhere is named."""
    for name in ("corpus/a.txt", "elsewhere/b/c.txt", "elsewhere/.git/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "z.md").symlink_to(tmp_path / "elsewhere" / "b" / "c.txt")
    (corpus / "circle").symlink_to(corpus)
    names = [str(file.relative_to(corpus)) for file in files_of(corpus)[0]]
    assert names == ["a.txt", "linked/b/c.txt", "z.md"]
    (corpus / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    with pytest.raises(CorpusError, match=r"gone\.txt is a link to nothing"):
        files_of(corpus)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "there is no corpus at"),
        ("a.csv", r"a corpus is a folder or a file that ends in \.jsonl, \.txt"),
        ("empty", r"the folder holds no file that ends in"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path, name, message):
    """Each has its own message, with what could be read."""
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=message):
        files_of(tmp_path / name)


def test_the_text_of_a_page_is_what_a_reader_sees(tmp_path):
    """In the page's own encoding, with its line breaks and programs, without menus and scripts."""
    (tmp_path / "a.html").write_bytes(PAGE.encode("iso-8859-1"))
    text = read_text(tmp_path / "a.html")
    assert "Caf\xe9" in text
    assert "One paragraph\nof two lines." in text
    assert "def f():\n    return 1" in text
    for gone in ("Home", "alert", "Imprint", "color", "<"):
        assert gone not in text
    (tmp_path / "b.html").write_bytes(b" \n")
    assert read_text(tmp_path / "b.html") == ""
    (tmp_path / "c.html").write_bytes(b"<!-- nothing yet -->")
    assert read_text(tmp_path / "c.html") == ""


def test_texts_end_their_lines_in_any_way_and_are_utf8(tmp_path):
    """A mark of byte order and carriage returns are no text; another encoding is named."""
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo\rlines\u2028x\n\n \nthree".encode())
    assert list(paragraphs(read_text(tmp_path / "a.txt"))) == [
        "one", "two\nlines\u2028x", "three"
    ]  # fmt: skip
    # UTF-16 of English is valid UTF-8 as well.
    for raw in ("caf\xe9".encode("latin-1"), "cafe".encode("utf-16-le"), b"\x7fELF\0\0"):
        (tmp_path / "b.md").write_bytes(raw)
        with pytest.raises(CorpusError, match=r"b\.md is not UTF-8"):
            read_text(tmp_path / "b.md")


def test_copies_are_told_from_texts_that_are_alike():
    """Exact ones whatever their case and spacing; near ones by their runs of words; half of a text
    is no copy of it, and short texts are copies only when they are equal."""
    copies = Copies()
    assert copies.meet(words(0, 200)) is None
    assert copies.meet(words(0, 200).upper().replace(" ", "\n")) == "exact"
    assert copies.meet(words(0, 100) + " another " + words(101, 99)) == "near"
    assert copies.meet(words(0, 100) + " " + words(500, 100)) is None
    assert copies.meet("What is 1 + 1?") is None
    assert copies.meet("What is 1 + 2?") is None
