"""Common Crawl to a clean Traditional Chinese corpus in Taiwan usage.

In: WET, WARC (HTML), JSONL or Parquet files; files, folders, globs, URLs, or a crawl by its name.
Out: zstd Parquet with text, id, url, date and the scores of every page, stats.json, a dataset card,
run.json, and the picture pictures/filter.png: pages and bytes that each rule left.

One pass reads and judges. ISA-L inflates a record only as far as its header when the header names
other languages (Common Crawl's CLD2 labels); numpy counts the scripts of what remains in its bytes;
FastWARC parses, and rules judge, the few pages that are left: script, length, Taiwan usage, menus
and footers, repetition (Gopher, Rae et al. 2021), closing punctuation (C4, Raffel et al. 2020;
FineWeb, Penedo et al. 2024), spam. Personal data become placeholders. Then exact and MinHash
deduplication (Broder 1997) over all pages. datatrove runs it: tasks, logs, resuming, clusters.

A run of a minute on any CPU (this command was run):
    python filter_cc.py --input data/sample
The real run:
    python filter_cc.py --crawl CC-MAIN-2026-30 --target_size 6GB --workers 8
Cost: a worker takes 0.2 GB of memory whatever the size of its files; benchmarks/bench_filter.py
measures the speed, and the price of deduplication.
"""

import argparse
import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import fsspec  # datatrove, matplotlib and ray are imported where they are used: --help stays quick
import numpy as np
from fastwarc.warc import WarcRecord
from isal import igzip_lib
from tqdm import tqdm
from transformers import HfArgumentParser

# --- Constants -----------------------------------------------------------------------------------

CRAWL_URL = "https://data.commoncrawl.org/"
ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ENDINGS = (".wet", ".wet.gz", ".warc", ".warc.gz", *ROW_ENDINGS)
MAX_TASKS = 256  # deduplication opens one file of every task at once
FIRST_TURN = 32  # files read before the yield of a crawl is known (--target_size)
BLOCK = 1 << 18  # bytes that a stream gives at a time
MAX_RECORD = 16 << 20  # bytes; no page of prose is larger
HEAD = 384  # compressed bytes that hold a record's header
SAMPLE = 640  # further bytes that show its script
HAN_LEADS = bytes(range(0xE4, 0xEA))  # they begin nearly every Han character in UTF-8
SCORES = ("han", "traditional", "mainland", "repeated", "distinct", "closing", "spam")
HERE_ONLY = ("input", "crawl", "limit_files", "workers", "executor", "partition", "time", "picture")
RANGES = {  # of the numbers that are neither a share nor a count without a limit
    "max_mainland": (-1000, math.inf), "max_spam": (0, math.inf), "workers": (1, 4096),
    "minhash_buckets": (1, 1000), "minhash_rows": (1, 1000)}

# Rules in the order in which they are applied; stats.json and the picture follow it.
RULES = {
    "language": "the header names languages, and Chinese is not among them",
    "han": "too few of its letters are Han",
    "japanese_korean": "kana or hangul",
    "simplified": "Simplified characters",
    "mojibake": "broken bytes, or characters that nobody uses",
    "lines": "menus, footers, share buttons and cookie notices (lines; pages stay)",
    "length": "too little prose is left",
    "repetition": "it repeats itself",
    "punctuation": "hardly a line ends like a sentence",
    "mainland": "mainland wording in Traditional glyphs",
    "spam": "gambling, loan, adult and drug vocabulary",
    "url": "the address is on a block list",
    "exact_duplicate": "same text as an earlier page",
    "near_duplicate": "nearly the same text as another page",
    "target": "beyond the target size"}

# The header of a text, in lower case, begins so; it names languages, and Chinese is not among them.
CONVERSION = b"warc/1.0\r\nwarc-type: conversion"
FOREIGN = re.compile(rb"\nwarc-identified-content-language:(?!.*zho)")

# Lines are searched in lower case. Where every alternative of a pattern begins with a plain letter,
# re looks for these letters by a table, many times as fast: hence 上一?頁|下一?頁, not [上下]一?頁.

# Words of menus, for lines that hold no sentence.
THINGS = "(?:文章|新聞|閱讀|商品|關鍵字|標籤|連結|主題|問答|留言)"
FURNITURE = re.compile(
    "首頁|主頁|最新消息|關於(?:我們|本站|我自己|這個網誌)|聯[絡繫]我們|會員|登[入出]|註冊|購物車|"
    "加入(?:好友|最愛|書籤)|追蹤|收藏|網站(?:地圖|導覽)|隱私權?(?:政策|聲明)?|服務條款|使用條款|免責聲明|"
    "常見問[題答]|回到?最?[頂上首][頁端方層]?|回主文|上一?[頁篇則首]|下一?[頁篇則首]|更多|延伸閱讀|"
    f"相關{THINGS}|熱門{THINGS}|最新{THINGS}|近期{THINGS}|推薦{THINGS}|精選{THINGS}|分享[到至]?|列印|"
    "字級|轉寄|訂閱|電子報|粉絲(?:團|專頁)|按讚|留言|回[覆應]|搜尋|您的?現?前?位置|目的?現?前?位置|"
    "人氣|最近瀏覽|瀏覽(?:人次|數|量)?|點閱[數率]?|點擊|標籤|分類|彙整|跳[到至](?:主|導覽|搜尋)|部落格|"
    "網誌|痞客邦|相簿|檢舉|舉報|選單|導覽|客服(?:中心)?|忘記(?:密碼|帳號)|人才招募|"
    " 人(?:喜歡|說讚)|發.?(?:日期|時間)|更.?(?:日期|時間)|張貼|作者|樓主|編輯|排序|複製連結|"
    "繁體中文|無障礙|目錄|關鍵字|迴響|其他應用程式|複製鏈接|附件|友站連結|完整簡介|追蹤者|廣告|"
    "贊助|退換貨|下載|付款方式|運送(?:方式|政策)|退款政策|立即購買|快速連結|電子資源|書評|"
    r"查詢結果|正在載入|»|›|＞|english|facebook|line|instagram|ig(?<!\wig)\b|youtube|twitter|threads|"
    "telegram|rss|app|pdf|e-?mail|mail|top|menu|home|login|search|share|like|posted by|blogthis|"
    "tags?|comments?")
# Lines that are furniture although they read like a sentence; of the prompts only short ones.
CREDIT = r"(?:圖片?|照片|攝影|翻攝)[^）)]{0,8}[:：／/][^）)]{1,20}[）)]$"
NOTICE = re.compile(
    r"版權(?:所有|為)|著作權(?:所有|聲明|歸)|©|\(c\)\s?(?:19|20)\d\d|copyright|"
    r"all\srights\sreserved|請勿(?:任意)?轉載|"
    r"未經.{0,4}(?:授權|許可|同意).{0,8}(?:轉載|重製|使用)|歡迎轉載|註明出處|"
    r"創用\s?cc.{0,24}(?:條款|釋出|\d\.\d)|網站.{0,6}使用.{0,4}cookie|同意.{0,12}cookie|"
    r"cookies?(?:[^。，]{0,24}(?:同意|政策|瀏覽)|.{0,40}(?:您|隱私))|"
    r"不代表.{0,8}立場|保[有留].{0,6}(?:修改|變更|更改|終止|解釋).{0,20}權|®.{0,30}商標|"
    r"最後(?:修訂|更新|編輯)(?:日期|時間|[於在:：])|akismet|佈景主題|powered\sby|processed\sin|"
    r"啟用.{0,8}javascript|開啟.{0,8}javascript|javascript.{0,12}(?:停用|關閉|啟用|開啟|支援)|"
    r"必須登入|尚未登入|沒有登入|目前時間是\s?\d|所有時間均為|網站.{0,12}僅供參考|電子郵件地址不會|"
    r"必填欄位|內容將保密|在瀏覽器中儲存|自由的百科全書|最佳瀏覽|"
    r"瀏覽器.{0,12}(?:最佳|建議)|建議使用.{0,24}瀏覽|對[您你]有.{0,2}幫助嗎|頁面有.{0,2}幫助嗎|"
    r"內容.{0,6}僅供參考|資[料訊].{0,6}僅供參考|繼續往下閱讀|您收到[這此本]封?[信郵]件?是?因|"
    r"以電子郵件傳送這篇|減少垃圾留言|按一下即可分享|本[帖文]最後由|發信站[:：]|文章網址[:：]|"
    r"本[文會站].{0,6}僅供參考|以上.{0,8}僅供參考|歡迎來電|除非另有註明|"
    r"不構成.{0,8}(?:建議|意見)|不得(?:任意)?(?:轉載|翻印)|版權屬|"
    r"尊重.{0,4}智慧財產權|須滿.?18.?歲|需滿.?18.?歲|網站分級|繼續閱讀本文|取自「|更換瀏覽器|"
    r"請.{0,10}與客服聯[絡繫]|請聯[絡繫]客服|此條目.{0,6}來源|來源以改善|"
    rf"（{CREDIT}|\({CREDIT}")
PROMPT = re.compile(
    r"喜歡.{0,14}(?:分享|按讚|訂閱)|覺得.{0,14}(?:分享|按讚|訂閱)|歡迎.{0,4}(?:分享|訂閱|追蹤|按讚)|"
    r"按讚.{0,8}(?:粉絲|專頁)|加入(?:會員|.{0,4}粉絲)|滿.{1,8}免運|全.{1,8}免運|"
    r"訂閱.{0,8}(?:電子報|頻道)|追蹤我們|加入我們|與我們聯[絡繫]|和我們聯[絡繫]|跟我們聯[絡繫]|"
    r"看大圖|留個言|加入討論|忘記(?:密碼|帳號)|官方帳號|下載.{0,6}app|請先?登入|訪客身[份分]|歡迎加入|"
    r"立即(?:報名|購買|下載)|"
    r"點(?:我|此|這裡)|看更多|閱讀更多|延伸閱讀|上一?[篇則頁][:：]|下一?[篇則頁][:：]|"
    r"顆星.{0,3}好評|文章對[您你].{0,4}幫助|發[表佈].{0,6}留言|贊助(?:支持)?(?:創?作者|我們)|"
    r"支持(?:贊助)?(?:創?作者|我們)")
