"""filter_cc.py: verdicts on pages written for the purpose, files damaged in every way, and runs."""

import contextlib
import functools
import gzip
import http.server
import io
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

import filter_cc
from filter_cc import Arguments, Judge, Tally, clean_lines, hide_private, read_pages

LETTER = (
    "阿明，好久不見，最近過得怎麼樣？上個禮拜我搬進了靠近捷運站的新家，房子雖然不大，可是陽臺朝東，每天早上一"
    "拉開窗簾就是滿屋子的陽光。房東是一位退休的國小老師，她在樓下開了一間小小的書店，賣二手書，也賣自己烤的餅"
    "乾。我下班以後常常坐在那裡，一邊喝茶，一邊聽她說以前帶學生去爬山的故事。前天颱風剛走，巷子口的老榕樹被吹"
    "斷了一根大枝幹，鄰居們拿著鋸子出來幫忙，不到一個小時就把路清出來了，有人煮了一鍋熱湯，大家就站在路邊喝。"
    "我忽然覺得，搬來這裡是對的。你如果有空，記得帶家人過來走走，車站出來往右轉，看到那棵剩下半邊的榕樹，就到"
    "了。代我問候伯父伯母，也祝你的新工作一切順利。")
RECIPE = """蒜香炒高麗菜
材料很簡單：高麗菜半顆、大蒜五瓣、辣椒一根、鹽一小匙、米酒少許。
高麗菜用手撕成小片，比用刀切更容易入味。
撕好以後泡在冷水裡十分鐘，葉子會變得很脆。
大蒜拍碎，辣椒切斜片，鍋子先燒熱再下油。
油溫夠了，先放大蒜爆香，聞到香味就可以下高麗菜。
這時候火要開到最大，翻炒的動作要快，不要讓菜出水。
沿著鍋邊淋一點米酒，蓋上鍋蓋，數到二十再打開。
最後加鹽拌勻，菜梗還有一點透明的時候就可以起鍋。
很多人炒出來的高麗菜又黃又軟，多半是火太小、炒太久。
如果家裡的爐子火力不強，可以分成兩次炒，一次炒半盤。
吃不完的放進冰箱，隔天加一顆蛋做成煎餅，又是一道菜。
我婆婆的做法是最後放一小塊豬油渣，她說這樣才有古早味。
"""
NOTICE = """臺中市某區公所 公告
主旨：本區公園地下停車場自三月一日起進行防水整修，工程期間暫停開放，請市民改停周邊停車場。
說明：
一、本工程預計施工九十個日曆天，如遇雨天得順延，完工日期將另行公告。
二、施工期間公園東側人行道封閉，請行人改走西側步道，並配合現場人員引導。
三、月票用戶可於施工前至管理室辦理退費，或延長使用期限，逾期恕不受理。
四、施工車輛進出時間為上午九時至下午五時，例假日不施工，以維護住戶安寧。
五、工地周圍設有圍籬與警示燈，家長請勿讓兒童靠近，以免發生危險。
六、如有任何疑問，請於上班時間洽詢本所工務課，我們將儘快為您說明。
另提醒市民，公園內的遊戲場與籃球場照常開放，公共廁所亦可使用，造成不便之處，敬請見諒。
"""
POEM = """我在雨裡等你
雨落在舊的屋簷
落在你走過的石階
落在那一年的夏天
你說過海是藍的
我卻只看見灰
你說過要回來的
門前的樹都老了
鐘聲從山的那邊來
像是誰在叫我的名字
我把燈點了又熄
把信寫了又撕
把你說的話一個字一個字
種在院子的角落裡
它們沒有發芽
也沒有死去
只是在每個下雨的晚上
輕輕地翻一個身
讓我知道你還在
在很遠很遠的地方
和我聽著同一場雨
等著同一個天亮
"""
FORUM = """問題：筆電的螢幕偶爾會閃一下，是不是快壞了？
我的筆電用了四年，最近看影片的時候螢幕會突然黑掉，過一兩秒又恢復正常，重新開機也沒有用，請問是哪裡出了問題？
先不要緊張，這種情形最常見的原因是排線鬆了，你可以試著慢慢開合上蓋，如果閃的次數變多，多半就是它。
樓上說得對，我之前也遇過一樣的狀況，送修只花了八百塊，師傅說排線用久了會疲乏，換一條新的就好。
補充一下，也有可能是顯示卡的驅動程式太舊，建議先去官網下載新版，更新完觀察幾天再決定要不要送修。
如果接外接螢幕完全不會閃，就可以確定不是顯示卡的問題，這個方法不用花錢，五分鐘就能判斷。
謝謝大家，我照著試了一下，開合上蓋的時候真的會閃，週末就拿去維修，修好了再上來跟大家報告。
更新：已經修好了，果然是排線，老闆人很好，還順便幫我清了風扇的灰塵，現在用起來安靜多了。
"""
HONG_KONG = (
    "深水埗的街市一早就熱鬧起來，賣魚的檔主把冰塊倒進發泡膠箱，水花濺得一地都是。我跟著外婆來買餸，她和每個檔"
    "主都認識，一邊揀菜一邊閒話家常，問人家的孫子考上了哪間中學。轉角的茶餐廳還保留着舊式卡位，伙記端來一杯絲"
    "襪奶茶，面上浮着薄薄的一層泡沫。外婆說，她年輕時在工廠穿膠花，一個月的工錢剛好夠交租和買米，閒時最大的娛"
    "樂就是去看一場戲。如今工廠都搬走了，唐樓也一幢接一幢地拆，只有這條街還像從前那樣，從天未亮便有人叫賣。我"
    "替她挽着菜籃，慢慢地走過那些我叫不出名字的攤檔，忽然有點捨不得這個早晨太快過去。")
VERSES = "\n".join(  # with a full stop after every second line, and long enough
    line + "。" * (number % 2)
    for number, line in enumerate(POEM.split("\n") + POEM[::-1].split("\n")))
GOOD = {
    "letter": LETTER, "recipe": RECIPE, "notice": NOTICE, "verses": VERSES, "forum": FORUM}
# A report by template: figures where prose has words.
STOCKS = (
    "乙電子（9901）今日收在 47.85 元，較前一個交易日下跌 0.65 元，跌幅 1.34%，成交量 1,842 張。"
    "開盤 48.50 元，最高 48.90 元，最低 47.60 元，振幅 2.68%。\n"
    "近 5 日下跌 3.92%，近 20 日上漲 1.16%，近 60 日下跌 7.43%，大盤同期是 1.20%、2.35%、5.81%。\n"
    "外資賣超 132 張，投信買超 20 張，自營商買超 7 張，合計賣超 105 張，累計 418 張與 21 張。\n"
    "融資增加 46 張，餘額 3,508 張；融券減少 2 張，餘額 11 張，券資比 0.31%。\n"
    "技術面在 5 日線之下、20 日線之上，K 值 41.22，D 值 48.06，RSI 是 43.87，MACD 是 -0.12。\n"
    "三月合併營收 2.13 億元，月增 11.52%，年減 4.08%；每股盈餘 0.42 元，本益比 24.66 倍，"
    "股價淨值比 1.57 倍，殖利率 2.93%，去年配息 1.40 元，配股 0.25 元，填息花了 38 天。\n"
    "同業之中，丙光電收在 112.50 元，上漲 2.74%；丁材料收在 33.15 元，下跌 0.75%。\n"
    "董監持股 18.36%，質押 4.20%；外資持股 7.71%，千張大戶 52.08%，股東人數 13,406 人。\n"
    "毛利率 28.4%，營業利益率 9.7%，稅後淨利率 8.1%，負債比 41.6%，流動比率 183.2%。\n")
