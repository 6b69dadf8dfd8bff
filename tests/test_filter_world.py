"""filter_cc.py on what others send: odd rows, types and compressions; HTML, encodings and headers
as servers send them; the account that closes; usage and topic."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import math
import os
import random
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import HubAnswers, serving
from test_filter_cc import (
    ENGLISH,
    LETTER,
    RECIPE,
    different,
    judge,
    members,
    read,
    record,
    rows,
    run,
    run_here,
)

import filter_cc
from filter_cc import hide_private, jsonl_rows

assert judge  # the fixture is used by its name


# --- Files as others send them -------------------------------------------------------------------


def lines_of(*objects) -> bytes:
    return b"".join(
        (one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in objects)


def account_of(folder) -> dict:
    account = json.loads((folder / "out" / "stats.json").read_text())["account"]
    fates = sum(sum(account[kind].values()) for kind in ("refused", "damaged", "no_page"))
    assert account["read"] == account["kept"] + fates
    return account


def test_an_odd_row_is_damaged_alone(tmp_path):
    texts = different(6, seed=11)
    good = [{"text": t, "id": None, "date": 20240501 + i, "url": [1]} for i, t in enumerate(texts)]
    bad = [
        42, ["text"], {"text": 1}, {"text": ["a"]}, {"text": None}, {"body": texts[0]},
        b'{"text": "cut',
        json.dumps({"text": texts[0]}, ensure_ascii=False).encode("big5hkscs")]
    (tmp_path / "odd.jsonl").write_bytes(lines_of(*good[:3], *bad, b"", b"\r", *good[3:]))
    run_here(tmp_path, "--input", tmp_path / "odd.jsonl")
    account = account_of(tmp_path)
    assert account["kept"] == 6
    assert account["read"] == 14
    assert sum(account["damaged"].values()) == 8
    assert len({row["id"] for row in rows(tmp_path)}) == 6
    assert {row["date"] for row in rows(tmp_path)} == {str(20240501 + i) for i in range(6)}


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary"])
def test_parquet_text_of_every_type_is_read(tmp_path, kind):
    texts = different(3, seed=12)
    column = pa.array(texts)
    if kind == "dictionary":
        column = column.dictionary_encode()
    else:
        column = column.cast(getattr(pa, kind)())
    when = pa.array([0, 10**15, None], pa.timestamp("us"))
    table = pa.table({"content": column, "date": when, "extra": [{"a": 1}, None, {"a": 2}]})
    pq.write_table(table, tmp_path / "rows.parquet")
    run_here(tmp_path, "--input", tmp_path / "rows.parquet")
    assert sorted(row["text"] for row in rows(tmp_path)) == sorted(texts)
    account_of(tmp_path)


@pytest.mark.parametrize("ending", [".jsonl.xz", ".jsonl.bz2", ".json.gz", ".ndjson.zst"])
def test_rows_in_every_compression_are_read(tmp_path, ending):
    pack = {
        "xz": lzma.compress, "bz2": bz2.compress, "gz": gzip.compress,
        "zst": lambda data: zstandard.compress(data[:900]) + zstandard.compress(data[900:])}
    data = lines_of(*({"text": text} for text in different(3, seed=13)))
    (tmp_path / f"rows{ending}").write_bytes(pack.get(ending.split(".")[-1], bytes)(data))
    run_here(tmp_path, "--input", tmp_path / f"rows{ending}")
    assert account_of(tmp_path)["kept"] == 3


def test_links_are_what_they_lead_to_and_json_is_read_by_name(tmp_path):
    texts = different(2, seed=3)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1f").write_bytes(lines_of({"text": texts[0]}))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").symlink_to(tmp_path / "blobs" / "1f")
    (tmp_path / "in" / "dataset_infos.json").write_text("{\n}")
    (tmp_path / "rows.json").write_bytes(lines_of({"text": texts[1]}))
    run_here(tmp_path, "--input", tmp_path / "in", tmp_path / "rows.json")
    assert {row["text"] for row in rows(tmp_path)} == set(texts)


def test_a_folder_says_what_it_holds_besides(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    (folder / "notes.txt").write_text("x")
    (folder / "新聞[1].jsonl").write_bytes(lines_of({"text": different(1, seed=14)[0]}))
    run_here(tmp_path, "--input", folder)
    said = capsys.readouterr().out
    assert "deeper/" in said and "notes.txt" in said
    assert account_of(tmp_path)["kept"] == 1
    (tmp_path / "again").mkdir()
    run_here(tmp_path / "again", "--input", folder / "新聞[1].jsonl")  # a name before a glob
    assert account_of(tmp_path / "again")["kept"] == 1


def test_a_finished_run_is_believed_only_as_it_was_written(tmp_path, capsys):
    source = tmp_path / "in.jsonl"

    def again() -> str:
        with pytest.raises(SystemExit):
            run_here(tmp_path, "--input", source)
        return capsys.readouterr().err.strip().splitlines()[-1]

    source.write_bytes(lines_of(*({"text": text} for text in different(3, seed=5))))
    run_here(tmp_path, "--input", source)
    whole, corpus = source.read_bytes(), next((tmp_path / "out").glob("*.parquet"))
    source.write_bytes(whole + b"\n")
    assert "its files have changed" in again()
    source.write_bytes(whole)
    corpus.write_bytes(corpus.read_bytes()[:-1])
    assert f"{corpus.name} is gone or was changed" in again()
    (tmp_path / "out" / ".work" / "settings.json").write_text("")
    assert "settings.json is damaged" in again()


@pytest.mark.parametrize("seed", range(4))
def test_the_account_closes_over_fuzzed_json_lines(seed):
    """250 inputs a seed: bytes changed, cut out, or put in. Every line is a row or damaged."""
    draw = random.Random(seed)
    whole = lines_of(*({"text": text, "id": "x"} for text in [*different(3, seed=15), ENGLISH]))
    for _ in range(250):
        damaged = Counter()
        data = spoil(draw, whole)
        found = list(jsonl_rows(io.BytesIO(data), lambda kind, row, to=damaged: to.update([kind])))
        lines = [line.removeprefix(b"\xef\xbb\xbf").strip() for line in data.split(b"\n")]
        assert len(found) + damaged.total() == len([line for line in lines if line])


@pytest.mark.parametrize("kind", ["wet", "warc"])
def test_the_account_closes_over_fuzzed_records(judge, kind):
    """250 inputs each; `read` asserts that every record read has one fate."""
    draw = random.Random(kind)
    texts = different(3, seed=16)
    if kind == "wet":
        records = [record(f"r{at}", text) for at, text in enumerate([*texts, ENGLISH])]
    else:
        records = [answer(article(text).encode()) for text in texts]
        records.append(answer(b"GIF89a", "HTTP/1.1 200 OK\r\nContent-Type: image/gif"))
    whole = [members(*records), b"".join(records)]
    for at in range(250):
        read(judge, spoil(draw, whole[at % 2]))


@pytest.mark.parametrize("seed", range(2))
def test_the_account_closes_over_fuzzed_parquet(tmp_path, seed):
    draw = random.Random(seed)
    table = pa.table({"text": [*different(3, seed=17), ENGLISH, None], "date": [1, 2, 3, 4, 5]})
    paths = []
    for at in range(50):
        path = tmp_path / f"{at}.parquet"
        pq.write_table(table, path, row_group_size=2)
        if at:
            path.write_bytes(spoil(draw, path.read_bytes()))
        paths.append(path)
    run_here(tmp_path, "--input", *paths, "--tasks", 1)
    account = account_of(tmp_path)
    assert account["kept"] >= 3 and account["damaged"]


def spoil(draw: random.Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(len(data))
        data[at : at + draw.choice((0, 1, 40))] = draw.randbytes(draw.choice((0, 1, 9)))
    return bytes(data)


# --- HTML as servers send it ---------------------------------------------------------------------


HTML = "HTTP/1.1 200 OK\r\nContent-Type: text/html"


def answer(body: bytes, head: str = HTML, **headers) -> bytes:
    block = head.encode() + b"\r\n\r\n" + body
    return record("page", block, WARC_Type="response", **headers)


def article(paragraphs: str = LETTER) -> str:
    return (
        "<html><head><title>一封信</title></head><body><nav><a href='/'>首頁</a></nav>"
        f"<article><h1>一封信</h1><p>{paragraphs}</p></article></body></html>")


def page_of(judge, body: bytes, **kinds) -> str:
    pages, _ = read(judge, answer(body, **kinds))
    return pages[0]["text"] if pages else ""


@pytest.mark.parametrize("head", [
    "HTTP/2 200\r\nContent-Type: text/html",
    "HTTP/1.1 200 OK\r\ncontent-type: TEXT/HTML; Charset=UTF-8",
    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked",
    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip",
    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: br",
    "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=bogus-7", "HTTP/1.0 200\r\nServer: x"])
def test_a_body_is_read_whatever_its_header_says(judge, head):
    assert LETTER[:60] in page_of(judge, article().encode(), head=head)


def test_chunks_and_compression_are_undone(judge):
    body = article().encode()
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
    parts = [body[at : at + 700] for at in range(0, len(body), 700)] + [b""]
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    assert LETTER[:60] in page_of(judge, chunked, head=head + "Transfer-Encoding: chunked")
    packed = gzip.compress(body)
    assert LETTER[:60] in page_of(judge, packed, head=head + "Content-Encoding: gzip")


@pytest.mark.parametrize(("label", "codec"), [
    ("big5", "big5hkscs"), ("x-x-big5", "big5hkscs"), ("BIG5-HKSCS", "big5hkscs"),
    ("gb2312", "gb18030"),
    ("utf-8", "utf-8"), ("iso-8859-1", "utf-8"), ("bogus", "big5hkscs")])
def test_encodings_are_read_as_browsers_do(judge, label, codec):
    text = LETTER + "恒春的碁盤和堃哥、喆弟。"
    meta = "<meta charset=big5>" if label == "bogus" else ""
    body = article(meta + text).encode(codec)
    kept = page_of(judge, body, head=f"{HTML}; charset={label}")
    assert "恒春的碁盤和堃哥、喆弟" in kept and LETTER[:60] in kept


@pytest.mark.parametrize(("label", "codec"), [
    ("gbk", "big5"), ("gb2312", "cp950"), ("", "utf-16"), ("utf-16", "utf-16")])
def test_bytes_overrule_a_wrong_label(judge, label, codec):
    head = f"{HTML}; charset={label}" if label else HTML
    assert LETTER in page_of(judge, article().encode(codec, "replace"), head=head)


def test_a_meta_element_in_a_comment_names_no_encoding(judge):
    page = article().replace("<head>", "<head><!--<meta charset=gbk>--><meta charset=big5>")
    assert LETTER in page_of(judge, page.encode("big5"))


def test_a_stray_byte_costs_one_character(judge):
    body = article(LETTER[:100] + "＠" + LETTER[100:]).encode("big5hkscs")
    body = body.replace("＠".encode("big5hkscs"), b"\xa9")
    kept = page_of(judge, body, head=f"{HTML}; charset=big5")
    assert LETTER[:100] in kept and LETTER[101:200] in kept


def test_odd_but_valid_transfers_are_undone(judge):
    body = article().encode()
    parts = [body[at : at + 300] for at in range(0, len(body), 300)]
    chunks = b"".join(b"%08x\r\n%s\r\n" % (len(part), part) for part in parts)
    two = gzip.compress(body[:900]) + gzip.compress(body[900:])
    for sent, more in (
        (chunks + b"0\r\n\r\n", "\r\nTransfer-Encoding: chunked"),
        (chunks + b"0\r\n\r\n", ""),
        (two, "\r\nContent-Encoding: gzip")):
        assert LETTER in page_of(judge, sent, head=HTML + more)


@pytest.mark.parametrize("around", [
    "<h2><button>{}</button></h2>", "<div class=card-header><a href='#a'>{}</a></div>"])
def test_the_questions_of_an_accordion_stay(judge, around):
    text = "".join(
        f"{around.format(f'第{at}個問題？')}<div class=card-body><p>{line}</p></div>"
        for at, line in enumerate(paragraphs(9)))
    kept = page_of(judge, f"<html><body><main>{text}</main></body></html>".encode())
    assert all(f"第{at}個問題？\n" in kept for at in range(9))


def test_elements_that_are_never_closed_end_nothing(judge):
    assert LETTER in page_of(judge, article().replace("<article>", "<div>" * 400).encode())


@pytest.mark.parametrize(("markup", "expected"), [
    ("這種藥<strong>不</strong>可以和牛奶一起吃。", "這種藥不可以和牛奶一起吃。"),
    ("發燒<a href='#'>、</a>咳嗽<i>和</i>喉嚨痛。", "發燒、咳嗽和喉嚨痛。"),
    ("<ruby>漢<rp>(</rp><rt>ㄏㄢˋ</rt></ruby><ruby>字<rt>ㄗˋ</ruby>的讀音。", "漢字的讀音。"),
    ("<span class='drop'>從</span>前有一座山。", "從前有一座山。")])
def test_inline_elements_of_one_character_stay(judge, markup, expected):
    assert expected in page_of(judge, article(f"{LETTER}</p><p>{markup}").encode())


def test_a_list_in_an_article_stays(judge):
    items = "<ul class='x'><li>去骨雞腿 兩隻</li><li>黑麻油 三大匙</li></ul>"
    text = page_of(judge, article(f"{RECIPE}</p>{items}<p>{LETTER}").encode())
    assert "去骨雞腿" in judge.verdict(text)[0]


def test_a_page_in_numeric_references_is_read(judge):
    references = "".join(f"&#{ord(char)};" for char in LETTER)
    assert LETTER[:60] in page_of(judge, article(references).encode())


def test_full_width_personal_data_become_placeholders():
    text = "電話０９１２－３４５－６７８，信箱ａｂ＠ｃ．ｔｗ，身分證Ａ１２３４５６７８９。"
    assert hide_private(text) == "電話[PHONE]，信箱[EMAIL]，身分證[ID]。"


INSIDE = {  # lines of an article that look like furniture, and stand in a text without HTML
    "verse behind a colon": "她只寫了四行：\n紙泡過水\n字就游走\n留下一張\n乾淨的夜晚",
    "a list behind a colon": "要準備的材料如下：\n全麥麵粉　50 公克\n冷開水　50 公克\n玻璃罐　一個",
    "code in a fence": "查詢寫成這樣。\n```sql\nSELECT name\n  FROM letters\n```",
    "a notice in a paragraph": (
        "外資今天又賣超，指數守在月線。量縮代表大家都在等。本文不構成任何投資建議。"
        "下週要看的是出口數字，還有那幾家代工廠怎麼說。"),
    "another language": "他抬頭問了一句。\n\"Where is my umbrella?\"\nAray kita.\n沒有人回答。",
    "options of a question": "下列哪一項是原因？\n(A) 位於迎風面\n(B) 海拔比較高\n(C) 受洋流影響",
    "words apart": "第二幕　第一場，燈亮的時候她坐在窗邊。"}


@pytest.mark.parametrize("before", ["", RECIPE])
@pytest.mark.parametrize("name", INSIDE)
def test_what_stands_within_an_article_stays(judge, name, before):
    text = f"{before}\n{INSIDE[name]}\n{LETTER}"
    assert INSIDE[name] in judge.verdict(text)[0]


@pytest.mark.parametrize("title", ["球評／老將不死　三局四分", "雙語讀報：The Last Salt Farmer"])
def test_a_title_stays_however_it_looks(judge, title):
    assert judge.verdict(f"{title}\n{LETTER}")[0].startswith(title)


def test_a_title_above_a_byline_and_below_a_menu_stays(judge):
    head = "站名 / 生活 / 交通 / 文教\n榕樹倒下以後 鄰居自己清路\n記者陳怡君／臺北報導"
    kept = judge.verdict(f"{head}\n{LETTER}")[0]
    assert kept.split("\n")[0] == "榕樹倒下以後 鄰居自己清路"


def test_a_list_of_chapters_is_no_verse(judge):
    names = "\n".join(f"第{at}章　他在那裡的{word}" for at, word in enumerate(LETTER[:40]))
    assert judge.verdict(names)[2]


def test_vertical_punctuation_and_colours_of_a_terminal(judge):
    text = LETTER.replace("，", "︐").replace("。", "︒")
    assert judge.verdict(f"\x1b[1;31m{text}\x1b[m")[::2] == (text, None)


def test_usage_is_judged_not_the_topic(judge):
    crime = (
        "警方昨天查獲一處線上博弈機房，逮捕八人。檢方指出，賭客在網站上下注百家樂和老虎機，儲值後卻無法出金。"
        "被害人說，他向當舖借錢翻本，最後只好報案。法官判決主嫌有期徒刑三年。")
    news = LETTER + "\n" + crime
    assert judge.verdict(news)[2] is None
    china = "陸媒報導，今年高考人數創新高，央企與國企招考減少，農民工返鄉，發改委說明微信的新規定。"
    china = LETTER + "\n" + china
    assert judge.verdict(china)[2] is None


def test_a_page_that_does_not_parse_is_read_once_and_damaged_once(judge, monkeypatch):
    def fail(page: str) -> str:
        raise ValueError("no tree")

    monkeypatch.setattr("filter_cc.extract", fail)
    pages, tally = read(judge, members(answer(article().encode()), record("whole", LETTER)))
    assert len(pages) == 1
    assert tally.damage == {"page that does not parse (ValueError)": 1}
    assert tally.read == 2


def test_a_response_whose_header_names_another_language_is_refused(judge):
    foreign = answer(article().encode(), WARC_Identified_Content_Language="eng")
    pages, tally = read(judge, members(foreign))
    assert pages == []
    assert tally.pages == {"language": 1}


def paragraphs(number: int) -> list[str]:
    text = RECIPE.replace("\n", "")
    return [f"第{at}段：{text[at * 30 : at * 30 + 60]}。" for at in range(number)]


def test_an_early_end_of_html_ends_nothing():
    """libxml2 stops there; browsers do not."""
    head = "<html><head><title>題</title></head></html>"
    body = "".join(f"<p>{text}</p>" for text in paragraphs(6))
    article, _ = filter_cc.extract(f"{head}<body><article>{body}</article></body></html>")
    assert all(text in article for text in paragraphs(6))


@pytest.mark.parametrize("tag", ["div", "p", "td", "li", "section"])
def test_lines_that_br_divides_are_there_once(tag):
    rows = {"td": ("<table><tr>", "</tr></table>"), "li": ("<ul>", "</ul>")}
    before, after = rows.get(tag, ("", ""))
    lines = "<br/>".join(paragraphs(8))
    page = f"<html><body><main>{before}<{tag}>{lines}</{tag}>{after}</main></body></html>"
    article, _ = filter_cc.extract(page)
    assert [article.count(text) for text in paragraphs(8)] == [1] * 8


def test_code_that_br_divides_stays():
    code = "<br>".join(f"value_{at} = load({at})" for at in range(6))
    body = "".join(f"<p>{text}</p>" for text in paragraphs(5))
    page = f"<article>{body}<pre><code>{code}</code></pre>{body}</article>"
    article, _ = filter_cc.extract(f"<html><body>{page}</body></html>")
    assert all(f"value_{at} = load({at})" in article for at in range(6))


PARTS = {  # what stands in an article: its HTML, and what must be read
    "one character": (
        "<p><strong>不</strong>可以和牛奶一起吃，會拉肚子。</p>",
        ["不可以和牛奶一起吃"]),
    "links": (
        "<p><a href=x>山</a>、<a href=y>海</a>和<a href=z>河</a>都去過了。</p>",
        ["山、海和河都去過了"]),
    "wbr": ("<p>隔壁的阿<wbr>伯請我們進去坐。</p>", ["隔壁的阿伯請我們進去坐"]),
    "ruby": (
        "<p>這條<ruby>圳<rt>ㄗㄨㄣˋ</rt></ruby>溝很老，"
        "<ruby><rb>水</rb><rb>門</rb><rt>a</rt></ruby>還在。</p>",
        ["這條圳溝很老，水門還在。"]),
    "table": (
        "<table><tr><th>材料</th><th>份量</th></tr>"
        "<tr><td>南瓜</td><td>半顆</td></tr></table>", ["材料 份量", "南瓜 半顆"]),
    "labels": (
        "<label><input type=checkbox><b>洋薏仁</b>半杯</label><br><label>二砂</label>",
        ["洋薏仁半杯", "二砂"]),
    "short list": (
        "<ul class=menu><li>埋到真葉的下面。</li></ul>", ["埋到真葉的下面。"]),
    "caption": (
        "<figure><img src=x><figcaption>民國六十年的渡船頭。</figcaption></figure>",
        ["民國六十年的渡船頭。"]),
    "code": (
        "<pre><code>def f(x):\n    if x &lt; 3:\n        return g(x)\n</code></pre>",
        ["    if x < 3:\n        return g(x)"]),
    "numbered code": (
        "<table><tr><td class=gutter><pre><span class=line>1</span><br>2<br>3</pre></td>"
        "<td class=code><pre>$ npm init<br>$ npm test</pre></td></tr></table>",
        ["。\n$ npm init\n$ npm test\n"]),
    "icons": (
        "<p><i class='material-icons tiny'>event</i>二月的第一個週末，我們又回到山上。</p>",
        ["\n二月的第一個週末"]),
    "a link and its text": (
        "<div><a href=/law/7>第 7 條</a></div><div>前項申請，應於三十日內補正。</div>",
        ["第 7 條\n前項申請"]),
    "source breaks": (
        "<p>他把門輕輕地\n   打開，外面沒有人。</p>", ["他把門輕輕地打開，外面沒有人。"]),
}
AROUND = """<nav><a href=a>首頁</a> <a href=b>站內搜尋</a> <a href=c>加入會員</a></nav>"""
BELOW = """<aside class="sidebar"><h3>熱門文章</h3>
<ul><li><a href=d>十個你不知道的景點</a></li></ul></aside>
<div class="share-buttons"><a href=e>分享到臉書</a></div>
<div id="comments"><p>路人：<a href=f>我也去過這裡，真的很好玩。</a></p></div>
<footer>版權所有 某某網站</footer>"""


@pytest.mark.parametrize("name", PARTS)
def test_nothing_of_an_article_is_lost_and_its_furniture_goes(judge, name):
    part, wanted = PARTS[name]
    text = RECIPE.replace("\n", "")
    first, last = (f"<p>{text[at : at + 300]}。</p>" for at in (0, 300))
    page = f"<body>{AROUND}<main><article>{first}{part}{last}</article></main>{BELOW}</body>"
    article, _, _ = judge.verdict(filter_cc.extract(f"<html>{page}</html>")[0], article=True)
    for words in wanted:
        assert words in article
    for words in ("站內搜尋", "熱門文章", "不知道的景點", "分享到", "我也去過", "版權所有"):
        assert words not in article


@pytest.mark.parametrize(("item", "refused"), [
    ("<h2><a href='/{0}'>第{0}篇</a></h2><p>{1}</p>", True),
    ("<a href='/{0}'><h5>第{0}篇</h5><p>{1}</p></a>", True),
    ("<div class='post-title'><a href='https://a.tw/{0}'>第{0}篇</a></div><div>{1}</div>", True),
    ("<a href='/{0}'><div><span class='card-title'>第{0}篇</span></div></a><div>{1}</div>", True),
    ("<h2><a href='#part-{0}'>第{0}節</a></h2><p>{1}</p>", False),
    ("<h3><a href='javascript:void(0)'>問題{0}</a></h3><p>{1}</p>", False),
    ("<h2>第{0}節</h2><p>{1}</p><p><a href='/{0}'>延伸閱讀：第{0}篇</a></p>", False),
    ("<h2><a href='/{0}'>第{0}日</a></h2>" + 5 * "<p>{1}</p>", False),
])
def test_first_lines_below_links_to_other_pages_are_an_index(judge, item, refused):
    items = "".join(item.format(at, text) for at, text in enumerate(paragraphs(9)))
    page = f"<html><body>{AROUND}<main>{items}</main>{BELOW}</body></html>"
    _, tally = read(judge, answer(page.encode()))
    assert tally.pages["index"] == refused


def test_an_article_whose_title_is_a_link_is_none(judge):
    text = "".join(f"<p>{line}</p>" for line in paragraphs(9))
    more = "".join(f"<h3><a href='/{at}'>別篇</a></h3><p>它的第一句。</p>" for at in range(4))
    page = f"<article><h1><a href='/me'>一篇</a></h1>{text}</article>{more}"
    page = f"<html><body>{page}</body></html>"
    pages, _ = read(judge, answer(page.encode()))
    assert all(line in pages[0]["text"] for line in paragraphs(9))


# --- Quality and provenance ----------------------------------------------------------------------


def test_keep_best_keeps_the_pages_most_like_a_trusted_text(tmp_path):
    """Half of the pages speak as the trusted text does; the score is DSIR's, by its plain form."""
    theirs, ours = different(10, seed=31), different(10, seed=32)

    def by_the_stream(text: str) -> str:
        ends = {"的確如此": "船慢慢走遠", "我們都知道": "孩子睡著了", "沒有人懷疑": "稻田一片綠"}
        for end, other in ends.items():
            text = text.replace(end, other)
        return text

    ours = list(map(by_the_stream, ours))
    trusted = by_the_stream("".join(different(4, seed=33)))
    (tmp_path / "trusted.txt").write_text(trusted)
    (tmp_path / "in.jsonl").write_bytes(lines_of(*({"text": text} for text in theirs + ours)))
    run_here(
        tmp_path, "--input", tmp_path / "in.jsonl", "--like", tmp_path / "trusted.txt",
        "--keep_best", 0.5)
    kept = rows(tmp_path)
    assert {row["text"] for row in kept} == set(ours)
    assert account_of(tmp_path)["refused"]["like"] == 10

    def shares(text: str) -> dict[str, float]:
        text = "".join(text.split())
        grams = Counter([*text, *map("".join, itertools.pairwise(text))])
        return {gram: number / grams.total() for gram, number in grams.items()}

    wanted, crawl = shares(trusted), shares("\n".join(theirs + ours))
    for row in kept:
        text = row["text"]
        grams = [*text, *map("".join, itertools.pairwise(text))]
        logs = [math.log((wanted.get(gram, 0) / crawl[gram] + 1) / 2) for gram in grams]
        assert row["like"] == pytest.approx(sum(logs) / len(logs), abs=2e-3)