# Headings of links to other pages, whose titles may read like a sentence, and of comments.
RELATED = re.compile(
    r"(?:延伸|推薦|相關|熱門|人氣|最新|更多|近期|其他|猜你|可能|related\s).{0,6}"
    r"(?:閱讀|文章|新聞|報導|興趣|喜歡|想看|話題|問答|作品|詩作|posts|articles)")
COMMENTS = re.compile(
    r"(?i)(?:發[佈表]|\d+\s?[則篇個]?\s?)?(?:留言|回應|迴響|評論|comments?)\s?[(（]?\d*[)）]?[:：]?")
# Lines about the page: when, by whom, where in the site.
DAY = r"(?:\d\d){1,2}\s?[年./-]\s?\d\d?\s?[月./-]\s?\d\d?"
ABOUT = re.compile(
    rf"{DAY}[\s\d:#日上下午星期週一二三四五六（）()]*$|{DAY}日?\s.{{0,8}}$|\d?\d:\d\d$|"
    r"\d\d?[月/]\d\d?日?\s\d?\d:\d\d$|.{0,12}發[表佈布]於|"
    r"(?:記者|編譯|特派員|文|圖).{1,14}[／/].{1,12}$|"
    r"\S{0,4}(?:編號|次數|人數|來源|領域|評價|評分|難度|單位|類別|類型|語文|字數|日期|時間|標籤|分類|"
    r"關鍵字|[者首])\s?[:：].{0,24}$|[A-Z][A-Za-z-]{1,20}:\s|"
    r".{1,20}\s(?:[>/»›＞|]|>>)\s.{1,20}$|.*[»›].*[»›]")
# Headings and formulas, however few of their characters are words; data and code.
NUMBERED = re.compile(
    "[壹貳參肆伍陸柒捌玖拾一二三四五六七八九十]+、|第[一二三四五六七八九十百0-9]+[章節條步]")
FORMULA = re.compile(r"\S [=≈≤≥] \S")
DATA = re.compile(r"[\d=(){};]")
LABELS = (
    "地址|電話|傳真|信箱|e-?mail|tel|fax|服務時間|營業時間|看診時間|門診時間|開放時間|開館時間|開店時間|"
    "客服時間|上班時間|統一?編號?|專線|郵遞區號|聯絡人")
CONTACT, CONTACT_LINE = re.compile(rf"(?:{LABELS})\s*[:：]"), re.compile(
    rf"\S{{0,2}}(?:{LABELS})\s.{{0,12}}\d")
HAN, LATIN = re.compile("[\u3400-\u9fff]"), re.compile("[a-z]")
SENTENCE = re.compile(  # Chinese punctuation, or ASCII's behind Han
    "[。！？；，,.!?;](?:(?<=[。！？；，])|(?<=[\u3400-\u9fff」）].)(?=\\s|$|[\u3400-\u9fff「]))")
ENDED = re.compile("[。？！]")
CLOSING = tuple("。！？…」』）；：.!?\"')~～")
PARAGRAPH = tuple("。；：，」』）.\"')~～")  # the ends of these; a title may end in ？ or ！
SEPARATORS = re.compile(r"[\s|｜│>»›＞/／·•．‧★◆■]+")
FUNCTION_WORDS = frozenset(
    "的了是我你妳他她它在不有這那著也就都而又還說到過裡吧嗎呢啊讓把被與和卻才很")

SPAM = (
    "娛樂城 百家樂 老虎機 體驗金 線上博弈 博弈網 運彩 首存 首儲 註冊送 現金版 現金網 彩金 六合彩 "
    "今彩539 捕魚機 骰寶 輪盤 德州撲克 真人荷官 信用版 出金 儲值 賠率 投注 下注 串關 必勝法 "
    "外送茶 外約 約妹 茶訊 叫小姐 援交 一夜情 定點茶 看照約 無碼 A片 成人影片 成人網站 情色 "
    "色情影片 做愛 口交 自慰 情趣用品 跳蛋 春藥 壯陽 威而鋼 犀利士 必利勁 持久液 催情 借錢 "
    "小額借款 急用錢 當日撥款 免留車 免保人 證件借款 票貼 房屋二胎 代書貸款 民間借貸 信用瑕疵 "
    "當舖 汽車借款 機車借款 加賴 加LINE 立即領取 高仿 A貨 代寫論文 代考 換現金 買粉絲 刷讚 增高鞋 "
    "減肥藥 豐胸 穩賺 保證獲利 飆股 報明牌 半套店 全套服務 手排服務 油壓店 舒壓會館 口爆 顏射 肉棒 "
    "淫蕩 騷穴 約砲 打砲 鴛鴦浴 酥胸 樓鳳 傳播妹 援妹 乳交 幹砲 卡債整合 貸款顧問 過件率 版路 拖牌 "
    "獨支 連碰 彩友 狼友 茶莊 喝茶吃魚 兼職妹 高清無碼 成人影音 理財顧問公司 不過件 過件才收費")
# Mainland words in Traditional glyphs besides those of OpenCC's table, and Taiwan's own.
MAINLAND = (
    "軟件 硬件 視頻 屏幕 鼠標 網絡 信息 內存 U盤 光盤 打印 服務器 互聯網 出租車 酸奶 土豆 激光 "
    "芯片 筆記本電腦 台式機 智能手機 充電寶 網約車 小哥 點贊 朋友圈 公眾號 立交橋 方便麵 西紅柿 "
    "菠蘿 獼猴桃 三文魚 公交車 公交站 領導幹部 攝像頭 操作系統 程序員 殺毒 博客 網吧 網民 雲盤 "
    "微信 支付寶 下單 門店 網店 衛生間 創可貼 居委會 高考 抓手 接地氣 給力 靠譜 忽悠 立馬 咱們 "
    "打車 帶貨 自媒體 短視頻 二維碼 掃碼 快遞員 外賣員 學區房 醫保 衛健委 發改委 充值 客戶端 "
    "用戶名 賬號 賬戶 數碼相機 家長們 早高峰 晚高峰 打工人 幹貨 乾貨滿滿 寶媽 閨蜜 顏值 網紅店 "
    "吃貨 點外賣 叫外賣 班主任 輔導班 堵車 錯峰 小姐姐 小哥哥 抓瞎 報銷 廣大群眾 國慶節 挺好 "
    "挺不錯 挺愉快 挺多 挺有 挺大 保健品 微信群 民警 城管 村委會 咋樣 咋辦 幹啥 沒啥 貓膩 鬧心 "
    "供暖 樓盤 首付 五險一金 年終獎 農家樂 釐米 厘米 學習成績 考研 央企 民企 私企 下崗 留守兒童 "
    "空巢老人 廣場舞 小賣部 順風車 拼車 社保 二手房 房產證 身份證號 充電樁 電瓶車 大夥兒 一塊兒 "
    "這會兒 媳婦兒 孩子他爸 鍛煉 貧困戶 扶貧 網課 慕課 師生們 同學們都 領導們 發票抬頭 渠道商 "
    "質檢 質監 打假 假冒偽劣 消費者們 人社部 單元樓 一個勁兒 細思極恐 牛逼 屌絲 坑爹 爆款 對標 "
    "國企 農民工 微商 物業費 護膚品 插混 綠皮火車 打工仔 倍兒 甭管 雲計算 大巴車 銀行卡 轉賬 "
    "進博會 電飯煲 小夥伴們 黨組 黨委書記 臺賬 供銷社 家屬院 老中醫 份兒上 評優 銷號 督導檢查 "
    # characters that a conversion took for others
    "餅幹 幹淨 幹燥 幹脆 幹擾 若幹 國傢 專傢 傢庭 方麵 麵積 曆史 經曆 復雜 恢複 宿捨 影嚮 特彆 "
    "彆人 區彆 註意 註重 專註 颱灣 颱北")
TAIWAN = (
    "軟體 硬體 影片 螢幕 滑鼠 網路 資訊 記憶體 硬碟 隨身碟 光碟 簡訊 列印 伺服器 資料庫 網際網路 "
    "計程車 優格 馬鈴薯 雷射 晶片 筆電 手機殼 行動電源 外送 按讚 泡麵 鳳梨 奇異果 鮭魚 公車 捷運 "
    "程式 作業系統 防毒 部落格 網咖 快取 主機板 雲端 人工智慧 專案 檔案 資料夾 數位 解析度 國小 "
    "國中 機車 便當 超商 健保 統一發票 阿嬤 阿公 腳踏車 透過 志工 帳號 帳戶")