TAGS = "\n".join(
    " ".join(f"{place}{thing} ({13 * len(place) + 7 * at})" for at, thing in enumerate(
        ("美食", "住宿", "親子景點", "民宿推薦", "早午餐", "伴手禮", "租車", "露營", "一日遊")))
    for place in ("台北", "新竹", "台中", "嘉義", "台南", "高雄", "花蓮", "台東", "宜蘭", "澎湖"))
OFFERS = "\n".join(
    f"【{name}方案】每{unit} NT${price}，隨時可以取消，再送限量的保溫杯" for name, unit, price in (
        ("月讀", "月", 149), ("年訂", "年", 1390), ("學生", "月", 79), ("家庭", "年", 2680),
        ("團體", "年", 9800), ("單篇", "篇", 20), ("試讀", "週", 1), ("紙本", "月", 220)))
# An advertisement in the words of medicine.
PILLS = (
    "男人過了四十歲，體力一天不如一天，心裡的苦只有自己知道。根據統計，有超過兩百萬名男性受到困擾，願意看醫生的"
    "不到一成。日本藤素採用天然植物，沒有副作用，不傷腎。一天兩粒，連續服用三個療程就能重振雄風，停藥永不反彈。"
    "跟必利勁、犀利士、威而鋼比較，它不會頭痛，高血壓患者也可以安心服用。\n"
    "我今年五十二歲，吃了半個月，老婆說我像變了一個人。一開始不相信，朋友送我一盒試吃，現在回購第四盒了。"
    "包裝很隱密，超商取貨，店員不會知道是什麼。\n"
    "市面上仿冒品很多，請認明官網，刮開防偽標籤輸入號碼即可查詢。貨到付款，隱密包裝，不顯示品名。"
    "美國黑金、印度神油、催情水也有現貨，買二送一，歡迎詢問。")

HEADLINES = (
    "信義區公所辦理防災演練，里民踴躍參加\n前鎮漁港拍賣場改建，明年三月啟用\n屯區農會推廣蔬果品牌，銷售創新高\n"
    "吉安圖書館親子說故事，週末開放報名\n潮州民俗文化祭登場，陣頭遊街三公里\n竹塹玻璃工藝展，百件作品免費看\n"
    "宜蘭童玩節門票調漲，學生半價優待\n澎湖花火節延後舉行，業者盼補助\n雲林古坑咖啡評鑑，得獎名單出爐\n"
    "南投茶博預售券開賣，限量五千份\n基隆嶼登島名額增加，採線上預約\n嘉義管樂節踩街，交通管制路段公布\n"
    "馬祖藍眼淚季節來臨，船班加開十二航次\n恆春半島落山風強勁，騎士小心側風\n新店溪堤防修復完工，自行車道恢復通行")

MALAYSIA = (
    "（本地訊）一名老婦早上到巴剎買菜，騎腳車回甘榜的途中，被兩個騎摩哆的男子搶走金鍊，跌在路旁的水溝裡，"
    "手骨折斷，另外損失三百令吉。她的兒子是羅里司機，他說母親每天六點出門，走同一條路走了幾十年，從來沒有出過"
    "事情，沒想到這次碰上了。\n"
    "對面咖啡店的老闆聽到喊聲，馬上跑出來看，那兩個人才逃走。他說案發的地方靠近油棕園，路燈壞了兩個多月，居民"
    "已經向縣議會投訴，到現在還沒有人來修。一個德士司機願意載她去醫院，到了以後也不肯收錢。\n"
    "拿督下午到醫院探望，帶了一籃水果，並且答應請警方在早市的時候多派人巡邏。睦鄰計劃的主席提醒大家，出門不要"
    "戴金飾，看到可疑的人要馬上通知鄰居。")
CANTONESE = (
    "琴日放工之後我同細佬去咗街市買餸，啲菜心靚到不得了，個檔主仲送咗兩棵蔥俾我哋。返到屋企，阿媽話佢未煮飯，我就"
    "話不如今晚我嚟煮啦。點知一開雪櫃，發現啲雞蛋一隻都冇，唯有行多轉落樓下間士多度買。細佬喺度睇電視，成晚都冇郁"
    "過，我嬲到唔想同佢講嘢。不過食飯嗰陣佢講咗句好好味，我個心又軟返，決定聽日再煮過第二樣俾佢食。阿爸返嚟見到成"
    "枱餸，仲以為有咩大日子，問我係咪升咗職，我話唔係，只係想大家坐埋一齊食餐飯啫。成家人笑晒，阿爸仲話下次等佢嚟煮，不過我哋都知佢淨係識煲水。佢冇出聲，淨"
    "係夾咗件魚俾我。")
CONVERTED = (
    "他走到門口，裡麵一片漆黑，隻聽見牆上的鍾聲。他係統地把東西恢複原狀，十分鍾之后才離開，後麵跟著一隻貓。"
    "嶽母站在院子裡，說她隻想見女兒一麵，下麵的人卻不肯放行。")

SIMPLIFIED = (
    "周末我和几个朋友去了郊外的农场，孩子们第一次看见奶牛，兴奋得又叫又跳。农场的主人是一对中年夫妇，他们原来在"
    "城里开饭馆，后来觉得太累，就把店转让了，到乡下租了这块地。丈夫负责种菜，妻子负责养鸡，每天早上五点钟就要起"
    "床干活。他们说刚开始的时候什么都不懂，第一年的西红柿全都烂在了地里，第二年才慢慢摸到门道。中午我们在院子里"
    "吃饭，菜都是刚从地里摘的，鸡蛋是孩子们自己从鸡窝里捡的，味道跟超市里买的完全不一样。临走的时候，主人还送给"
    "我们每家一袋新鲜的玉米，让我们下次再来。回家的路上孩子们都睡着了，车里安安静静的，只听见窗外的风声。"
)
MAINLAND = (
    "很多用戶反映，手機用久了就會變得很卡，打開一個軟件要等半天，看視頻也老是緩衝。其實這多半是因為內存不夠，後"
    "臺運行的程序太多。你可以先打開設置，看看哪些應用佔用的空間最大，把不常用的卸載掉。微信的聊天記錄和緩存也很"
    "佔地方，定期清理一下就好。另外，屏幕亮度不要調得太高，網絡信號不好的時候把數據流量關掉，可以省不少電。如果"
    "這些方法都試過了還是不行，就把重要的照片備份到雲盤，然後恢復出廠設置。千萬不要去街邊的小店刷機，裡面可能有"
    "木馬，會偷你的支付寶密碼和短信驗證碼。總之，手機跟人一樣，也需要好好保養，才能用得更長久。")
