"""The page of a run: what is read, thinned and shown, and that it holds on to all of it without a network."""

import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from html import unescape

import numpy as np
import pytest
from browser import Browser, find_chromium
from PIL import Image

from jit_accel.base.image_rows import draw_rows, without_paper
from jit_accel.monitor.health import KINDS
from jit_accel.report import main
from jit_accel.report.charts import charts_of
from jit_accel.report.page import BYTES_ON_PAGE, MAX_SHEETS, MIN_SHEETS, build_page, load_sheets
from jit_accel.report.runs import MAX_BUCKETS, Curve, read_runs

SETTINGS = {
    "model": "JiT-B/16",
    "img_size": 256,
    "data_path": "photos",
    "learning_rate": 2e-4,
    "seed": 0,
    "total_steps": 400,
    "num_images": 1280,
    "device": "NVIDIA H100",
    "num_processes": 8,
    "health_max_grad_norm": 100.0,
    "health_min_grad_norm": 0.001,
}


def rows_of_a_run(steps: int = 400, seed: int = 0) -> list[dict]:
    """Rows with every key there is."""
    draw = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        loss = (0.2 + math.exp(-step / 40)) * math.exp(draw.gauss(0, 0.1))
        row = {"step": step, "train/loss": loss, "train/grad_norm": 2 * loss, "train/learning_rate": 1e-4}
        row |= {"train/epoch": step / 100, "train/images_seen": 128 * step}
        if step % 10 == 0:
            row |= {"perf/images_per_second": 2000.0, "perf/step_time": 0.064, "perf/mfu": 0.4}
            row |= {"perf/peak_memory_gib": 30.0, "data/wait_fraction": 0.01, "data/worker_rss_gib": 2.0}
            row |= {"data/bad_images": step // 200, "train/update_ratio": 1e-3, "ema/auto/decay": 0.9}
            row |= {"ema/auto/distance": 0.01, "ema/0.9996/distance": 0.02}
            row |= {f"train/loss_by_t/{i / 10:.1f}-{(i + 1) / 10:.1f}": loss * (1 + i / 10) for i in range(10)}
        if step % 100 == 0:
            row |= {"train/epoch_loss": loss, "train/epoch_time": 6.4, "train/samples_per_second": 2000.0}
            row |= {"train/best_loss": loss, "val/loss": 1.1 * loss, "ema/val_loss": 0.9 * loss}
        rows.append(row)
    rows[steps // 2]["health/loss_jump"] = 1.5
    return rows


def write_run(folder, rows=(), settings=SETTINGS, sheets=()):
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps(settings))
    for step in sheets:
        image = Image.new("RGB", (60, 40), (step % 256, 80, 160))
        image.save(folder / "samples" / f"step_{step:08d}.png")
    return folder


def page_of(*folders) -> str:
    return build_page(read_runs(list(folders)))


def data_in(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.S)[1])