# Forms of OpenCC's own standard, in use neither in Taiwan nor in Hong Kong: a conversion left them.
VARIANTS = "爲僞衆竈覈纔"
CURLY = re.compile("“[\u4e00-\u9fff]")  # Taiwan quotes with 「」; conversion leaves quotes alone
# Words of OpenCC's table that Taiwan has too, and compounds that only seem to hold one.
SHARED = (
    "支持 程序 社區 菜單 公元 地址 參數 函數 循環 智能 用戶 界面 算法 聯繫 訪問 連接 項目 消息 "
    "文件 數據 數字 模擬 類型 設備 設置 聲明 保存 打開 運行 對象 圖像 高級 高端 發佈 發布 發送 "
    "性能 查找 分區 交互 局部 內核 光標 字體 自行車 實例 集成 通信 代碼 權限 指針 調度 腳本 註銷 "
    "搜索 插件 添加 壁紙 映射 蹦極 兼容 塑料 後綴 前綴 像素 優化 採樣 接口 擴展 枚舉 概率 矢量 "
    "窗口 超聲波 端口 隊列 變量 線程 禁用 散列 溢出 持久性 涼菜 相冊 磁盤 登錄 遠程 連接器 鏡像 "
    "鏈接 黑客 點擊 仿真 元音 輔音 全局 低級 多態 外置 內置 加納 孤獨症 字段 字符 存儲 導入 導出 "
    "截取 模塊 比特 綁定 聲卡 調試 進程 進制 信號 信道 串口 圖庫 實時 重載 弗吉尼亞 帕勞 歐拉 "
    "萬象 組件 移動 乍得 也門 性價比 主板 運營 回調 拋出 拷貝 掛斷 刷新 批量 控件 複印 遞歸 重裝 "
    "網關 網卡 諾蘭 奶酪 冰棍 貝多 凱奇 薩提 福雷 拉莫 布爾 創建 格拉斯 視圖 圖標 觸摸 調製 的士 "
    "標識符 屏蔽 寬帶 移動通信 移動電話 南卡羅來納 北卡羅來納 南卡羅來納州 北卡羅來納州 "
    "馬薩諸塞州 新澤西 哈薩克斯坦 帕金森病 大眾汽車 集群 空間 卸載 免提 串行 通用 白細胞 紅細胞 "
    "羅得島州 瓦格納 胰腺 前列腺 知識產權 市場營銷 默認 截屏 高清 數字人文 觸摸屏 激活 審核 覈心 "
    "目標代碼 移動網絡 納米 納米比亞 支持者 程序正義 程序不正義 正當程序 訴訟程序 司法程序 "
    "處理程序 方程式 軟體動物 演算法 大數據 公元紀年 海內存知己 電視頻道 衛視頻道 影視頻道 "
    "感激光 相信息 本土豆 打印度 強硬件 高考慮 高考驗 高考量 微信心 微信仰 給力量 給力氣 土豆腐 "
    "靠譜系 外賣力 打車輪 下單位 下單純 下單元")

# Personal data. Digits and letters around them must have ended; that is asked after the first
# character, because a pattern that begins with a set of characters is found much faster.
EMAIL = re.compile(r"(?a)[\w.+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+")
NUMBER = re.compile(r"(?a)\d[\d.()\s-]{5}")  # all that follow have one
IP_ADDRESS = re.compile(r"(?a)\d(?<![\d.]\d)\d{0,2}(\.\d{1,3}){3}(?!\d|\.\d)")
NATIONAL_ID = re.compile(r"(?a)[A-Z](?<![A-Za-z\d][A-Z])[1289A-D]\d{8}(?!\d)")
PHONE = re.compile(
    r"(?a)[+(（0](?<![\d-][+(（0])"
    r"((?<=\+)886[-\s]?(\(0\)|0)?|(?<=0)0886[-\s]?0?|(?<=[(（])0|(?<=0))"  # country or trunk prefix
    r"(9\d{2}[)）]?([-\s.]?\d{3}){2}|[2-8]\d{0,2}[)）]?[-\s.]?\d{3,4}[-\s.]?\d{4}|800([-\s]?\d{3}){2}"
    r"|(37|89|82|826|836)[)）]?[-\s.]?\d{2,3}[-\s.]?\d{3})"
    r"(?!\d)(\s*(#|轉|分機)\s*\d{1,5})?"
)

PLACEHOLDER = re.compile(r"\[(?:EMAIL|IP|ID|PHONE)\]")

# --- Arguments -----------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written and every option's default."""


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Every option of the command line; the help text is the documentation."""

    input: list[str] = field(
        default_factory=lambda: ["data/sample"],
        metadata={"help": "Files, folders, globs, URLs: .wet, .warc[.gz], .jsonl[.zst], .parquet."})
    crawl: str | None = option(None, "Crawl to read, such as CC-MAIN-2026-30; None: --input.")
    limit_files: int | None = option(None, "Read only so many files; None: all.")
    output_dir: str = option("data/cc_filtered", "Folder for the corpus; made if missing.")
    target_size: str | None = option(None, "Stop at so much text (UTF-8), such as 6GB; None: all.")
    executor: Literal["local", "ray", "slurm"] = option("local", "datatrove executor to run on.")
    workers: int = option(1, "Tasks at a time.")
    tasks: int | None = option(None, f"Groups of files; None: one a file, at most {MAX_TASKS}.")
    save_rejected: bool = option(False, "Write refused pages to rejected/<rule>/ to read and tune.")
    min_han: float = option(0.5, "Least share of Han among the letters.")
    max_kana_hangul: float = option(0.2, "Largest share of kana and hangul in East Asian letters.")
    min_traditional: float = option(0.9, "Least share of Traditional where scripts differ.")
    max_broken: float = option(0.002, "Largest share of broken characters (U+FFFD, private use).")
    max_rare: float = option(0.1, "Largest share of Han outside Big5 level 1, the 5,401 in use.")
    min_length: int = option(200, "Least number of Han left when the lines are cleaned.")
    max_mainland: float = option(4.0, "Most mainland words, less Taiwan's, per 1,000 Han.")
    max_repeated: float = option(0.2, "Largest share of 10-grams of characters repeated (Gopher).")
    min_distinct: float = option(0.5, "Least share of distinct 2-grams in the first 1,000.")
    min_closing: float = option(0.3, "Least share of text in lines that end like a sentence (C4).")
    max_spam: float = option(6.0, "Most spam words per 1,000 Han, of two different at least.")
    url_lists: bool = option(False, "Refuse datatrove's listed addresses too (0.8 GB a worker).")
    minhash_buckets: int = option(20, "MinHash bands: more find more near duplicates.")
    minhash_rows: int = option(8, "MinHash values in a band: more are stricter.")
    partition: str = option("cpu", "Slurm partition.")
    time: str = option("08:00:00", "Slurm time limit of a task.")
    picture: str = option("pictures/filter.png", "Where to draw what each rule left.")


def parse_args(argv: list[str] | None) -> Arguments:
    """Read the command line (None: sys.argv; in a notebook nothing); exit code 2 if it is wrong."""
    parser = HfArgumentParser(
        Arguments, description=__doc__, formatter_class=HelpFormatter,
        usage="%(prog)s [options]", allow_abbrev=False)
    if argv is None and "__file__" not in globals():
        argv = []  # a notebook's sys.argv is Jupyter's own
    args, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unknown option: {' '.join(unknown)}; --help lists the options")
    return args


# --- Errors --------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend: the argument, its value, what was expected, what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """End mistakes and refusals in one line: exit code 2 for a UserError or a package that is
    missing or too old, 1 for a full or read-only disk, 130 for Ctrl-C. Anything else is our bug and
    keeps its traceback."""
    refusals = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
    try:
        yield
        return
    except UserError as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted; run the same command again to go on", 130
    except ImportError as error:
        message, code = f"error: {error}; pip install -r requirements.txt mends it", 2
    except Exception as error:
        if getattr(error, "errno", None) not in refusals and "No space left" not in str(error):
            raise
        message, code = f"error: {error}", 1
    print(message, file=sys.stderr)
    raise SystemExit(code)


# --- Records out of damaged files ----------------------------------------------------------------


def file_records(file, wanted: Callable, damage: Callable) -> Iterator[tuple]:
    """Yield the records of a file of WARC bytes, each with the place and length of its body; where
    a length is wrong, go on at the next record's header."""
    file.flush()
    if not file.tell():
        return
    at, lost = 0, False
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while (start := data.find(b"WARC/1.", at)) >= 0:
            if not lost and data[at : min(start, at + HEAD)].strip():
                damage("foreign bytes")
            head = data[start : start + (1 << 16)]
            body = max(head.find(b"\r\n\r\n"), 0) + 4
            header = head[: body - 2].lower()
            said = header.partition(b"\ncontent-length:")[2].partition(b"\n")[0].strip()
            length = int(said[:20]) if said.isdigit() else 0  # int() refuses thousands of digits
            at = start + body + length
            kind = None
            if not said.isdigit():
                kind = "record without a length"
            elif length > MAX_RECORD:
                kind = "oversized record"
            elif at > len(data):
                kind = "truncated record"
            elif not b"WARC/1.".startswith(data[at : at + 11].lstrip(b"\r\n")[:7]):
                kind = "record with a wrong length"
            if lost := kind is not None:
                damage(kind)
                at = start + 7  # past this header's WARC/1., on to the next
            elif wanted(header, length):
                yield data[start:at], body, length
        if not lost and data[at : at + HEAD].strip():
            damage("foreign bytes")


def only_record(data: bytes, at: int, end: int, wanted: Callable) -> tuple | None:
    """Return the record of the gzip member data[at:end] if it is healthy and holds just one, with
    the place and length of its body; () if `wanted` refuses it for its header or for its first
    bytes, and then the rest is not even inflated; None if the member is anything else. Its last
    four bytes, the inflated size, must be the record's own. Bytes after it do no harm."""
    try:
        inflate, fed = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP), at + HEAD
        head, size = inflate.decompress(data[at:fed]), int.from_bytes(data[end - 4 : end], "little")
        while (body := head.find(b"\r\n\r\n") + 4) < 4 and not inflate.eof and fed < end:
            head += inflate.decompress(data[fed : fed + HEAD])
            fed += HEAD
        header, length = head[: body - 2].lower(), size - body - 4
        said = b"\ncontent-length: %d\r" % length in header and header.startswith(b"warc/1.")
        if not said or size > MAX_RECORD:
            return None
        if not wanted(header, length):
            return ()
        if not inflate.eof:
            head += inflate.decompress(data[fed : fed + SAMPLE])
        if not wanted(header, length, head[body:]):
            return ()
        if not inflate.eof:
            head += inflate.decompress(data[fed + SAMPLE : end], size)
        return (head, body, length) if inflate.eof and len(head) == size else None
    except igzip_lib.IsalError:
        return None