JAPANESE = (
    "先週の日曜日、久しぶりに祖母の家を訪ねました。駅から歩いて二十分ほどの坂道は、子どものころと少しも変わって"
    "いません。庭の柿の木には実がたくさんなっていて、祖母は「ことしは豊作だよ」とうれしそうに笑いました。いっしょに"
    "縁側に座って、お茶を飲みながら昔の話を聞きました。帰りぎわに、祖母は新聞紙に包んだ柿を袋いっぱい持たせてくれ"
    "ました。電車の中でひとつ食べてみると、やさしい甘さが口の中に広がって、なんだか泣きそうになりました。"
) * 2
KOREAN = (
    "지난 주말에 가족과 함께 시골에 계신 할머니 댁에 다녀왔습니다. 마당에는 감나무가 있고 "
    "담장 아래에는 꽃이 피어 있었습니다. 할머니는 우리를 보시고 아주 기뻐하시며 따뜻한 밥을 "
    "차려 주셨습니다. 저녁에는 모두 마루에 앉아 옛날 이야기를 들었습니다."
) * 4
ENGLISH = "The old harbour was quiet that morning, and the boats lay still on the grey water. " * 20
MENU_WORDS = (
    "首頁 最新消息 關於我們 產品介紹 服務據點 下載專區 常見問題 聯絡我們 會員登入 購物車 男裝 "
    "女裝 童裝 外套 襯衫 牛仔褲 配件 鞋子 包包 帽子 特價商品 新品上市 熱銷排行 門市查詢 退換貨說明")
MENU = "\n".join(MENU_WORDS.split() * 8)
SPAM = (
    "想在家輕鬆賺錢嗎？全新娛樂城盛大開幕，現在註冊送體驗金，首存立刻加碼，老虎機、百家樂、輪盤一應俱全，還有真人"
    "荷官陪你玩到天亮。我們的運彩賠率全臺最高，足球、籃球、棒球通通可以下注，出金快速，客服親切，老玩家都說讚。不"
    "知道怎麼贏？加入群組，老師每天免費報明牌，六合彩、今彩539準到嚇人，保證獲利。手頭緊也別擔心，急用錢的朋友可"
    "以找我們合作的當舖，免留車、免保人，小額借款當日撥款，信用瑕疵照樣過件。本月推薦好友再送彩金，名額有限，錯過"
    "可惜，立即領取專屬優惠，讓財神爺天天到你家敲門，今晚就從一個平凡的上班族變成人人羨慕的大贏家吧！"
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Arguments())


def rule(judge: Judge, text: str) -> str | None:
    """The rule that refuses a page, as bytes first and then as text."""
    return judge.refuse_bytes(text.encode()) or judge.verdict(text)[2]


def record(name: str, text: str | bytes, length: int | str | None = None, **headers: str) -> bytes:
    """A WET record; `length` lies about its size."""
    body = text.encode() if isinstance(text, str) else text
    fields = {
        "WARC-Type": "conversion",
        "WARC-Target-URI": f"https://example.tw/{name}",
        "WARC-Date": "2026-05-01T00:00:00Z",
        "WARC-Record-ID": f"<urn:uuid:{name}>",
        **{key.replace("_", "-"): value for key, value in headers.items()},
        "Content-Type": "text/plain",
        "Content-Length": str(len(body) if length is None else length)}
    lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    return f"WARC/1.0\r\n{lines}\r\n".encode() + body + b"\r\n\r\n"


def members(*records: bytes) -> bytes:
    return b"".join(gzip.compress(one, mtime=0) for one in records)


def read(judge: Judge, data: bytes) -> tuple[list[dict], Tally]:
    """Read a file's bytes; the pages and the counts."""
    tally = Tally("")

    def damage(kind: str) -> None:
        tally.damage[kind] += 1

    pages = list(read_pages(io.BytesIO(data), tally, damage, judge))
    refused = tally.pages.total()  # the kept ones are counted after their verdict
    fates = len(pages) + refused + tally.damage.total() + tally.others.total()
    assert tally.read == fates, "the account closes"
    return pages, tally


def names(pages: list[dict]) -> list[str]:
    return [page["url"].rpartition("/")[2] for page in pages]


def different(count: int, seed: int = 0) -> list[str]:
    """Good pages that are no near duplicates of each other: sentences of the letter, rearranged and
    with words of their own."""
    draw = random.Random(seed)
    words = (
        "山海風雨花鳥魚蟲春夏秋冬東西南北紅黃藍白金木水火土日月星河湖溪谷林石橋路燈窗門書筆茶飯菜果"
    )
    ends = ("的確如此", "我們都知道", "他這樣說", "沒有人懷疑", "後來才明白", "誰也不曾想到")
    pages = []
    for _ in range(count):
        text = "".join(
            f"{''.join(draw.choices(words, k=draw.randint(6, 20)))}，{draw.choice(ends)}。"
            for _ in range(25))
        pages.append(text)
    return pages


# --- Verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_good_pages_of_many_kinds_are_kept(judge, name):
    assert rule(judge, GOOD[name]) is None


@pytest.mark.parametrize("name", GOOD)
def test_no_sentence_of_a_good_page_is_lost(judge, name):
    text, _, _ = judge.verdict(GOOD[name])
    kept = set(text.split("\n"))
    lost = [line for line in GOOD[name].split("\n") if line.endswith("。") and line not in kept]
    assert lost == []


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("han", ENGLISH),
        ("han", ENGLISH + "這一頁只有一句中文。"),
        ("japanese_korean", JAPANESE),
        ("han", KOREAN),
        ("japanese_korean", LETTER[:120] + JAPANESE),
        ("hongkong", HONG_KONG),
        ("hongkong", MALAYSIA),
        ("cantonese", CANTONESE),
        ("converted", LETTER.replace("只", "隻").replace("後", "后") + CONVERTED),
        ("japanese_korean", LETTER + KOREAN),
        ("simplified", SIMPLIFIED),
        ("simplified", LETTER + SIMPLIFIED),
        ("mainland", MAINLAND),
        ("length", LETTER[:150]),
        ("length", MENU),
        ("repetition", LETTER[:120] * 12),
        ("repetition", "\n".join([LETTER[:60] + "。"] * 20)),
        ("spam", SPAM),
        ("mojibake", LETTER.replace("，", "\ufffd")),
        ("mojibake", LETTER.replace("的", "?").replace("，", "?")),
        ("mainland", RECIPE.replace("的", "爲")),
        ("mojibake", "".join(c + "龘" * (i % 6 == 0) for i, c in enumerate(LETTER))),
        ("mojibake", re.sub("(?<=[\u4e00-\u9fff]{2})(?=[\u4e00-\u9fff])", " ", LETTER)),
        ("punctuation", HEADLINES),
        ("digits", STOCKS),
        ("length", TAGS),
        ("length", LETTER[:150] + "\n本文為訂閱會員專屬內容，尚餘 92% 未讀\n" + OFFERS),
        ("spam", PILLS),
        ("han", LETTER + " english words that say nothing at all" * 80 + "。")])
def test_each_rule_refuses_its_page(judge, expected, text):
    assert rule(judge, text) == expected


@pytest.mark.parametrize("comma", ["，", ","])
def test_lines_of_one_width_as_in_mail_are_no_list(judge, comma):
    lines = textwrap.wrap(LETTER.replace("\n", "").replace("。", "，"), 35)
    wrapped = "\n".join(line.rstrip("，") for line in lines).replace("，", comma)
    assert rule(judge, wrapped) is None


def test_a_page_on_computers_in_taiwan_words_is_no_mainland_page(judge):
    text = MAINLAND
    pairs = "軟件 軟體 視頻 影片 內存 記憶體 屏幕 螢幕 網絡 網路 短信 簡訊 雲盤 雲端 卸載 移除"
    words = [*pairs.split(), "微信", "聊天程式", "緩存", "暫存檔", "支付寶", "銀行"]
    for mainland, taiwan in zip(words[::2], words[1::2], strict=True):
        text = text.replace(mainland, taiwan)
    assert rule(judge, text) is None