def own_part(page: str) -> str:
    """The page without plotly, which is somebody else's text."""
    from plotly.offline import get_plotlyjs

    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def words(page: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(script|style)\b.*?</\1>", "", own_part(page), flags=re.S)))


# --- curves


@pytest.mark.parametrize("count", [1, 7, MAX_BUCKETS, MAX_BUCKETS + 1, 37_123])
def test_thinning_keeps_the_extremes_and_the_mean_and_few_points(count):
    draw, curve = random.Random(count), Curve()
    values = {7 * step: draw.lognormvariate(0, 1) for step in range(1, count + 1)}
    spike = draw.choice(list(values))
    values[spike] = 1e6
    for step, value in values.items():
        curve.add(step, value)

    extremes, means = curve.extremes(), curve.means()
    assert len(means["x"]) <= MAX_BUCKETS
    assert len(extremes["x"]) <= 2 * MAX_BUCKETS
    assert extremes["x"] == sorted(extremes["x"])
    assert extremes["y"][extremes["x"].index(spike)] == 1e6
    assert min(extremes["y"]) == pytest.approx(min(values.values()), rel=1e-4)
    assert set(extremes["x"]) <= set(values)
    assert sum(means["n"]) == count
    weighted = sum(y * n for y, n in zip(means["y"], means["n"])) / count
    assert weighted == pytest.approx(sum(values.values()) / count, rel=1e-4)
    if count <= MAX_BUCKETS:
        assert (means["x"], extremes["x"]) == (list(values), list(values))


def test_a_sparse_curve_keeps_each_of_its_points_in_a_long_run(tmp_path):
    rows = [
        {"step": step, "train/loss": 1.0} | ({"val/loss": float(step)} if step % 500 == 0 else {})
        for step in range(1, 20_001)
    ]
    (run,) = read_runs([write_run(tmp_path / "run", rows)])
    curves = run.curves
    assert curves["val/loss"].means()["x"] == list(range(500, 20_001, 500))
    assert len(curves["train/loss"].means()["x"]) <= MAX_BUCKETS


def test_the_running_mean_of_a_constant_is_the_constant_and_forgets_what_is_long_past():
    constant, stepped = Curve(), Curve()
    for step in range(1, 5001):
        constant.add(step, 3.0)
        stepped.add(step, 9.0 if step < 2500 else 1.0)
    assert constant.smoothed_end(100) == pytest.approx(3)
    assert stepped.smoothed_end(100) == pytest.approx(1, abs=1e-6)
    assert stepped.smoothed_end(0) == 1


# --- files as they are found


BAD_LINES = [
    "",
    "garbage",
    "[1, 2]",
    "3",
    "null",
    '{"train/loss": 1.0}',
    '{"step": "7", "train/loss": 1.0}',
    '{"step": -1, "train/loss": 1.0}',
    '{"step": true, "train/loss": 1.0}',
    "\0\0\0\0",
    "[" * 100_000,
    '{"step": 9, "train/lo',
]


def test_what_cannot_be_read_is_left_out_and_the_rest_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    good = ['{"step": 1, "train/loss": 0.5, "train/grad_norm": NaN}', '{"step": 2, "train/loss": null}']
    good += ['{"step": 3, "train/loss": 1e999, "val/loss": "low", "train/grad_norm": true, "other": {}}']
    good += [f'{{"step": 4, "train/loss": 1{"0" * 400}}}', '{"step": 5, "train/loss": 2}']
    lines = [*BAD_LINES[:6], *good, *BAD_LINES[6:]]
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + "\n".join(lines).encode())

    (found,) = read_runs([folder])
    assert (found.num_rows, found.step) == (5, 5)
    assert found.curves["train/loss"].means() == {
        "x": [1, 2, 3, 4, 5],
        "y": [0.5, None, None, None, 2],
        "n": [1, 0, 0, 0, 1],
    }
    assert [key for key in found.curves if found.curve(key)] == ["train/loss"]
    charts = data_in(page_of(folder))["charts"]
    assert [chart["id"] for chart in charts] == ["loss"]  # the norm was never finite


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b'{"step": 1'])
def test_a_run_without_a_row_has_a_page_that_says_so(tmp_path, content):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    if content is not None:
        (folder / "metrics.jsonl").write_bytes(content)
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "No optimizer step has been logged yet." in words(page)
    assert "Not started" in words(page)


def test_old_rows_give_the_charts_they_have_data_for(tmp_path):
    rows = [
        {"step": step, "train/loss": 0.3, "train/grad_norm": 1.0, "train/learning_rate": 1e-4} for step in range(1, 9)
    ]
    page = page_of(write_run(tmp_path / "run", rows))
    assert re.findall(r'<figure class="card chart" data-chart="(\w+)"', page) == ["loss", "grad_norm", "learning_rate"]


def test_settings_come_from_config_yaml_where_there_is_no_record(tmp_path):
    folder = write_run(tmp_path / "run", rows_of_a_run(5))
    (folder / "config.yaml").write_text("model: JiT-L/16\nmax_steps: 50\n")
    for record in (None, "{broken", "[]"):
        (folder / "run.json").unlink(missing_ok=True)
        if record:
            (folder / "run.json").write_text(record)
        (run,) = read_runs([folder])
        assert run.settings == {"model": "JiT-L/16", "max_steps": 50}
        assert run.total_steps == 50


# --- the page


