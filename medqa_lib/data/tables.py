"""A file as a table. What kind of file it is shows in its first bytes, whatever its name ends with."""

import codecs
import csv
import gzip
import io
import json
import math
import re
import zipfile
from collections import Counter
from pathlib import Path

import pandas as pd
from charset_normalizer import from_bytes

SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".xlsx", ".xls", ".gz")
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # UTF-32 begins as UTF-16 does
# What Excel writes as "CSV", by country: pages of Latin letters with their languages' letters, then others.
WESTERN = ("äöüß", "àâæçéèêëîïôœùûüÿ", "áéíóúüñ", "àáâãçéêíóôõúü", "àèéìíîòóùú", "åäöæøé", "äëïöüéèó",
           "áðéíóúýþæö")
CENTRAL = ("ąćęłńóśźż", "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "ăâîşţ", "čćđšž")
BALTIC = ("ąčęėįšųūž", "āčēģīķļņšūž", "äöõüšž")
LATIN_PAGES = {"cp1252": WESTERN, "cp1250": CENTRAL, "iso8859_2": CENTRAL, "cp1254": ("çğıi̇öşü",),
               "cp1257": BALTIC, "mac_roman": WESTERN}
OTHER_PAGES = ["cp1251", "cp1253", "cp1255", "cp1256", "cp874", "koi8_r", "gb18030", "big5", "cp932", "cp949"]
MISFIT = 100  # nats of a letter of another language, of a capital or a sign inside a word
_LETTER = re.compile("[a-z]?[^\\x00-\\x7f¡¿«»°·±µ½€£§‘’“”„–—…\u00a0]|[A-Za-z][¡¿«»°±§][A-Za-z]")
_GLUED = re.compile("[a-z][^\\x00-\\x7f][a-z]")
AS_UTF8 = "save it as UTF-8 (in Excel: CSV UTF-8), or read it with pandas and pass the DataFrame"


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a CSV (any delimiter), Excel, Parquet, JSON or JSON Lines file, packed or not.

    Cells of text files stay text: "None" and "007" are what they are. A ValueError says what is wrong.
    """
    try:
        frame = parse_table(path.read_bytes())
    except Exception as error:  # pandas, pyarrow, zipfile, gzip and json each raise their own
        reason = " ".join(str(error).split())[:300] or "it is cut"
        if isinstance(error, ImportError):
            reason = "Excel needs a package: pip install openpyxl (.xls: xlrd), or save it as CSV UTF-8."
        raise ValueError(f"{path} cannot be read: {reason}") from None
    frame.attrs["origin"] = path.name
    if frame.empty:
        raise ValueError(f"{path} has no row below the header.")
    return frame


def parse_table(content: bytes) -> pd.DataFrame:
    """The table in the content of a file."""
    if content.startswith(b"\x1f\x8b"):
        return parse_table(gzip.decompress(content))
    if content.startswith(b"PAR1"):
        return pd.read_parquet(io.BytesIO(content))
    if content.startswith(b"PK") and len(names := zipfile.ZipFile(io.BytesIO(content)).namelist()) == 1:
        return parse_table(zipfile.ZipFile(io.BytesIO(content)).read(names[0]))
    if content.startswith((b"PK", b"\xd0\xcf\x11\xe0")):
        return pd.read_excel(io.BytesIO(content), dtype=str, keep_default_na=False)
    text = decode(content)
    start = text[:500].lstrip().lower()
    if not start:
        raise ValueError("it is empty.")
    if start.startswith("version https://git-lfs"):
        raise ValueError("it is a git-lfs pointer: run git lfs pull, or download the file itself.")
    if start.startswith(("<!doctype", "<html")):
        raise ValueError("it is a web page: download the file itself.")
    return parse_json(text) if start[0] in "[{" else parse_csv(text)


def decode(content: bytes) -> str:
    """Text in UTF-8, UTF-16, UTF-32 or in the code page that fits best, which is then printed."""
    for bom, encoding in BOMS.items():
        if content.startswith(bom):
            return content.decode(encoding)
    even, odd = content[:400:2].count(0), content[1:400:2].count(0)
    if even + odd > 20 and 0 in (even, odd):  # UTF-16 without a mark: every other byte of ASCII is 0
        return content.decode("utf-16-be" if even else "utf-16-le")
    if even + odd:
        raise ValueError("it is no table; expected CSV, TSV, Excel, Parquet, JSON or JSON Lines.")
    text = content.decode("utf-8", "replace")
    if "\ufffd" not in text:
        return text
    odd = [character for character in text if not character.isascii()]
    line = text.count("\n", 0, text.index("\ufffd")) + 1
    if 2 * odd.count("\ufffd") < len(odd):
        raise ValueError(f"it is UTF-8 but damaged in line {line}: export it again.")
    surprise = {page: least_surprise(content, page) for page in LATIN_PAGES}
    page = min(surprise, key=surprise.get)
    if surprise[page] > 0.05 * MISFIT * len(odd):
        found = from_bytes(content, cp_isolation=OTHER_PAGES)
        found = [one for one in found if one.chaos < 0.05 and not _GLUED.search(str(one))]
        if not found:
            raise ValueError(f"line {line} is not UTF-8, and its encoding cannot be told: {AS_UTF8}.")
        page = found[0].encoding
    print(f"The file is not UTF-8; read as {page}. If letters look wrong, {AS_UTF8}.")
    return content.decode(page)


def least_surprise(content: bytes, page: str) -> float:
    """How little the file, read as this page, fits the language of the page that it fits best.

    In nats, as if a language used its letters equally often: so nine letters that are all Hungarian's are
    Hungarian, although Portuguese has them among its thirteen.
    """
    try:
        text = content.decode(page)
    except UnicodeDecodeError:
        return math.inf
    letters = Counter("?" if pair[1:].isupper() else pair[-1].lower() for pair in _LETTER.findall(text))
    fits = (sum(count * (math.log(len(alphabet)) if letter in alphabet else MISFIT)
                for letter, count in letters.items()) for alphabet in LATIN_PAGES[page])
    return min(fits) - 7 * (page == "cp1252")  # the commonest by far


def parse_json(text: str) -> pd.DataFrame:
    """Records: a list, a line each, by column, or the one list in an object such as {"data": [...]}."""
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(found, dict):
        nested = [value for value in found.values() if isinstance(value, (list, dict))]
        records = nested[0] if len(nested) == 1 and isinstance(nested[0], list) else found
        found = records if nested else [found]
    return pd.DataFrame(found)


def parse_csv(text: str) -> pd.DataFrame:
    """Rows of text cells, cut by the character that cuts the first rows into equal numbers of cells."""
    if text.startswith("sep=") and text[5:6] in "\r\n":  # Excel's hint
        mark, text = text[4], text.partition("\n")[2]
    else:
        mark = find_delimiter(text)
    engine = "c" if mark.isascii() else "python"
    frame = pd.read_csv(io.StringIO(text), sep=mark, dtype=str, keep_default_na=False, engine=engine)
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes surplus cells for row names
        raise ValueError("the rows have more cells than the header.")
    return frame


def find_delimiter(text: str) -> str:
    """The character of the header that gives most rows as many cells as the header has."""
    lines, fits = text[:100_000].splitlines(), {}
    for mark in ",;\t|" + lines[0]:
        if not mark.isalnum() and mark not in "\"' _-.?()":
            widths = [len(row) for row in csv.reader(lines, delimiter=mark) if row]
            is_prose = f"{mark} " in lines[0]  # as in the header "Question, in English;Answer"
            fits[mark] = (widths[0] > 1, widths.count(widths[0]) / len(widths), not is_prose, widths[0])
    return max(fits, key=fits.get)