def test_like_alone_only_adds_its_column(tmp_path):
    texts = different(6, seed=34)
    (tmp_path / "in.jsonl").write_bytes(lines_of(*({"text": text} for text in texts)))
    (tmp_path / "trusted.jsonl").write_bytes(lines_of({"text": texts[0]}, {"text": texts[1]}))
    run_here(
        tmp_path, "--input", tmp_path / "in.jsonl", "--like", tmp_path / "trusted.jsonl",
        "--target_size", "4kB")
    kept = rows(tmp_path)
    assert [row["text"] for row in kept] == texts[: len(kept)]
    assert 1 < len(kept) < 6
    assert min(row["like"] for row in kept[:2]) > max(row["like"] for row in kept[2:])


def test_copies_counts_equal_and_nearly_equal_pages(tmp_path):
    texts = different(5, seed=35)
    near = texts[1].replace("的確如此", "確實如此", 1)
    files = [texts, [texts[0], near, texts[0]], [texts[3]]]
    for number, part in enumerate(files):
        lines = lines_of(*({"text": text} for text in part))
        (tmp_path / f"{number}.jsonl").write_bytes(lines)
    run_here(tmp_path, "--input", *sorted(tmp_path.glob("*.jsonl")), "--minhash_buckets", 20)
    kept = rows(tmp_path)
    assert sorted(row["copies"] for row in kept) == [1, 1, 2, 2, 3]
    assert {row["copies"] for row in kept if row["text"] == texts[0]} == {3}
    assert account_of(tmp_path)["refused"]["duplicate"] == 4