def test_the_page_names_no_other_place_and_forbids_going_there(tmp_path):
    page = own_part(page_of(write_run(tmp_path / "run", rows_of_a_run(), sheets=[10, 20])))
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert all(re.match("data:|#", place) for place in re.findall(r'(?:src|href)="([^"]*)"', page))


HOSTILE = "</script></title><script>alert(1)</script><!-- &amp; ' \" %{x} <img src=x onerror=alert(2)>"


def test_names_of_a_run_are_text_and_nothing_else(tmp_path):
    settings = SETTINGS | {"wandb_name": HOSTILE, "data_path": HOSTILE, "wandb_notes": HOSTILE, HOSTILE: HOSTILE}
    rows = [*rows_of_a_run(20), {"step": 21, f"health/{HOSTILE}": 1.0, f"ema/{HOSTILE}/distance": 0.1}]
    plain = own_part(page_of(write_run(tmp_path / "plain", rows_of_a_run(20))))
    folders = [write_run(tmp_path / name, rows, settings) for name in ("a", "b <b> ' \" & $title")]
    for page in (page_of(folders[0]), page_of(*folders)):
        own = own_part(page)
        assert own.count("<script") == plain.count("<script")
        assert own.count("</script") == plain.count("</script")
        assert "<img" not in own.replace("<img src", "", 0).split("<body>")[1].split('<script type="application')[0]
        assert HOSTILE in words(page) or re.sub(r"<[^>]*>", " ", HOSTILE) in words(page)
    assert [run["label"] for run in data_in(page_of(*folders))["runs"]] == ["a", "b <b> ' \" & $title"]
    assert HOSTILE in json.dumps(data_in(page_of(folders[0])), ensure_ascii=False).replace('\\"', '"')


def test_the_head_tells_what_runs_how_far_it_is_and_how_well(tmp_path):
    folder = write_run(tmp_path / "mine", rows_of_a_run(300))
    text = words(page_of(folder))
    for expected in ("JiT-B/16", "256 px", "photos (1,280 images)", "8 × NVIDIA H100", "step 300 of 400", "epoch 3.00"):
        assert expected in text
    assert "▶ Running" in text
    (folder / "INTERRUPTED").write_text("stopped at step 300")
    assert "❙❙ Interrupted" in words(page_of(folder))
    os.utime(folder / "metrics.jsonl", (0, 0))
    assert "❙❙ Interrupted" in words(page_of(folder))
    (folder / "INTERRUPTED").unlink()
    assert "? Unfinished" in words(page_of(folder))
    (folder / "run.json").write_text(json.dumps(SETTINGS | {"total_steps": 300}))
    assert "✓ Finished" in words(page_of(folder))
    (folder / "FAILED").write_text("UserError: <the disk> is full")
    assert "✗ Failed" in words(page_of(folder))
    assert "UserError: &lt;the disk&gt; is full" in page_of(folder)


def test_events_of_a_kind_are_one_line_with_their_remedy_and_unknown_kinds_are_shown(tmp_path):
    rows = rows_of_a_run(300)
    rows[199] |= {"health/loss_not_finite": 1, "health/new_trouble": 7.5}
    for i in range(50, 90):
        rows[i]["health/grad_exploding"] = 100.0 + i
    folder = write_run(tmp_path / "run", rows)
    page = page_of(folder)
    body = re.search(r'<table class="events">.*?</table>', page, re.S)[0]
    assert body.count("<tr>") == 1 + 4
    line = next(unescape(re.sub("<[^>]*>", " ", part)) for part in body.split("<tr>") if "grad_exploding" in part)
    assert re.search(r"40×\s+51 – 90\s+the gradient norm is 189 ", line)  # the highest
    assert "New trouble" in body
    for kind, value in (("grad_exploding", 189.0), ("loss_not_finite", 1), ("loss_jump", 1.5)):
        assert KINDS[kind].describe(value) in unescape(body)
        assert KINDS[kind].remedy[1:] in unescape(re.sub("</?code>", "", body))
    events = {event["name"]: event["x"] for chart in data_in(page)["charts"] for event in chart.get("events", ())}
    assert events["Loss not finite"] == [200]
    assert events["Gradient exploding"] == list(range(51, 91))
    assert 'class="events"' not in page_of(write_run(tmp_path / "good", rows_of_a_run(100)[:50]))