def member_starts(data: bytes) -> list[int]:
    """Return where gzip members start in `data`, the first place left out."""
    codes = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(codes[1:-8] == 0x1F) + 1
    at = at[(codes[at + 1] == 0x8B) & (codes[at + 2] == 8) & (codes[at + 3] < 32)]
    return at[codes[at + 8] <= 4].tolist()


def gzip_records(stream, data: bytes, wanted: Callable, damage: Callable) -> Iterator[tuple]:
    """Cut records out of the gzip members in `data` and then `stream`. Magic bytes divide them, so
    that damage ends with its member. One record each is the rule; any other member (many records,
    a wrong length, damage, magic bytes that were none) is inflated into a file and looked through.
    """
    at, more, starts = 0, True, [*member_starts(data), len(data)]

    def refill(keep: int) -> bool:
        """Read another block; what lies before `keep` is done with."""
        nonlocal data, at, more, starts
        block = stream.read(BLOCK) if more else b""
        if more := bool(block):
            data, at = data[keep:] + block, at - keep
            starts = [*member_starts(data), len(data)]
        return more

    def inflate_into(file) -> bool:
        """Inflate the member at `at` and go to its end; False, and stay, if it is damaged."""
        nonlocal at
        inflate, fed = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP), at
        with contextlib.suppress(igzip_lib.IsalError):
            while not inflate.eof:
                given = b""
                if inflate.needs_input:
                    if fed == len(data):
                        keep = at if fed - at < 2 * MAX_RECORD else fed  # too large to come back to
                        if not refill(keep):
                            return False
                        fed -= keep
                    given = data[fed : fed + BLOCK]
                    fed += len(given)
                file.write(inflate.decompress(given, BLOCK))
            at = fed - len(inflate.unused_data)
        return inflate.eof

    while True:
        if at == len(data):
            if not refill(at):
                return
            continue
        end = starts[bisect(starts, at)]
        if end == len(data) and end - at < MAX_RECORD and refill(at):
            continue
        found = only_record(data, at, end, wanted)
        if found is not None:
            at = end
            if found:
                yield found
            continue
        with tempfile.TemporaryFile() as file:
            kind = "damaged gzip member" if data.startswith(b"\x1f\x8b", at) else "foreign bytes"
            whole = inflate_into(file)
            if not whole:
                damage(kind)
                at = starts[bisect(starts, at)]
            yield from file_records(file, wanted, damage if whole else lambda kind: None)


def stream_records(stream, wanted: Callable, damage: Callable) -> Iterator[tuple]:
    """Yield the wanted records of a WET or WARC file, compressed or not, whatever its name says."""
    start = stream.read(BLOCK)
    if not start:
        damage("empty file")
    if start.startswith(b"\x1f\x8b"):
        yield from gzip_records(stream, start, wanted, damage)
    else:
        with tempfile.TemporaryFile() as file:
            file.write(start)
            shutil.copyfileobj(stream, file, BLOCK)
            yield from file_records(file, wanted, damage)


# --- Pages out of records ------------------------------------------------------------------------


@dataclass
class Tally:
    """What a task read, refused and kept: for progress, stats.json and the log; one file a task."""

    path: str
    pages: Counter = field(default_factory=Counter)  # rule or "kept" -> pages
    bytes: Counter = field(default_factory=Counter)  # the same -> bytes of UTF-8
    damage: Counter = field(default_factory=Counter)  # kind -> how often
    files: int = 0
    saved: float = 0.0

    def count(self, rule: str, size: int) -> None:
        """Count a page under the rule that refuses it, or under "kept"."""
        self.pages[rule] += 1
        self.bytes[rule] += size

    def save(self, every: float = 0.0) -> None:
        """Write the counts; with `every`, only if so many seconds passed since the last time."""
        if time.monotonic() - self.saved >= every:
            self.saved = time.monotonic()
            counts = {name: getattr(self, name) for name in ("files", "pages", "bytes", "damage")}
            write_whole(Path(self.path), json.dumps(counts, sort_keys=True))


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that no half of it is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_pages(stream, tally: Tally, damage: Callable, judge: "Judge") -> Iterator[dict]:
    """Yield the pages of a WET or WARC stream that neither header nor bytes refuse; with
    --save_rejected the refused ones as well, with the rule under "refused"."""
    save = judge.limits.save_rejected

    def wanted(header: bytes, length: int, start: bytes = b"") -> bool:
        if not header.startswith(CONVERSION) and b"\nwarc-type: conversion" not in header:
            return b"\nwarc-type: response" in header
        refused = judge.glance(start) if start else "language" if FOREIGN.search(header) else None
        if save or not refused:
            return True
        tally.count(refused, length)
        return False

    names = {"id": "WARC-Record-ID", "url": "WARC-Target-URI", "date": "WARC-Date"}
    for data, at, length in stream_records(stream, wanted, damage):
        try:
            page = None if data.isascii() else data[at : at + length]
            header = data[:at].lower() if save or b"\nHTTP/1." in data[at - 1 : at + 8] else b""
            if b"\nwarc-type: response" in header:
                page = main_text(WarcRecord.from_bytes(data), judge)
                if page is None:
                    continue
            refused = "language" if FOREIGN.search(header) else judge.refuse_bytes(page or b"")
            if refused and not save:
                tally.count(refused, len(page) if page else length)
                continue
            headers = WarcRecord.from_bytes(data).headers
            known = {name: headers.get(field) for name, field in names.items()}
            yield known | {
                "text": (page or data[at:]).decode("utf-8", "replace"), "refused": refused}
        except (OSError, ValueError, LookupError):
            damage("record that does not parse")


def main_text(record: WarcRecord, judge: "Judge") -> bytes | None:
    """Return the main text of an HTML response as UTF-8; None if it is not HTML."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    record.parse_http(auto_decode="all")
    if "html" not in (record.http_content_type or "html"):
        return None
    html = record.reader.read()
    if np.count_nonzero(np.frombuffer(html, np.uint8) & 0x80) < judge.limits.min_length:
        return b""  # in no encoding can it hold enough Han
    encoding = record.http_charset or detect_encoding(html, from_html_meta=True)
    text = extract_plain_text(
        bytes_to_str(html, encoding, errors="replace"), preserve_formatting=True,
        main_content=True, list_bullets=False, alt_texts=False, comments=False)
    return text.encode("utf-8", errors="replace")


# --- Verdicts ------------------------------------------------------------------------------------


class Scripts(NamedTuple):
    """How many characters of each script a text has; the four of Han come in one run."""

    other: int
    han: int  # in Traditional and Simplified text alike
    traditional: int
    simplified: int
    rare: int
    kana: int
    hangul: int
    letter: int
    broken: int  # no property here: dill, which takes this to the workers, would lose it


def script_table() -> np.ndarray:
    """Return for every code point the place of its script in Scripts.

    OpenCC's tables say which characters only Traditional or only Simplified text has. Simplified
    forms that Big5 holds as well (后, 里, 台) say nothing. Big5 level 1 (lead bytes A4 to C6) is
    the 5,401 characters that Taiwan's schools and newspapers use.
    """
    from opencc import OpenCC

    table = np.zeros(1 << 16, np.uint8)  # what lies beyond is rare: the last place stands for it
    table[0x3040:0x3100] = Scripts._fields.index("kana")
    table[0xAC00:0xD7A4] = table[0x1100:0x1200] = Scripts._fields.index("hangul")
    table[0xE000:0xF900] = table[0xFFFD] = Scripts._fields.index("broken")
    table[0x3400:0x4E00] = table[0xF900:0xFB00] = Scripts._fields.index("rare")
    table[[code for code in range(0x1100) if chr(code).isalpha()]] = Scripts._fields.index("letter")
    han = [chr(code) for code in range(0x4E00, 0xA000)]
    to_simplified, to_traditional = (
        OpenCC(name).convert("\n".join(han)).split("\n") for name in ("t2s", "s2t"))
    for char, simple, full in zip(han, to_simplified, to_traditional, strict=True):
        big5 = char.encode("big5", errors="ignore")
        if simple != char:
            script = "traditional"
        elif full != char and not big5:
            script = "simplified"
        else:
            script = "han" if big5 and big5[0] <= 0xC6 else "rare"
        table[ord(char)] = Scripts._fields.index(script)
    return table


def word_kinds() -> dict[str, int]:
    """Return words that only mainland (1) or Taiwan (2) pages or spam (3) use, and others (0) that
    hide such a word. OpenCC's TWPhrases pair mainland words in Traditional glyphs with Taiwan's."""
    import opencc

    folder = Path(opencc.__file__).parent / "clib"
    command = [folder / "bin" / "opencc_dict", "-f", "ocd2", "-t", "text", "-o", "/dev/stdout"]
    command += ["-i", folder / "share" / "opencc" / "TWPhrases.ocd2"]
    table = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    to_taiwan = opencc.OpenCC("t2tw").convert
    words = {}
    for line in table.splitlines():
        word, _, values = line.partition("\t")
        if word not in values.split() and len(word) > 1:
            words[to_taiwan(word)] = 1
    for kind, listed in enumerate((SHARED, MAINLAND, TAIWAN, SPAM)):
        words |= dict.fromkeys(listed.split(), kind)
    return words


class Words:
    """Finds listed words, the longest first. A table of the hashes of their first two characters
    lets numpy point out the few places that are worth a look."""

    def __init__(self, kinds: dict[str, int]):
        self.kinds, self.lengths = kinds, {}
        self.starts = np.zeros(1 << 18, bool)
        for word in sorted(kinds, key=len, reverse=True):
            self.lengths.setdefault(word[:2], []).append(len(word))
            self.starts[(ord(word[0]) * 31 + ord(word[1])) & 0x3FFFF] = True

    def count(self, text: str, codes: np.ndarray) -> Counter:
        """Return the listed words in the text and how often each is there."""
        found, end = Counter(), 0
        hashes = (codes[:-1] * 31 + codes[1:]) & 0x3FFFF
        for at in self.starts.take(hashes).nonzero()[0].tolist():
            if at < end:
                continue
            for length in self.lengths.get(text[at : at + 2], ()):
                if (word := text[at : at + length]) in self.kinds:
                    found[word] += 1
                    end = at + length
                    break
        return found


class Judge:
    """The rules with their limits and tables; it travels to the workers whole."""

    def __init__(self, limits: Arguments):
        self.limits, self.scripts, self.words = limits, script_table(), Words(word_kinds())

    def count(self, codes: np.ndarray) -> Scripts:
        """Count characters by script."""
        scripts = self.scripts.take(codes, mode="clip")
        return Scripts._make(np.bincount(scripts, minlength=len(Scripts._fields)).tolist())

    def refuse_bytes(self, page: bytes) -> str | None:
        """Return the rule that refuses a page for its UTF-8 bytes. E4 to E9 begin nearly all Han;
        before its lines are cleaned, much of a page may be menus in English. Of what is left, a
        sample tells the script."""
        limits = self.limits
        leads = 0 if page.isascii() else lead_bytes(page)
        if not leads or 3 * leads < 0.4 * limits.min_han * len(page):
            return "han"
        if leads < limits.min_length:
            return self.glance(page) or "length"
        return self.glance(page[:2000])

    def glance(self, start: bytes) -> str | None:
        """Return the rule that refuses a page for its first 1,000 bytes or so: no Han at all, or
        plainly another script."""
        if start.isascii():
            return "han"
        if (leads := lead_bytes(start)) < 30:
            return None if leads else "han"
        return self.refuse_scripts(self.count(code_points(start.decode(errors="ignore"))))

    def refuse_scripts(self, counts: Scripts) -> str | None:
        """Return the rule that refuses a page for its scripts."""
        other = counts.kana + counts.hangul
        if other > self.limits.max_kana_hangul * (sum(counts[1:5]) + other):
            return "japanese_korean"
        telling = counts.traditional + counts.simplified
        few = counts.traditional < self.limits.min_traditional * telling
        return "simplified" if few else None

    def verdict(self, text: str) -> tuple[str, dict, str | None]:
        """Return a page's prose, its scores, and the rule that refuses it (None: it is good)."""
        limits = self.limits
        lost = text.count("?") > 0.04 * len(text)  # characters that another encoding did not have
        if lost or text.count("\ufffd") > limits.max_broken * len(text):
            return text, {}, "mojibake"
        text = clean_lines(text)
        codes = code_points(text)
        counts, dense = self.count(codes), codes[codes > 32]
        han = sum(counts[1:5])
        broken = counts.broken > limits.max_broken * len(text)
        if broken or counts.rare > limits.max_rare * han:
            return text, {}, "mojibake"
        if han < limits.min_length:
            return text, {}, "length"
        scores = {
            "han": han / (han + counts.kana + counts.hangul + counts.letter),
            "traditional": counts.traditional / max(1, counts.traditional + counts.simplified)}
        if refused := self.refuse_scripts(counts):
            return text, scores, refused
        if scores["han"] < limits.min_han:
            return text, scores, "han"
        scores["distinct"] = distinct_share(shingles(dense[:1000], 2))
        if scores["distinct"] < limits.min_distinct:
            return text, scores, "repetition"
        scores["repeated"] = 1 - distinct_share(shingles(dense, 10))
        if scores["repeated"] > limits.max_repeated:
            return text, scores, "repetition"
        scores["closing"] = closing_share(text)
        if scores["closing"] < limits.min_closing:
            return text, scores, "punctuation"
        found = self.words.count(text, codes)
        kinds = Counter(map(self.words.kinds.get, found))  # different words, so no topic decides
        curly = 0 if "「" in text else min(2, len(CURLY.findall(text)))
        abroad = kinds[1] + curly + sum(map(text.count, VARIANTS)) - kinds[2]
        spam = sum(number for word, number in found.items() if self.words.kinds[word] == 3)
        scores |= {"mainland": 1000 * abroad / min(han, 1000), "spam": 1000 * spam / han}
        if abroad > 1 and scores["mainland"] > limits.max_mainland:
            return text, scores, "mainland"
        if kinds[3] > 1 and scores["spam"] > limits.max_spam:
            return text, scores, "spam"
        return hide_private(text), scores, None


