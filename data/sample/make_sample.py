"""Build the embedded web pages: pages/*.txt -> luojiu-sample.warc.wet.gz and luojiu-sample.warc.gz.

pages/*.txt hold the pages as people can read and edit them; `=== label/slug` starts a page. This
script puts them into the two containers that Common Crawl publishes (WET: plain text, WARC: the
HTML as served) and adds the pages that nobody writes by hand: near duplicates and broken bytes.
A page's label is the first path segment of its URI, so that tests can check the filter's verdict.
The output depends on the pages alone: the same pages give the same bytes.

    python data/sample/make_sample.py
"""

import gzip
import random
import re
import uuid
from io import BytesIO
from pathlib import Path

from fastwarc.warc import WarcRecord, WarcRecordType

HERE = Path(__file__).resolve().parent
HOST = "https://sample.luojiu.example"
LANGUAGE = {"en": "eng", "ja": "jpn", "ko": "kor", "mixed": "zho,eng"}  # every other label: zho


def read_pages() -> dict[str, str]:
    """Return {label/slug: text} of all pages, in the order of the file names."""
    pages: dict[str, str] = {}
    for file in sorted(HERE.glob("pages/*.txt")):
        parts = re.split(r"^=== (\S+)\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            assert name not in pages, f"{file.name}: {name} is there twice"
            pages[name] = text.strip()
    return pages


def near_duplicates(pages: dict[str, str], count: int) -> dict[str, str]:
    """Return `count` good pages as another site has them: one sentence gone, a line added."""
    good = [name for name in pages if name.startswith("tc/")]
    copies = {}
    for name in random.Random(0).sample(good, count):
        sentences = pages[name].split("。")
        del sentences[len(sentences) // 2]
        slug = name.partition("/")[2]
        copies[f"dup/{slug}"] = "。".join(sentences) + "\n（本文由讀者推薦轉載。）"
    return copies


def broken_bytes(pages: dict[str, str]) -> dict[str, bytes]:
    """Return pages whose bytes went wrong on the way, in the ways that crawls show."""
    good = [name for name in pages if name.startswith("tc/")]
    first, second, third, fourth = (pages[name] for name in random.Random(1).sample(good, 4))
    return {
        "broken/big5-served-as-utf8": first.encode("cp950", errors="ignore"),
        "broken/utf8-read-as-latin1": second.encode().decode("latin-1").encode(),
        "broken/replacement-characters": re.sub("(..).", "\\1\ufffd", third).encode(),
        "broken/bytes-lost": bytes(b for i, b in enumerate(fourth.encode()) if i % 7),
    }


def write_warc(path: Path, records: list[WarcRecord]) -> None:
    """Write each record as a gzip member of its own, as Common Crawl does."""
    with path.open("wb") as file:
        for record in records:
            plain = BytesIO()
            record.write(plain, checksum_data=True)
            file.write(gzip.compress(plain.getvalue(), mtime=0))


def new_record(kind: WarcRecordType, uri: str, content: bytes, **headers: str) -> WarcRecord:
    """Return a record with a fixed date and an id that follows from its URI."""
    record = WarcRecord()
    urn = f"uuid:{uuid.uuid5(uuid.NAMESPACE_URL, uri)}"
    record.init_headers(record_type=kind, record_urn=urn.encode())
    record.headers["WARC-Date"] = "2026-11-01T00:00:00Z"
    record.headers["WARC-Target-URI"] = uri
    for name, value in headers.items():
        record.headers[name.replace("_", "-")] = value
    record.set_bytes_content(content)
    return record


def wet_record(name: str, text: str | bytes) -> WarcRecord:
    """Return a WET record; three in ten have no language header, as in the crawls."""
    content = text if isinstance(text, bytes) else text.encode()
    language = LANGUAGE.get(name.partition("/")[0], "zho")
    headers = {"Content_Type": "text/plain"}
    if random.Random(name).random() > 0.3:
        headers["WARC_Identified_Content_Language"] = language
    return new_record(WarcRecordType.conversion, f"{HOST}/{name}", content, **headers)


def html_record(name: str, html: str) -> WarcRecord:
    """Return a WARC response record: the HTTP answer of the server with the page in it."""
    body = html.encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n"
    return new_record(
        WarcRecordType.response,
        f"{HOST}/{name}",
        head.encode() + body,
        Content_Type="application/http; msgtype=response",
    )


def main() -> None:
    pages = read_pages()
    html = {name: text for name, text in pages.items() if name.startswith("html/")}
    text = {name: text for name, text in pages.items() if name not in html}
    text |= near_duplicates(text, count=10) | broken_bytes(text)
    names = sorted(text, key=lambda name: random.Random(name).random())  # a crawl has no order
    write_warc(HERE / "luojiu-sample.warc.wet.gz", [wet_record(name, text[name]) for name in names])
    write_warc(HERE / "luojiu-sample.warc.gz", [html_record(name, html[name]) for name in html])
    print(f"{len(text)} pages as WET, {len(html)} as WARC")


if __name__ == "__main__":
    main()
