"""Build luojiu.ipynb from the scripts and the sample, and execute it.

The notebook opens on Colab with nothing else, so it carries everything: requirements.txt as a list,
the sample's pages as a small archive, the four scripts as they are, a script a cell. What comes out
is executed, with its charts inline, and is committed. After a change of a script:

    make notebook
"""

import base64
import io
import re
import tarfile
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

# --- Constants -----------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
ROOT, NOTEBOOK = HERE.parent, HERE / "luojiu.ipynb"
BASE64_LINE = 100
HIDDEN = {"cellView": "form", "jupyter": {"source_hidden": True}}  # on Colab, in JupyterLab

# --- The texts -----------------------------------------------------------------------------------

INTRO = """\
# 落九 Luojiu：從網頁到會寫繁體中文的模型

四支腳本，一個流程：把網頁篩成乾淨的臺灣繁體中文、擴充 Llama 的詞彙表、繼續預訓練、合併成可以直接用\
的權重。這本筆記用專案自己寫的兩百多頁範例和一個迷你 Llama，從頭走一遍。

- **要多久**：兩個 CPU 核心大約三分鐘；在 Colab 上另外要幾分鐘安裝套件。
- **不需要顯示卡，也不需要 Llama 2 的授權。** 除了套件，什麼都不下載：腳本和範例都在這個檔案裡。
- **怎麼跑**：Colab 選「檔案 → 上傳筆記本」，再選「執行階段 → 全部執行」；自己的電腦要 Python 3.11 \
到 3.13。
- 每支腳本整份貼在一格（收合著，點開就能讀），下一格用 `main([...])` 執行它，選項和命令列一樣。每支\
腳本都定義自己的 `main`，所以要回頭重跑某一步時，先執行它的腳本格，再執行呼叫格。

迷你 Llama 只有不到三百萬個權重、語料只有五萬多字，它寫出來的句子只證明整個流程跑得通。

---

Four scripts, one pipeline: filter web pages into clean Taiwan Traditional Chinese, extend a
Llama's vocabulary, continue its pretraining, and merge the result into usable weights. This
notebook runs all of it on the project's own sample of some 200 pages and a tiny Llama.

- **How long**: about three minutes on two CPU cores; on Colab a few minutes more, to install.
- **No GPU and no Llama 2 licence are needed.** Nothing but packages is downloaded: the scripts and
  the sample are in this file.
- **How**: on Colab *File → Upload notebook*, then *Runtime → Run all*; elsewhere with Python 3.11
  to 3.13.
- Each script is pasted whole into one cell (collapsed; open it to read), and `main([...])` in the
  next cell runs it, with the options of its command line. Each defines its own `main`: to repeat a
  step, run its script's cell first, then the call.

The tiny Llama has under three million weights and the corpus 55,000 characters: what it writes
proves only that the pipeline runs end to end."""

INSTALL_TEXT = """\
## 準備 · Getting ready

套件的版本與 `requirements.txt` 相同；已經有的就略過，已經裝好的 PyTorch 絕不重裝。pip 若抱怨 \
Colab 其他套件的版本衝突，可以不理會：那些套件這裡都用不到。若它請你重新啟動，就重新啟動，再全部執\
行一次。

The packages have the versions of `requirements.txt`; what is there already is left alone, and a
PyTorch that is there is never replaced. pip may complain of conflicts with other packages of Colab:
none of them is used here. If the cell asks for a restart, restart and run all cells again."""