def lead_bytes(text: bytes) -> int:
    """Count the bytes that begin Han characters in UTF-8, nearly all of them."""
    return len(text) - len(text.translate(None, HAN_LEADS))


def clean_lines(text: str) -> str:
    """Return the lines that are prose, headings or verse; menus, footers and notices go."""
    lines = [line for line in map(" ".join, map(str.split, text.splitlines())) if line]
    kinds = [line_kind(line) for line in lines]
    if {"furniture", "table", "short"}.intersection(kinds):
        drop_links(lines, kinds)
        drop_islands(lines, kinds)
    kept, start = [], 0
    for at, kind in enumerate([*kinds, "end"]):
        if kind in ("prose", "end"):
            if start < at:
                kept += block_lines(lines[start:at], kinds[start:at], kind == "prose", start > 0)
            kept += lines[at : at + 1]
            start = at + 1
    return "\n".join(kept)


def drop_links(lines: list[str], kinds: list[str]) -> None:
    """Turn what stands below a heading like 延伸閱讀 or 留言 into furniture, up to a paragraph."""
    links = comments = False
    read = 0
    for at, line in enumerate(lines):
        if prose := kinds[at] == "prose":
            read += len(line)
            closed = not comments and line.endswith(PARAGRAPH)
        if prose and (closed or len(line) > (100 if comments else 45)):
            links = comments = False
        elif not prose and read >= 100 and COMMENTS.fullmatch(line):
            comments = True
        elif not prose and len(line) < 20 and RELATED.search(line.lower()):
            links, kinds[at] = True, "furniture"
        elif comments or (links and (prose or kinds[at + 1 : at + 2] != ["prose"])):
            kinds[at] = "furniture"


def drop_islands(lines: list[str], kinds: list[str]) -> None:
    """Turn what little stands alone among the menus below the article into furniture too."""
    runs, at = [], 0
    for furniture, run in groupby(kinds, lambda kind: kind in ("furniture", "table")):
        place = range(at, at := at + len(list(run)))
        prose = [len(lines[line]) for line in place if kinds[line] == "prose"]
        runs.append((place, furniture, prose))
    ends = [number for number, (_, _, prose) in enumerate(runs) if sum(prose) >= 100]
    apart = 0
    for place, furniture, prose in runs[ends[-1] + 1 :] if ends else ():
        if furniture:
            apart += sum(kinds[line] != "table" or not DATA.search(lines[line]) for line in place)
        if apart > 3 and prose and max(prose) < 60:
            for line in place:
                kinds[line] = "furniture"


def line_kind(line: str) -> str:
    """Return "prose" for a line that holds a sentence, "furniture", "table" for what looks like
    furniture but may be data or code, or "short" for what may be a heading, a verse or a menu: its
    neighbours tell."""
    sentence = SENTENCE.search(line) or (len(line) > 60 and line.endswith(CLOSING))
    if sentence and len(line) > 300:
        return "prose"
    low = line.lower()
    contacts = len(CONTACT.findall(low)) if ":" in line or "：" in line else 0
    if not contacts and " " in line[:8] and CONTACT_LINE.match(low):
        contacts = 1
    if not sentence and len(line) > 11 and line[-1] in ":：" and not contacts and HAN.search(line):
        return "prose"  # it leads to a list, a formula or a listing
    letters = len(line) if sentence or line.isalpha() else sum(map(str.isalpha, line))
    if not letters:
        return "table"
    heading = not sentence and NUMBERED.match(line)
    menu = 0 if sentence or heading else sum(map(len, FURNITURE.findall(low)))
    if (
        (menu and menu >= 0.4 * letters)
        or contacts > 1 or (contacts and len(line) < 60)
        or (len(line) < 160 and NOTICE.search(low))
        or (len(line) < 45 and not line.endswith("。") and PROMPT.search(low))
        or (len(line) < 11 and line[-1] == "*") or line.startswith("^ ")):
        return "furniture"
    about = len(line) < 60 and ABOUT.match(line) and not ENDED.search(line)
    if about and not heading and not FORMULA.search(line):
        return "table"
    foreign = len(line) < 30 and LATIN.search(low) and not HAN.search(line)
    if sentence and not foreign:
        card = len(line) < 120 and "。" not in line and len(PLACEHOLDER.findall(hide_private(line)))
        return "furniture" if card > 1 else "prose"
    items = SEPARATORS.split(line)
    if hide_private(line) != line or (menu and len(items) > 1):
        return "furniture"
    if heading or FORMULA.search(line):
        return "short"
    table = len(items) > 2 and len(line) < 7 * len(items)
    return "table" if table or foreign else "short"


def block_lines(
    lines: list[str], kinds: list[str], before_prose: bool, after_prose: bool
) -> list[str]:
    """Return what to keep of lines between prose: a heading and a byline, verse, or data and code
    that stand within the article without any word of menus."""
    if before_prose and after_prose and "furniture" not in kinds:
        data = [line for line in lines if DATA.search(line) and not ABOUT.match(line)]
        if 2 * len(data) >= len(lines):
            return lines
    if "short" not in kinds:
        return []
    kinds = ["furniture" if kind == "table" else kind for kind in kinds]
    short = [line for line, kind in zip(lines, kinds, strict=True) if kind == "short"]
    verse = []
    for is_short, run in groupby(zip(lines, kinds, strict=True), lambda pair: pair[1] == "short"):
        run = [line for line, _ in run]
        letters = "".join(run)
        grammar = sum(char in FUNCTION_WORDS for char in letters) >= 0.06 * len(letters)
        if is_short and 3 < len(run) == len(set(run)) and len(letters) >= 5 * len(run) and grammar:
            verse += run  # verse and talk have grammar, menus only names
    if verse:
        return verse
    if not before_prose:
        return []
    if "furniture" in kinds or len(short) > 3:
        return short[-1:] if kinds[-1] == "short" and len(short[-1]) > 5 else []
    return short