def test_one_word_of_spam_is_a_topic(judge):
    assert rule(judge, LETTER + "聊到六合彩，" * 3 + "舅舅說，六合彩害人不淺。") is None
    assert rule(judge, LETTER + "聊到六合彩和百家樂，" * 3 + "還有老虎機，都害人不淺。") == "spam"


def test_search_words_that_go_with_the_menus_still_count_as_spam(judge):
    """Beside an article, in a menu or in comments, spam may be three times as dense as in it."""
    words = "百家樂 老虎機 六合彩"
    assert rule(judge, f"{LETTER}\n{words}") is None
    stuffed = "\n".join([LETTER, *[words] * 4])
    assert "百家樂" not in judge.verdict(stuffed)[0]
    assert rule(judge, stuffed) == "spam"


def test_one_mainland_word_is_not_enough(judge):
    assert rule(judge, LETTER[:250] + "這些信息我都記下來了。") is None


def test_words_that_only_seem_mainland_do_not_count(judge):
    from filter_cc import code_points

    text = "電視頻道的節目，讓我深深感激光明磊落的人，互相信息相關。"
    assert 1 not in map(judge.words.kinds.get, judge.words.count(text, code_points(text)))


def test_scores_stand_apart_for_traditional_and_simplified(judge):
    traditional = judge.verdict(LETTER)[1]["traditional"]
    simplified = judge.count(filter_cc.code_points(SIMPLIFIED))
    assert traditional > 0.99
    telling = simplified.traditional + simplified.simplified
    assert simplified.traditional < 0.02 * telling


def test_every_limit_is_an_option(judge):
    strict = Judge(Arguments(min_length=5_000))
    assert strict.verdict(LETTER)[2] == "length"
    lenient = Judge(Arguments(max_mainland=1_000))
    assert lenient.verdict(MAINLAND)[2] is None


# --- Lines and personal data ---------------------------------------------------------------------


def test_furniture_goes_and_prose_stays():
    page = f"""首頁 | 最新消息 | 關於我們
目前位置：首頁 > 生活 > 隨筆
會員登入
購物車 (0)
分享到 Facebook
發布日期：2024-03-05
搬家以後的第一封信
{LETTER}
延伸閱讀：舊家的榕樹
上一篇 下一篇
本網站使用 Cookie 以提升您的瀏覽體驗，繼續瀏覽即表示您同意我們的隱私權政策。
地址：臺北市某區某路 1 號 電話：(02)2345-6789 傳真：(02)2345-6780
客服信箱：service@example.com.tw
Copyright © 2024 某某公司 All Rights Reserved.
"""
    assert clean_lines(page) == f"搬家以後的第一封信\n{LETTER}"


def test_a_poem_without_punctuation_is_no_menu():
    assert clean_lines(POEM) == POEM.strip()


def test_a_list_of_goods_is_a_menu():
    goods = "冰箱\n洗衣機\n除濕機\n電風扇\n氣炸鍋\n電鍋\n咖啡機\n吹風機"
    assert clean_lines(f"{goods}\n{LETTER}\n{goods}") == LETTER


@pytest.mark.parametrize(
    "below",
    [
        "你可能也會想看\n巷口那棵樹，三十年後還在嗎？這家人說出答案了\n老屋翻修記",
        "3 則留言\n小魚\n好想去看看那棵榕樹，謝謝分享！\n路人甲\n2021年5月3日\n我也住附近。",
        "版權所有\n回首頁\n登入\n訂閱\n站長是個愛散步的人，養了一隻龜。\n碎念集",
        "開放時間 週二至週五 10:00-18:00，週末休息\n洽詢電話 02-2345-6789",
        "本店保留活動變更及終止之權利。", "手藝教室 » 木工", "0 comments", "電子信箱 *",
        "榕樹與書店（圖片來源：作者提供）", "Search\nRelated Posts\n雨天在家，做這三件事最好？",
        "張貼者：小魚 於 下午 3:00\n以電子郵件傳送這篇文章\nBlogThis！\n較舊的文章",
        "您收到這封信是因為您訂閱了本討論群組。", "以上內容僅供參考，個案情形不同，請洽專業律師",
        "※本文不構成法律意見，個案請洽專業律師。", "廣告（請繼續閱讀本文）",
        "^ 某某. 老屋誌. 地方出版社. 1998: 45-52.",
        "洽詢信箱 someone@example.com，專線 （02）2345-6789 （週一至週五，例假日休息，9-18 時）"])
def test_what_stands_below_an_article_goes(below):
    assert clean_lines(f"{LETTER}\n{below}") == LETTER


@pytest.mark.parametrize(
    "about",
    [
        "2015 年 10 月 28 日", "2023/05/12 社區新聞", "文章編號：65502", "生活 / 隨筆",
        "好書 >> 散文", "生活»隨筆»搬家", "標籤: 榕樹, 書店", "記者王某某／臺北報導",
        "5月17日 02:58",
        "由 老鄭 發表於 2017.7.20", "00:00", "Like", "點閱 3,021",
        "Categories: 隨筆, 榕樹"])
def test_what_is_said_about_a_page_goes(about):
    assert clean_lines(f"{LETTER}\n{about}\n{LETTER}") == f"{LETTER}\n{LETTER}"


@pytest.mark.parametrize(
    "line",
    [
        "「歡迎光臨！」她說。", "我收到這封信的時候，天剛亮。", "這樣做真的有幫助嗎？",
        "打電話聯絡客服，等了半個小時。", "網站可以透過 JavaScript 知道螢幕有多大。",
        "你必須按一下即可開啟的那個選單，再選第二項。", "。",
        "業者說 Cookie 要退場了，可是換一個瀏覽器，名字也換一個而已。",
        "創用 CC 是什麼，很多機關到現在還分不清楚。",
        "有事請打 0912-345-678，或寫到 someone@example.com.tw 給我。",
        "He used to say that a house without books is a body without a soul."])
def test_prose_that_only_sounds_like_furniture_stays(line):
    assert clean_lines(f"{LETTER}\n{line}\n{LETTER}") == f"{LETTER}\n{line}\n{LETTER}"


@pytest.mark.parametrize(
    "within",
    [
        "第二章 留言", "三、更多的樹", "面積 = 長 × 寬", "速度 = 距離 / 時間",
        "for i in range(3):\n    print(i)",
        "長 3.5 12 40\n寬 2.5 11 38", "所需的材料與工具如下："])
def test_headings_formulas_and_data_within_an_article_stay(within):
    page = f"{LETTER}\n{within}\n{RECIPE.splitlines()[2]}"
    assert clean_lines(page) == page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("寄到 a.chen+news@mail.example.com.tw。", "寄到 [EMAIL]。"),
        ("主機 203.0.113.25 與 10.0.0.1，", "主機 [IP] 與 [IP]，"),
        ("手機 0912-345-678 或 0987 654 321", "手機 [PHONE] 或 [PHONE]"),
        ("市話 (02) 2345-6789、049-2345678", "市話 [PHONE]、[PHONE]"),
        ("分機 02-23456789#123，免付費 0800-123-456", "分機 [PHONE]，免付費 [PHONE]"),
        ("國外請撥 +886-2-2345-6789", "國外請撥 [PHONE]"),
        ("電話（02）23456789、（0912）345678", "電話[PHONE]、[PHONE]"),
        ("苗栗 037-320111、臺東 (089)322-111", "苗栗 [PHONE]、臺東 [PHONE]"),
        ("馬祖 0836-22345", "馬祖 [PHONE]"),
        ("字號 A123456789 與 F223456789", "字號 [ID] 與 [ID]"),
        ("居留證 AC12345678 與新式 A800000014", "居留證 [ID] 與新式 [ID]")])