def test_a_threshold_is_drawn_only_where_it_is_near(tmp_path):
    rows = [{"step": step, "train/grad_norm": 20.0} for step in range(1, 5)]
    (chart,) = charts_of(read_runs([write_run(tmp_path / "run", rows)]))
    assert [(line["value"], line["is_drawn"]) for line in chart["thresholds"]] == [(100, True), (0.001, False)]


def test_a_zero_has_no_place_on_a_logarithmic_axis(tmp_path):
    rows = [{"step": step, "ema/auto/distance": max(0, step - 2) / 100} for step in range(1, 6)]
    (chart,) = charts_of(read_runs([write_run(tmp_path / "run", rows)]))
    assert chart["series"][0]["y"] == [None, None, 0.01, 0.02, 0.03]


@pytest.mark.parametrize(("shares", "marked"), [([0.3], [10]), ([0.02, 0.3, 0.2], [20, 30]), ([0.04, 0.06, 0.01], [])])
def test_a_run_that_waits_beyond_its_limit_is_not_called_good(tmp_path, shares, marked):
    rows = [{"step": 10 * i, "train/loss": 1.0, "data/wait_fraction": share} for i, share in enumerate(shares, 1)]
    page = page_of(write_run(tmp_path / "run", rows, SETTINGS | {"health_max_wait": 0.05}))
    assert ("✓ good" in words(page)) == (not marked)
    assert ("Data starving" in words(page)) == bool(marked)
    events = [event["x"] for chart in data_in(page)["charts"] for event in chart["events"]]
    assert events == [marked] * bool(marked)
    for limit in (0, None, "much"):  # never, or not known
        assert "✓ good" in words(page_of(write_run(tmp_path / str(limit), rows, SETTINGS | {"health_max_wait": limit})))


def test_the_head_has_the_time_of_the_training_and_the_page_in_wandb(tmp_path):
    rows = [{"step": step, "train/loss": 1.0, "perf/step_time": 2.0} for step in (10, 20)]
    old = write_run(tmp_path / "old", rows)
    new = write_run(tmp_path / "new", [*rows, {"step": 21, "train/elapsed": 4000.4}])
    (new / "wandb_url.txt").write_text("https://wandb.ai/team/shop/runs/x1?a=1&b=2\n")
    (old / "wandb_url.txt").write_text("javascript:alert(1)\n")
    assert "trained for 0:00:40" in words(page_of(old))  # the steps alone
    page = own_part(page_of(new))
    assert "trained for 1:06:40" in words(page_of(new))
    assert re.findall(r'<a class="wandb" href="(.*?)"', page) == ["https://wandb.ai/team/shop/runs/x1?a=1&amp;b=2"]
    both = page_of(old, new)
    assert "0:00:40" in words(both)
    assert "1:06:40" in words(both)
    assert "https://wandb.ai" in both
    assert "javascript:" not in own_part(both)


def test_settings_that_differ_stand_first(tmp_path):
    more = {"wandb_name": "b", "device": "cpu", "learning_rate": 1e-3, "seed": 1}
    a = write_run(tmp_path / "a", rows_of_a_run(20), {"wandb_name": "a"} | SETTINGS | {"only_here": 1})
    b = write_run(tmp_path / "b", rows_of_a_run(20, seed=1), SETTINGS | more)
    page = own_part(page_of(a, b))
    groups = re.findall(r"<details(.*?)><summary>(.*?) <span>(\d+)</span>(.*?)</details>", page, re.S)
    assert [title for _, title, *_ in groups[:2]] == ["Differing", "Not recorded by all"]
    assert "open" in groups[0][0]
    cells = re.findall(r"<code>(.*?)</code></th><td>(.*?)</td><td>(.*?)</td>", groups[0][3])
    differing = [("learning_rate", "0.0002", "0.001"), ("seed", "0", "1"), ("wandb_name", "a", "b")]
    assert cells == [*differing, ("device", "NVIDIA H100", "cpu")]  # names and facts, which mostly differ, last
    assert page.index("learning_rate") < page.index("</header>")
    assert "only_here" in groups[1][3]
    names = re.findall(r'<th scope="row"><code>(.*?)</code>', page)
    assert sorted(names) == sorted({*SETTINGS, "only_here", "wandb_name"})  # each setting once