def hide_private(text: str) -> str:
    """Put placeholders in the place of e-mail and IP addresses, national ids and phone numbers."""
    if "@" in text:
        text = EMAIL.sub("[EMAIL]", text)
    if NUMBER.search(text):
        text = NATIONAL_ID.sub("[ID]", IP_ADDRESS.sub("[IP]", text))
        text = PHONE.sub("[PHONE]", text)
    return text


def code_points(text: str) -> np.ndarray:
    """Return the text's characters as numbers."""
    return np.frombuffer(text.encode("utf-32-le", errors="replace"), np.uint32)


def distinct_share(hashes: np.ndarray) -> float:
    """Return the share of hashes that are there for the first time."""
    hashes = np.sort(hashes)
    return 1 - np.count_nonzero(hashes[1:] == hashes[:-1]) / max(1, len(hashes))


def closing_share(text: str) -> float:
    """Return the share of characters that stand in lines which end like a sentence, or hold the
    end of one, as in mail and boards, where each line has the same width."""
    lines = text.split("\n")
    closed = sum(len(line) for line in lines if line.endswith(CLOSING) or "。" in line)
    return closed / max(1, sum(map(len, lines)))


def shingles(codes: np.ndarray, size: int) -> np.ndarray:
    """Return a 32-bit hash of every run of `size` characters: a polynomial in their mixed codes
    (Karp and Rabin 1987). Runs of two are made of runs of one, of four of those of two, and so on;
    `size` says in binary which to join."""
    power, length, hashes, have = codes * np.uint32(0x9E3779B1), 1, None, 0
    power ^= power >> np.uint32(15)
    while True:
        if size & length:
            hashes = power if hashes is None else join(hashes, power[have:], length)
            have += length
        if have == size:
            return hashes
        power, length = join(power, power[length:], length), 2 * length


def join(left: np.ndarray, right: np.ndarray, length: int) -> np.ndarray:
    """Return the hashes of runs, each followed by one of `length` characters."""
    size = min(len(left), len(right))
    return left[:size] * np.uint32(pow(0x85EBCA6B, length, 1 << 32)) + right[:size]


# --- Blocks for datatrove ------------------------------------------------------------------------


@lru_cache(1)
def blocks() -> SimpleNamespace:
    """Return our pipeline steps; defined here because datatrove is imported only when it runs."""
    from datatrove.data import Document
    from datatrove.io import get_datafolder, get_shard_from_paths_file
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.readers.base import BaseDiskReader
    from datatrove.utils.logging import logger

    class CrawlReader(BaseDiskReader):
        """Reads WET and WARC with ISA-L and FastWARC, rows with datatrove's own readers."""

        name = "Luojiu crawl reader"

        def __init__(self, paths_file: str, tallies: str, judge: Judge):
            super().__init__("/", paths_file, add_file_path=False)
            self.tallies, self.judge = tallies, judge

        def run(self, data=None, rank: int = 0, world_size: int = 1):
            self.tally = Tally(self.tallies.format(rank))
            for path in get_shard_from_paths_file(self.paths_file, rank, world_size):
                for document in self.read_file(path):
                    yield document
                    self.tally.save(every=1.0)
            self.tally.save()

        def read_file(self, filepath: str):
            def damage(kind: str) -> None:
                self.tally.damage[kind] += 1
                logger.warning(f"{filepath}: {kind}")

            pages = self.read_rows if filepath.endswith(ROW_ENDINGS) else self.read_crawl
            try:
                for page in pages(filepath, damage):
                    text, name = page.pop("text"), page.pop("id")
                    if text:
                        yield Document(text, str(name), metadata=page | {"tally": self.tally})
            except Exception as error:
                if "://" in filepath:  # the network's fault: the task fails, and runs again
                    what = f"{filepath} ({type(error).__name__}: {error})"
                    raise ConnectionError(what) from error
                ours = not isinstance(error, (OSError, EOFError, ValueError, zlib.error))
                if ours or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                damage(f"unreadable file ({type(error).__name__})")
            self.tally.files += 1
            self.tally.save(every=1.0)

        def read_crawl(self, path: str, damage: Callable) -> Iterator[dict]:
            with fsspec.open(path, "rb") as stream:
                yield from read_pages(stream, self.tally, damage, self.judge)

        def read_rows(self, path: str, damage: Callable) -> Iterator[dict]:
            folder, _, name = path.rpartition("/")
            reader = ParquetReader if path.endswith(".parquet") else JsonlReader
            found = False
            for row in reader(folder).read_file(name):
                found = True
                known = {name: row.metadata.get(name) for name in ("url", "date")}
                page = row.text.encode("utf-8", errors="replace")
                refused = self.judge.refuse_bytes(page)
                if refused and not self.judge.limits.save_rejected:
                    self.tally.count(refused, len(page))
                else:
                    yield known | {"text": row.text, "id": row.id, "refused": refused}
            if not found:
                damage("no row with a column text")

    class Verdicts(BaseFilter):
        """Cleans a page, scores it and refuses it by the first rule that it breaks."""

        name = "Luojiu verdicts"

        def __init__(self, judge: Judge, url_filter, exclusion_writer):
            super().__init__(exclusion_writer, batch_size=100)  # its tables stay in the cache
            self.judge, self.url_filter = judge, url_filter

        def run(self, data, rank: int = 0, world_size: int = 1):
            self.tally = None
            yield from super().run(data, rank, world_size)
            if self.tally:
                self.tally.save()  # with the last batch

        def filter(self, doc):
            tally = self.tally = doc.metadata.pop("tally")
            refused = doc.metadata.pop("refused")
            before = len(doc.text.encode("utf-8", errors="replace"))
            if not refused:
                text, scores, refused = self.judge.verdict(doc.text)
                if not refused and self.url_filter and doc.metadata["url"]:
                    refused = "url" if self.url_filter.filter(doc) is not True else None
                doc.metadata |= scores
            if refused:
                tally.count(refused, before)
                return False, refused
            doc.text = text
            after = len(text.encode("utf-8", errors="replace"))
            tally.count("kept", after)
            tally.bytes["lines"] += before - after
            return True

    class KeptReader(ParquetReader):
        """Reads what a task of the first pass kept; it wrote no file if that was nothing."""

        def read_file(self, filepath: str):
            if self.data_folder.isfile(filepath):
                yield from super().read_file(filepath)

    class Meter(PipelineStep):
        """Counts the pages that pass."""

        type, name = "Meter", "Luojiu meter"

        def __init__(self, tallies: str):
            super().__init__()
            self.tallies = tallies

        def run(self, data, rank: int = 0, world_size: int = 1):
            tally = Tally(self.tallies.format(rank))
            for document in data:
                tally.count("kept", len(document.text.encode("utf-8", errors="replace")))
                yield document
            tally.save()

    class CharacterSignatures(MinhashDedupSignature):
        """datatrove's first MinHash stage on runs of characters, where it has words.

        A value is the upper half of a * shingle + b modulo 2^64 (multiply-shift, Dietzfelbinger et
        al. 1997), which numpy does without a division."""

        def __init__(self, folder: str, config):
            PipelineStep.__init__(self)  # datatrove's own would want a word tokenizer
            self.output_folder, self.config = get_datafolder(folder), config
            self.num_hashes = config.num_buckets * config.hashes_per_bucket
            self._parameters, self.skip_existing_sigs = None, False

        def get_shingles(self, text: str) -> np.ndarray:
            codes = code_points(text)
            hashes = np.unique(shingles(codes[codes > 32], self.config.n_grams))
            return hashes.astype(np.uint64).reshape(-1, 1)

        def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
            a, b = (part | np.uint64(1) for part in self.parameters)
            lowest = np.full(self.num_hashes, np.iinfo(np.uint64).max)
            for start in range(0, len(shingles), 256):  # a block that stays in the cache
                values = shingles[start : start + 256] * a + b
                np.minimum(lowest, values.min(axis=0), out=lowest)
            bands = np.split(lowest >> np.uint64(32), self.config.num_buckets)
            return [band.tolist() for band in bands]

    return SimpleNamespace(**{k: v for k, v in locals().items() if isinstance(v, type)})


class TaskLock:
    """First step of every pipeline: wait until the task of a killed run has let go of its files."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, data=None, rank: int = 0, world_size: int = 1):
        os.makedirs(self.folder, exist_ok=True)
        self.file = open(f"{self.folder}/{rank:05d}", "w")  # noqa: SIM115 (held on to)
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.lockf(self.file, fcntl.LOCK_EX)
        return data


# --- Stages --------------------------------------------------------------------------------------


def content(document) -> str:
    """Return what two exact duplicates have in common."""
    return document.text


def task_count(args: Arguments, files: list[str]) -> int:
    """Return the number of tasks. Not the workers' number: the corpus must not depend on that."""
    return min(len(files), args.tasks or MAX_TASKS)


def parquet_writer(folder: str, name: str, compression: str):
    """Return a step that writes the columns of the corpus."""
    import pyarrow as pa
    from datatrove.pipeline.writers import ParquetWriter

    columns = [pa.field(column, pa.string()) for column in ("text", "id", "url", "date")]
    schema = pa.schema(columns + [pa.field(score, pa.float32()) for score in SCORES])
    return ParquetWriter(
        folder, name, compression,
        adapter=lambda _, page: {"text": page.text, "id": page.id} | page.metadata, schema=schema,
        batch_size=200, max_file_size=-1, use_content_defined_chunking=False)


def reject_writer(args: Arguments, name: str):
    """Return the step that saves refused pages; None without --save_rejected."""
    from datatrove.pipeline.writers import JsonlWriter

    folder = f"{args.output_dir}/rejected"
    return JsonlWriter(folder, name, compression=None) if args.save_rejected else None