INSTALL = """\
# @title 安裝套件 · Install the packages
import subprocess
import sys
from importlib.metadata import distributions, files

REQUIREMENTS = \"\"\"
{requirements}
\"\"\"
# Any version of these will do, and what else is here was built for the one that is here.
KEPT = {{"torch", "matplotlib", "wandb"}}


def is_loaded(name):
    loaded = {{getattr(module, "__file__", None) for module in list(sys.modules.values())}}
    return any(str(file.locate()) in loaded for file in files(name) or [])


def install():
    here = {{dist.name.lower(): dist.version for dist in distributions()}}
    wanted, kept, loaded = [], [], []
    for line in REQUIREMENTS.split():
        name, pin = line.partition("[")[0].partition("=")[0], line.partition("==")[2]
        if name in KEPT and name in here:
            kept.append(f"{{name}}=={{here[name]}}")
        elif here.get(name) != pin:
            wanted.append(line)
            loaded += [name] if name in here and is_loaded(name) else []
    pip = [sys.executable, "-m", "pip"]
    if wanted:
        subprocess.run([*pip, "install", "-q", *wanted, *kept], check=True)
    from packaging.version import Version  # transformers brings it

    if "torchao" in here and Version(here["torchao"]) < Version("0.16"):
        # PEFT refuses to run beside so old a one, and nothing here uses it
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchao"], check=True)
    if loaded:
        raise SystemExit(
            f"{{', '.join(loaded)}} 是舊的，請選「執行階段 → 重新啟動工作階段」再全部執行一次。\\n"
            "Old versions are still loaded: choose Runtime > Restart session, then run all again."
        )
    print(f"{{len(wanted)}} packages installed" if wanted else "all packages are here already")


install()"""

SAMPLE_TEXT = """\
下一格在資料夾 `luojiu` 裡擺好範例：把網頁裝成 Common Crawl 的 WET 與 WARC 檔，再用其中的英文頁訓練\
一個不懂中文的迷你 Llama 當基礎模型。之後的每一步都在這個資料夾裡讀寫。

The next cell lays out the sample in a folder `luojiu`: it packs the pages as Common Crawl's WET and
WARC files, and trains a tiny Llama on the English ones alone, a base that knows no Chinese. Every
step reads and writes in this folder."""

SAMPLE = """\
# @title 範例：網頁與迷你 Llama · The sample: web pages and a tiny Llama
import base64
import io
import logging
import os
import sys
import tarfile
from pathlib import Path

ARCHIVE = \"\"\"
{archive}
\"\"\"

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the sample runs on any CPU; see the last part for a GPU
if "WORK" not in globals():
    WORK = Path("luojiu").resolve()
WORK.mkdir(exist_ok=True)
os.chdir(WORK)
if not Path("data/probes").exists():
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(ARCHIVE)), mode="r:xz") as tar:
        tar.extractall("data", filter="data")
sys.path.insert(0, "data/sample")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
if not Path("data/sample/tiny-llama/model.safetensors").exists():
    import make_sample
    import make_tiny_llama

    make_sample.main()
    make_tiny_llama.STEPS = {tiny_steps}  # of 600: enough to begin with
    make_tiny_llama.main()"""

CHART = """\
from IPython.display import Image

Image("pictures/{picture}")"""