# --- samples


def test_a_page_has_the_first_and_the_newest_sheet_and_some_evenly_between(tmp_path):
    folder = write_run(tmp_path / "run", sheets=[7, *range(100, 5001, 100)])
    steps = [sheet["step"] for sheet in load_sheets(folder)]
    assert len(steps) == MAX_SHEETS
    assert (steps[0], steps[-1]) == (7, 5000)
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert max(gaps) <= 300
    assert load_sheets(folder)[0]["src"].startswith("data:image/webp;base64,")


def test_sheets_that_are_broken_or_half_written_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", sheets=[100, 200, 300, 400])
    samples = folder / "samples"
    whole = (samples / "step_00000400.png").read_bytes()
    (samples / "step_00000400.png").write_bytes(whole[: len(whole) // 2])
    (samples / "step_00000200.png").write_bytes(b"")
    (samples / "step_00000500.png").write_bytes(b"no picture")
    (samples / "step_00000600.png").mkdir()
    (samples / "notes.txt").write_text("mine")
    flipped = bytearray((samples / "step_00000300.png").read_bytes())
    flipped[-14] ^= 1  # in the checksum of the pixels
    (samples / "step_00000350.png").write_bytes(flipped)
    assert [sheet["step"] for sheet in load_sheets(folder)] == [100, 300]


@pytest.mark.parametrize(("rows", "size"), [(1, 28), (3, 28), (10, 100)])
def test_the_paper_of_a_sheet_is_see_through_and_its_images_are_not(rows, size):
    draw = np.random.default_rng(rows)
    images = draw.integers(0, 256, (rows, 8, size, size, 3), np.uint8)
    images[0, 0] = 255  # white, as digits on paper are
    sheet = draw_rows([(f"class {row}", images[row]) for row in range(rows)])
    drawn, left = without_paper(sheet)
    whole, drawn = np.asarray(sheet), np.asarray(drawn)
    cell = whole.shape[0] // rows
    assert left == whole.shape[1] - 8 * cell
    for row, column in itertools.product(range(rows), range(8)):
        place = np.s_[row * cell : (row + 1) * cell - 2, left + column * cell : left + (column + 1) * cell - 2]
        assert (drawn[place][..., :3] == whole[place]).all()
        assert (drawn[place][..., 3] == 255).all()
    share = drawn[..., 3:] / 255
    on_white = drawn[..., :3] * share + 255 * (1 - share)
    assert np.allclose(on_white, whole)
    assert (drawn[:, left:][..., 3] == 0).sum() == whole.shape[0] * 8 * cell - rows * 8 * (cell - 2) ** 2
    assert 0 < (drawn[:, :left, 3] > 128).mean() < 0.2  # the letters of the names
    other = Image.fromarray(draw.integers(0, 256, (rows * 30, 300, 3), np.uint8))
    assert without_paper(other) == (other, 0)


def test_large_sheets_are_made_small_enough_for_a_page(tmp_path):
    folder = write_run(tmp_path / "run")
    for step in (1, 2):
        Image.effect_noise((800, 1000), 90).convert("RGB").save(
            folder / "samples" / f"step_{step:08d}.png", compress_level=1
        )
    num_runs = 40
    sheets = load_sheets(folder, num_runs)
    assert len(sheets) == 2
    assert sum(len(sheet["src"]) for sheet in sheets) < 2 * BYTES_ON_PAGE / (num_runs * MIN_SHEETS) * 1.4
    assert all(sheet["height"] >= 320 for sheet in sheets)


# --- the command


def test_a_folder_without_a_run_is_refused_with_what_helps(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "many" / "one", rows_of_a_run(5))
    for folder, expected in [
        (tmp_path / "empty", "no run in this folder"),
        (tmp_path / "missing", "check the path"),
        (run / "metrics.jsonl", f"give its folder, {run}"),
        (tmp_path / "many", str(run)),
    ]:
        assert main([str(run), str(folder), "--output", str(tmp_path / "page.html")]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {folder}: ")
        assert expected in message
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_where_the_page_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = (write_run(tmp_path / name, rows_of_a_run(5)) for name in "ab")
    assert main(["a"]) == main(["a", "b"]) == main(["a", "--output", "deep/er/page.html"]) == 0
    pages = [a / "report.html", tmp_path / "comparison.html", tmp_path / "deep/er/page.html"]
    assert all(page.read_text().endswith("</html>\n") for page in pages)
    assert "Report: comparison.html" in capsys.readouterr().out
    assert main(["a", "--output", str(b)]) == 2
    assert "name a file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["a", "--output", "file/page.html"]) == 2
    assert "--output file/page.html: cannot be written" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    folder = write_run(tmp_path / "run", rows_of_a_run(5))
    (folder / "report.html").write_text("old")
    limited = "import resource, sys; from jit_accel.report import main; " + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); sys.exit(main(sys.argv[1:]))"
    )
    ended = subprocess.run([sys.executable, "-c", limited, str(folder)], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "cannot be written (File too large)" in ended.stderr
    assert (folder / "report.html").read_text() == "old"
    assert {path.name for path in folder.iterdir()} == {"report.html", "metrics.jsonl", "run.json", "samples"}
    with open(folder / "report.html") as reader:
        assert main([str(folder)]) == 0
        assert reader.read() == "old"  # who is reading reads on in the page that was there


def test_torch_is_not_imported(tmp_path):
    folder = write_run(tmp_path / "run", rows_of_a_run(5), sheets=[1])
    script = "import sys; from jit_accel.report import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)


def test_runs_of_equal_names_can_be_told_apart_and_a_folder_given_twice_is_one_run(tmp_path):
    names = ["x/run", "y/run", "y/other", "z/y/run"]
    folders = [write_run(tmp_path / name, rows_of_a_run(5)) for name in names]
    runs = read_runs([*folders, tmp_path / "x" / ".." / "x" / "run"])
    assert [run.label for run in runs][:3] == ["x/run", f"{tmp_path.name}/y/run", "other"]
    assert runs[3].label == "z/y/run"
    assert [run.folder for run in runs] == folders


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    if not find_chromium():
        pytest.skip("no Chromium found: apt-get install chromium")
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of a run's page, and of a comparison of two runs."""
    folder = tmp_path_factory.mktemp("pages")
    a = write_run(folder / "a", rows_of_a_run(), SETTINGS | {"wandb_name": HOSTILE}, sheets=[100, 200, 300, 400])
    b = write_run(folder / HOSTILE.replace("/", "_"), rows_of_a_run(300, seed=1), sheets=[150, 300])
    assert main([str(a)]) == 0
    assert main([str(a), str(b), "--output", str(folder / "comparison.html")]) == 0
    return (a / "report.html").as_uri(), (folder / "comparison.html").as_uri()


@pytest.fixture(scope="module")
def opened(browser, pages):
    """Give one of `pages`, opened once at its second sheet (three seconds), in a wide window."""
    open_once = functools.cache(lambda which: browser.open(pages[which] + "#sheet=1"))

    def wide(which):
        page = open_once(which)
        page.call("Page.bringToFront")  # a page behind another one does not draw
        page.look()
        page.until(f"{RIGHT_END} > 390")
        return page

    return wide


ERRORS = "document.documentElement.dataset.errors || ''"
DRAWN = "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.main-svg .trace').length)"
RIGHT_END = "document.querySelector('.main-svg').getBoundingClientRect().right"
# Where the page ends, its charts and other parts, in pixels.
RIGHT_ENDS = (
    "[document.documentElement.scrollWidth, ...[...document.querySelectorAll('.main-svg, h1, figure, .toolbar')]"
    ".map(e => Math.round(e.getBoundingClientRect().right))]"
)
TILES = (
    "Object.fromEntries([...document.querySelectorAll('.tile')]"
    ".map(tile => [tile.children[0].textContent, tile.children[1].textContent]))"
)
TRAIN = "document.querySelector('[data-chart=loss] .plot').data.find(trace => trace.name === 'train')"
TEXT = "document.querySelector('.xtick text').style.fill"
GROUND = "getComputedStyle(document.body).backgroundColor"
SHEET = "document.querySelector('#sheets img').alt"
REDRAWN = "new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))"


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def set_value(selector: str, value) -> str:
    return (
        f"(field => {{ field.value = {json.dumps(value)}; field.dispatchEvent(new Event('input')); }})"
        f"(document.querySelector({json.dumps(selector)}))"
    )


@pytest.mark.parametrize("which", [0, 1], ids=["one run", "two runs"])
def test_everything_is_drawn_in_light_and_dark_and_on_a_phone(opened, pages, which):
    page = opened(which)
    for dark, width in [(False, 1280), (True, 1280), (True, 390), (False, 390)]:
        page.look(dark, width)
        page.until(f"{RIGHT_END} <= {width}")  # charts follow
        page.ask(REDRAWN)
        drawn = page.ask(DRAWN)
        assert len(drawn) == 13
        assert min(drawn) >= 1
        assert max(page.ask(RIGHT_ENDS)) <= width
        ground, text = brightness(page.ask(GROUND)), brightness(page.ask(TEXT))
        assert (ground < 60 and text > 140) if dark else (ground > 200 and text < 130)
    assert page.ask(ERRORS) == ""
    assert [url for url in page.requested if not url.startswith("data:")] == [pages[which]]


def test_the_page_follows_its_reader(opened):
    page = opened(0)
    assert page.ask("document.title") == HOSTILE
    assert page.ask(SHEET) == "Samples of a at step 200"
    assert page.ask("document.querySelector('#sheets img').decode().then(() => true)")
    page.ask("document.querySelector('#sheet-after').click()")
    assert page.ask(SHEET) == "Samples of a at step 300"
    page.ask("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: true}))")
    assert page.ask(SHEET) == "Samples of a at step 200"
    page.ask(set_value("#sheet", 0))
    assert page.ask(SHEET) == "Samples of a at step 100"

    tiles = page.ask(TILES)
    assert tiles["Images/s"] == "2,000"
    assert tiles["Health"] == "⚠ 1 finding"
    assert float(tiles["Loss"]) == pytest.approx(page.ask(f"{TRAIN}.y.at(-1)"), rel=1e-3)  # Python smooths alike
    losses = [row["train/loss"] for row in rows_of_a_run()]
    page.ask(set_value("#smoothing", 6))  # a memory of 10%, 40 steps
    page.ask(REDRAWN)
    start = Curve()
    for step in range(1, 21):
        start.add(step, losses[step - 1])
    assert page.ask(f"{TRAIN}.y[19]") == pytest.approx(start.smoothed_end(40), rel=1e-4)
    page.ask(set_value("#smoothing", 0))
    page.ask(REDRAWN)
    assert page.ask(f"{TRAIN}.y") == pytest.approx(losses, rel=1e-4)

    assert page.ask(f"{TRAIN}.customdata") == pytest.approx([step / 100 for step in range(1, 401)])  # epochs

    axis = "document.querySelector('[data-chart=loss] .plot')._fullLayout.yaxis.type"
    assert page.ask(axis) == "log"
    page.ask("document.querySelector('input[name=y][value=linear]').click()")
    page.ask(REDRAWN)
    assert page.ask(axis) == "linear"

    rows = "[...document.querySelectorAll('.settings tbody tr')].filter(row => !row.hidden).length"
    assert page.ask(rows) == len(SETTINGS) + 1
    page.ask(set_value("#search", "HEALTH_"))
    assert page.ask(rows) == 2
    assert page.ask(ERRORS) == ""


def test_lines_of_a_comparison_are_solid_and_names_of_classes_light_on_a_dark_page(browser, tmp_path):
    images = np.full((8, 28, 28, 3), 128, np.uint8)
    for name, first in (("a", 0.0), ("b", 0.1)):
        rows = rows_of_a_run(40)
        rows[9]["ema/auto/distance"] = first
        write_run(tmp_path / name, rows)
        draw_rows([("cat", images), ("dog", images)]).save(tmp_path / name / "samples" / "step_00000040.png")
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "page.html")]) == 0
    page = browser.open((tmp_path / "page.html").as_uri(), dark=True)
    dashes = (
        "[...new Set([...document.querySelectorAll('.plot')].flatMap(p => p.data.filter(t => t.name.length < 40 && "
    )
    dashes += "!/above|below/.test(t.name)).map(t => t.line?.dash)))]"
    assert set(page.ask(dashes)) <= {"solid", None}
    kinds = "[...new Set(document.querySelector('[data-chart=ema] .plot').data.map(t => t.marker?.symbol))]"
    assert {"circle", "diamond"} <= set(page.ask(kinds))  # which tells the averages apart
    lowest = (
        "Math.min(...document.querySelector('[data-chart=ema] .plot').data.flatMap(t => t.y.filter(y => y !== null)))"
    )
    assert page.ask(lowest) > 0
    assert page.ask("document.querySelectorAll('#sheets .names').length") == 2
    names = "getComputedStyle(document.querySelector('#sheets .names')).filter"
    assert page.ask(names) == "invert(0.9)"
    page.look(dark=False)
    assert page.ask(names) == "none"
    assert page.ask(ERRORS) == ""