@pytest.fixture
def hub(tmp_path):
    """A stand-in for the hub's HTTP API: the folder `hub` as the dataset me/web."""
    root = tmp_path / "hub"

    class Dataset(HubAnswers):
        protocol_version = "HTTP/1.1"

        def entry(self, path: Path) -> dict:
            kind = "directory" if path.is_dir() else "file"
            place, size = str(path.relative_to(root)), path.stat().st_size
            return {"type": kind, "oid": "0" * 40, "size": size, "path": place}

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path.startswith("/api/datasets/me/web/tree/"):
                folder = root / path.partition("/tree/")[2].partition("/")[2]
                if not folder.is_dir():
                    return self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
                return self.answer([self.entry(path) for path in folder.iterdir()])
            if path.startswith("/api/datasets/me/web"):
                return self.answer({"id": "me/web", "sha": "1" * 40, "siblings": []})
            if "/resolve/" not in path:
                return self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})
            content = (root / path.partition("/resolve/")[2].partition("/")[2]).read_bytes()
            asked = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            start, end = int(asked[0] or 0), int(asked[2] or len(content) - 1)
            place = f"bytes {start}-{end}/{len(content)}"
            self.answer(
                content[start : end + 1], 206 if asked[0] else 200,
                {"ETag": '"1"', "X-Repo-Commit": "1" * 40, "Content-Range": place})

        do_HEAD = do_GET

        def do_POST(self):
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            try:
                paths = json.loads(asked)["paths"]
            except ValueError:
                paths = parse_qs(asked)["paths"]
            paths = [paths] if isinstance(paths, str) else paths
            self.answer([self.entry(root / path) for path in paths if (root / path).exists()])

    with serving(Dataset) as server:
        yield server


def test_a_dataset_of_the_hub_is_read_where_it_lies(hub, run_script, tmp_path):
    """A stand-in of the hub's API serves two Parquet files; hf:// with a glob reads both."""
    texts = different(6, seed=41)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for number in (0, 1):
        table = pa.table({"text": texts[number::2], "id": ["a", "b", "c"]})
        pq.write_table(table, tmp_path / "hub" / "data" / f"part-{number}.parquet")
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    run(run_script, tmp_path, "--input", "hf://datasets/me/web/data/*.parquet", env=env)
    assert {row["text"] for row in rows(tmp_path)} == set(texts)