# By script: heading and text, the arguments of the demo (`make demo`), its chart.
STEPS = {
    "filter_cc.py": (
        """\
## 1. 篩選 · Filter

`filter_cc.py` 讀 Common Crawl 的檔案，留下乾淨的臺灣繁體中文：看文字、長度、用語、選單、重複與廣\
告，遮掉個人資料，再去掉重複與近似重複的頁。結果在 `data/cc_filtered`；圖裡是每一條規則之後還剩多\
少。

It reads Common Crawl's files and keeps clean Taiwan Traditional Chinese: script, length, wording,
menus, repetition and spam are judged, personal data masked, duplicates and near duplicates dropped.
The result is in `data/cc_filtered`; the chart shows what each rule left.""",
        "[]",
        "filter.png",
    ),
    "extend_vocab.py": (
        """\
## 2. 擴充詞彙表 · Extend the vocabulary

`extend_vocab.py` 從剛才的語料學中文的 piece，接在基礎模型的詞彙表後面，逐一證明每一個都用得到，再\
替它們在模型裡加上新的列。同樣一句話，token 變少，模型就讀得多、寫得快。

It learns Chinese pieces from that corpus, appends them to the base's, proves that each of them can
be produced, and gives each a row in the model. The same sentence in fewer tokens: the model reads
more and writes faster.""",
        """\
[
        "--base_model", "data/sample/tiny-llama",
        "--corpus", "data/cc_filtered",
        "--vocab_size", "8000",
    ]""",
        "vocab.png",
    ),
    "train_pt.py": (
        """\
## 3. 繼續預訓練 · Continue the pretraining

`train_pt.py` 用 QLoRA 與 S² 注意力訓練：凍結的權重存成 4 位元，LoRA、新詞向量與 norm 一起學。示範\
縮短了序列與步數；它會把這些頁背起來，所以沒看過的頁（held out）的損失降不了多少，後來還會上升。

It trains with QLoRA and S² attention: frozen weights in 4 bits; LoRA, the new rows and the norms
learn. Sequences and steps are cut short here; it learns these few pages by heart, so the loss on
held-out pages falls little, and rises in the end.""",
        """\
[
        "--block_size", "256",
        "--gradient_accumulation_steps", "1",
        "--learning_rate", "3e-3",
        "--warmup_steps", "20",
        "--num_train_epochs", "{epochs}",
    ]""",
        "trainloss.png",
    ),
    "merge_lora.py": (
        """\
## 4. 合併 · Merge

`merge_lora.py` 把 adapter 併進基礎模型，一塊一塊讀寫，記憶體不隨模型變大。`--verify` 再讓合併前後\
的模型讀同一段文字，比較兩者的預測。

It merges the adapter into its base, block by block, in memory that does not grow with the model.
`--verify` has the model read a text before and after merging, and compares what they predict.""",
        '["--verify"]',
        None,
    ),
}

RESULT_TEXT = """\
## 5. 讓它寫 · Let it write

合併後的資料夾 `outputs/merged` 是普通的 Transformers 模型。

The merged folder `outputs/merged` is an ordinary Transformers model."""

RESULT = """\
from transformers import pipeline

write = pipeline("text-generation", "outputs/merged")
print(write("春天的", max_new_tokens=60)[0]["generated_text"])"""

OUTRO = """\
## 換成你的資料與 Llama 2 · Your own text and Llama 2

這個檔案裡的腳本就是真正訓練用的腳本：

1. 重新啟動工作階段，刪掉範例那一格的 `CUDA_VISIBLE_DEVICES` 一行（顯示卡才看得到），執行「準備」的\
兩格。
2. 換到自己的資料夾，把文字放進它的 `data/mine`。Colab 的檔案在結束後會消失，所以放在雲端硬碟。
3. 每一步先執行腳本格，再呼叫它的 `main`。

The scripts in this file are those of the real run:

1. Restart the session, delete the line `CUDA_VISIBLE_DEVICES` in the sample's cell (it hides the
   GPU), and run the two cells of *Getting ready*.
2. Go to a folder of your own, with your text in its `data/mine`. Colab's files vanish when the
   session ends, so keep it on your Drive.
3. For each step run its script's cell, then call its `main`.

```python
from google.colab import drive  # Colab only

drive.mount("/content/drive")
os.makedirs("/content/drive/MyDrive/luojiu/data/mine", exist_ok=True)
os.chdir("/content/drive/MyDrive/luojiu")
```

```python
main(["--input", "data/mine"])  # filter_cc.py: WET, WARC, JSONL or Parquet
main(["--corpus", "data/hongloumeng.txt", "data/cc_filtered", "--corpus_weight", "1", "8"])
main(["--plan"])                # train_pt.py: how many steps, and whether this GPU will do
main([])                        # train_pt.py: interrupted, the same call goes on
main([])                        # merge_lora.py
```

第二行（`extend_vocab.py`）下載紅樓夢與 Llama 2：先在\
[Llama 2 的頁面](https://huggingface.co/meta-llama/Llama-2-7b-hf)接受授權，再執行 \
`from huggingface_hub import login; login()`。Llama 2 7B 占 13.5 GB 磁碟，擴大後與合併後各約 14 GB\
，超過免費 Drive 的 15 GB；訓練是為一張 24 GB 的顯示卡設計的，我們沒有在 Colab 上跑過。\
`main(["--help"])` 列出每支腳本的所有選項。

The second line (`extend_vocab.py`) fetches 紅樓夢 and Llama 2: accept the licence on
[Llama 2's page](https://huggingface.co/meta-llama/Llama-2-7b-hf), then run
`from huggingface_hub import login; login()`. Llama 2 7B takes 13.5 GB of disk, the extended and the
merged model about 14 GB each, more than a free Drive's 15 GB; training is made for one GPU of
24 GB, and we have not run it on Colab. `main(["--help"])` lists all options of a script."""