def test_names_of_settings_that_differ_are_whole_whatever_their_values(browser, tmp_path):
    runs = [tmp_path / str(i) for i in range(5)]
    for i, run in enumerate(runs):
        write_run(run, rows_of_a_run(2), SETTINGS | {"learning_rate": 0.1 * i, "git_commit": 40 * str(i)})
    assert main([*map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    page = browser.open((tmp_path / "page.html").as_uri())
    lines = "[...document.querySelectorAll('.differing tbody code')].map(code => code.getClientRects().length)"
    assert page.ask(lines) == [1, 1]


def test_a_point_without_neighbours_is_seen(browser, tmp_path):
    values = [2.0, None, None, 0.5, 0.4, None, 0.3]
    write_run(tmp_path / "run", [{"step": i + 1, "train/loss": value} for i, value in enumerate(values)])
    assert main([str(tmp_path / "run")]) == 0
    page = browser.open((tmp_path / "run" / "report.html").as_uri())
    assert page.ask(f"{TRAIN}.marker.size") == [7, 0, 0, 0, 0, 0, 7]
    assert page.ask("[...document.querySelectorAll('[data-chart=loss] .point')].length") == 4
    assert page.ask(ERRORS) == ""


def test_zooming_into_one_chart_shows_the_same_steps_in_all(opened):
    page = opened(0)
    ranges = "[...document.querySelectorAll('.plot')].map(plot => plot._fullLayout.xaxis.range.map(Math.round))"
    page.ask(
        "Plotly.relayout(document.querySelector('.plot'), {'xaxis.range[0]': 50, 'xaxis.range[1]': 90}).then(() => 0)"
    )
    page.ask(REDRAWN)
    over_steps = [shown for shown in page.ask(ranges) if shown != [0, 1]]
    assert over_steps == [[50, 90]] * 12


def test_a_comparison_hides_runs_and_shows_their_samples_side_by_side(opened):
    page = opened(1)
    captions = "[...document.querySelectorAll('#sheets figcaption')].map(c => c.textContent.split(' · ').pop())"
    shown = "document.querySelector('[data-chart=grad_norm] .plot').data.filter(t => t.visible !== false).length"
    assert page.ask("document.querySelectorAll('header tbody tr').length") == 2
    assert page.ask(captions) == ["step 100", "step 150"]
    both = page.ask(shown)
    page.ask("document.querySelectorAll('input[data-run]')[1].click()")
    page.ask(REDRAWN)
    assert page.ask(captions) == ["step 100"]
    assert page.ask(shown) == both / 2
    assert page.ask(ERRORS) == ""


def test_a_folder_whose_name_is_too_long_is_no_folder(capsys):
    assert main([5000 * "x"]) == 2
    assert "not a folder; check the path." in capsys.readouterr().err
    assert main(["--output", 5000 * "x", "here"]) == 2
    assert "cannot be written to (File name too long): give another" in capsys.readouterr().err