def judging(args: Arguments, work: Path, turn: int, files: list[str]) -> tuple:
    """Return the stage that reads the files of a turn and keeps the good pages."""
    from datatrove.pipeline.filters import URLFilter

    listing = work / f"inputs_{turn:02d}.txt"
    write_whole(listing, "\n".join(files))
    judge = Judge(args)
    rejected = reject_writer(args, "${filter_reason}/" + f"{turn:02d}_${{rank}}.jsonl")
    tallies = f"{work}/tally/{turn:02d}_{{:05d}}.json"
    steps = [
        blocks().CrawlReader(str(listing), tallies, judge),
        blocks().Verdicts(judge, URLFilter() if args.url_lists else None, rejected),
        parquet_writer(f"{work}/kept", f"{turn:02d}_${{rank}}.parquet", "lz4")]
    return (f"judge_{turn:02d}", steps, task_count(args, files))


def deduplication(args: Arguments, work: Path, kept: list[str], turn: int) -> list[tuple]:
    """Return the stages that find duplicates over all kept files and write what remains."""
    from datatrove.pipeline import dedup
    from datatrove.utils.hashing import HashConfig

    place = f"{work}/dedup_{turn:02d}"
    write_whole(Path(place, "kept.txt"), "\n".join(kept))
    Path(place, "found").mkdir(exist_ok=True)
    exact = dedup.ExactDedupConfig(content)
    buckets, rows = args.minhash_buckets, args.minhash_rows
    minhash = dedup.MinhashConfig(5, buckets, rows, hash_config=HashConfig(precision=32))

    def read():
        return blocks().KeptReader(f"{work}/kept", f"{place}/kept.txt")

    def drop_exact(writer=None):
        return dedup.ExactDedupFilter(f"{place}/found", exact, writer)

    stages = {
        "exact_hashes": [read(), dedup.ExactDedupSignature(f"{place}/hashes", exact)],
        "exact_found": [dedup.ExactFindDedups(f"{place}/hashes", f"{place}/found", exact)],
        "signatures": [
            read(), drop_exact(), blocks().CharacterSignatures(f"{place}/signatures", minhash)],
        "buckets": [
            dedup.MinhashDedupBuckets(f"{place}/signatures", f"{place}/pairs", config=minhash)],
        "clusters": [dedup.MinhashDedupCluster(f"{place}/pairs", f"{place}/removed", minhash)],
        "write": [
            read(),
            drop_exact(reject_writer(args, "exact_duplicate/${rank}.jsonl")),
            blocks().Meter(f"{place}/tally/exact_{{:05d}}.json"),
            dedup.MinhashDedupFilter(
                f"{place}/removed", reject_writer(args, "near_duplicate/${rank}.jsonl")),
            blocks().Meter(f"{place}/tally/near_{{:05d}}.json"),
            parquet_writer(f"{place}/final", "${rank}.parquet", "lz4")]}
    tasks = {"exact_found": 1, "clusters": 1, "buckets": buckets}
    return [
        (f"{turn:02d}_{name}", steps, tasks.get(name, len(kept))) for name, steps in stages.items()]


def run_stages(stages: list[tuple], args: Arguments, work: Path, files: int) -> bool:
    """Run the stages one after another on the chosen executor; what an earlier run finished stays.
    False if Slurm has been given jobs that have still to run."""
    executor = None
    for name, steps, tasks in stages:
        steps = [TaskLock(f"{work}/locks/{name}"), *steps]
        executor = make_executor(args, steps, tasks, work / "logs" / name, executor)
        if args.executor != "slurm":
            with progress(executor, name, work / "tally" if "judge" in name else None, files):
                try:
                    executor.run()
                except ConnectionError as error:
                    raise UserError(
                        f"cannot read {error}; expected an answer from its server; check the"
                        " network and run the same command again: what is finished stays"
                    ) from error
            if failed := executor.get_incomplete_ranks():
                logs = f"{work}/logs/{name}/logs"
                raise RuntimeError(f"{len(failed)} of {tasks} tasks of {name} failed; see {logs}")
    if args.executor == "slurm" and executor.get_incomplete_ranks():
        executor.run()
        return False
    return True


def make_executor(args: Arguments, steps: list, tasks: int, folder: Path, depends):
    """Return datatrove's executor for one stage."""
    import dill

    dill.settings["recurse"] = True  # workers get our functions by value: __main__ is not theirs
    common = {
        "pipeline": steps, "tasks": tasks, "workers": args.workers, "logging_dir": str(folder)}
    if args.executor == "slurm":
        from datatrove.executor import SlurmPipelineExecutor

        job = {"job_name": f"luojiu_{folder.name}", "partition": args.partition, "time": args.time}
        return SlurmPipelineExecutor(**common, **job, depends=depends)
    if args.executor == "ray":
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        if not ray.is_initialized():
            local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": args.workers}
            ray.init(log_to_driver=False, **local)

        class EndableExecutor(RayPipelineExecutor):
            def _run_for_rank(self, *args, **kwargs):
                # datatrove ends a task's process by SIGTERM; Ray's handler may make it wait
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                return super()._run_for_rank(*args, **kwargs)

        return EndableExecutor(**common)
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor

    # every stage has workers of its own; they start from a process that has these imported
    heavy = "fastwarc.warc fsspec isal pandas pyarrow.parquet tqdm transformers.hf_argparser"
    heavy += " datatrove.executor datatrove.pipeline.dedup datatrove.pipeline.readers"
    heavy += " datatrove.pipeline.filters datatrove.pipeline.writers"
    multiprocess.set_forkserver_preload(heavy.split())

    class QuietExecutor(LocalPipelineExecutor):
        def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
            with contextlib.redirect_stderr(io.StringIO()):  # its log goes to files only
                return super()._run_for_rank(rank, local_rank, node_rank)

    return QuietExecutor(**common)


@contextmanager
def progress(executor, name: str, tallies: Path | None, files: int) -> Iterator[None]:
    """Show a bar while a stage runs: tasks, and for the first pass files, MB/s and pages kept."""
    from datatrove.utils.logging import logger

    logger.remove()
    total, unit = (files, "file") if tallies else (executor.world_size, "task")
    bar, ended, start = tqdm(total=total, desc=name, unit=unit), threading.Event(), time.monotonic()
    before = sum_tallies(tallies).bytes.total() if tallies else 0

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(0.5)
            bar.n = executor.world_size - len(executor.get_incomplete_ranks())
            if tallies:
                tally = sum_tallies(tallies)
                bar.n = tally.files
                speed = (tally.bytes.total() - before) / 1e6 / (time.monotonic() - start)
                bar.set_postfix_str(f"{speed:.0f} MB/s, {tally.pages['kept']:,} pages kept")
            bar.refresh()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        bar.close()


def sum_tallies(folder: Path, pattern: str = "*.json") -> Tally:
    """Return the sum of the counts that tasks wrote."""
    total = Tally("")
    for path in sorted(folder.glob(pattern)):
        part = json.loads(path.read_text())
        total.files += part["files"]
        for name in ("pages", "bytes", "damage"):
            getattr(total, name).update(part[name])
    return total


def filter_files(args: Arguments, files: list[str], work: Path) -> int | None:
    """Judge the files and deduplicate what is kept; with a target size in turns, each with as many
    more files as the yield so far lets expect, until it is there. Return the number of the last
    turn, None if Slurm has still to work."""
    target, kept, done, turn, size = parse_size(args.target_size), [], 0, 0, FIRST_TURN
    while True:
        chosen = files[done : done + size] if target else files
        done += len(chosen)
        kept += [f"{turn:02d}_{rank:05d}.parquet" for rank in range(task_count(args, chosen))]
        stages = [judging(args, work, turn, chosen), *deduplication(args, work, kept, turn)]
        if not run_stages(stages, args, work, done):
            return None
        have = sum_tallies(work / f"dedup_{turn:02d}" / "tally", "near_*").bytes["kept"]
        if target is None or have >= target or done == len(files):
            return turn
        size = math.ceil(done * min(3, 1.1 * target / max(1, have) - 1))
        turn += 1


# --- Input and output ----------------------------------------------------------------------------