def test_personal_data_become_placeholders(text, expected):
    assert hide_private(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "民國 101 至 102 年，西元 2019-2020 年",
        "圓周率 3.14159265，人口 23,404,138",
        "ISBN 978-986-1234-56-7，統一編號 12345678",
        "上午 09:00-18:00，第 0204 號",
        "訂單 20240501123456 與型號 XA123456789"])
def test_other_numbers_stay(text):
    assert hide_private(text) == text


# --- Files: kinds, damage ------------------------------------------------------------------------


def test_wet_records_are_read_whole_with_url_id_and_date(judge):
    pages, tally = read(judge, members(record("letter", LETTER), record("recipe", RECIPE)))
    assert [page["text"].strip() for page in pages] == [LETTER, RECIPE.strip()]
    assert pages[0]["url"] == "https://example.tw/letter"
    assert pages[0]["id"] == "<urn:uuid:letter>"
    assert pages[0]["date"] == "2026-05-01T00:00:00Z"
    assert not tally.damage


def test_a_header_in_other_languages_refuses_before_the_page_is_inflated(judge):
    broken_inside = bytearray(
        members(record("en", LETTER * 9, WARC_Identified_Content_Language="eng,fra")))
    broken_inside[-60] ^= 0xFF  # never reached
    pages, tally = read(judge, bytes(broken_inside) + members(record("letter", LETTER)))
    assert names(pages) == ["letter"]
    assert tally.pages == {"language": 1}


@pytest.mark.parametrize("languages", ["zho", "eng,zho", "zho,jpn,eng"])
def test_a_header_that_names_chinese_does_not_refuse(judge, languages):
    pages, _ = read(judge, members(record("a", LETTER, WARC_Identified_Content_Language=languages)))
    assert names(pages) == ["a"]


def test_long_headers_and_tiny_records(judge):
    pages, tally = read(
        judge, members(record("x" * 3_000, LETTER), record("tiny", "短"), record("last", RECIPE)))
    assert names(pages) == ["x" * 3_000, "last"]
    assert tally.pages == {"length": 1}


RECORDS = [record(f"p{i}", text) for i, text in enumerate(different(8))]


def test_uncompressed_and_single_member_files_read_the_same(judge):
    for data in (members(*RECORDS), b"".join(RECORDS), gzip.compress(b"".join(RECORDS))):
        pages, tally = read(judge, data)
        assert names(pages) == [f"p{i}" for i in range(8)]
        assert not tally.damage


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("damaged gzip member", lambda m: m[: len(m) // 2]),
        ("damaged gzip member", lambda m: m[:600] + bytes([m[600] ^ 0xFF]) + m[601:]),
        ("damaged gzip member", lambda m: m[:-6] + b"\0\0" + m[-4:]),
        ("foreign bytes", lambda m: m + b"rubbish between the members"),
        ("foreign bytes", lambda m: b"\0" + m[1:])])
def test_damage_ends_with_its_member(judge, kind, spoil):
    packed = [members(one) for one in RECORDS]
    packed[3] = spoil(packed[3])
    pages, tally = read(judge, b"".join(packed))
    expected = [f"p{i}" for i in range(8) if i != 3 or b"rubbish" in packed[3]]
    if packed[3][:1] == b"\0":  # its neighbour's end cannot be told from rubbish
        expected = names(pages)
        assert {"p0", "p1", "p4", "p7"} <= set(expected)
    assert names(pages) == expected
    assert kind in tally.damage or tally.damage["damaged gzip member"]


@pytest.mark.parametrize("lie", [-200, -1, 5, 17, 3_000, 10**9, 10**22])
@pytest.mark.parametrize(
    "pack", [members, lambda *r: b"".join(r), lambda *r: gzip.compress(b"".join(r))])
def test_a_wrong_length_costs_its_own_record_only(judge, lie, pack):
    text = different(1, seed=9)[0]
    lying = record("lie", text, length=len(text.encode()) + lie)
    pages, tally = read(judge, pack(*RECORDS[:4], lying, *RECORDS[4:]))
    assert [name for name in names(pages) if name != "lie"] == [f"p{i}" for i in range(8)]
    assert tally.damage.total() >= 1


def test_a_length_of_thousands_of_digits_costs_its_own_record_only(judge):
    pages, tally = read(judge, members(RECORDS[0], record("a", RECIPE, "9" * 5000), RECORDS[1]))
    assert names(pages) == ["p0", "p1"]
    assert tally.damage == {"oversized record": 1}


def test_magic_bytes_inside_a_member_are_no_member(judge):
    stored = gzip.compress(record("odd", LETTER + "\n" + "x" * 50), compresslevel=0, mtime=0)
    magic = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"
    raw = record("odd", LETTER.encode() + b"\n" + magic * 5)
    stored = gzip.compress(raw, compresslevel=0, mtime=0)
    assert stored.count(magic) >= 5
    pages, tally = read(judge, members(RECORDS[0]) + stored + members(RECORDS[1]))
    assert names(pages) == ["p0", "odd", "p1"]
    assert not tally.damage


@pytest.mark.parametrize(
    "data", [b"", b"hello, this is no crawl\n" * 99, gzip.compress(b"nor is this" * 99)],
    ids=["empty", "foreign", "packed"])  # gzip puts the time in: workers would differ
def test_empty_and_foreign_files_are_counted(judge, data):
    pages, tally = read(judge, data)
    assert pages == []
    assert tally.damage.total() >= 1


@pytest.mark.parametrize("packed", [True, False])
def test_a_record_of_one_gigabyte_is_passed_over(judge, packed, tmp_path):
    """In constant memory: its body is never held."""
    import zlib

    start, end = record("huge", b"", length=1 << 30).removesuffix(b"\r\n\r\n"), b"\r\n\r\n"
    huge = tmp_path / "huge"
    with open(huge, "wb") as file:
        file.write(members(RECORDS[0]) if packed else RECORDS[0])
        if packed:
            deflate = zlib.compressobj(1, zlib.DEFLATED, 31)
            file.write(deflate.compress(start))
            for _ in range(1 << 6):
                file.write(deflate.compress(b"abcdefgh" * (1 << 21)))
            file.write(deflate.compress(end) + deflate.flush())
        else:
            file.write(start)
            file.seek(1 << 30, os.SEEK_CUR)  # a hole
            file.write(end)
        file.write(members(RECORDS[1]) if packed else RECORDS[1])
    tally = Tally("")
    with open(huge, "rb") as stream:
        pages = list(read_pages(stream, tally, lambda kind: tally.damage.update([kind]), judge))
    assert names(pages) == ["p0", "p1"]
    assert tally.damage["oversized record"] == 1


