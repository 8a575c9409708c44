# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The Space as users meet it: a process of its own, in a real browser."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import expect, sync_playwright
from tiny_clip import fit, make_image_processor, make_model, make_tokenizer
from tiny_pipeline import (
    ID2LABEL,
    LABELS,
    make_bank,
    make_image_encoder,
    make_picture,
    make_pipeline,
    make_transformer,
    quiet,
)
from transformers import CLIPTextModelWithProjection

from diffusers_gmem import GMemMemoryBank, GMemPipeline, read_provenance
from diffusers_gmem.data import encode_text_keys


CHECKOUT = Path(__file__).parents[2]
APP = CHECKOUT / "examples/space/app.py"
PROMPTS = ["a red mug", "two dogs", "the sea at night", "a cat on a mat", "snow", "an old tree", "z"]
# One process and one browser, in which the tests share more than ten seconds
pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")

if CHROMIUM is None and os.environ.get("GMEM_TEST_REQUIRE_BROWSER") != "1":
    pytest.skip("there is no chromium", allow_module_level=True)


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline that can do all that the page offers."""
    folder = tmp_path_factory.mktemp("space") / "tiny-gmem"
    images = [make_picture(k) for k in range(len(LABELS))]
    clip = fit(make_model(), PROMPTS, images)
    clip.save_pretrained(folder.parent / "clip")
    keys = encode_text_keys(clip, make_image_processor()(images=images, return_tensors="pt").pixel_values)
    bank = GMemMemoryBank(
        make_bank()[:],
        labels=LABELS,
        id2label=ID2LABEL,
        metadata={
            "image": [f"{folder.parent}/{k}.png" for k in range(len(LABELS))],
            "title": ["<b id='injected'>bold</b>"] * len(LABELS),
            "thumbnail": [png(image) for image in images],
        },
        encoder=str(folder.parent / "encoder"),
    ).with_text_keys(keys, "org/clip", "abc", "clip")
    make_pipeline(
        make_transformer(in_channels=3),
        memory_bank=bank,
        text_encoder=CLIPTextModelWithProjection.from_pretrained(folder.parent / "clip"),
        tokenizer=make_tokenizer(),
        **make_image_encoder(),
    ).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return folder


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The address of the page, and the folder to which Gradio would write files."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "files"), "GRADIO_SERVER_NAME": "127.0.0.1"}
    command = [sys.executable, APP, "--model", model, "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                httpx.get(address)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield address, folder / "files"
    finally:
        process.terminate()
        process.wait()
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def context(server):
    """A browser, which keeps the scripts of the page from test to test."""
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-quic", "--disable-background-networking"]
        )
        context = browser.new_context()
        context.set_default_timeout(20_000)
        yield context
        browser.close()


@pytest.fixture
def open_page(context, server):
    """Opens the page at an address, and sees to it that no script of it fails and that it asks nobody else for anything."""
    errors, elsewhere = [], []
    here = (server[0], "data:", "blob:")

    def open_at(query="?tab=generate&steps=2", width=1280):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 844})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: request.url.startswith(here) or elsewhere.append(request.url))
        page.goto(server[0] + query)
        tab = query.partition("tab=")[2].partition("&")[0] or "generate"
        page.locator(f"[role=tab][data-tab-id={tab}][aria-selected=true]").wait_for()
        return page

    yield open_at
    for page in context.pages:
        page.close()
    assert not errors and not elsewhere


def panel(page, tab=None):
    """What a tab shows, after turning to it."""
    if tab is not None:
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
    return page.locator("[role=tabpanel]:visible")


def captions(page, count):
    """The captions of the images, when there are so many and no older ones fade."""
    figures = panel(page).locator("figure")
    expect(figures).to_have_count(count)
    return figures.locator("figcaption").all_inner_texts()


def run(page, button, count):
    """Presses a button and waits for the answer; the captions of its images."""
    link = panel(page).get_by_role("link", name="Link to these settings")
    before = link.get_attribute("href") if link.count() else None
    panel(page).get_by_role("button", name=button, exact=True).click()
    page.wait_for_function(
        """(before) => [...document.querySelectorAll(".gmem-link a")].some(
            (link) => link.checkVisibility() && link.getAttribute("href") !== before)""",
        arg=before,
    )
    return captions(page, count)


def download(page, number, folder):
    with page.expect_download() as event:
        panel(page).get_by_role("link", name="Download").nth(number).click()
    path = folder / event.value.suggested_filename
    event.value.save_as(path)
    return path


def set_slider(page, label, value):
    field = panel(page).get_by_role("spinbutton", name=re.compile(f"number input for {label}", re.IGNORECASE))
    field.fill(str(value))
    field.blur()


def expect_sentence(page, sentence):
    """In a message that comes and goes."""
    expect(page.locator(".toast-body").filter(has_text=sentence)).to_be_visible()


# Each tab


def test_generate_says_what_made_each_image_and_downloads_it(open_page, model, tmp_path):
    page = open_page()
    texts = run(page, "Generate", 4)
    path = download(page, 2, tmp_path)
    provenance = read_provenance(path)
    row = provenance["memory_index"]
    assert path.name == f"gmem-{row}-seed-{provenance['seed']}.png"
    first, label, *_ = texts[2].split("\n")
    assert (first, label) == (f"Memory {row}", ID2LABEL[LABELS[row]])
    assert f"seed {provenance['seed']}" in texts[2] and f"image: {row}.png" in texts[2]
    # The file tells all that is needed to make the image again
    remade = quiet(GMemPipeline.from_pretrained(model)).remake(provenance)
    assert np.abs(np.asarray(remade, dtype=int) - np.asarray(PIL.Image.open(path), dtype=int)).max() <= 1
    # Another time, other images
    assert run(page, "Generate", 4) != texts
    # What the bank says is text, not HTML
    assert "title: <b id='injected'>" in texts[0] and page.locator("#injected").count() == 0


def test_generate_from_a_class_from_words_and_from_numbers(open_page):
    page = open_page()
    panel(page).get_by_label("A class", exact=True).check()
    panel(page).get_by_role("combobox", name="Class").click()
    page.get_by_role("option", name="dog").click()
    assert {text.split("\n")[1] for text in run(page, "Generate", 4)} == {"dog"}

    panel(page).get_by_label("Words", exact=True).check()
    field = panel(page).get_by_role("textbox", name="Words")
    field.fill(PROMPTS[4])
    set_slider(page, "Memories", 2)
    assert run(page, "Generate", 2)[0].startswith("Memory 4\n")

    panel(page).get_by_label("Memory numbers", exact=True).check()
    field = panel(page).get_by_role("textbox", name="Memory numbers")
    field.fill("6, 3 5")
    field.press("Enter")
    texts = captions(page, 3)
    assert [text.split("\n")[0] for text in texts] == ["Memory 6", "Memory 3", "Memory 5"]


def test_explore(open_page, tmp_path):
    page = open_page("?tab=explore&steps=2")
    set_slider(page, "Memories", 5)
    assert [text.split("\n")[0] for text in run(page, "Search", 5)] == [f"Memory {k}" for k in range(5)]
    shown = panel(page).locator("figure img")
    expect(shown).to_have_count(5)  # thumbnails
    assert shown.first.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [40, 30]
    panel(page).get_by_role("spinbutton", name="Page").fill("2")
    assert [text.split("\n")[0] for text in run(page, "Search", 2)] == ["Memory 5", "Memory 6"]
    panel(page).get_by_role("spinbutton", name="Page").fill("1")

    panel(page).get_by_label("A class", exact=True).check()
    panel(page).get_by_role("combobox", name="Class").click()
    page.get_by_role("option", name="fish").click()
    assert [text.split("\n")[:2] for text in run(page, "Search", 3)] == [[f"Memory {k}", "fish"] for k in (4, 5, 6)]

    panel(page).get_by_label("Like a memory").check()
    panel(page).get_by_role("spinbutton", name="Memory number").fill("3")
    assert run(page, "Search", 5)[0].startswith("Memory 3\nsimilarity 1.000\n")

    panel(page).get_by_label("Words", exact=True).check()
    panel(page).get_by_role("textbox", name="Words").fill(PROMPTS[1])
    assert run(page, "Search", 5)[0].startswith("Memory 1\nsimilarity 1.000\n")

    panel(page).get_by_label("Like an image").check()
    (tmp_path / "mine.png").write_bytes(png(make_picture(9)))
    panel(page).get_by_label("Image", exact=True).set_input_files(tmp_path / "mine.png")
    expect(panel(page).get_by_alt_text("The image that you chose")).to_be_visible()
    scores = [float(re.search(r"similarity (\S+)", text)[1]) for text in run(page, "Search", 5)]
    assert scores == sorted(scores, reverse=True)


def test_mix_and_interpolate(open_page, tmp_path):
    page = open_page("?tab=mix&steps=2")
    for k, (row, weight) in enumerate([(1, 0.5), (4, 0.25), (6, -0.25)], start=1):
        panel(page).get_by_role("spinbutton", name=f"Memory {k}").fill(str(row))
        set_slider(page, f"Weight {k}", weight)
    texts = run(page, "Mix", 4)
    assert texts[0].startswith("0.50 × memory 1 + 0.25 × memory 4 + -0.25 × memory 6\n")
    assert [text.split("\n")[0] for text in texts[1:]] == ["Memory 1", "Memory 4", "Memory 6"]
    sources = read_provenance(download(page, 0, tmp_path))["sources"]
    assert [(source["index"], source["weight"]) for source in sources] == [(1, 0.5), (4, 0.25), (6, -0.25)]

    panel(page).get_by_label("slerp").check()
    set_slider(page, "Images on the path", 5)
    texts = run(page, "Interpolate", 5)
    assert texts[0].startswith("Memory 1\n") and texts[4].startswith("Memory 4\n")
    assert texts[1].startswith("0.75 × memory 1 + 0.25 × memory 4\n")

    panel(page).get_by_role("button", name="Pick memories at random").click()
    set_slider(page, "Weight 1", 0)
    set_slider(page, "Weight 2", 0)
    set_slider(page, "Weight 3", 0)
    panel(page).get_by_role("button", name="Mix", exact=True).click()
    expect_sentence(page, "All weights are 0: move the slider of a memory.")


def test_your_image_is_varied_and_not_stored(open_page, server, tmp_path):
    page = open_page("?tab=image&steps=2")
    (tmp_path / "mine.webp").write_bytes(b"")
    make_picture(9).save(tmp_path / "mine.webp")
    panel(page).get_by_label("Image", exact=True).set_input_files(tmp_path / "mine.webp")
    set_slider(page, "Variations", 3)
    assert all(text.startswith("Your image\nseed ") for text in run(page, "Draw variations", 3))
    expect(panel(page)).to_contain_text("The nearest memories of the bank, with their similarity: ")
    assert len(set(panel(page).locator("figure img").evaluate_all("images => images.map(image => image.src)"))) == 3
    assert "mine" not in panel(page).get_by_role("link", name="Link to these settings").get_attribute("href")
    assert not [path for path in server[1].rglob("*") if path.is_file()]


def test_bad_uploads_get_a_sentence(open_page, tmp_path):
    page = open_page("?tab=image")
    field = panel(page).get_by_label("Image", exact=True)
    panel(page).get_by_role("button", name="Draw variations").click()
    expect_sentence(page, "An image is missing: choose a PNG, JPEG or WebP file first.")

    (tmp_path / "text.png").write_text("not an image")
    field.set_input_files(tmp_path / "text.png")
    panel(page).get_by_role("button", name="Draw variations").click()
    expect_sentence(page, "This is not a PNG, JPEG or WebP image that can be read.")

    (tmp_path / "large.png").write_bytes(bytes(6 * 2**20))
    field.set_input_files(tmp_path / "large.png")
    expect(panel(page).get_by_role("alert")).to_have_text("This file is too large: up to 5 MB are accepted.")


def test_about(open_page, model):
    page = open_page("")
    about = panel(page, "About")
    for text in ("tiny-gmem", "cc-by-4.0", GMemMemoryBank.from_pretrained(model / "bank").fingerprint, "8 x 8 pixels"):
        expect(about).to_contain_text(text)
    about.get_by_role("button", name="Card of the memory bank").click()
    expect(about).to_contain_text("What it is for")
    assert str(model.parent) not in page.content()


# Settings, progress, keyboard, phone


def test_a_link_restores_the_settings_and_the_images(open_page, server):
    page = open_page()
    panel(page).get_by_label("A class", exact=True).check()
    panel(page).get_by_role("combobox", name="Class").click()
    page.get_by_role("option", name="fish").click()
    set_slider(page, "Memories", 3)
    texts = run(page, "Generate", 3)
    images = panel(page).locator("figure img").evaluate_all("images => images.map(image => image.src)")
    with page.context.expect_page() as event:
        panel(page).get_by_role("link", name="Link to these settings").click()
    other = event.value
    expect(other.get_by_label("A class", exact=True).first).to_be_checked()
    expect(panel(other).get_by_role("checkbox", name="New seed each time")).not_to_be_checked()
    assert run(other, "Generate", 3) == texts
    assert panel(other).locator("figure img").evaluate_all("images => images.map(image => image.src)") == images


def test_a_link_to_another_tab_with_a_setting_that_does_not_fit(open_page):
    page = open_page("?tab=mix&memory_1=5&weight_2=7&method=slerp&unknown=1")
    expect(page.get_by_role("tab", name="Mix")).to_have_attribute("aria-selected", "true")
    expect(panel(page).get_by_role("spinbutton", name="Memory 1")).to_have_value("5")
    expect(panel(page).get_by_label("slerp")).to_be_checked()
    expect_sentence(page, "The link holds a setting that does not fit. Weight 2 has to be a number from -1 to 1.")


def test_progress_is_shown_step_by_step(open_page):
    page = open_page("?tab=generate&steps=100&count=12")
    expect(panel(page).get_by_role("spinbutton", name=re.compile("Memories"))).to_have_value("12")
    # Written down as it changes: to look now and then can miss all of it
    page.evaluate(
        """() => {
            window.progress = [];
            new MutationObserver(() => window.progress.push(...document.body.textContent.matchAll(/(\\d+)\\/199 steps/g)))
                .observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    panel(page).get_by_role("button", name="Generate", exact=True).click()
    captions(page, 12)
    steps = [int(number) for number in page.evaluate("window.progress.map((match) => match[1])")]
    assert len(set(steps)) > 1 and steps == sorted(steps)


def test_the_keyboard_is_enough(open_page):
    page = open_page()
    focused = "document.activeElement.matches('[role=tabpanel] button.primary')"
    page.keyboard.press("Tab")
    for _ in range(40):
        if page.evaluate(focused):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    captions(page, 4)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Download Memory ")
    # Every field says what it is
    for tab in ("Generate", "Explore", "Mix", "Your image"):
        for field in panel(page, tab).locator("input, textarea, select").all():
            if field.is_visible():
                assert field.evaluate("(field) => field.labels.length > 0 || !!field.ariaLabel"), field


def test_on_a_phone(open_page, tmp_path):
    page = open_page("", width=390)
    scroll = "document.documentElement.scrollWidth"
    for tab, button, count in (("Generate", "Generate", 4), ("Explore", "Search", 7), ("Mix", "Interpolate", 8)):
        panel(page, tab)
        assert page.evaluate(scroll) <= 390
        run(page, button, count)
        assert page.evaluate(scroll) <= 390
    for tab in ("Your image", "About"):
        panel(page, tab)
        assert page.evaluate(scroll) <= 390


# Without the page


def call(address, name, data):
    """What the API answers."""
    event = httpx.post(f"{address}gradio_api/call/{name}", json={"data": data}).json()["event_id"]
    return httpx.get(f"{address}gradio_api/call/{name}/{event}", timeout=20).text


def defaults(address, name):
    endpoint = httpx.get(f"{address}gradio_api/info").json()["named_endpoints"][f"/{name}"]
    return {item["label"]: item.get("parameter_default") for item in endpoint["parameters"]}


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("generate", {"Steps": 10**6}, "Steps has to be a whole number from 1 to 100."),
        ("generate", {"Steps": "many"}, "Steps has to be a whole number from 1 to 100."),
        ("generate", {"Seed": 1.5}, "Seed has to be a whole number from 0 to 4294967295."),
        ("generate", {"Memories": 12, "Images of each": 2}, "up to 12 at a time"),
        ("generate", {"Draw from": "elsewhere"}, "Draw from has to be one of those that are offered."),
        ("generate", {"Draw from": "class", "Class": 99}, "Class has to be one of those that are offered."),
        ("generate", {"Draw from": "words"}, "Words are missing"),
        ("generate", {"Draw from": "words", "Words": "a" * 301}, "Words has to be a text of up to 300 characters."),
        ("generate", {"Draw from": "numbers", "Memory numbers": "1, 7"}, "whole numbers from 0 to 6"),
        ("generate", {"Draw from": "numbers", "Memory numbers": {"path": "/"}}, "has to be a text"),
        ("explore", {"Page": 7, "Memories": 5}, "Page 7 is beyond the 7 memories"),
        ("explore", {"Show": "memory", "Memory number": -1}, "Memory number has to be a whole number from 0 to 6."),
        ("mix", {"Weight 1": 1e9}, "Weight 1 has to be a number from -1 to 1."),
        ("vary", {"Image": "/etc/passwd"}, "This is not a PNG, JPEG or WebP image that can be read."),
        ("vary", {"Image": "data:image/png;base64,%%%"}, "This is not a PNG, JPEG or WebP image that can be read."),
        ("vary", {"Image": ["x"]}, "This is not a PNG, JPEG or WebP image that can be read."),
    ],
)
def test_the_server_checks_what_it_is_sent(server, name, changes, sentence):
    values = defaults(server[0], name)
    assert changes.keys() <= values.keys()
    answer = call(server[0], name, list((values | changes).values()))
    assert answer.startswith("event: error") and sentence in answer and "Traceback" not in answer


def test_no_files_go_to_the_server_or_come_from_it(server, model):
    address = server[0]
    upload = {"files": ("mine.png", png(make_picture()), "image/png")}
    assert httpx.post(f"{address}gradio_api/upload", files=upload).status_code == 404
    assert not [path for path in server[1].rglob("*") if path.is_file()]
    for path in (model / "README.md", "/etc/passwd", APP):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == 404
    content = (b" " * 2**20 for _ in range(12))
    assert httpx.post(f"{address}gradio_api/queue/join", content=content).status_code == 413


def test_no_answer_names_a_path_of_the_server(server, model):
    address = server[0]
    texts = [httpx.get(address + path).text for path in ("", "config", "gradio_api/info", "theme.css", "nothing")]
    texts += [call(address, name, list(defaults(address, name).values())) for name in ("generate", "explore", "mix")]
    assert "<figure>" in texts[-1]
    for text in texts:
        for path in (model.parent, server[1], CHECKOUT, sys.prefix, Path.home()):
            assert len(str(path)) < 6 or str(path) not in json.dumps(text)