def check(args: Arguments) -> None:
    """Find mistakes before any work."""
    parse_size(args.target_size)
    for name, value in asdict(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            usual = (0, 1) if isinstance(value, float) else (1, math.inf)
            least, most = RANGES.get(name, usual)
            expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
            if not least <= value <= most:  # a NaN lies in no range
                raise UserError(f"--{name} {value}: out of range; expected {expected}; change it")
    if Path(args.output_dir).is_file():
        raise UserError(f"--output_dir {args.output_dir}: a file; expected a folder; give another")
    if Path(args.picture).suffix not in (".png", ".pdf", ".svg"):
        expected = "expected a file that ends in .png, .pdf or .svg; change it"
        raise UserError(f"--picture {args.picture}: no picture's name; {expected}")
    if args.executor == "slurm" and not shutil.which("sbatch"):
        expected = "expected a Slurm cluster; use --executor local"
        raise UserError(f"--executor slurm: no sbatch on this machine; {expected}")
    if args.executor == "ray" and not importlib.util.find_spec("ray"):
        raise UserError("--executor ray: not installed; expected Ray; pip install ray")


def parse_size(text: str | None) -> int | None:
    """Return the bytes of a size such as 500MB or 6GB (decimal), None for None."""
    if text is None:
        return None
    match = re.fullmatch(r"(?i)\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text)
    if not match or not float(match[1]):
        raise UserError(f"--target_size {text}: no size; expected one such as 6GB; change it")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def list_inputs(args: Arguments) -> list[str]:
    """Return the files to read, in a fixed order."""
    if args.crawl is not None:
        files = crawl_files(args.crawl)
    else:
        files = list(dict.fromkeys(name for given in args.input for name in expand_input(given)))
    for name in files:
        if "://" not in name and Path(name).parent.resolve() == Path(args.output_dir).resolve():
            raise UserError(
                f"--output_dir {args.output_dir}: holds {name}, which is read;"
                " expected a folder of its own; choose another")
    return files[: args.limit_files]


def crawl_files(crawl: str) -> list[str]:
    """Return the URLs of a crawl's WET files, from its wet.paths.gz."""
    listing = f"{CRAWL_URL}crawl-data/{crawl}/wet.paths.gz"
    try:
        with fsspec.open(listing, "rt", compression="gzip") as lines:
            return [CRAWL_URL + line.strip() for line in lines if line.strip()]
    except Exception as error:  # each file system of fsspec raises its own
        raise UserError(
            f"--crawl {crawl}: cannot read {listing} ({type(error).__name__}); expected one like"
            " CC-MAIN-2026-30 and the internet; check both, or give files with --input") from error


def expand_input(given: str) -> list[str]:
    """Return the files that one --input names: a file, a folder, a glob, or a URL."""
    expected = f"expected files that end in {', '.join(ENDINGS)}"
    remote = "://" in given
    try:
        system, path = fsspec.core.url_to_fs(given)
        if any(sign in given for sign in "*?["):
            names = sorted(system.glob(path))
        elif system.isdir(path):
            names = sorted(name for name in system.ls(path, detail=False) if name.endswith(ENDINGS))
        else:
            names = [path] if system.exists(path) else []
    except Exception as error:  # each file system of fsspec raises its own
        remedy = "check the address and the network"
        if given.startswith("s3://"):
            remedy = f"set AWS credentials, or give {CRAWL_URL}... (the same files, without any)"
        why = str(error).partition("\n")[0]
        raise UserError(f"--input {given}: no access ({why}); {expected}; {remedy}") from error
    if not names:
        what = "holds no such file" if Path(given).is_dir() else "does not exist"
        what, remedy = ("no answer", "address and the network") if remote else (what, "path")
        raise UserError(f"--input {given}: {what}; {expected}; check the {remedy}")
    for name in names:
        if not name.endswith(ENDINGS):
            raise UserError(f"--input {given}: {name} has another ending; {expected}; rename it")
    if names == [path] and remote:
        return [given]
    return [system.unstrip_protocol(name) if remote else name for name in names]


@contextmanager
def claimed(args: Arguments, files: list[str]) -> Iterator[Path]:
    """Hold the output folder: one run at a time, always with the same settings."""
    output, where = Path(args.output_dir), f"--output_dir {args.output_dir}:"
    work = output / ".work"
    known = work / "settings.json"
    if not known.exists() and any(output.glob("*.parquet")):
        raise UserError(f"{where} another program's Parquet; expected its own folder; choose one")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "another run is writing here; expected none; wait for it or choose another"
            raise UserError(f"{where} {what}") from error
        names = [name if "://" in name else os.path.relpath(name, output) for name in files]
        settings = {k: v for k, v in asdict(args).items() if k not in HERE_ONLY} | {"files": names}
        if not known.exists():
            write_whole(known, json.dumps(settings, ensure_ascii=False))
        before = json.loads(known.read_text())
        for name, value in settings.items():
            if value != before.get(name):
                shown = f"{name} ({before.get(name)} before, {value} now)"
                shown = "input" if name == "files" else shown
                raise UserError(
                    f"{where} begun with another --{shown}; expected the same settings;"
                    " choose another folder or delete this one")
        yield work


def publish(args: Arguments, work: Path, turn: int) -> dict:
    """Put the finished corpus into the output folder, cut at the target size; return its counts."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    judged = sum_tallies(work / "tally")
    if not judged.pages:
        given = f"--crawl {args.crawl}" if args.crawl else f"--input {', '.join(args.input[:5])}"
        tidy(work)
        (work / "settings.json").unlink()
        for completions in work.glob("logs/*/completions"):  # the next run begins anew
            shutil.rmtree(completions)
        raise UserError(
            f"{given}: no page could be read ({', '.join(judged.damage) or 'none there'});"
            f" expected WET, WARC, JSONL or Parquet; see {work}/logs and give other files")
    output, place = Path(args.output_dir), work / f"dedup_{turn:02d}"
    left = parse_size(args.target_size) or math.inf
    pages = size = characters = 0
    for old in output.glob("*.parquet"):
        old.unlink()
    for path in sorted((place / "final").glob("*.parquet")):
        table = pq.read_table(path)
        sizes = np.cumsum(pc.binary_length(table["text"].cast(pa.binary())).to_numpy())
        table = table.slice(0, int(np.searchsorted(sizes, left - size)) + 1)
        pq.write_table(table, output / f".{path.name}", compression="zstd")
        os.replace(output / f".{path.name}", output / path.name)
        pages, size = pages + len(table), size + int(sizes[len(table) - 1])
        characters += pc.sum(pc.utf8_length(table["text"])).as_py()
        if size >= left:
            break
    pages_left, bytes_left = judged.pages.total(), judged.bytes.total()
    left_after = {"read": (pages_left, bytes_left)}
    for rule in list(RULES)[:-3]:
        pages_left, bytes_left = pages_left - judged.pages[rule], bytes_left - judged.bytes[rule]
        left_after[rule] = (pages_left, bytes_left)
    for rule in ("exact", "near"):
        tally = sum_tallies(place / "tally", f"{rule}_*")
        left_after[f"{rule}_duplicate"] = (tally.pages["kept"], tally.bytes["kept"])
    left_after["target"] = (pages, size)
    return {
        "files": judged.files, "pages": pages, "characters": characters, "bytes": size,
        "left_after": {rule: {"pages": p, "bytes": b} for rule, (p, b) in left_after.items()},
        "damage": dict(sorted(judged.damage.items()))}


def report(args: Arguments, results: dict, work: Path, seconds: float) -> None:
    """Write stats.json, the card, the picture and, last, run.json; tidy up and print the counts."""
    write_whole(Path(args.output_dir, "stats.json"), json.dumps(results, indent=2))
    write_whole(Path(args.output_dir, "README.md"), card(args, results))
    draw_funnel(results["left_after"], Path(args.picture))
    packages = ("datatrove", "fastwarc", "isal", "numpy", "opencc", "pyarrow", "resiliparse")
    run = {
        "script": "filter_cc.py", "arguments": asdict(args),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "results": results | {"seconds": round(seconds, 1)}}
    write_whole(Path(args.output_dir, "run.json"), json.dumps(run, indent=2, ensure_ascii=False))
    tidy(work)
    for rule, left in results["left_after"].items():
        print(f"{rule:16} {left['pages']:>12,} pages {left['bytes']:>16,} bytes left")
    for kind, times in results["damage"].items():
        print(f"damage: {kind}: {times:,} (named in {work}/logs)")
    if not results["pages"]:
        counts = [counts["pages"] for counts in results["left_after"].values()]
        rule = max(range(len(RULES)), key=lambda at: counts[at] - counts[at + 1])
        name, what = list(RULES.items())[rule]
        print(f"every page was refused, most by {name} ({what});"
              " --save_rejected, into another --output_dir, shows them")
    print(
        f"{results['pages']:,} pages, {results['characters']:,} characters in {args.output_dir},"
        f" {seconds:.0f} s; what each rule left: {args.picture}", flush=True)


def tidy(work: Path) -> None:
    """Remove what only an unfinished run needs; the logs stay."""
    for path in [work / "kept", work / "tally", work / "locks", *work.glob("dedup_*")]:
        shutil.rmtree(path, ignore_errors=True)


def draw_funnel(left_after: dict, path: Path) -> None:
    """Draw pages and bytes that were left after each rule, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, unit in zip(figure.subplots(1, 2, sharey=True), ("pages", "bytes"), strict=True):
        values = [counts[unit] for counts in left_after.values()]
        axis.barh(list(left_after), values, color="#4c72b0" if unit == "pages" else "#55a868")
        axis.set(xscale="symlog", xlim=(0, 9 * max(*values, 1)), xlabel=f"{unit} left")
        axis.spines[["top", "right"]].set_visible(False)
        for row, value in enumerate(values):
            axis.text(value * 1.1 + 0.1, row, f"{value:,}", va="center", fontsize=8)
    axis.invert_yaxis()
    figure.suptitle("What each rule left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def card(args: Arguments, results: dict) -> str:
    """Return the dataset card."""
    rows = [
        f"| {rule} | {RULES.get(rule, 'nothing yet')} | {left['pages']:,} | {left['bytes']:,} |"
        for rule, left in results["left_after"].items()]
    return f"""---
language: [zh]
task_categories: [text-generation]
configs: [{{config_name: default, data_files: "*.parquet"}}]
---
# Traditional Chinese web text in Taiwan usage

{results["pages"]:,} pages, {results["characters"]:,} characters, {results["bytes"]:,} bytes,
from {args.crawl or ", ".join(args.input)}, by `filter_cc.py` of the Luojiu project.
Columns: `text`, `id`, `url`, `date`, and the scores {", ".join(f"`{name}`" for name in SCORES)}.
run.json holds the settings and versions, stats.json the counts.

| after the rule | which refuses | pages left | bytes left |
| --- | --- | --- | --- |
{chr(10).join(rows)}

Personal data are placeholders: [EMAIL], [IP], [PHONE], [ID]. Pages remain their authors' work;
for Common Crawl its terms of use apply: https://commoncrawl.org/terms-of-use
"""


# --- Main ----------------------------------------------------------------------------------------


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Filter web pages into a corpus."""
    args = parse_args(argv)
    check(args)
    files = list_inputs(args)
    with claimed(args, files) as work:
        if Path(args.output_dir, "run.json").exists():
            tidy(work)
            print(f"already done: {args.output_dir} (run.json has the settings)")
            return
        start = time.monotonic()
        turn = filter_files(args, files, work)
        if turn is None:
            print("jobs submitted; run the same command again when Slurm has ended them")
            return
        results = publish(args, work, turn)
        report(args, results, work, time.monotonic() - start)


if __name__ == "__main__" and "__file__" in globals():  # a pasted notebook cell only defines
    main()