@pytest.mark.parametrize("seed", range(6))
def test_fuzzed_files_never_stop_the_reader(judge, seed):
    """100 spoilt files a seed: every record whose member nothing touched is read."""
    draw = random.Random(seed)
    packed = [members(one) for one in RECORDS]
    for _ in range(100):
        parts, hurt = list(packed), set()
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(parts))
            part = bytearray(parts[at])
            match draw.choice(["cut", "flip", "zero", "insert", "drop"]):
                case "cut":
                    del part[draw.randrange(1, len(part)) :]
                case "flip":
                    part[draw.randrange(len(part))] ^= 1 << draw.randrange(8)
                case "zero":
                    start = draw.randrange(len(part))
                    part[start : start + 40] = bytes(min(40, len(part) - start))
                case "insert":
                    start = draw.randrange(len(part))
                    part[start:start] = draw.randbytes(draw.randint(1, 300))
                case "drop":
                    start = draw.randrange(len(part))
                    del part[start : start + draw.randint(1, 300)]
            parts[at] = bytes(part)
            hurt.add(at)
        pages, tally = read(judge, b"".join(parts))
        whole = {f"p{i}" for i in range(8) if i not in hurt}
        assert whole <= set(names(pages))
        assert max(Counter(names(pages)).values()) == 1
        counted = (tally.damage + tally.pages + tally.others).total()
        assert len(pages) == 8 or counted >= 1


HTML = """<!DOCTYPE html><html lang="zh-Hant"><head><meta charset="{charset}"><title>信</title>
<script>var menu = "首頁";</script><style>p {{ color: red }}</style></head><body>
<nav><ul><li><a href="/">首頁</a></li><li><a href="/about">關於本站</a></li></ul></nav>
<aside><h2>熱門文章</h2><ul><li><a href="/1">巷口的麵店</a></li></ul></aside>
<main><article><h1>搬家以後</h1>{paragraphs}</article></main>
<footer>版權所有 某某工作室 電話：02-2345-6789</footer></body></html>"""


def response(name: str, html: bytes, content_type: str = "text/html") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(html)}\r\n\r\n"
    return record(name, head.encode() + html, WARC_Type="response").replace(
        b"Content-Type: text/plain", b"Content-Type: application/http;msgtype=response", 1)


@pytest.mark.parametrize(("charset", "codec"), [("utf-8", "utf-8"), ("big5", "cp950")])
def test_html_keeps_its_article_and_loses_its_navigation(judge, charset, codec):
    halves = LETTER[:200] + "。", LETTER[200:]
    html = HTML.format(charset=charset, paragraphs="".join(f"<p>{half}</p>" for half in halves))
    pages, tally = read(judge, members(response("page", html.encode(codec))))
    assert not tally.damage
    text, _, refused = judge.verdict(pages[0]["text"])
    assert refused is None
    for half in halves:
        assert half in text
    for word in ("首頁", "關於本站", "巷口的麵店", "版權", "2345", "color", "var menu"):
        assert word not in text


def test_other_responses_are_no_pages(judge):
    pages, tally = read(
        judge,
        members(
            response("image", b"\x89PNG" * 400, "image/png"),
            response("english", HTML.format(charset="utf-8", paragraphs=ENGLISH).encode())))
    assert pages == []
    assert tally.pages == {"han": 1}


# --- Runs ----------------------------------------------------------------------------------------


def write_wets(folder, files: int = 3, pages: int = 8) -> list[str]:
    """Small crawl files with good pages, copies and pages that must go; returns their paths."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(files):
        good = [record(f"g{number}_{i}", text) for i, text in enumerate(different(pages, number))]
        bad = [record(f"en{number}", ENGLISH), record(f"sc{number}", SIMPLIFIED)]
        same = [record(f"same{number}", LETTER), record(f"spam{number}", SPAM)]
        near = [record(f"near{number}", RECIPE.replace("二十", "二三四五六"[number]))]
        path = folder / f"crawl-{number}.warc.wet.gz"
        path.write_bytes(members(*good, *bad, *same, *near))
        paths.append(str(path))
    return paths


FEW = ("--minhash_buckets", 2)  # fewer tasks: a quicker test


def run(run_script, folder, *options: object, **kwargs):
    """Run filter_cc.py with its outputs below `folder`."""
    return run_script(
        "filter_cc.py",
        *("--output_dir", folder / "out", "--picture", folder / "filter.png", *FEW, *options),
        **kwargs)


def run_here(folder, *options: object) -> None:
    """The same in this process, which is quicker."""
    places = ("--output_dir", folder / "out", "--picture", folder / "filter.png")
    filter_cc.main([*map(str, (*places, *FEW, *options))])


def refused(capsys, folder, *options: object) -> str:
    """What a run says that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run_here(folder, *options)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


def corpus(folder) -> dict[str, bytes]:
    """The corpus's files and their bytes."""
    return {path.name: path.read_bytes() for path in sorted((folder / "out").glob("*.parquet"))}