# --- Building ------------------------------------------------------------------------------------


def pack_sample() -> str:
    """Return in base64 the sample (the pages, what packs them, the tiny Llama's maker) and the
    lists of filter_cc.py and train_pt.py."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=9) as tar:
        folder = ROOT / "data"
        chosen = ("sample/*.py", "sample/pages/*.txt", "filter/*.txt", "probes/*.txt")
        for path in sorted(path for pattern in chosen for path in folder.glob(pattern)):
            entry = tarfile.TarInfo(str(path.relative_to(folder)))  # no date, no owner
            entry.size = path.stat().st_size
            tar.addfile(entry, io.BytesIO(path.read_bytes()))
    text = base64.b64encode(packed.getvalue()).decode()
    return "\n".join(text[i : i + BASE64_LINE] for i in range(0, len(text), BASE64_LINE))


def read_requirements() -> str:
    """Return the pins of requirements.txt, a line each, without its comments."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return "\n".join(line for line in lines if line and not line.startswith("#"))


def build(tiny_steps: int = 200, epochs: int = 12) -> NotebookNode:
    """Return the notebook, not executed; every cell has a name, so that differences stay small."""
    install = INSTALL.format(requirements=read_requirements())
    sample = SAMPLE.format(archive=pack_sample(), tiny_steps=tiny_steps)
    cells = [
        new_markdown_cell(INTRO, id="intro"),
        new_markdown_cell(INSTALL_TEXT, id="install-text"),
        new_code_cell(install, id="install", metadata=HIDDEN),
        new_markdown_cell(SAMPLE_TEXT, id="sample-text"),
        new_code_cell(sample, id="sample", metadata=HIDDEN),
    ]
    for script, (text, arguments, picture) in STEPS.items():
        name, pasted = Path(script).stem, f"# @title {script}\n{(ROOT / script).read_text()}"
        call = f"main({arguments.format(epochs=epochs)})"
        cells += [
            new_markdown_cell(text, id=f"{name}-text"),
            new_code_cell(pasted, id=name, metadata=HIDDEN),
            new_code_cell(re.sub(r"^    ", "", call, flags=re.MULTILINE), id=f"{name}-call"),
        ]
        if picture:
            cells.append(new_code_cell(CHART.format(picture=picture), id=f"{name}-chart"))
    cells += [
        new_markdown_cell(RESULT_TEXT, id="result-text"),
        new_code_cell(RESULT, id="result"),
        new_markdown_cell(OUTRO, id="outro"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "colab": {"provenance": [], "toc_visible": True}}
    return new_notebook(cells=cells, metadata=metadata)


# --- Executing -----------------------------------------------------------------------------------


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run every cell in a fresh kernel that starts in `folder`; a cell that fails raises."""
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def tidy_outputs(notebook: NotebookNode) -> None:
    """Leave what a reader wants: what was printed and the charts, no progress bars or warnings."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept: list[NotebookNode] = []
        for output in cell.outputs:
            if output.get("name") != "stdout" and "image/png" not in output.get("data", {}):
                continue
            if kept and "text" in output and "text" in kept[-1]:  # printed in several pieces
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept


def main() -> None:
    notebook = build()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
        tidy_outputs(notebook)
        text = nbformat.writes(notebook) + "\n"
        for path in (folder, str(ROOT), str(Path.home())):
            assert path not in text, f"an output names {path}, a folder of this machine"
    NOTEBOOK.write_text(text, encoding="utf-8")
    print(f"wrote {NOTEBOOK.relative_to(ROOT)}, {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