def rows(folder) -> list[dict]:
    return [
        row
        for path in sorted((folder / "out").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run_script):
    """A folder with small crawl files and what one worker makes of them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_wets(folder / "crawl")
    run(run_script, folder, "--input", folder / "crawl", "--save_rejected")
    return folder


def test_a_run_keeps_the_good_pages_once(undisturbed):
    kept = Counter(row["url"].rpartition("/")[2].rstrip("0123") for row in rows(undisturbed))
    assert kept == {"g0_": 4, "g1_": 4, "g2_": 4} | {
        name: count for name, count in kept.items() if name.startswith("g")
    } | {"same": 1, "near": 1}
    assert sum(count for name, count in kept.items() if name.startswith("g")) == 24


def test_the_columns_are_text_id_url_date_and_scores(undisturbed):
    table = pq.read_table(next((undisturbed / "out").glob("*.parquet")))
    assert table.column_names == ["text", "id", "url", "date", *filter_cc.SCORES, "copies"]
    assert table.schema.field("mainland").type == pa.float32()
    metadata = pq.ParquetFile(next((undisturbed / "out").glob("*.parquet"))).metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_workers_carry_the_word_lists_with_them(run_script, tmp_path):
    bad = {"cantonese": CANTONESE, "hongkong": HONG_KONG, "mainland": MAINLAND, "spam": SPAM}
    for name in ("a", "b"):
        lines = [json.dumps({"text": text}) + "\n" for text in (LETTER, *bad.values())]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    run(run_script, tmp_path, "--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl",
        "--workers", 2, cwd=tmp_path)
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert {rule: stats["account"]["refused"][rule] for rule in bad} == dict.fromkeys(bad, 2)


def test_stats_card_picture_and_run_say_what_happened(undisturbed):
    stats = json.loads((undisturbed / "out" / "stats.json").read_text())
    left = {rule: counts["pages"] for rule, counts in stats["left_after"].items()}
    assert list(left) == ["read", *filter_cc.RULES]
    assert (left["read"], left["han"], left["simplified"], left["spam"]) == (39, 36, 33, 30)
    assert left["duplicate"] == 26
    bytes_left = [counts["bytes"] for counts in stats["left_after"].values()]
    assert bytes_left == sorted(bytes_left, reverse=True)
    assert bytes_left[-1] == sum(len(row["text"].encode()) for row in rows(undisturbed))
    run_json = json.loads((undisturbed / "out" / "run.json").read_text())
    assert run_json["script"] == "filter_cc.py"
    assert run_json["arguments"]["min_han"] == 0.5
    assert run_json["results"]["pages"] == 26
    assert "duplicate" in (undisturbed / "out" / "README.md").read_text()
    assert (undisturbed / "filter.png").read_bytes().startswith(b"\x89PNG")


def test_rejected_pages_lie_by_rule(undisturbed):
    rejected = undisturbed / "out" / "rejected"
    assert {path.name for path in rejected.iterdir()} == {
        "han", "simplified", "spam", "duplicate"}
    lines = (rejected / "simplified" / "00_00001.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["text"].strip() == SIMPLIFIED


def test_the_same_command_again_is_already_done(undisturbed, capsys):
    before = corpus(undisturbed)
    run_here(undisturbed, "--input", undisturbed / "crawl", "--save_rejected")
    assert "already done" in capsys.readouterr().out
    assert corpus(undisturbed) == before


def test_other_settings_in_the_same_folder_are_refused(undisturbed, capsys):
    options = ("--input", undisturbed / "crawl", "--save_rejected", "--min_han", 0.6)
    said = refused(capsys, undisturbed, *options)
    assert "--min_han" in said
    assert "0.5 before, 0.6 now" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("options", [("--workers", 2), ("--workers", 2, "--executor", "ray")])
def test_more_workers_make_the_same_bytes(undisturbed, run_script, tmp_path, options):
    if "ray" in options:
        pytest.importorskip("ray")
    run(run_script, tmp_path, "--input", undisturbed / "crawl", *options)
    assert corpus(tmp_path) == corpus(undisturbed)


def test_slurm_is_given_one_script_a_stage(undisturbed, tmp_path):
    """sbatch is ours here: it keeps the scripts; then the jobs run as Slurm would run them."""
    programs = {
        "sbatch": f"""n=$(ls {tmp_path}/job* 2>/dev/null | wc -l)
            echo "# $@" > {tmp_path}/job$n
            cat "${{@: -1}}" >> {tmp_path}/job$n
            echo Submitted batch job $((100 + n))""",
        "scontrol": "echo localhost"}
    for name, body in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path}/bin:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "SLURM_NODELIST": "localhost"}
    options = ["--executor", "slurm", "--workers", "2", "--partition", "small"]
    options += ["--time", "01:30:00", *map(str, FEW)]
    options += ["--output_dir", tmp_path / "out", "--picture", tmp_path / "picture.png"]
    command = [sys.executable, ROOT / "filter_cc.py", "--input", undisturbed / "crawl", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "run the same command again" in done.stdout

    jobs = [tmp_path / f"job{n}" for n in range(len(list(tmp_path.glob("job*"))))]
    scripts = [job.read_text() for job in jobs if "launch_pickled_pipeline" in job.read_text()]
    assert len(scripts) == 5
    lines = "--partition=small --time=01:30:00 --array=0-2%2 --job-name=luojiu_judge_00"
    for line in lines.split():
        assert f"#SBATCH {line}" in scripts[0]
    assert "--dependency=afterok:100" in scripts[1].splitlines()[0]

    for script in scripts:
        pickled = Path(script.split("launch_pickled_pipeline ")[1].split()[0])
        ranks = json.loads((pickled.parent / "ranks_to_run.json").read_text())
        tasks = [
            subprocess.Popen(
                ["launch_pickled_pipeline", pickled],
                env=env | {"SLURM_ARRAY_TASK_ID": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)
            for rank in range(len(ranks))]
        assert [task.wait() for task in tasks] == [0] * len(ranks)
    subprocess.run(command, env=env, capture_output=True, check=True, cwd=ROOT)
    assert corpus(tmp_path) == corpus(undisturbed)


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_run_again_it_makes_the_same_bytes(undisturbed, run_script, tmp_path, seed):
    options = ["--output_dir", tmp_path / "out", "--picture", tmp_path / "p.png", *FEW]
    command = [sys.executable, ROOT / "filter_cc.py", "--input", undisturbed / "crawl", *options]
    command = [*map(str, command), "--workers", "2"]
    draw = random.Random(seed)
    tasks = draw.randrange(16)  # killed after so many of its 16 tasks, on any machine
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(list(tmp_path.glob("out/.work/logs/*/completions/*"))) < tasks:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    completed = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/.work/logs/*/completions/*")}
    try:
        run(run_script, tmp_path, "--input", undisturbed / "crawl", "--workers", 2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its orphans
    assert corpus(tmp_path) == corpus(undisturbed)
    assert [p for p, changed in completed.items() if p.stat().st_mtime_ns != changed] == []


def test_rows_of_other_corpora_are_read(tmp_path):
    """JSONL, compressed or not, and Parquet, as OSCAR, CC-100 and FineWeb-2 come."""
    texts = [*different(4, seed=5), ENGLISH, SIMPLIFIED]
    lines = [
        json.dumps({"text": t, "id": f"i{i}", "url": "u", "date": "d"}) for i, t in enumerate(texts)
    ]
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines[0] + "\nthis is no JSON\n" + lines[4])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((lines[1] + "\n" + lines[5]).encode()))
    with fsspec.open(str(folder / "c.jsonl.zst"), "wt", compression="zstd") as file:
        file.write(lines[2])
    pq.write_table(pa.table({"text": [texts[3]], "id": ["i3"], "url": ["u"]}), folder / "d.parquet")
    (folder / "e.parquet").write_bytes(b"PAR1 but not really")
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(lines[1].encode())[:-20])
    (folder / "notes.txt").write_text("not looked at")
    run_here(tmp_path, "--input", folder)
    assert sorted(row["id"] for row in rows(tmp_path)) == ["i0", "i1", "i2", "i3"]
    damage = json.loads((tmp_path / "out" / "stats.json").read_text())["damage"]
    assert damage == {
        "damaged compression (EOFError)": 1, "row that is not a JSON object": 1,
        "unreadable file (ArrowInvalid)": 1}


def test_target_size_stops_there_with_what_comes_first(tmp_path):
    write_wets(tmp_path / "crawl", files=3)
    run_here(tmp_path, "--input", tmp_path / "crawl", "--target_size", "10KB")
    sizes = [len(row["text"].encode()) for row in rows(tmp_path)]
    assert sum(sizes[:-1]) < 10_000 <= sum(sizes)
    assert rows(tmp_path)[0]["url"].endswith("g0_0")


def test_target_size_reads_no_more_files_than_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(filter_cc, "FIRST_TURN", 1)
    paths = write_wets(tmp_path / "crawl", files=5, pages=4)
    options = ["--output_dir", str(tmp_path / "out"), "--picture", str(tmp_path / "filter.png")]
    filter_cc.main(["--input", *paths, "--target_size", "12KB", *options])
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["bytes"] >= 12_000
    assert 1 < stats["files"] < 5


def test_a_crawl_is_listed_from_its_paths_file(monkeypatch, tmp_path):
    memory = fsspec.filesystem("memory")
    with memory.open("/cc/crawl-data/CC-MAIN-2026-30/wet.paths.gz", "wb") as file:
        file.write(gzip.compress(b"crawl-data/a.warc.wet.gz\ncrawl-data/b.warc.wet.gz\n"))
    monkeypatch.setattr(filter_cc, "CRAWL_URL", "memory://cc/")
    args = Arguments(crawl="CC-MAIN-2026-30", limit_files=1)
    assert filter_cc.list_inputs(args) == ["memory://cc/crawl-data/a.warc.wet.gz"]


def test_a_remote_file_is_read_where_it_lies(judge):
    with fsspec.filesystem("memory").open("/cc/a.warc.wet.gz", "wb") as file:
        file.write(members(*RECORDS))
    assert filter_cc.expand_input("memory://cc/a.warc.wet.gz") == ["memory://cc/a.warc.wet.gz"]
    with fsspec.open("memory://cc/a.warc.wet.gz", "rb") as stream:
        assert len(list(read_pages(stream, Tally(""), print, judge))) == 8


@pytest.mark.parametrize(  # more of them stand in test_errors.py
    ("options", "words"),
    [
        (["--input", "no/such/place"], ["--input no/such/place", "does not exist"]),
        (["--input", "tests"], ["--input tests", "no such file", ".wet"]),
        (["--input", "README.md"], ["--input README.md", "another kind", "JSON lines"]),
        (["--input", "no/such/*.wet.gz"], ["--input no/such/*.wet.gz", "does not exist"]),
        (["--workers", "0"], ["--workers 0", "1 to 4096"])])
def test_mistakes_end_in_one_line(monkeypatch, capsys, tmp_path, options, words):
    monkeypatch.chdir(ROOT)
    said = refused(capsys, tmp_path, *options)
    assert len(said.splitlines()) == 1
    for word in words:
        assert word in said


def test_no_good_page_is_no_mistake(capsys, tmp_path):
    (tmp_path / "english.wet").write_bytes(record("en", ENGLISH))
    run_here(tmp_path, "--input", tmp_path / "english.wet")
    printed = capsys.readouterr().out
    assert "0 pages" in printed
    assert "most by han" in printed
    assert corpus(tmp_path) == {}


def test_nothing_to_read_is_a_mistake_and_leaves_nothing_finished(capsys, tmp_path):
    rubbish = tmp_path / "rubbish.warc.wet.gz"
    rubbish.write_bytes(random.Random(0).randbytes(5_000))
    (tmp_path / "corrupt.parquet").write_bytes(b"PAR1 but not really")
    for _ in range(2):  # the second run says so again, not "already done"
        said = refused(capsys, tmp_path, "--input", rubbish, tmp_path / "corrupt.parquet")
        for word in ("rubbish.warc.wet.gz", "corrupt.parquet", "no page could be read", "logs"):
            assert word in said.splitlines()[-1]
        assert not (tmp_path / "out" / "run.json").exists()
    rubbish.write_bytes(members(*RECORDS))  # mended, it is read
    run_here(tmp_path, "--input", rubbish, tmp_path / "corrupt.parquet")
    assert len(rows(tmp_path)) == 8


def test_a_web_server_s_file_is_read_and_its_absence_is_one_line(capsys, tmp_path):
    (tmp_path / "a.warc.wet.gz").write_bytes(members(*RECORDS))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        run_here(tmp_path, "--input", f"{address}/a.warc.wet.gz")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_here(tmp_path, "--input", f"{address}/missing.warc.wet.gz")
        server.shutdown()
    assert len(rows(tmp_path)) == 8
    assert ended.value.code == 2
    assert "missing.warc.wet.gz" in capsys.readouterr().err


def test_a_server_that_stops_answering_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(filter_cc, "list_inputs", lambda args: ["memory://gone/a.warc.wet.gz"])
    with pytest.raises(SystemExit) as ended:
        run_here(tmp_path, "--crawl", "CC-MAIN-2026-30")
    assert ended.value.code == 2
    assert "run the same command again" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_is_one_line_and_exit_code_1(monkeypatch, capsys, tmp_path):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    write_wets(tmp_path / "crawl", files=1)
    monkeypatch.setattr(filter_cc, "write_whole", full)
    with pytest.raises(SystemExit) as ended:
        filter_cc.main(["--input", str(tmp_path / "crawl"), "--output_dir", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "No space left" in capsys.readouterr().err


def test_a_folder_of_another_program_is_left_alone(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    pq.write_table(pa.table({"text": ["precious"]}), tmp_path / "out" / "mine.parquet")
    write_wets(tmp_path / "crawl", files=1)
    refused(capsys, tmp_path, "--input", tmp_path / "crawl")
    assert (tmp_path / "out" / "mine.parquet").exists()


# --- Deduplication -------------------------------------------------------------------------------


def test_near_duplicates_are_found_and_others_are_not(tmp_path):
    """60 pages; a copy of each with some characters changed, Jaccard 0.8 to 0.95."""
    draw = random.Random(3)
    texts = different(60, seed=21)
    copies = []
    for text in texts:
        copy = list(text)
        for at in draw.sample(range(len(copy)), len(copy) // 70):
            copy[at] = "龍"
        copies.append("".join(copy))
    kept = tmp_path / ".work" / "kept"
    kept.mkdir(parents=True)
    for name, part in (("00_00000.parquet", texts), ("00_00001.parquet", copies)):
        table = {"text": part, "id": [str(i) for i in range(60)], "url": [""] * 60}
        pq.write_table(pa.table(table), kept / name)
    args = Arguments(output_dir=str(tmp_path))
    stages = filter_cc.deduplication(args, kept.parent, ["00_00000.parquet", "00_00001.parquet"], 0)
    assert filter_cc.run_stages(stages, args, kept.parent)
    left = [
        text
        for path in sorted(kept.parent.glob("dedup_00/final/*.parquet"))
        for text in pq.read_table(path)["text"].to_pylist()]
    assert len(set(left) & set(texts)) >= 58  # the first of a pair stays
    assert len(set(left) & set(copies)) <= 2


def test_shingles_are_hashes_of_runs():
    codes = filter_cc.code_points("春眠不覺曉處處聞啼鳥春眠不覺曉處處聞啼鳥")
    for size in (1, 2, 3, 5, 10):
        hashes = filter_cc.shingles(codes, size)
        assert len(hashes) == 20 - size + 1
        assert (hashes[0] == hashes[10:11]).all()
        assert len(set(hashes.tolist())) == 10 - (size == 1)
    assert filter_cc.shingles(codes[:3], 5).size == 0


# --- The labelled file ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(shared_data, tmp_path_factory, run_script):
    folder = tmp_path_factory.mktemp("labelled")
    run(run_script, folder, "--input", shared_data / "labelled.wet.gz")
    return folder


def test_the_labelled_file_is_sorted_as_its_labels_say(labelled, shared_data, judge):
    total = Counter()
    with gzip.open(shared_data / "labelled.wet.gz") as file:
        for line in file:
            if line.startswith(b"WARC-Target-URI"):
                total[line.split(b"/")[3].decode()] += 1
    kept = Counter(row["url"].split("/")[3] for row in rows(labelled))
    good = ("tc", "tc_page")
    assert sum(kept[name] for name in good) >= 0.98 * sum(total[name] for name in good)
    assert kept["dup"] <= 0.05 * total["dup"]
    bad = [name for name in total if name not in (*good, "dup")]
    assert sum(kept[name] for name in bad) <= 0.02 * sum(total[name] for name in bad)
    assert max(kept[name] / total[name] for name in bad) <= 0.02


def test_labelled_pages_lose_their_furniture_and_keep_their_prose(labelled, shared_data, judge):
    originals = {}
    with open(shared_data / "labelled.wet.gz", "rb") as stream:
        for page in read_pages(stream, Tally(""), print, judge):
            originals[page["url"]] = page["text"]
    prose_total = prose_kept = 0
    for row in rows(labelled):
        if "/tc_page/" not in row["url"]:
            continue
        lines = originals[row["url"]].split("\n")
        menus = {line for line in lines if 0 < len(line) < 10}
        kept = row["text"].split("\n")
        assert not menus & set(kept)
        assert "版權所有" not in row["text"]
        assert "2345-6789" not in row["text"]
        assert "@" not in row["text"]
        prose = [
            hide_private(" ".join(line.split()))
            for line in lines
            if len(line) > 100 and "版權" not in line]
        prose_total += sum(map(len, prose))
        prose_kept += sum(len(line) for line in prose if line in kept)
    assert prose_kept >= 0.99 * prose_total > 0
